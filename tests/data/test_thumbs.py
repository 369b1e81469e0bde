"""Completions that were liked or not: of pairs, cut, and beside those of other prompts."""

import collections

import numpy as np
import pytest

from rlhf_jax.data.preference_batches import batch_thumbs
from rlhf_jax.data.preferences import PreferenceGroup
from rlhf_jax.data.thumbs import Liked, from_groups, with_others


def test_a_pair_is_a_completion_that_was_liked_and_one_that_was_not():
    group = PreferenceGroup("p", ("a", "b", "c"), (1, 5), ((6,), (7,), (8,)), (), ((2, 0), (0, 1)), (0.0, 0.0), "file")
    assert from_groups([group]) == [
        Liked((1, 5), ((8,),), True), Liked((1, 5), ((6,),), False),
        Liked((1, 5), ((6,),), True), Liked((1, 5), ((7,),), False),
    ]  # fmt: skip


def test_a_prompt_loses_its_start_before_a_completion_its_end():
    row = Liked((1, 5, 6, 7), ((8, 9, 10),), True)
    assert row.longest == 7 and row.cut(7) == row
    assert row.cut(5) == Liked((1, 7), ((8, 9, 10),), True)
    assert row.cut(3) == Liked((1,), ((8, 9),), True)


@pytest.mark.parametrize("prompts", [[0, 0, 0, 0, 1], [0, 1, 0, 1, 0, 1], list(range(7)), [3] * 9 + [4] * 2 + [5] * 9])
def test_each_row_stands_beside_a_completion_of_another_prompt(prompts):
    rows = [Liked((1, 100 + prompt), ((200 + i, 2),), bool(i % 2)) for i, prompt in enumerate(prompts)]
    found = with_others(rows, np.random.default_rng(0), length=10)
    prompt_of = {row.completion_tokens[0]: row.prompt_tokens for row in rows}
    for row, beside in zip(rows, found, strict=True):
        assert beside.completion_tokens[0] == row.completion_tokens[0] and beside.desirable == row.desirable
        assert prompt_of[beside.completion_tokens[1]] != row.prompt_tokens
    assert with_others(rows, np.random.default_rng(0), length=10) == found
    if len(set(prompts)) == len(prompts):  # then it is the next in a circle, each once
        assert set(collections.Counter(row.completion_tokens[1] for row in found).values()) == {1}


def test_what_stands_beside_is_cut_to_the_length_and_one_prompt_is_refused():
    rows = [Liked((1, 5, 6), ((7,),), True), Liked((1,), ((8, 9, 10, 11),), False)]
    found = with_others(rows, np.random.default_rng(0), length=5)
    assert [row.completion_tokens[1] for row in found] == [(8, 9), (7,)]
    with pytest.raises(ValueError, match="all 2 rows have the same prompt"):
        with_others([rows[0], rows[0]], np.random.default_rng(0), length=5)


def test_a_batch_by_hand():
    rows = [Liked((1, 5), ((6, 7), (8,)), True, (-1.0, -2.0)), Liked((1,), ((9,), (6, 7)), False)]
    batch = batch_thumbs(rows, pad_id=0, completions=2, length=4)
    assert batch.tokens.tolist() == [[[1, 5, 6, 7], [1, 5, 8, 0]], [[1, 9, 0, 0], [1, 6, 7, 0]]]
    assert batch.completion_mask.tolist() == [
        [[False, False, True, True], [False, False, True, False]],
        [[False, True, False, False], [False, True, True, False]],
    ]
    assert batch.desirable.tolist() == [True, False] and batch.ref_logps.tolist() == [[-1, -2], [0, 0]]
    assert np.array_equal(batch.mask, batch.tokens > 0)
