"""Cost against work, drawn: time a token by rows, and an iteration's time by the length of completions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf_jax.bench.work import COSTS

BAND = 0.15
"""Half the width of the band in which a cost counts as flat."""


def draw(table: Sequence[dict[str, Any]], path: Path) -> bool:
    """Write the picture of `table.rows`; False where not one of its points was measured."""
    measured = [row for row in table if row["what"].startswith("cost/") and "seconds" in row.get("ours", {})]
    found = {(row["work"]["rows"], row["work"]["completion"]): row["ours"] for row in measured}
    if not found:
        return False
    figure = Figure(figsize=(11, 4.2), layout="tight")
    by_rows, by_length = figure.subplots(1, 2)
    same_length = [point for point in found if point[1] == COSTS[0][1]]
    same_rows = [point for point in found if point[1] != COSTS[0][1]]
    if same_length:
        _by_rows(by_rows, np.array([rows for rows, _ in same_length]), [found[point] for point in same_length])
    if same_rows:
        _by_length(by_length, np.array([length for _, length in same_rows]), [found[point] for point in same_rows])
    figure.savefig(path, dpi=120)
    return True


def _by_rows(ax: Axes, rows: np.ndarray, found: Sequence[dict[str, Any]]) -> None:
    times = 1e3 / np.array([one["tokens_per_second"] for one in found])
    middle = float(np.median(times))
    ax.axhspan((1 - BAND) * middle, (1 + BAND) * middle, color="0.9", label=f"median ± {BAND:.0%}")
    ax.plot(rows, times, "o-")
    ax.set_xscale("log", base=2)
    ax.set_xticks(rows, [str(n) for n in rows])
    ax.set_ylim(0, 1.3 * times.max())
    ax.set(
        xlabel="completions an iteration", ylabel="ms a completion token", title="PPO iteration of tiny, 16 + 48 tokens"
    )
    ax.legend()


def _by_length(ax: Axes, lengths: np.ndarray, found: Sequence[dict[str, Any]]) -> None:
    seconds = np.array([one["seconds"] for one in found])
    slope = float(lengths @ seconds / (lengths @ lengths))
    ax.plot(lengths, slope * lengths, color="0.7", label=f"{1e3 * slope:.3g} ms a token of each row")
    ax.plot(lengths, seconds, "o-")
    ax.set(xlabel="completion tokens", ylabel="seconds an iteration")
    ax.set_title("PPO iteration of tiny, 16 completions")
    ax.set_ylim(bottom=0)
    ax.legend()
