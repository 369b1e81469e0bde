"""Distinct n-grams counted by hand, and at equal token counts."""

import numpy as np
import pytest

from rlhf_jax.evals import distinct_n, equal_tokens


def test_by_hand():
    sequences = [[1, 2, 3, 1, 2], [1, 2], [3, 1]]
    # Bigrams: 12 23 31 12 | 12 | 31; none crosses from one sequence to the next.
    assert distinct_n(sequences, tokens=9) == 3 / 6
    assert distinct_n(sequences, n=1, tokens=9) == 3 / 9
    assert distinct_n(sequences, n=3, tokens=9) == 3 / 3
    # The first six tokens: 12 23 31 12 | (a lone 1)
    assert distinct_n(sequences, tokens=6) == 3 / 4


def test_nothing_to_count_is_zero():
    assert distinct_n([], tokens=0) == 0.0
    assert distinct_n([[1], [2], []], tokens=2) == 0.0


def test_order_of_sequences_decides_only_what_is_cut():
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 9, size) for size in rng.integers(0, 12, 50)]
    tokens = sum(map(len, sequences))
    assert distinct_n(sequences, tokens=tokens) == distinct_n(sequences[::-1], tokens=tokens)
    assert distinct_n([list(map(int, one)) for one in sequences], tokens=70) == distinct_n(sequences, tokens=70)


def test_equal_counts_make_sets_of_unequal_size_comparable():
    rng = np.random.default_rng(1)
    small, large = (list(rng.integers(0, 50, (rows, 20))) for rows in (30, 300))
    common = equal_tokens(small, large)
    assert common == 600 == equal_tokens(large, small)
    assert distinct_n(large, tokens=6000) < 0.5 * distinct_n(small, tokens=common)
    assert distinct_n(large, tokens=common) == pytest.approx(distinct_n(small, tokens=common), rel=0.1)


@pytest.mark.parametrize(
    ("fields", "message"), [({"n": 0, "tokens": 1}, "n is 0"), ({"tokens": -1}, "tokens is -1"), ({"tokens": 4}, "3")]
)
def test_bad_arguments_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        distinct_n([[1, 2], [3]], **fields)
