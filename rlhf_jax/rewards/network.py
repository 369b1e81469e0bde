"""Scores from a reward network, or an ensemble of them, for rows of tokens on the host: batched, padded, sharded."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from rlhf_jax import hosts, lockstep, models, sharding
from rlhf_jax.models import ModelSpec
from rlhf_jax.rewards.ensemble import Ensemble, each, member_scores
from rlhf_jax.types import Params


class RewardNetwork:
    """A reward model as a function of parameters and token rows; compiled once, for one shape."""

    def __init__(
        self,
        spec: ModelSpec,
        mesh: Mesh,
        *,
        length: int,
        pad_id: int,
        batch_size: int = 64,
        ensemble: Ensemble | None = None,
    ) -> None:
        """Rows may have at most `length` tokens; `batch_size`, read at once, is filled up to what the mesh divides.

        With an `ensemble` the parameters are its.
        """
        multiple = sharding.row_multiple(mesh)
        self._mesh, self._length, self._pad_id, self._ensemble = mesh, length, pad_id, ensemble
        self._batch_size = math.ceil(batch_size / multiple) * multiple
        self._score = lockstep.jit(lambda params, tokens, mask: models.score(spec, params, tokens, mask))
        if ensemble is not None:
            self._score = lockstep.jit(lambda params, tokens, mask: member_scores(spec, params, ensemble, tokens, mask))
        self._at = lockstep.jit(
            lambda params, tokens, mask, ends: each(
                spec, params, ensemble, lambda one: models.scores_at(spec, one, tokens, mask, ends)
            )
        )

    def __call__(self, params: Params, rows: Sequence[Sequence[int]]) -> Float[np.ndarray, " n"]:
        """One score a row, read at its last token; of an ensemble the combined one."""
        return self.combined(self.members(params, rows))

    def combined(self, scores: Float[np.ndarray, "m n"]) -> Float[np.ndarray, " n"]:
        """One score of the members'."""
        return scores[0] if self._ensemble is None else self._ensemble.combine(scores)

    def members(self, params: Params, rows: Sequence[Sequence[int]]) -> Float[np.ndarray, "m n"]:
        """The same of every member; of a single network m is 1."""
        return self._read(self._score, params, rows)

    def at(
        self, params: Params, rows: Sequence[Sequence[int]], ends: Sequence[Sequence[int]]
    ) -> Float[np.ndarray, "m e"]:
        """Every member's scores at some tokens of each row, `ends`, one row's after the other's."""
        most = max(map(len, ends))
        places = np.asarray([[*own, *([0] * (most - len(own)))] for own in ends], np.int32)
        scores = self._read(self._at, params, rows, places)
        return np.concatenate([scores[:, i, : len(own)] for i, own in enumerate(ends)], axis=1)

    def _read(
        self, program: Callable[..., Any], params: Params, rows: Sequence[Sequence[int]], *more: np.ndarray
    ) -> np.ndarray:
        """[m, n, …]: what a program makes of the rows, a batch of them at a time; `more` are arrays by row."""
        found = []
        for start in range(0, len(rows), self._batch_size):
            part = rows[start : start + self._batch_size]
            tokens = np.full((self._batch_size, self._length), self._pad_id, np.int32)
            mask = np.zeros((self._batch_size, self._length), bool)
            for i, row in enumerate(part):
                tokens[i, : len(row)] = row
                mask[i, : len(row)] = True
            own = [np.resize(x[start : start + len(part)], (self._batch_size, *x.shape[1:])) for x in more]
            with sharding.scope(self._mesh):
                batch = sharding.shard_batch(self._mesh, (tokens, mask, *own))
                scores = np.atleast_2d(hosts.fetch(program(params, *batch)))
            found.append(scores[:, : len(part)])
        return np.concatenate(found, axis=1)
