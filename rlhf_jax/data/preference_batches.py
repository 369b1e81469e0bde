"""Groups of completions to endless, resumable batches. Shapes: b prompts, k completions, p pairs, t tokens."""

import math
from collections.abc import Sequence

import grain
import numpy as np

from rlhf_jax.data.pipeline import READ, WHOLE, endless
from rlhf_jax.data.preferences import PreferenceGroup
from rlhf_jax.sharding import Shard
from rlhf_jax.types import PreferenceBatch


def preference_batches(
    groups: Sequence[PreferenceGroup],
    *,
    pad_id: int,
    batch_size: int,
    completions: int,
    length: int,
    seed: int,
    pairs: int | None = None,
    shard: Shard = WHOLE,
) -> grain.DatasetIterator:
    """Endless `PreferenceBatch`es, see `endless`; of each the process's `shard`."""

    def batch(rows: Sequence[PreferenceGroup]) -> PreferenceBatch:
        own = rows[shard.rows(batch_size)]
        return batch_groups(own, pad_id=pad_id, completions=completions, length=length, pairs=pairs)

    batches = endless(groups, seed=seed).batch(batch_size, batch_fn=batch)
    return iter(batches.to_iter_dataset(READ))


def batch_groups(
    groups: Sequence[PreferenceGroup], *, pad_id: int, completions: int, length: int, pairs: int | None = None
) -> PreferenceBatch:
    """Stack groups of at most `completions` completions; rows are padded on the right, and pairs by weight 0.

    A group has at most `pairs` of these; None: one of every two completions.
    """
    b, p = len(groups), math.comb(completions, 2) if pairs is None else pairs
    tokens = np.full((b, completions, length), pad_id, np.int32)
    mask = np.zeros((b, completions, length), bool)
    completion_mask = np.zeros((b, completions, length), bool)
    judged = np.zeros((b, p, 2), np.int32)
    weights, margins = np.zeros((b, p), np.float32), np.zeros((b, p), np.float32)
    for i, group in enumerate(groups):
        for j, row in enumerate(group.rows()):
            tokens[i, j, : len(row)] = row
            mask[i, j, : len(row)] = True
            completion_mask[i, j, max(len(row) - len(group.completion_tokens[j]), 1) : len(row)] = True
        n = len(group.pairs)
        judged[i, :n] = np.asarray(group.pairs, np.int32).reshape(-1, 2)
        weights[i, :n] = 1
        margins[i, :n] = group.margins
    return PreferenceBatch(tokens, mask, completion_mask, judged, weights, margins)
