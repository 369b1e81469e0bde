"""Log-probs of whole completions, and the reference that they are compared with.

Shapes: b prompts, k completions of each, t tokens.
"""

import dataclasses
import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from rlhf_jax import digests, hosts, lockstep, models, sharding
from rlhf_jax.algorithms.context import check_positive
from rlhf_jax.data.pipeline import by_part
from rlhf_jax.data.preference_batches import Completed
from rlhf_jax.logprobs import next_token_logps, sequence_logps, token_logps
from rlhf_jax.metrics import Progress
from rlhf_jax.models import ModelSpec
from rlhf_jax.models.experts import Routing
from rlhf_jax.numerics import require
from rlhf_jax.types import Params, PreferenceBatch, ThumbBatch, TrainState


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
    spec: ModelSpec, params: Params, batch: PreferenceBatch | ThumbBatch
) -> tuple[Float[Array, "b k"], Routing | None, Bool[Array, "r t"]]:
    """Log π of whole completions; what the routers of experts did, and the mask that they saw, a row a completion.

    Where the batch says how long completions are at most, so many columns of each row reach the vocabulary: a
    completion's own, wherever its prompt ends.
    """
    b, k, t = batch.tokens.shape
    tokens, mask, counted = (jnp.reshape(x, (b * k, t)) for x in (batch.tokens, batch.mask, batch.completion_mask))
    if batch.longest is None:
        states, routing = models.hidden_and_routing(spec, params, tokens, mask)
        logps = next_token_logps(models.unembed(spec, params, states), tokens)
        return sequence_logps(logps, counted).reshape(b, k), routing, mask
    columns = jnp.argmax(counted, axis=1)[:, None] + jnp.arange(batch.longest)
    at = jnp.clip(columns, 1, t - 1)
    states, routing = models.hidden_and_routing(spec, params, tokens, mask, read=at - 1)
    logps = token_logps(models.unembed(spec, params, states), jnp.take_along_axis(tokens, at, axis=1))
    own = jnp.take_along_axis(counted, at, axis=1) & (columns == at)
    return sequence_logps(logps, own).reshape(b, k), routing, mask


def logps_program(spec: ModelSpec) -> Callable[..., Any]:
    """(params, batch of completions) -> their log π, [b, k], jitted: what reads the reference."""
    return lockstep.jit(lambda params, batch: completion_logps(spec, params, batch)[0])


class CompletionLogps:
    """log π of the completions of any number of rows, a batch at a time, in every process."""

    def __init__(
        self, spec: ModelSpec, mesh: Mesh, *, make: Callable[[Sequence[Completed]], Any], batch_size: int
    ) -> None:
        """`make` makes a batch of rows."""
        self._mesh, self._make, self._batch_size = mesh, make, batch_size
        self._read = logps_program(spec)

    def __call__(self, params: Params, rows: Sequence[Completed]) -> Float[np.ndarray, "n k"]:
        """0 for completions that a row does not have; there must be a row."""
        return np.concatenate([*self.batches(params, rows)])

    def batches(self, params: Params, rows: Sequence[Completed]) -> Iterator[Float[np.ndarray, "b k"]]:
        """The same, as they are read."""
        for first in range(0, len(rows), self._batch_size):
            some = [rows[i] for i in range(first, min(first + self._batch_size, len(rows)))]
            whole = some + [some[0]] * (self._batch_size - len(some))
            with sharding.scope(self._mesh):
                found = self._read(params, sharding.shard_batch(self._mesh, self._make(whole)))
            yield hosts.fetch(found)[: len(some)]


def with_reference(
    path: Path, read: CompletionLogps, reference: Params, splits: Sequence[Sequence[Any]], *, note: str
) -> list[Sequence[Any]]:
    """The splits' rows with the reference's log-probs, which are read once and kept in a file.

    A file that is not as it was written, or of other rows, is read anew.
    """
    digest = _digest(splits)
    if not hosts.from_writer(lambda: _is_kept(path, digest)):
        logps, done = {}, 0
        with Progress(f"{note}: reference", sum(map(len, splits))) as progress:
            for index, rows in enumerate(splits):
                found = []
                for some in read.batches(reference, rows):
                    found.append(some)
                    progress.update(done := done + len(some), {})
                logps[f"split{index}"] = np.concatenate(found)
        content = io.BytesIO()
        np.savez(content, digest=digest, **logps)
        hosts.from_writer(lambda: digests.write_sealed(path, content.getvalue()))
    with np.load(path) as file:
        return [_attach(rows, file[f"split{index}"]) for index, rows in enumerate(splits)]


def _is_kept(path: Path, digest: str) -> bool:
    if not digests.is_whole(path):
        return False
    with np.load(path) as file:
        return str(file["digest"]) == digest


def _digest(splits: Sequence[Sequence[Completed]]) -> str:
    """Of all tokens."""
    found = hashlib.blake2b(digest_size=16)
    for rows in splits:
        for row in rows:
            found.update(repr((tuple(row.prompt_tokens), row.completion_tokens)).encode())
    return found.hexdigest()


def _attach(rows: Sequence[Any], logps: Float[np.ndarray, "n k"]) -> Sequence[Any]:
    each = iter(logps)

    def part(own: Sequence[Any]) -> Sequence[Any]:
        return _WithLogps(own, np.asarray([next(each) for _ in range(len(own))]))

    return by_part(rows, part)


class _WithLogps(Sequence[Any]):
    """Rows with log-probs each."""

    def __init__(self, rows: Sequence[Any], logps: np.ndarray) -> None:
        self._rows, self._logps = rows, logps

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return dataclasses.replace(self._rows[index], ref_logps=tuple(self._logps[index].tolist()))
