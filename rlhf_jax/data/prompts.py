"""Prompts to sample from: the first words of reviews, left-padded so that completions start in one column."""

from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Bool, Int

from rlhf_jax.data.pipeline import READ, WHOLE, endless
from rlhf_jax.data.reviews import Review
from rlhf_jax.data.text import opening
from rlhf_jax.errors import UserError
from rlhf_jax.interop.tokenizers import Tokenizer
from rlhf_jax.sharding import Shard
from rlhf_jax.types import ArrayLike

_CHARACTERS = 400  # of a review; far more than the longest prefix has


class PromptBatch(NamedTuple):
    """Left-padded prompts, each with BOS."""

    tokens: Int[ArrayLike, "b p"]
    mask: Bool[ArrayLike, "b p"]


def review_prompts(
    reviews: Sequence[Review],
    tokenizer: Tokenizer,
    *,
    tokens: tuple[int, int],
    count: int,
    rng: np.random.Generator,
    apart: int = 0,
    apart_rng: np.random.Generator | None = None,
) -> list[list[int]]:
    """Prompts of `tokens[0]` to `tokens[1]` tokens, BOS not counted, from different reviews where there are enough.

    Where there are not, reviews come again, cut anew; but those of the first `apart` prompts give no other one.
    `apart_rng` draws these, in place of `rng`: whoever else draws them by an equal one has the same reviews apart.
    Raises UserError where no review is left that has such an opening.
    """
    prompts: list[list[int]] = []
    taken: set[int] = set()
    while len(prompts) < count:
        before = len(prompts)
        source = rng if apart_rng is None or before >= apart else apart_rng
        for index in source.permutation(len(reviews)).tolist():
            if index in taken:
                continue
            encoded = tokenizer.encode(reviews[index].text[:_CHARACTERS])
            cut = opening(encoded, tokenizer, source, prompt=tokens, completion=1)
            if cut is not None:
                prompts.append(cut.prompt)
                if len(prompts) <= apart:
                    taken.add(index)
            if len(prompts) == count or (source is apart_rng and len(prompts) == apart):
                break
        if len(prompts) == before:
            raise UserError(
                f"data: of {len(reviews)} reviews, {apart} of them apart, none has a space after {tokens[0]} to "
                f"{tokens[1]} tokens to cut a prompt at"
            )
    return prompts


def pad_left(prompts: Sequence[Sequence[int]], *, length: int, pad_id: int) -> PromptBatch:
    """Stack prompts; the last column holds the last token of each."""
    tokens = np.full((len(prompts), length), pad_id, np.int32)
    mask = np.zeros((len(prompts), length), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = True
    return PromptBatch(tokens, mask)


def prompt_batches(
    prompts: Sequence[Sequence[int]], *, length: int, pad_id: int, batch_size: int, seed: int, shard: Shard = WHOLE
) -> grain.DatasetIterator:
    """Endless batches of prompts, see `endless`; of each the process's `shard`."""

    def batch(rows: Sequence[Sequence[int]]) -> PromptBatch:
        return pad_left(rows[shard.rows(batch_size)], length=length, pad_id=pad_id)

    return iter(endless(prompts, seed=seed).batch(batch_size, batch_fn=batch).to_iter_dataset(READ))
