"""Checkpoints with Orbax: the whole state of a stage, its data cursor included, and nothing else.

A save copies the arrays to the host; the rest goes on beside the next steps. Orbax writes the arrays into
`.<step>.part`, the cursor follows, every file's digest is listed, and the folder is renamed to `<step>`: what has such
a name was whole once, and what became of it since is found before a number of it is used. Where there are several
processes, all write their shards, and the first alone judges, renames and deletes.
"""

import contextlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from rlhf_jax import digests, hosts
from rlhf_jax.errors import NO_ROOM, UserError
from rlhf_jax.files import sync_folder, write_whole
from rlhf_jax.types import Params

KEPT = 2
"""Checkpoints of a stage that stay on the disk, so that there is a good one before a bad one."""

_FREE_SPACE_FACTOR = 2  # other files of the run grow beside the one that is written
_STATE, _CURSOR = "state", "cursor.json"
_HIDDEN = ".part"  # after the name of a folder that is being written, or that is being deleted


# Orbax's threads print with its traceback what they then hand on, and what we raise or make one line of.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname or not record.exc_info)


def _is_handed_on(record: logging.LogRecord) -> bool:
    """False for asyncio's word of a further write that failed as the one did which Orbax hands on: asyncio prints each
    with its traceback, whenever it comes to be collected.
    """
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, OSError):
        return error.errno not in NO_ROOM
    return not isinstance(error, ValueError) or "OCDBT" not in str(error)


logging.getLogger("asyncio").addFilter(_is_handed_on)


def _without_late_writes(show: Callable[[Any], None]) -> Callable[[Any], None]:
    """A `sys.unraisablehook` but for tensorstore's writes that end after one of them has failed: their loop is closed
    then, and each would print that with a traceback.
    """

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not isinstance(error, RuntimeError) or str(error) != "Event loop is closed":
            show(unraisable)

    return hook


sys.unraisablehook = _without_late_writes(sys.unraisablehook)


class Checkpoints:
    """The checkpoints of one stage, in `folder`/<step>/; each becomes visible only when it is whole."""

    def __init__(self, folder: Path, *, keep: int = KEPT) -> None:
        """Open the folder, making it where it is missing, and find the newest good checkpoint.

        Those after it, which are damaged, are set aside, a line each in `damaged`; half-written ones are removed.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.damaged = folder.resolve(), list[str]()
        self._keep = keep
        self._writer, self._thread = _checkpointer(), ThreadPoolExecutor(1)
        self._saving: Future[int] | None = None
        self._latest = hosts.from_writer(self._newest_good)

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, None where there is none; one that is being written is waited for."""
        self.wait()
        return None if self._latest < 0 else self._latest

    def save(self, step: int, state: Any, cursor: dict[str, Any]) -> None:
        """Write a pytree of arrays and a JSON-able cursor; returns when the arrays are copied and may be donated.

        UserError if the disk has no room, for this one or, met while it was written, for the one before; what was
        saved earlier is kept.
        """
        if step == self.latest_step():
            return
        arrays, part = _key_data(state), self.folder / f".{step}{_HIDDEN}"
        with _room_for(arrays, self.folder, f"the checkpoint of step {step}", part):
            if hosts.is_writer():
                part.mkdir()
            self._writer.save(part / _STATE, arrays)
        self._saving = self._thread.submit(self._commit, step, _arrays(arrays), cursor, part)

    def restore(self, state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """The newest checkpoint (or that of `step`) in the shapes, types and shardings of `state`, and its cursor.

        Raises UserError, which names an array, for a checkpoint of another model.
        """
        newest = self.latest_step()
        folder = self.folder / str(newest if step is None else step)
        about, target = json.loads((folder / _CURSOR).read_bytes()), _key_data(state)
        _check_same(folder, about["arrays"], _arrays(target))
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
        return _wrap_keys(self._writer.restore(folder / _STATE, target), state), about["cursor"]

    def check(self) -> None:
        """Raise what a save that goes on in the background has met so far."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Wait for what is being written; UserError if the disk had no room for it."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            self._latest = saving.result()

    def close(self) -> None:
        """Wait for what is being written, and end the thread that writes."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._writer.close()

    def _commit(self, step: int, arrays: dict[str, str], cursor: dict[str, Any], part: Path) -> int:
        """What a save does in the background, beside the next steps; returns the step."""
        with _room_for((), self.folder, f"the checkpoint of step {step}", part):
            self._writer.wait_until_finished()  # for the other processes, too
            if hosts.is_writer():
                write_whole(part / _CURSOR, json.dumps({"cursor": cursor, "arrays": arrays}))
                digests.seal(part)
                os.rename(part, self.folder / str(step))
                sync_folder(self.folder)
        if hosts.is_writer():
            for old in self._steps()[: -self._keep]:
                _remove(self.folder / str(old))
        return step

    def _newest_good(self) -> int:
        for remains in self.folder.glob(f".*{_HIDDEN}"):
            shutil.rmtree(remains)
        for step in reversed(self._steps()):
            wrong = digests.damage(self.folder / str(step))
            if wrong is None:
                return step
            place = digests.set_aside(self.folder / str(step))
            self.damaged.append(f"the checkpoint of step {step} is damaged and now {place.name}: {wrong}")
        return -1

    def _steps(self) -> list[int]:
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())


