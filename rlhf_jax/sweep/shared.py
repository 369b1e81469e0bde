"""A stage that several runs of a sweep have in common: made by one of them, linked by the others."""

import json
import os
import shutil
from pathlib import Path

from rlhf_jax.errors import UserError
from rlhf_jax.files import write_whole
from rlhf_jax.metrics import read_jsonl
from rlhf_jax.records import say

_LINKED = "summary.json"  # the last file of a finished stage


def is_made(workdir: Path, stage: str) -> bool:
    """Whether a run has finished a stage, or has all of another's."""
    return (workdir / stage / _LINKED).exists()


def take(source: Path, workdir: Path, stage: str) -> None:
    """Have in a run's workdir what another run has written of a stage; UserError where that did not finish it."""
    if is_made(workdir, stage):
        return
    if not is_made(source, stage):
        raise UserError(f"{stage}: it is that of {source.name}, which did not finish it")
    rows = read_jsonl(workdir / "metrics.jsonl") if (workdir / "metrics.jsonl").exists() else []
    rows = [row for row in rows if row["stage"] != stage]
    rows += [row for row in read_jsonl(source / "metrics.jsonl") if row["stage"] == stage]
    write_whole(workdir / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for inside in (Path("tensorboard", stage), Path(stage)):
        if (source / inside).is_dir():
            _linked(source / inside, workdir / inside)
    say(f"{stage}: that of {source.name}")


def _linked(source: Path, target: Path) -> None:
    """A folder of links to another's files, there whole or not at all."""
    hidden = target.with_name(f".{target.name}.part")
    for old in (hidden, target):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(source, hidden, copy_function=_link)
    os.rename(hidden, target)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)
