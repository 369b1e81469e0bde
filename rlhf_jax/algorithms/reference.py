"""Log-probs of whole completions, and the reference that they are compared with.

Shapes: b prompts, k completions of each, t tokens.
"""

import dataclasses
import io
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from rlhf_jax import models, sharding
from rlhf_jax.algorithms.context import check_positive
from rlhf_jax.data.pipeline import by_part
from rlhf_jax.data.preference_batches import batch_groups
from rlhf_jax.data.preferences import PreferenceGroup
from rlhf_jax.files import write_whole
from rlhf_jax.logprobs import next_token_logps, sequence_logps
from rlhf_jax.metrics import Progress
from rlhf_jax.models import ModelSpec
from rlhf_jax.models.experts import Routing
from rlhf_jax.numerics import require
from rlhf_jax.types import Params, PreferenceBatch, TrainState


@dataclass(frozen=True)
class Sync:
    """A reference that follows the policy: every so many steps it moves a share of the way (TR-DPO)."""

    every: int = 64
    """Steps between two moves."""
    share: float = 0.6
    """The part of the way to the policy; 1 is a copy of it (the paper's hard update)."""

    def __post_init__(self) -> None:
        check_positive(self, "every")
        require("reference.share", self.share, "(0, 1]")

    def follow(self, reference: Params, policy: TrainState) -> Params:
        """The reference after a step of the policy."""
        share = jnp.where(policy.step % self.every == 0, self.share, 0.0)
        return jax.tree.map(lambda old, new: (old + share * (new - old)).astype(old.dtype), reference, policy.params)


def completion_logps(
    spec: ModelSpec, params: Params, batch: PreferenceBatch
) -> tuple[Float[Array, "b k"], Routing | None, Bool[Array, "r t"]]:
    """Log π of whole completions; what the routers of experts did, and the mask that they saw, a row a completion."""
    flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), (batch.tokens, batch.mask, batch.completion_mask))
    tokens, mask, counted = flat
    states, routing = models.hidden_and_routing(spec, params, tokens, mask)
    logps = next_token_logps(models.unembed(spec, params, states), tokens)
    return sequence_logps(logps, counted).reshape(batch.tokens.shape[:2]), routing, mask


class GroupLogps:
    """log π of the completions of any number of groups, a batch at a time."""

    def __init__(
        self, spec: ModelSpec, mesh: Mesh, *, pad_id: int, completions: int, length: int, batch_size: int
    ) -> None:
        self._mesh, self._batch_size = mesh, batch_size
        self._layout = {"pad_id": pad_id, "completions": completions, "length": length}
        self._read = jax.jit(lambda params, batch: completion_logps(spec, params, batch)[0])

    def __call__(self, params: Params, groups: Sequence[PreferenceGroup]) -> Float[np.ndarray, "n k"]:
        """0 for completions that a group does not have."""
        found = list(self.batches(params, groups))
        return np.concatenate(found) if found else np.zeros((0, self._layout["completions"]), np.float32)

    def batches(self, params: Params, groups: Sequence[PreferenceGroup]) -> Iterator[Float[np.ndarray, "b k"]]:
        """The same, as they are read."""
        for first in range(0, len(groups), self._batch_size):
            some = [groups[i] for i in range(first, min(first + self._batch_size, len(groups)))]
            whole = some + [some[0]] * (self._batch_size - len(some))
            batch = sharding.shard_batch(self._mesh, batch_groups(whole, **self._layout))
            with sharding.scope(self._mesh):
                yield np.asarray(jax.device_get(self._read(params, batch)))[: len(some)]


def with_reference(
    path: Path, read: GroupLogps, reference: Params, splits: Sequence[Sequence[PreferenceGroup]], *, note: str
) -> list[Sequence[PreferenceGroup]]:
    """The splits' groups with the reference's log-probs, which are read once and kept in a file."""
    logps = _kept(path, [len(groups) for groups in splits])
    if logps is None:
        logps = []
        with Progress(f"{note}: reference", sum(map(len, splits))) as progress:
            done = 0
            for groups in splits:
                found = []
                for some in read.batches(reference, groups):
                    found.append(some)
                    progress.update(done := done + len(some), {})
                logps.append(np.concatenate(found) if found else np.zeros((0, 0), np.float32))
        content = io.BytesIO()
        np.savez(content, *logps)
        write_whole(path, content.getvalue())
    return [_attach(groups, rows) for groups, rows in zip(splits, logps, strict=True)]


def _kept(path: Path, lengths: Sequence[int]) -> list[np.ndarray] | None:
    """What an earlier session wrote, if all of it is there; a damaged file is read again."""
    try:
        with np.load(path) as file:
            logps = [file[name] for name in file.files]
    except (OSError, ValueError, zipfile.BadZipFile, EOFError):
        return None
    return logps if [len(rows) for rows in logps] == list(lengths) else None


def _attach(groups: Sequence[PreferenceGroup], logps: Float[np.ndarray, "n k"]) -> Sequence[PreferenceGroup]:
    rows = iter(logps)

    def part(own: Sequence[PreferenceGroup]) -> Sequence[PreferenceGroup]:
        return _WithLogps(own, np.asarray([next(rows) for _ in range(len(own))]))

    return by_part(groups, part)


class _WithLogps(Sequence[PreferenceGroup]):
    """Groups with a row of log-probs each."""

    def __init__(self, groups: Sequence[PreferenceGroup], logps: np.ndarray) -> None:
        self._groups, self._logps = groups, logps

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return dataclasses.replace(self._groups[index], ref_logps=tuple(self._logps[index].tolist()))
