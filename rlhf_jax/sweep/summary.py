"""Figures of a sweep: of each combination of values the mean over seeds, its standard error and a 95% interval."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.records import read_json
from rlhf_jax.report.workdir import number
from rlhf_jax.sweep.grid import Setting, short

# Student's t at 97.5% for 1, 2, … degrees of freedom; the normal's from there on is within 4%.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
      2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045)  # fmt: skip

READINGS = {
    **dict.fromkeys(("gold_after", "score_after", "best_accuracy", "win_rate", "accuracy", "heldout_accuracy"), 1),
    **dict.fromkeys(("auc", "heldout_auc", "correlation", "heldout_margin"), 1),
    **dict.fromkeys(("heldout_loss", "log_loss", "heldout_log_loss", "rmse", "heldout_rmse"), -1),
}
"""Figures that say how good a stage's outcome is, the most telling first: 1 where more is better, −1 where less is."""


def summarise(runs: Sequence[Setting], folder: Path) -> dict[str, Any]:
    """{"rows": […]}, a row a combination: "values", "seeds", "unfinished", and stage: {figure: {mean, se, low, high}}.

    Figures are those of runs that are finished; with one seed there is a mean alone.
    """
    rows = []
    for values, some in by_values(runs):
        finished = [one for one in some if (folder / one.label / "summary.json").exists()]
        read = [read_json(folder / one.label / "summary.json") for one in finished]
        figures = {stage: _figures([one[stage] for one in read]) for stage in some[0].experiment.stages}
        seeds = [one.experiment.seed for one in finished]
        unfinished = [one.experiment.seed for one in some if one not in finished]
        rows.append({"values": values, "seeds": seeds, "unfinished": unfinished, **figures})
    return {"rows": rows}


def by_values(runs: Sequence[Setting]) -> list[tuple[dict[str, Any], list[Setting]]]:
    """The combinations, each with its runs."""
    found: dict[Any, list[Setting]] = {}
    for one in runs:
        found.setdefault(tuple(one.values.items()), []).append(one)
    return [(dict(values), some) for values, some in found.items()]


def over_seeds(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard error and the 95% interval of Student's t; of one value the mean alone.

    >>> {name: round(value, 3) for name, value in over_seeds([1.0, 2.0, 3.0]).items()}
    {'mean': 2.0, 'se': 0.577, 'low': -0.484, 'high': 4.484}
    """
    n, mean = len(values), float(np.mean(values))
    if n == 1:
        return {"mean": mean}
    se = float(np.std(values, ddof=1)) / math.sqrt(n)
    half = se * half_width(n)
    return {"mean": mean, "se": se, "low": mean - half, "high": mean + half}


def half_width(n: int) -> float:
    """Of the 95% interval of a mean of n values, in standard errors."""
    return _T[n - 2] if n - 2 < len(_T) else 1.96


def stages_of(summary: dict[str, Any]) -> list[str]:
    """The stages that a summary has figures of, in their order."""
    return [name for name in summary["rows"][0] if name not in ("values", "seeds", "unfinished")]


def telling(summary: dict[str, Any], stage: str) -> list[str]:
    """A stage's figures that say something: ends of intervals are left out, and what is the same in all runs.

    A reading (READINGS) stays, whatever it is; of a single run all do.
    """
    rows = [row for row in summary["rows"] if row["seeds"]]
    names = dict.fromkeys(name for row in rows for name in row[stage])

    def varies(name: str) -> bool:
        found = [row[stage][name] for row in rows if name in row[stage]]
        return len({one["mean"] for one in found}) > 1 or any(one.get("se", 0.0) > 0 for one in found)

    is_single = sum(len(row["seeds"]) for row in rows) == 1
    return [
        name
        for name in names
        if not name.endswith(("_low", "_high")) and (is_single or name in READINGS or varies(name))
    ]


def main_reading(summary: dict[str, Any]) -> tuple[str, str] | None:
    """The stage and the figure by which settings are put in order: a reading of the last stage that has one."""
    rows = [row for row in summary["rows"] if row["seeds"]]
    for stage in reversed(stages_of(summary)):
        for name in READINGS:
            if rows and all(name in row[stage] for row in rows):
                return stage, name
    return None


def ranked(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows, best first by the main reading; those without a finished run last, ties as they were."""
    main = main_reading(summary)
    if main is None:
        return summary["rows"]
    stage, name = main

    def place(row: dict[str, Any]) -> tuple[bool, float]:
        return not row["seeds"], -READINGS[name] * row[stage][name]["mean"] if row["seeds"] else 0.0

    return sorted(summary["rows"], key=place)


def table(summary: dict[str, Any]) -> list[str]:
    """Lines for a terminal: a block a stage, a row a combination, best first, each mean ± its standard error."""
    rows, main = ranked(summary), main_reading(summary)
    names = short(rows[0]["values"])
    by = "" if main is None else f"; best first by {main[0]}'s {main[1]}"
    lines = [f"mean ± standard error over seeds{by}", ""]
    for stage in stages_of(summary):
        figures = telling(summary, stage)
        cells = [[*names.values(), "seeds", *figures]]
        for row in rows:
            told = [told_figure(row[stage][name]) if name in row[stage] else "-" for name in figures]
            cells.append([*(str(row["values"][path]) for path in names), str(len(row["seeds"])), *told])
        lines += [stage, *_aligned(_transposed(cells) if len(cells[0]) > len(cells) + 4 else cells), ""]
    return lines


def told_figure(figure: dict[str, float]) -> str:
    """A mean, with its standard error where it has one that is not 0.

    >>> told_figure({"mean": 0.51234, "se": 0.0123}), told_figure({"mean": 8.0, "se": 0.0}), told_figure({"mean": 2.0})
    ('0.5123 ± 0.012', '8', '2')
    """
    return f"{figure['mean']:.4g}" + (f" ± {figure['se']:.2g}" if figure.get("se") else "")


def _figures(summaries: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    names = dict.fromkeys(name for one in summaries for name in one)
    found = {name: [number(one.get(name)) for one in summaries] for name in names}
    whole = {name: [value for value in values if value is not None] for name, values in found.items()}
    return {name: over_seeds(values) for name, values in whole.items() if len(values) == len(summaries)}


def _transposed(cells: list[list[str]]) -> list[list[str]]:
    return [list(column) for column in zip(*cells, strict=True)]


def _aligned(cells: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return [f"  {line}".rstrip() for line in lines]
