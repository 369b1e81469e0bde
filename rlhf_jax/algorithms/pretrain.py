"""Pretraining: next-token prediction on whole texts, in rows that start at sentence boundaries."""

from collections.abc import Sequence
from dataclasses import dataclass

import grain

from rlhf_jax.algorithms.context import BASE, Context
from rlhf_jax.algorithms.supervised import SupervisedConfig, fit
from rlhf_jax.data.pipeline import packed
from rlhf_jax.data.reviews import Review
from rlhf_jax.data.text import sentence_rows


@dataclass(frozen=True)
class Config(SupervisedConfig):
    """Pretraining on the experiment's texts."""

    steps: int = 2_000
    """Optimiser steps."""


def train(config: Config, context: Context, name: str) -> dict[str, float]:
    """Train the experiment's model on its train texts; the figures are for summary.json."""
    batches = _batches(config, context, context.reviews.train, seed=context.seed)
    heldout = _batches(config, context, context.reviews.validation, seed=0)
    _, figures = fit(config, context, name, context.policy_params(BASE), batches, heldout)
    return figures


def _batches(config: Config, context: Context, reviews: Sequence[Review], *, seed: int) -> grain.DatasetIterator:
    texts = (review.text for review in reviews)
    return packed(
        sentence_rows(texts, context.tokenizer, row_length=config.row_length),
        lambda row, rng: row,
        pad_id=context.tokenizer.pad_id,
        row_length=config.row_length,
        batch_size=config.batch_size,
        seed=seed,
    )
