"""Endless batches by grain: deterministic under a seed, and resumed exactly by `get_state` and `set_state`."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import grain
import numpy as np
from grain.experimental import FirstFitPackIterDataset
from jaxtyping import Bool, Int

from rlhf_jax.data.text import Row
from rlhf_jax.types import ArrayLike

# In the caller's thread: reading ahead of steps of hundreds of milliseconds gains nothing.
READ = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
"""In this thread, nothing ahead: the cursor stands where training does."""


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
) -> grain.DatasetIterator:
    """Endless batches of rows packed from `source`, shuffled anew each epoch.

    `make_row` gets a generator of its own for each draw, so an example may be cut differently in each epoch; what it
    returns None for is left out, and nothing it returns may be longer than `row_length`. Some row must be left.
    """

    def features(item: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
        row = make_row(item, rng)
        if row is None:
            row = Row([], [])
        return {"tokens": np.asarray(row.tokens, np.int32), "loss_mask": np.asarray(row.loss_mask, bool)}

    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat().random_map(features)
    rows = dataset.to_iter_dataset(READ).filter(lambda row: len(row["tokens"]) > 0)
    lengths = {"tokens": row_length, "loss_mask": row_length}
    rows = FirstFitPackIterDataset(
        rows,
        length_struct=lengths,
        num_packing_bins=batch_size,
        shuffle_bins=False,
        padding_struct={"tokens": pad_id, "loss_mask": 0},
    )
    return iter(rows.batch(batch_size).map(_packed_batch))


def _packed_batch(features: dict[str, np.ndarray]) -> PackedBatch:
    return PackedBatch(features["tokens"], features["tokens_segment_ids"], features["loss_mask"].astype(bool))