def save_params(folder: Path, params: Params) -> None:
    """Write a finished stage's parameters, replacing any that are there; UserError if the disk has no room."""
    folder, part = folder.resolve(), folder.resolve().with_name(f".{folder.name}{_HIDDEN}")
    if hosts.is_writer():
        shutil.rmtree(part, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
    with _room_for(params, folder.parent, "the parameters", part), _checkpointer() as checkpointer:
        checkpointer.save(part, params)
        checkpointer.wait_until_finished()
        if hosts.is_writer():
            digests.seal(part)
            if folder.exists():
                _remove(folder)
            os.rename(part, folder)
            sync_folder(folder.parent)


def damage(folder: Path) -> str | None:
    """What is wrong with what `save_params` wrote, None where nothing is; a line that names the file."""
    return hosts.from_writer(lambda: digests.damage(folder))


def load_params(folder: Path, target: Params) -> Params:
    """Read parameters in the shapes, types and shardings of `target` (arrays or ShapeDtypeStructs).

    Raises UserError where a file is not as it was written, or the parameters are another model's.
    """
    wrong = damage(folder)
    if wrong is not None:
        raise UserError(f"{wrong}; `rlhf-jax run` with this workdir makes these parameters again")
    with _checkpointer() as checkpointer:
        stored = checkpointer.metadata(folder.resolve()).item_metadata
        _check_same(folder, _arrays(stored.tree if stored else {}, types=False), _arrays(target, types=False))
        return checkpointer.restore(folder.resolve(), target)


def _arrays(tree: Any, *, types: bool = True) -> dict[str, str]:
    """Type and shape of each array, or its shape alone, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    return {name: f"{leaf.dtype if types else ''}{list(leaf.shape)}" for name, leaf in named.items()}


def _check_same(folder: Path, there: dict[str, str], here: dict[str, str]) -> None:
    for name in sorted(there.keys() | here.keys()):
        a, b = (arrays.get(name, "nothing") for arrays in (there, here))
        if a != b:
            raise UserError(f"{folder} is of another model: {name} is {a} there and {b} here")


def check_room(workdir: Path, needed: int) -> None:
    """Raise UserError unless the disk has room for a run of so many bytes; what its folder holds is some of them."""
    for path in workdir.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # another process's, which may hold the folder
            needed -= path.lstat().st_size
    folder = next(path for path in (workdir, *workdir.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"--workdir {workdir}: no disk space: the run needs at least {needed / 1e6:.0f} MB, "
            f"{free / 1e6:.0f} MB are free"
        )


@contextlib.contextmanager
def _room_for(tree: Any, folder: Path, what: str, part: Path) -> Iterator[None]:
    """Turn a full disk, seen before or met while writing, into one line; what is half-written goes, the rest stays."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) * _FREE_SPACE_FACTOR
    free = shutil.disk_usage(folder).free
    kept = "what was saved before is kept, free some space and repeat the command"
    if free < size:
        needs = f"it needs {size / 1e6:.1f} MB, {free / 1e6:.1f} MB are free"
        raise UserError(f"no disk space for {what} in {folder}: {needs}; {kept}")
    try:
        yield
    except (OSError, ValueError) as error:  # tensorstore's errors are ValueErrors
        met = next((text for text in map(os.strerror, NO_ROOM) if text in str(error)), None)
        if met is None:
            raise
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"no disk space for {what} in {folder}: {met}; {kept}") from None


def _remove(folder: Path) -> None:
    """Delete a folder; a process that is killed meanwhile leaves a hidden one."""
    hidden = folder.with_name(f".{folder.name}.old{_HIDDEN}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(folder, hidden)
    shutil.rmtree(hidden)


def _checkpointer() -> ocp.StandardCheckpointer:
    """Orbax's, whose processes wait for each other without a collective, as its threads run beside the steps."""
    everyone = set(range(hosts.count())) if hosts.count() > 1 else None
    options = ocp.options.MultiprocessingOptions(active_processes=everyone)
    return ocp.StandardCheckpointer(multiprocessing_options=options)


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _key_data(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)


def _wrap_keys(tree: Any, like: Any) -> Any:
    def wrap(x: Any, y: Any) -> Any:
        return jax.random.wrap_key_data(x, impl=jax.random.key_impl(y)) if _is_key(y) else x

    return jax.tree.map(wrap, tree, like)
