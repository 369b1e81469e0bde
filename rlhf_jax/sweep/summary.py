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


def table(summary: dict[str, Any]) -> list[str]:
    """Lines for a terminal: a block a stage, a row a combination, the mean ± half its interval."""
    rows, lines = summary["rows"], list[str]()
    names = short(rows[0]["values"])
    stages = [name for name, value in rows[0].items() if name not in ("values", "seeds", "unfinished")]
    for stage in stages:
        names_of = dict.fromkeys(name for row in rows for name in row[stage])
        figures = [name for name in names_of if not name.endswith(("_low", "_high"))]
        cells = [[*names.values(), "seeds", *figures]]
        for row in rows:
            told = [_told(row[stage][name]) if name in row[stage] else "-" for name in figures]
            cells.append([*(str(row["values"][path]) for path in names), str(len(row["seeds"])), *told])
        lines += [stage, *_aligned(_transposed(cells) if len(cells[0]) > len(cells) + 4 else cells), ""]
    return lines


def _figures(summaries: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    names = dict.fromkeys(name for one in summaries for name in one)
    found = {name: [number(one.get(name)) for one in summaries] for name in names}
    whole = {name: [value for value in values if value is not None] for name, values in found.items()}
    return {name: over_seeds(values) for name, values in whole.items() if len(values) == len(summaries)}


def _told(figure: dict[str, float]) -> str:
    return f"{figure['mean']:.4g}" + (f" ± {figure['high'] - figure['mean']:.2g}" if "high" in figure else "")


def _transposed(cells: list[list[str]]) -> list[list[str]]:
    return [list(column) for column in zip(*cells, strict=True)]


def _aligned(cells: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return [f"  {line}".rstrip() for line in lines]
