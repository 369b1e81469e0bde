"""What a sweep runs: every combination of the varied values, with every seed, each an experiment of its own."""

import dataclasses
import difflib
import itertools
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_jax.algorithms.made_rows import named_stages
from rlhf_jax.config import Experiment, to_dict
from rlhf_jax.errors import UserError

Value = int | float
Values = dict[str, Value]
"""Of each varied field, by its path in the experiment."""

_BARRED = {
    "seed": "--seeds says how many seeds there are",
    "mesh": "all runs of a sweep have the same axes",
}


@dataclass(frozen=True)
class Setting:
    """One run of a sweep."""

    values: Values
    experiment: Experiment
    label: str
    """Its seed and its values, which is also its folder's name."""

    def share(self, stage: str) -> str:
        """What a stage's outcome depends on: equal in two runs, it is one outcome."""
        stages, needed = self.experiment.stages, [stage]
        for name in needed:
            required = [one for one, _ in stages[name].requires().values()]
            needed += [one for one in (*required, *named_stages(stages[name]).values()) if one not in needed]
        plain = to_dict(self.experiment)
        plain["stages"] = {name: plain["stages"][name] for name in sorted(needed)}
        return json.dumps([stage, plain], sort_keys=True)


def settings(experiment: Experiment, seeds: int, varied: Sequence[str]) -> list[Setting]:
    """All runs, the seeds of a combination after one another; seeds count from the experiment's.

    Each is on the mesh of one group of `mesh.replica`.
    `varied` are words such as "stages.ppo.kl.coef=0.01,0.05". Raises UserError, one line, for what they cannot say.
    """
    if seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {seeds}")
    grid: dict[str, list[Value]] = {}
    for word in varied:
        path, values = _values(experiment, word)
        if path in grid:
            raise UserError(f"--vary {path}: is named twice; give its values behind one another")
        grid[path] = values
    experiment = dataclasses.replace(experiment, mesh=dataclasses.replace(experiment.mesh, replica=1))
    found = []
    for combination in itertools.product(*grid.values()):
        values, changed = dict(zip(grid, combination, strict=True)), experiment
        for path, value in values.items():
            try:
                changed = _changed(changed, path.split("."), value)
            except ValueError as error:  # of a field's own check
                raise UserError(f"--vary {path}={value}: {error}") from None
        for seed in range(experiment.seed, experiment.seed + seeds):
            label = ",".join([f"seed={seed}", *(f"{name}={values[path]}" for path, name in short(values).items())])
            found.append(Setting(values, dataclasses.replace(changed, seed=seed), label))
    return found


def groups(runs: Sequence[Setting]) -> list[list[Setting]]:
    """Runs that may go in step: those that differ in seeds and in fractions; whole numbers are mostly shapes."""
    found: dict[Any, list[Setting]] = {}
    for one in runs:
        whole = {path: value for path, value in one.values.items() if isinstance(value, int)}
        found.setdefault(tuple(whole.items()), []).append(one)
    return list(found.values())


def short(paths: Mapping[str, Any]) -> dict[str, str]:
    """Names of the paths: what follows a stage's name, where no other path ends so."""
    names = {path: path.split(".", 2)[-1] if path.startswith("stages.") else path for path in paths}
    return {path: path if list(names.values()).count(name) > 1 else name for path, name in names.items()}


def described(experiment: Experiment, seeds: int, runs: Sequence[Setting]) -> dict[str, Any]:
    """What sweep.json says: the sweep that a folder is of."""
    vary = {path: list(dict.fromkeys(one.values[path] for one in runs)) for path in runs[0].values}
    return {"experiment": to_dict(experiment), "seeds": seeds, "vary": vary}


def _values(experiment: Experiment, word: str) -> tuple[str, list[Value]]:
    path, sign, text = word.partition("=")
    if not path or not sign:
        raise UserError(f"--vary {word}: give a field and its values, such as stages.ppo.kl.coef=0.01,0.05")
    if not text.strip(","):
        raise UserError(f"--vary {word}: no values; give them as in {path}=0.01,0.05")
    kind = _kind(experiment, path)
    values = [_number(path, one, kind) for one in text.split(",")]
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise UserError(f"--vary {path}: {twice} is there twice")
    return path, values


def _number(path: str, text: str, kind: type) -> Value:
    try:
        value = kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise UserError(f"--vary {path}: expected {wanted}, got {text!r}") from None
    if not math.isfinite(value):
        raise UserError(f"--vary {path}: expected a finite number, got {text!r}")
    return value


def _kind(experiment: Experiment, path: str) -> type:
    """Whether the field of a path holds an int or a float; UserError where there is none such."""
    names = path.split(".")
    if names[0] in _BARRED:
        raise UserError(f"--vary {path}: {_BARRED[names[0]]}")
    inside: Any = experiment
    for depth, name in enumerate(names):
        there = list(inside) if isinstance(inside, Mapping) else _fields(inside)
        if name not in there:
            where, close = ".".join(names[:depth]) or "the experiment", difflib.get_close_matches(name, there, n=1)
            has = f"it has {', '.join(there)}" if there else "it has no fields"
            has = f"did you mean {close[0]!r}?" if close else has
            raise UserError(f"--vary {path}: {where} has no field {name!r}; {has}")
        if depth == len(names) - 1 and not isinstance(inside, Mapping):
            hint = typing.get_type_hints(type(inside))[name]
            kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
            kind = next((kind for kind in (float, int) if kind in kinds), None)
            if kind is None:
                raise UserError(f"--vary {path}: is {_told(vars(inside)[name])}; numbers alone are varied")
            return kind
        inside = inside[name] if isinstance(inside, Mapping) else vars(inside)[name]
    raise UserError(f"--vary {path}: is {_told(inside)}; numbers alone are varied")


def _fields(inside: Any) -> list[str]:
    return [one.name for one in dataclasses.fields(inside)] if dataclasses.is_dataclass(inside) else []


def _told(value: Any) -> str:
    """A value in a word or two."""
    return type(value).__name__ if dataclasses.is_dataclass(value) or isinstance(value, Mapping) else repr(value)


def _changed(inside: Any, names: Sequence[str], value: Value) -> Any:
    """A dataclass, or a mapping, with one field of it or of what it holds set."""
    name, rest = names[0], names[1:]
    held = inside[name] if isinstance(inside, Mapping) else vars(inside)[name]
    new = _changed(held, rest, value) if rest else value
    return {**inside, name: new} if isinstance(inside, Mapping) else dataclasses.replace(inside, **{name: new})
