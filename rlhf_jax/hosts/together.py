"""What the processes of a run do together; every one must come to each call here, in the same order."""

import itertools
import json
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src.distributed import global_state  # the key-value store has no public name
from jax.experimental import multihost_utils
from jaxtyping import Float

from rlhf_jax.errors import UserError

T = TypeVar("T")

_HOURS = 6  # of waiting for process 0, which may sample or fit for long; that it lives is for `peers` to see
_calls = itertools.count()


def count() -> int:
    """Processes of the run."""
    return global_state.num_processes


def cores() -> int:
    """Processors of this host that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_writer() -> bool:
    """Whether this is the process that writes the run's files and talks to the user."""
    return global_state.process_id == 0


def from_writer(make: Callable[[], T]) -> T:
    """What `make` returns in process 0, the only one to call it; the others wait for it. It must be JSON's."""
    if count() == 1:
        return make()
    key = f"rlhf_jax/made/{next(_calls)}"
    if is_writer():
        value = make()
        _client().key_value_set(key, json.dumps(value))
        return value
    try:
        return json.loads(_client().blocking_key_value_get(key, _HOURS * 3_600_000))
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"process 0 is not where the others are after {_HOURS} hours: {error}") from None


def wait() -> None:
    """Wait until every process is here."""
    if count() > 1:
        _client().wait_at_barrier(f"rlhf_jax/here/{next(_calls)}", _HOURS * 3_600_000)


def fetch(tree: Any) -> Any:
    """Arrays as whole NumPy arrays, in every process, wherever their parts lie."""

    def whole(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return multihost_utils.process_allgather(leaf, tiled=True)
        return jax.device_get(leaf)

    return jax.tree.map(whole, tree)


def by_rows(score: Callable[[Sequence[T]], Float[np.ndarray, " m"]], rows: Sequence[T]) -> Float[np.ndarray, " n"]:
    """One float32 score a row, in every process, each of which asks `score` for a run of the rows of its own."""
    if count() == 1 or not rows:
        return score(rows)
    size = -(-len(rows) // count())
    own = rows[global_state.process_id * size :][:size]
    padded = np.zeros(size, np.float32)
    padded[: len(own)] = score(own)
    return multihost_utils.process_allgather(padded).reshape(-1)[: len(rows)]


def _client() -> Any:
    return global_state.client
