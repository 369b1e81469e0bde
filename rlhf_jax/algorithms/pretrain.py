"""Pretraining: next-token prediction on whole texts, in rows that start at sentence boundaries."""

from collections.abc import Sequence
from dataclasses import dataclass

import grain

from rlhf_jax.algorithms.context import BASE, Context
from rlhf_jax.algorithms.supervised import SupervisedConfig, fit
from rlhf_jax.data.pipeline import WHOLE, by_part, packed
from rlhf_jax.data.reviews import Review
from rlhf_jax.data.text import Row, sentence_rows
from rlhf_jax.sharding import Shard, process_shard


@dataclass(frozen=True)
class Config(SupervisedConfig):
    """Pretraining on the experiment's texts."""

    steps: int = 2_000
    """Optimiser steps."""


def train(config: Config, context: Context, name: str) -> dict[str, float]:
    """Train the experiment's model on its train texts; the figures are for summary.json."""
    reviews, shard = context.reviews, process_shard(context.mesh)
    sizes = {"row_length": config.row_length, "batch_size": config.batch_size}
    training = batches(reviews.train, context, **sizes, seed=context.seed, shard=shard)
    heldout = batches(reviews.validation, context, **sizes, seed=0, shard=WHOLE)
    _, figures = fit(config, context, name, context.policy_params(BASE), training, heldout, note=reviews.counts.line())
    return {**figures, **reviews.counts.figures()}


def batches(
    reviews: Sequence[Review], context: Context, *, row_length: int, batch_size: int, seed: int, shard: Shard
) -> grain.DatasetIterator:
    """Endless batches of rows of whole texts; a row starts where a sentence does."""

    def rows(part: Sequence[Review]) -> list[Row]:
        return sentence_rows((review.text for review in part), context.tokenizer, row_length=row_length)

    return packed(
        by_part(reviews, rows),
        lambda row, rng: row,
        pad_id=context.tokenizer.pad_id,
        row_length=row_length,
        batch_size=batch_size,
        seed=seed,
        shard=shard,
    )
