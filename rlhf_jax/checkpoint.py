"""Checkpoints with Orbax: the whole state of a stage, its data cursor included, and nothing else."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from rlhf_jax.errors import UserError
from rlhf_jax.types import Params

_FREE_SPACE_FACTOR = 2  # a checkpoint is written beside the one that it replaces


class Checkpoints:
    """The checkpoints of one stage, in `folder`/<step>/; each becomes visible only when it is whole."""

    def __init__(self, folder: Path, *, keep: int = 1) -> None:
        """Open the folder, making it where it is missing; what a killed save left half-written is removed."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder.resolve()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=False
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, cursor: dict[str, Any]) -> None:
        """Write a pytree of arrays and a JSON-able cursor; UserError if the disk has no room, and the last is kept."""
        if step == self.latest_step():
            return
        with _room_for(_key_data(state), self.folder, f"the checkpoint of step {step}"):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_key_data(state)), cursor=ocp.args.JsonSave(cursor)
                ),
            )

    def restore(self, state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """The newest checkpoint (or that of `step`) in the shapes, types and shardings of `state`, and its cursor."""
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _key_data(state))
        step = self.latest_step() if step is None else step
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target), cursor=ocp.args.JsonRestore())
        )
        return _wrap_keys(restored["state"], state), restored["cursor"]

    def close(self) -> None:
        """Wait for what is being written."""
        self._manager.close()


def save_params(folder: Path, params: Params) -> None:
    """Write a finished stage's parameters, replacing any that are there; UserError if the disk has no room."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _room_for(params, folder.parent, "the parameters"), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.resolve(), params, force=True)


def load_params(folder: Path, target: Params) -> Params:
    """Read parameters in the shapes, types and shardings of `target` (arrays or ShapeDtypeStructs)."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder.resolve(), target)


@contextlib.contextmanager
def _room_for(tree: Any, folder: Path, what: str) -> Iterator[None]:
    """Turn a full disk, seen before or met while writing, into one line; what was there before is kept."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) * _FREE_SPACE_FACTOR
    free = shutil.disk_usage(folder).free
    message = (
        f"no disk space for {what} in {folder}: it needs {size / 1e6:.1f} MB, {free / 1e6:.1f} MB are free; "
        "what was saved before is kept, free some space and repeat the command"
    )
    if free < size:
        raise UserError(message)
    try:
        yield
    except (OSError, ValueError) as error:  # tensorstore's errors are ValueErrors
        if os.strerror(errno.ENOSPC) in str(error):
            raise UserError(message) from None
        raise


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _key_data(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)


def _wrap_keys(tree: Any, like: Any) -> Any:
    def wrap(x: Any, y: Any) -> Any:
        return jax.random.wrap_key_data(x, impl=jax.random.key_impl(y)) if _is_key(y) else x

    return jax.tree.map(wrap, tree, like)
