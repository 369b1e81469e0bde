"""Rows that one stage makes and a later one learns from: `<stage>/rows`, JSON lines in TRL's fields, and their digest.

A stage that `produces` "rows" calls `write`; a later one names them as `FromStage("that stage")` where any source may
stand. `resolved` puts the file there when the later stage begins: before that nothing can be said of its rows.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rlhf_jax import digests, hosts
from rlhf_jax.algorithms.context import Context
from rlhf_jax.data.prompt_rows import PromptRow
from rlhf_jax.data.sources import FromStage, Jsonl, Mixture
from rlhf_jax.evals.policy import Row
from rlhf_jax.files import sync_folder, write_whole
from rlhf_jax.metrics import Progress

FOLDER = "rows"
"""What a stage's rows are kept in, as its parameters are in `params`."""

_FILE = "rows.jsonl"
_PARTS = ".rows"  # a file a batch, while they are being made

T = TypeVar("T")
Rows = list[dict[str, Any]]


def named_stages(config: Any) -> dict[str, str]:
    """By field of a stage's config, a mixture's parts each by its own, the earlier stage whose rows it names."""
    sources: dict[str, Any] = {}
    for name, value in vars(config).items():
        parts = value.parts if isinstance(value, Mixture) else ()
        sources |= {name: value} | {f"{name}.parts[{i}]": part for i, part in enumerate(parts)}
    return {f"{where}.stage": source.stage for where, source in sources.items() if isinstance(source, FromStage)}


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
    write_whole(part / _FILE, _lines(rows))
    digests.seal(part)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(part, folder)
    sync_folder(folder.parent)
    shutil.rmtree(folder.with_name(_PARTS), ignore_errors=True)


def in_batches(
    context: Context, name: str, items: Sequence[T], make: Callable[[int, Sequence[T]], Rows], *, batch_size: int
) -> Rows:
    """Rows made of a batch of items after the other; a run that is killed goes on after the last whole batch.

    `make(number of the batch, its items)` must give the same rows whenever it is called.
    """
    folder, rows = context.stage_dir(name) / _PARTS, []
    with Progress(name, len(items)) as progress:
        for number, start in enumerate(range(0, len(items), batch_size)):
            path, batch = folder / f"{number}.jsonl", items[start : start + batch_size]
            made = hosts.from_writer(lambda path=path: _read(path) if path.exists() else None)
            if made is None:
                made = make(number, batch)
                if hosts.is_writer():
                    write_whole(path, _lines(made))
            rows += made
            progress.update(start + len(batch), {})
    return rows


def conversation(row: PromptRow, completions: Mapping[str, str]) -> dict[str, Any]:
    """A row of a prompt and its completions, texts or messages as the prompt is."""
    if not row.messages:
        return {"prompt": row.text, **completions}
    said = {name: [{"role": "assistant", "content": text}] for name, text in completions.items()}
    return {"prompt": [dict(message) for message in row.messages], **said}


def written(prompt: PromptRow, row: Row) -> dict[str, Any]:
    """A row of what a policy wrote, with its score, and with the ids that were read and written.

    Those of the texts may be others, and have an EOS too many.
    """
    ids = {"prompt_tokens": list(prompt.tokens), "completion_tokens": list(row.tokens), "ended": row.ended}
    return {"prompt": row.prompt, "completion": row.completion, "score": row.readings["score"], **ids}


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _read(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def digest(folder: Path) -> str:
    """sha256 of a stage's rows."""
    return hashlib.sha256((folder / _FILE).read_bytes()).hexdigest()
