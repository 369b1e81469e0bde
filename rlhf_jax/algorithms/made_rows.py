"""Rows that one stage makes and a later one learns from: `<stage>/rows`, JSON lines in TRL's fields, and their digest.

A stage that `produces` "rows" calls `write`; a later one names them as `FromStage("that stage")` where any source may
stand. `resolved` puts the file there when the later stage begins: before that nothing can be said of its rows.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax import digests, hosts
from rlhf_jax.algorithms.context import Context
from rlhf_jax.data.sources import FromStage, Jsonl, Mixture
from rlhf_jax.files import sync_folder, write_whole

FOLDER = "rows"
"""What a stage's rows are kept in, as its parameters are in `params`."""

_FILE = "rows.jsonl"


def named_stages(config: Any) -> dict[str, str]:
    """By field of a stage's config, the earlier stage whose rows it names."""
    found = {}
    for name, value in vars(config).items():
        parts = value.parts if isinstance(value, Mixture) else (value,)
        found |= {f"{name}.stage": part.stage for part in parts if isinstance(part, FromStage)}
    return found


def resolved(config: Any, workdir: Path) -> Any:
    """The config with the files of earlier stages' rows where it names the stages."""

    def file_of(value: Any) -> Any:
        if isinstance(value, Mixture):
            return dataclasses.replace(value, parts=tuple(file_of(part) for part in value.parts))
        if not isinstance(value, FromStage):
            return value
        selection = {name: kept for name, kept in vars(value).items() if name != "stage"}
        return Jsonl(workdir / value.stage / FOLDER / _FILE, **selection)

    changed = {name: file_of(value) for name, value in vars(config).items()}
    return dataclasses.replace(config, **{name: new for name, new in changed.items() if new is not vars(config)[name]})


def write(context: Context, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a stage's rows; they appear whole, with their digest, or not at all."""
    if not hosts.is_writer():
        return
    folder = context.stage_dir(name) / FOLDER
    part = folder.with_name(f".{FOLDER}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write_whole(part / _FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    digests.seal(part)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(part, folder)
    sync_folder(folder.parent)


def digest(folder: Path) -> str:
    """sha256 of a stage's rows."""
    return hashlib.sha256((folder / _FILE).read_bytes()).hexdigest()
