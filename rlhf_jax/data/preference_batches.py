"""Judged completions to endless, resumable batches. Shapes: b prompts, k completions, p pairs, t tokens."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import grain
import numpy as np
from jaxtyping import Bool, Int

from rlhf_jax.data.pipeline import READ, WHOLE, endless
from rlhf_jax.data.preferences import PreferenceGroup
from rlhf_jax.data.thumbs import Liked
from rlhf_jax.sharding import Shard
from rlhf_jax.types import PreferenceBatch, ThumbBatch


class Completed(Protocol):
    """A prompt and its completions, in tokens."""

    @property
    def prompt_tokens(self) -> tuple[int, ...]:
        """BOS first."""
        ...

    @property
    def completion_tokens(self) -> tuple[tuple[int, ...], ...]:
        """One or more."""
        ...


def preference_batches(
    groups: Sequence[PreferenceGroup],
    *,
    pad_id: int,
    batch_size: int,
    completions: int,
    length: int,
    seed: int,
    pairs: int | None = None,
    soft: bool = False,
    shard: Shard = WHOLE,
) -> grain.DatasetIterator:
    """Endless `PreferenceBatch`es, see `batch_groups` and `endless`; of each the process's `shard`."""
    make = partial(batch_groups, pad_id=pad_id, completions=completions, length=length, pairs=pairs, soft=soft)
    return batches(groups, make, batch_size=batch_size, seed=seed, shard=shard)


def batches(
    rows: Sequence[Any], make: Callable[[Sequence[Any]], Any], *, batch_size: int, seed: int, shard: Shard = WHOLE
) -> grain.DatasetIterator:
    """Endless batches that `make` makes of rows, see `endless`; of each the process's `shard`."""

    def batch(drawn: Sequence[Any]) -> Any:
        return make(drawn[shard.rows(batch_size)])

    return iter(endless(rows, seed=seed).batch(batch_size, batch_fn=batch).to_iter_dataset(READ))


def stack(
    rows: Sequence[Completed], *, pad_id: int, completions: int, length: int
) -> tuple[Int[np.ndarray, "b k t"], Bool[np.ndarray, "b k t"], Bool[np.ndarray, "b k t"]]:
    """Tokens, mask and completion mask of at most `completions` completions each, padded on the right."""
    shape = len(rows), completions, length
    tokens, mask, completion_mask = np.full(shape, pad_id, np.int32), np.zeros(shape, bool), np.zeros(shape, bool)
    for i, row in enumerate(rows):
        for j, completion in enumerate(row.completion_tokens):
            start = len(row.prompt_tokens)
            end = start + len(completion)
            tokens[i, j, :end] = (*row.prompt_tokens, *completion)
            mask[i, j, :end] = True
            completion_mask[i, j, max(start, 1) : end] = True
    return tokens, mask, completion_mask


def batch_groups(
    groups: Sequence[PreferenceGroup],
    *,
    pad_id: int,
    completions: int,
    length: int,
    pairs: int | None = None,
    soft: bool = False,
    longest: int | None = None,
) -> PreferenceBatch:
    """Stack groups of at most `completions` completions; rows are padded on the right, and pairs by weight 0.

    A group has at most `pairs` of these; None: one of every two completions. With `soft` each has its probability:
    all batches of a stage have these or none, so that one program reads them.
    """
    b, p = len(groups), math.comb(completions, 2) if pairs is None else pairs
    judged = np.zeros((b, p, 2), np.int32)
    weights, margins, probabilities = (np.full((b, p), fill, np.float32) for fill in (0, 0, 1))
    for i, group in enumerate(groups):
        n = len(group.pairs)
        judged[i, :n] = np.asarray(group.pairs, np.int32).reshape(-1, 2)
        weights[i, :n] = 1
        margins[i, :n] = group.margins
        probabilities[i, :n] = group.probabilities or 1
    stacked = stack(groups, pad_id=pad_id, completions=completions, length=length)
    known = probabilities if soft else None
    return PreferenceBatch(*stacked, judged, weights, margins, _ref_logps(groups, completions), known, longest)


def batch_thumbs(
    rows: Sequence[Liked], *, pad_id: int, completions: int, length: int, longest: int | None = None
) -> ThumbBatch:
    """Stack completions that were liked or not, with the other prompts' where there are any."""
    stacked = stack(rows, pad_id=pad_id, completions=completions, length=length)
    return ThumbBatch(*stacked, np.asarray([row.desirable for row in rows]), _ref_logps(rows, completions), longest)


def longest_completion(rows: Iterable[Completed], *, length: int) -> int | None:
    """Tokens of the longest completion of some rows, for their batches; None where it is most of a row of `length`."""
    longest = max(len(tokens) for row in rows for tokens in row.completion_tokens)
    return longest if longest < 0.9 * length else None


def _ref_logps(rows: Sequence[PreferenceGroup] | Sequence[Liked], completions: int) -> np.ndarray:
    found = np.zeros((len(rows), completions), np.float32)
    for i, row in enumerate(rows):
        found[i, : len(row.ref_logps)] = row.ref_logps
    return found
