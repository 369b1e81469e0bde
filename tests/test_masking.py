"""Reductions under a mask: two different means, biased variances, positions that padding does not shift."""

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from rlhf_jax.masking import (
    fixed_length_mean,
    keep,
    last_index,
    masked_mean,
    masked_var,
    positions,
    sequence_mean,
    token_mean,
    whiten,
)
from tests.properties import Case, Properties, mask_of, normal

X = np.array([[1.0, 3.0, 99.0], [8.0, 99.0, 99.0]], np.float32)
MASK = np.array([[True, True, False], [True, False, False]])


class TestProperties(Properties):
    cases = (
        Case(keep, normal("x", mask=mask_of())),
        Case(token_mean, normal("x", mask=mask_of()), rowwise=False),
        Case(sequence_mean, normal("x", mask=mask_of()), rowwise=False),
        Case(fixed_length_mean, normal("x", mask=mask_of()), {"length": 7.0}, rowwise=False),
        Case(masked_mean, normal("x", mask=mask_of()), rowwise=False),
        Case(masked_var, normal("x", mask=mask_of()), rowwise=False),
        Case(whiten, normal("x", mask=mask_of()), rowwise=False),
        Case(whiten, normal("x", mask=mask_of()), static={"shift_mean": False}, rowwise=False, label="-unshifted"),
    )


def test_token_mean_weighs_tokens_and_sequence_mean_weighs_sequences():
    tokens, sequences = token_mean(X, MASK), sequence_mean(X, MASK)
    assert (tokens.total, tokens.count, tokens.value) == (12.0, 3.0, 4.0)
    assert (sequences.total, sequences.count, sequences.value) == (2.0 + 8.0, 2.0, 5.0)


def test_sequence_mean_does_not_count_a_row_that_keeps_nothing():
    mask = MASK & np.array([[True], [False]])
    assert (sequence_mean(X, mask).value, sequence_mean(X, mask).count) == (2.0, 1.0)


def test_fixed_length_mean_divides_every_sequence_by_the_same_length():
    reduced = fixed_length_mean(X, MASK, length=4)
    assert (reduced.total, reduced.count, reduced.value) == (1.0 + 2.0, 2.0, 1.5)
    without = fixed_length_mean(X, MASK & np.array([[True], [False]]), length=4)
    assert (without.value, without.count) == (1.0, 1.0)
    full = np.ones((2, 3), bool)
    np.testing.assert_allclose(fixed_length_mean(X, full, length=3).value, sequence_mean(X, full).value, rtol=1e-6)


@pytest.mark.parametrize("length", [0, -1.0])
def test_a_length_must_be_positive(length):
    with pytest.raises(ValueError, match=f"length must lie in .*, got {length:g}"):
        fixed_length_mean(X, MASK, length=length)


def test_parts_of_a_batch_add_up_to_the_whole():
    for reduce in (token_mean, sequence_mean, lambda x, mask: fixed_length_mean(x, mask, length=4)):
        parts = reduce(X[:1], MASK[:1]) + reduce(X[1:], MASK[1:])
        assert parts.value == reduce(X, MASK).value


def test_a_mean_of_bools_is_a_share():
    assert token_mean(X > 2, MASK).value == pytest.approx(2 / 3)


def test_masked_mean_and_biased_variance():
    assert masked_mean(X, MASK) == 4.0
    assert masked_var(X, MASK) == pytest.approx(np.var([1.0, 3.0, 8.0]))


def test_variance_of_large_numbers_does_not_cancel():
    x = np.float32([10_000.0, 10_001.0, 10_002.0])
    assert masked_var(x, np.ones(3, bool)) == pytest.approx(2 / 3, rel=1e-4)


def test_whiten_shifts_the_mean_to_zero_or_puts_it_back():
    kept = np.array([1.0, 3.0, 8.0])
    whitened = (kept - kept.mean()) / np.sqrt(kept.var() + 1e-8)
    np.testing.assert_allclose(whiten(X, MASK)[MASK], whitened, rtol=1e-5)
    np.testing.assert_allclose(whiten(X, MASK, shift_mean=False)[MASK], whitened + kept.mean(), rtol=1e-5)
    assert not whiten(X, MASK)[~MASK].any() and not whiten(X, MASK, shift_mean=False)[~MASK].any()


def test_whiten_does_not_blow_up_what_is_constant():
    np.testing.assert_allclose(whiten(np.full((2, 3), 5.0, np.float32), MASK), 0)


def test_last_index_of_any_padding():
    mask = np.array([[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(last_index(mask), [1, 3, 3, 0, -1])
    np.testing.assert_array_equal(last_index(mask.reshape(5, 1, 4)), [[1], [3], [3], [0], [-1]])
    assert last_index(np.zeros((2, 0), bool)).tolist() == [-1, -1]


def test_positions_count_the_kept_tokens_before():
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 0, 1]], bool)
    left, right, holes = positions(mask)
    np.testing.assert_array_equal(left[2:], [0, 1, 2])
    np.testing.assert_array_equal(right[:3], [0, 1, 2])
    np.testing.assert_array_equal(holes[mask[2]], [0, 1, 2])


@pytest.mark.parametrize("reduce", [token_mean, sequence_mean, masked_mean, whiten])
def test_a_mask_must_be_bool_and_of_the_same_shape(reduce):
    with pytest.raises(TypeCheckError, match="mask"):
        reduce(X, MASK.astype(np.float32))
    with pytest.raises(TypeCheckError, match="mask"):
        reduce(X, MASK[:, :2])
