"""The estimator against all sets of n samples, and the formula of the KL against its definition."""

import itertools
import math

import numpy as np
import pytest

from rlhf_jax.errors import NonFiniteError
from rlhf_jax.evals.best_of_n import best_of_n, best_of_n_kl, powers_up_to


def over_all_sets(scores, values, n):
    """The mean over every set of n samples of its best one's value; of several best ones their mean."""
    found = []
    for members in map(list, itertools.combinations(range(len(scores)), n)):
        best = [i for i in members if scores[i] == scores[members].max()]
        found.append(values[best].mean())
    return np.mean(found)


@pytest.mark.parametrize("levels", [None, 3, 1], ids=["all differ", "some tie", "all tie"])
@pytest.mark.parametrize("n", [1, 2, 3, 6, 7])
def test_it_is_the_mean_over_all_sets(levels, n):
    rng = np.random.default_rng(n)
    scores = rng.normal(size=(4, 7)) if levels is None else rng.integers(levels, size=(4, 7)).astype(float)
    values = rng.normal(size=(4, 7))
    expected = [over_all_sets(s, v, n) for s, v in zip(scores, values, strict=True)]
    np.testing.assert_allclose(best_of_n(scores, values, n=n), expected, atol=1e-12)


def test_one_is_the_mean_and_all_is_the_best():
    rng = np.random.default_rng(0)
    scores, values = rng.normal(size=(5, 600)), rng.normal(size=(5, 600)).astype(np.float32)
    np.testing.assert_allclose(best_of_n(scores, values, n=1), values.mean(1, dtype=np.float64), atol=1e-12)
    np.testing.assert_array_equal(best_of_n(scores, values, n=600), values[np.arange(5), scores.argmax(1)])
    own = [best_of_n(scores, scores, n=n).mean() for n in powers_up_to(600)]
    assert own == sorted(own)  # of its own scores more samples never lose


@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_the_kl_is_that_of_the_density_of_the_largest(n):
    """The largest of n uniform numbers has the density n u^(n−1), to which any scores without ties can be brought."""
    u = (np.arange(200_000) + 0.5) / 200_000
    density = n * u ** (n - 1)
    assert best_of_n_kl(n) == pytest.approx((density * np.log(density)).mean(), abs=1e-4)


def test_the_kl_of_the_paper():
    assert best_of_n_kl(1_000) == pytest.approx(5.91, abs=5e-3) and best_of_n_kl(60_000) == pytest.approx(
        10.0, abs=5e-3
    )
    assert best_of_n_kl(1) == 0 and best_of_n_kl(16) == pytest.approx(math.log(16) - 15 / 16)


def test_what_is_no_number_of_samples_is_refused():
    scores = np.zeros((2, 3))
    for n in (0, 4):
        with pytest.raises(ValueError, match=f"n is {n}; of 3 samples it is 1 to 3"):
            best_of_n(scores, scores, n=n)
    with pytest.raises(ValueError, match="n is 0"):
        best_of_n_kl(0)
    with pytest.raises(NonFiniteError, match="scores: 1 of 6 are not finite"):
        best_of_n(np.array([[0, 1, np.nan], [0, 0, 0]]), scores, n=2)
