"""The files of a run, read for its report: whatever exists of config, metrics, samples, evaluations and summaries.

A file that is missing is an empty part; a file that is there and wrong is a `UserError` that names it.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.metrics import RESERVED, read_jsonl

Row = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """What one stage has written so far."""

    name: str
    rows: list[Row]  # of metrics.jsonl, in file order
    before: list[Row]  # of samples.jsonl
    after: list[Row]
    evaluation: Row
    summary: Row
    config: Row

    @property
    def metrics(self) -> list[str]:
        """The names of its metrics, by first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row if name not in RESERVED))

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a metric, where it is there and finite."""
        steps, values = self.together(name)
        return steps, values

    def together(self, *names: str) -> np.ndarray:
        """`[1 + names, steps]`: steps, then the values of several metrics, of the rows that have them all."""
        return columns_of(self.rows, "step", *names)

    def samples(self, when: str, *fields: str) -> np.ndarray:
        """`[fields, rows]` numbers of the samples "before" or "after", of the rows that have them all."""
        return columns_of({"before": self.before, "after": self.after}[when], *fields)

    def pairs(self) -> list[tuple[str, Row | None, Row | None]]:
        """Prompt, its row before and its row after, by first appearance; a prompt's k-th rows belong together."""
        found: dict[tuple[str, int], list[Row | None]] = {}
        for side, rows in enumerate((self.before, self.after)):
            seen: dict[str, int] = {}
            for row in rows:
                prompt = row["prompt"]
                seen[prompt] = seen.get(prompt, 0) + 1
                found.setdefault((prompt, seen[prompt]), [None, None])[side] = row
        return [(prompt, before, after) for (prompt, _), (before, after) in found.items()]


@dataclass(frozen=True)
class Run:
    """A workdir's contents."""

    path: Path
    config: Row
    summary: Row
    stages: list[Stage]

    @property
    def unfinished(self) -> list[str]:
        """The stages that have no figures in a summary yet."""
        return [stage.name for stage in self.stages if not stage.summary]


def number(value: Any) -> float | None:
    """A finite number as a float, anything else as None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def columns_of(rows: list[Row], *names: str) -> np.ndarray:
    """`[names, rows]`: the numbers of those rows in which every name is finite."""
    table = [[number(row.get(name)) for name in names] for row in rows]
    whole = [line for line in table if None not in line]
    return np.asarray(whole, np.float64).reshape(len(whole), len(names)).T


def read_run(workdir: Path) -> Run:
    """Read what is there; raises `UserError` where the folder is missing, holds no run, or holds a broken file."""
    if not workdir.is_dir():
        raise UserError(f"{workdir}: no such folder")
    config, summary = _object(workdir / "config.json"), _object(workdir / "summary.json")
    rows = _rows(workdir / "metrics.jsonl", "stage", "step")
    stage_configs = _inside(_inside(config, "experiment"), "stages")
    folders = sorted(path.name for path in workdir.iterdir() if _is_stage(path))
    summarised = [name for name, value in summary.items() if isinstance(value, dict) and name != "params_digest"]
    # In the order in which they run: as configured, then as they wrote.
    names = dict.fromkeys([*stage_configs, *(str(row["stage"]) for row in rows), *summarised, *folders])
    stages = [
        _stage(
            workdir,
            name,
            rows=[row for row in rows if str(row["stage"]) == name],
            summary=_inside(summary, name),
            config=_inside(stage_configs, name),
            has_folder=name in folders,
        )
        for name in names
    ]
    if not config and not summary and not stages:
        raise UserError(f"{workdir}: no run here; a run's folder holds config.json and metrics.jsonl")
    return Run(workdir, config, summary, stages)


FILES = ("samples.jsonl", "evaluation.json", "summary.json")


def _is_stage(path: Path) -> bool:
    return path.is_dir() and any((path / name).exists() for name in FILES)


def _stage(workdir: Path, name: str, *, rows: list[Row], summary: Row, config: Row, has_folder: bool) -> Stage:
    samples, evaluation = [], {}
    if has_folder:  # a name from metrics.jsonl alone is no path
        folder = workdir / name
        samples = _rows(folder / "samples.jsonl", "when", "prompt", "completion")
        evaluation = _object(folder / "evaluation.json")
        summary = summary or _object(folder / "summary.json")
    before, after = ([row for row in samples if row["when"] == when] for when in ("before", "after"))
    return Stage(name, rows, before, after, evaluation, summary, config)


def _inside(outer: Row, key: str) -> Row:
    """An object inside an object; empty where there is none."""
    inner = outer.get(key)
    return inner if isinstance(inner, dict) else {}


def _object(path: Path) -> Row:
    """A JSON object, empty where there is no file."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def _rows(path: Path, *fields: str) -> list[Row]:
    """A JSON-lines file's rows, empty where there is no file; every row must have the fields."""
    if not path.exists():
        return []
    rows = read_jsonl(path)
    for count, row in enumerate(rows, start=1):
        missing = [name for name in fields if name not in row]
        if missing:
            raise UserError(f"{path}, row {count}: no {missing[0]!r}; a row has {', '.join(fields)}")
    return rows
