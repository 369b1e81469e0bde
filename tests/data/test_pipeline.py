"""Batches: packed without loss, the same under a seed, resumed in the middle of an epoch."""

import json

import numpy as np
import pytest

from rlhf_jax.data.pipeline import packed
from rlhf_jax.data.prompts import pad_left, prompt_batches, review_prompts
from rlhf_jax.data.text import Row
from rlhf_jax.errors import UserError


def rows(n=200):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 12, n)
    return [Row([100 + i] * int(k), [False] + [True] * (int(k) - 1)) for i, k in enumerate(lengths)]


def iterator(source, seed=0):
    make = {"pad_id": 0, "row_length": 24, "batch_size": 4, "seed": seed}
    return packed(source, lambda row, rng: None if row.tokens[0] % 10 == 0 else row, **make)


def test_packing_keeps_every_row_whole():
    source, batches = rows(), iterator(rows())
    seen = {}
    for _ in range(14):
        batch = next(batches)
        for tokens, segments, loss_mask in zip(batch.tokens, batch.segment_ids, batch.loss_mask, strict=True):
            assert not tokens[segments == 0].any() and not loss_mask[segments == 0].any()
            for segment in range(1, segments.max() + 1):
                part = segments == segment
                expected = source[tokens[part][0] - 100]
                assert tokens[part].tolist() == expected.tokens and loss_mask[part].tolist() == expected.loss_mask
                seen[expected.tokens[0]] = seen.get(expected.tokens[0], 0) + 1
    assert not any(token % 10 == 0 for token in seen)  # those that make_row returned None for
    assert set(seen.values()) <= {1, 2} and len(seen) == 180  # no row twice before all have come once


@pytest.mark.parametrize("steps", [1, 7, 40])
def test_resuming_goes_on_exactly(steps):
    first = iterator(rows())
    for _ in range(steps):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    second = iterator(rows())
    second.set_state(state)
    for _ in range(10):
        a, b = next(first), next(second)
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.segment_ids, b.segment_ids)


def test_seeds_differ_and_repeat():
    tokens = [next(iterator(rows(), seed)).tokens for seed in (0, 0, 1)]
    assert np.array_equal(tokens[0], tokens[1]) and not np.array_equal(tokens[0], tokens[2])


def test_prompts_are_left_padded_and_resume(reviews, tokenizer):
    rng = np.random.default_rng(0)
    prompts = review_prompts(reviews.test, tokenizer, tokens=(2, 8), count=50, rng=rng)
    assert len({tuple(prompt) for prompt in prompts}) > 45
    batch = pad_left(prompts, length=9, pad_id=tokenizer.pad_id)
    for row, kept, prompt in zip(batch.tokens, batch.mask, prompts, strict=True):
        assert row[kept].tolist() == prompt and kept[-1] and (row[~kept] == tokenizer.pad_id).all()
    make = {"length": 9, "pad_id": 0, "batch_size": 8, "seed": 3}
    first, second = prompt_batches(prompts, **make), prompt_batches(prompts, **make)
    for _ in range(9):
        next(first)
    second.set_state(json.loads(json.dumps(first.get_state())))
    np.testing.assert_array_equal(next(first).tokens, next(second).tokens)


def test_prompts_repeat_reviews_only_when_they_run_out(reviews, tokenizer):
    some = reviews.test[:20]
    prompts = review_prompts(some, tokenizer, tokens=(2, 8), count=45, rng=np.random.default_rng(0))
    assert len(prompts) == 45
    with pytest.raises(UserError, match="of 20 reviews, 0 of them apart, none has a space after 300 to 301 tokens"):
        review_prompts(some, tokenizer, tokens=(300, 301), count=1, rng=np.random.default_rng(0))
