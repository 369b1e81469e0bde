"""After a kill: runs that went in step go on in step, from what all of them had saved.

A mapped call rounds otherwise than a single one. Where a kill found some runs a checkpoint ahead of the others, these
would make calls by themselves until they meet, and no longer end where a sweep that was never killed does.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf_jax.records import say
from rlhf_jax.sweep.grid import Setting

_CHECKPOINTS, _PARTS = "checkpoints", ".rows"
_KEPT = "answers.jsonl"  # a judge's, which are paid for, and are no program's


def level(runs: Sequence[Setting], folder: Path, owners: Mapping[str, Setting]) -> None:
    """Take back from each stage of runs that are in step what not all that train it have got to.

    Where they were further apart than one save, a run had left the others: all go on from where they are.
    """
    for stage in runs[0].experiment.stages:
        own = [folder / one.label / stage for one in runs if owners[one.share(stage)] is one]
        held = {path: _held(path) for path in own}
        common = set[str]().union(*held.values()).intersection(*held.values())
        if all("summary.json" in one for one in held.values()) or not _within_a_save(list(held.values())):
            continue
        for path, names in held.items():
            for name in sorted(names - common):
                _remove(path / name)
            if names - common:
                say(f"{path.parent.name}: {stage}: set back to what all runs had saved")


def _held(folder: Path) -> set[str]:
    """What a stage has written, each thing that is there whole or not at all; nothing that was set aside."""
    if not folder.is_dir():
        return set()
    inside = [*folder.glob("*"), *folder.glob(f"{_CHECKPOINTS}/[0-9]*"), *folder.glob(f"{_PARTS}/*")]
    names = {path.relative_to(folder).as_posix() for path in inside if not path.name.endswith(".damaged")}
    return names - {_CHECKPOINTS, _PARTS, _KEPT}


def _within_a_save(held: Sequence[set[str]]) -> bool:
    """Whether all have a checkpoint in common, or none has more than its first."""
    steps = [{name for name in one if name.startswith(_CHECKPOINTS)} for one in held]
    return bool(set.intersection(*steps)) or max(map(len, steps)) <= 1


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
