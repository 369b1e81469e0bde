"""Endless batches by grain: deterministic under a seed, and resumed exactly by `get_state` and `set_state`."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import flax.struct
import grain
import numpy as np
from grain.experimental import FirstFitPackIterDataset
from jaxtyping import Bool, Int

from rlhf_jax.data.reading import Mixed
from rlhf_jax.data.text import Row
from rlhf_jax.sharding import Shard
from rlhf_jax.types import ArrayLike

# In the caller's thread: reading ahead of steps of hundreds of milliseconds gains nothing.
READ = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
"""In this thread, nothing ahead: the cursor stands where training does."""


T = TypeVar("T")

WHOLE = Shard()
"""All rows of a batch, as where there is one process."""


# grain's own endless data set is as long as an index can be, and batches of one row are then one too many: it divides
# by floats, and rounds up. A float counts as many as these exactly, and no run gets there.
_ENDLESS = 2**53


def endless(rows: Sequence[Any], *, seed: int) -> grain.MapDataset:
    """The rows for ever, shuffled anew each epoch; of a mixture each part on its own, drawn as often as it weighs."""
    if isinstance(rows, Mixed):
        return grain.MapDataset.mix(
            [endless(part, seed=seed + i) for i, part in enumerate(rows.parts)], rows.weights
        ).seed(seed)
    return grain.MapDataset.source(rows).seed(seed).shuffle().repeat(_ENDLESS // max(1, len(rows)))


def by_part(rows: Sequence[Any], make: Callable[[Sequence[Any]], Sequence[T]]) -> Sequence[T]:
    """What `make` makes of the rows, of a mixture of each part's."""
    return Mixed(tuple(map(make, rows.parts)), rows.weights) if isinstance(rows, Mixed) else make(rows)


@flax.struct.dataclass
class PackedBatch:
    """Rows that hold several texts each; segment 0 is padding."""

    tokens: Int[ArrayLike, "b t"]
    segment_ids: Int[ArrayLike, "b t"]
    loss_mask: Bool[ArrayLike, "b t"]


def packed(
    source: Sequence[Any],
    make_row: Callable[[Any, np.random.Generator], Row | None],
    *,
    pad_id: int,
    row_length: int,
    batch_size: int,
    seed: int,
    shard: Shard = WHOLE,
) -> grain.DatasetIterator:
    """Endless batches of rows packed from `source`, see `endless`; each process packs all and keeps its `shard`.

    `make_row` gets a generator of its own for each draw, so an example may be cut differently in each epoch; what it
    returns None for is left out, and nothing it returns may be longer than `row_length`. Some row must be left.
    """

    def features(item: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
        row = make_row(item, rng)
        if row is None:
            row = Row([], [])
        return {"tokens": np.asarray(row.tokens, np.int32), "loss_mask": np.asarray(row.loss_mask, bool)}

    def own(whole: dict[str, np.ndarray]) -> PackedBatch:
        rows = shard.rows(batch_size)
        tokens, segments, mask = (whole[name][rows] for name in ("tokens", "tokens_segment_ids", "loss_mask"))
        return PackedBatch(tokens, segments, mask.astype(bool))

    dataset = endless(source, seed=seed).random_map(features)
    rows = dataset.to_iter_dataset(READ).filter(lambda row: len(row["tokens"]) > 0)
    lengths = {"tokens": row_length, "loss_mask": row_length}
    rows = FirstFitPackIterDataset(
        rows,
        length_struct=lengths,
        num_packing_bins=batch_size,
        shuffle_bins=False,
        padding_struct={"tokens": pad_id, "loss_mask": 0},
    )
    return iter(rows.batch(batch_size).map(own))
