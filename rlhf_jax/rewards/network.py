"""Scores from a reward network for rows of tokens on the host: batched, padded, sharded."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from rlhf_jax import hosts, models, sharding
from rlhf_jax.models import ModelSpec
from rlhf_jax.types import Params


class RewardNetwork:
    """A reward model as a function of parameters and token rows; compiled once, for one shape."""

    def __init__(self, spec: ModelSpec, mesh: Mesh, *, length: int, pad_id: int, batch_size: int = 64) -> None:
        """Rows may have at most `length` tokens; `batch_size`, read at once, is filled up to what the mesh divides."""
        multiple = sharding.row_multiple(mesh)
        self._mesh, self._length, self._pad_id = mesh, length, pad_id
        self._batch_size = math.ceil(batch_size / multiple) * multiple
        self._score = jax.jit(lambda params, tokens, mask: models.score(spec, params, tokens, mask))

    def __call__(self, params: Params, rows: Sequence[Sequence[int]]) -> Float[np.ndarray, " n"]:
        """One score a row, read at its last token."""
        scores = np.zeros(len(rows), np.float32)
        for start in range(0, len(rows), self._batch_size):
            part = rows[start : start + self._batch_size]
            tokens = np.full((self._batch_size, self._length), self._pad_id, np.int32)
            mask = np.zeros((self._batch_size, self._length), bool)
            for i, row in enumerate(part):
                tokens[i, : len(row)] = row
                mask[i, : len(row)] = True
            with sharding.scope(self._mesh):
                batch = sharding.shard_batch(self._mesh, (tokens, mask))
                scores[start : start + len(part)] = hosts.fetch(self._score(params, *batch))[: len(part)]
        return scores
