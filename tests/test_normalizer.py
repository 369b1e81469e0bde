"""Running moments against NumPy's of all scores at once, however they were cut into batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax import normalizer
from rlhf_jax.normalizer import Moments
from tests.properties import Case, Properties, mask_of, normal

STATE = Moments(np.float32(3), np.float32(0.5), np.float32(2))


def update(scores, mask):
    return normalizer.update(STATE, scores, mask)


def normalize(scores, **static):
    return normalizer.normalize(scores, STATE, **static)


class TestProperties(Properties):
    cases = (
        Case(update, normal("scores", mask=mask_of()), rowwise=False),
        Case(normalize, normal("scores")),
        Case(normalize, normal("scores"), static={"center": False}, label="-scale"),
    )


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    shift=st.sampled_from([0.0, 3.0, 1e3]),
    seed=st.integers(0, 2**16),
)
def test_any_batches_have_the_moments_of_all_scores(sizes, shift, seed):
    rng, state, seen = np.random.default_rng(seed), Moments(), []
    for size in sizes:
        scores = (rng.normal(size=5) + shift).astype(np.float32)  # one shape, to be compiled once
        state = normalizer.update(state, scores, np.arange(5) < size)
        seen.extend(scores[:size].astype(np.float64))
    assert state.count == len(seen)
    if seen:
        np.testing.assert_allclose(state.mean, np.mean(seen), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state.variance, np.var(seen), rtol=1e-3, atol=1e-5)


def test_a_mean_far_from_zero_does_not_cancel():
    scores = (10_000 + np.random.default_rng(0).normal(size=(20, 32))).astype(np.float32)
    state, _ = jax.lax.scan(lambda state, batch: (normalizer.update(state, batch), None), Moments(), scores)
    np.testing.assert_allclose(state.variance, scores.astype(np.float64).var(), rtol=1e-3)


def test_the_state_is_a_pytree_that_jit_carries():
    step, state = jax.jit(normalizer.update), Moments()
    for scores in np.float32([[1, 2], [3, 6]]):
        state = step(state, scores)
    assert state.mean == 3 and state.variance == 3.5
    assert [x.dtype for x in jax.tree.leaves(state)] == [jnp.float32] * 3
    assert step._cache_size() == 1


def test_scores_come_out_with_mean_zero_and_variance_one():
    scores = (5 + 3 * np.random.default_rng(0).normal(size=200)).astype(np.float32)
    state = normalizer.update(Moments(), scores)
    out = normalizer.normalize(scores, state)
    np.testing.assert_allclose((out.mean(), out.var()), (0, 1), atol=1e-4)
    scaled = normalizer.normalize(scores, state, center=False)
    np.testing.assert_allclose(scaled, scores / scores.std(), rtol=1e-4)


@pytest.mark.parametrize("center", [True, False])
def test_before_the_first_score_nothing_is_changed(center):
    scores = np.float32([2, -3])
    np.testing.assert_array_equal(normalizer.normalize(scores, Moments(), center=center), scores)
    empty = normalizer.update(Moments(), scores, np.zeros(2, bool))
    assert empty.count == 0 and empty.mean == 0 and empty.variance == 0


@pytest.mark.parametrize("same", [7.0, 0.1, -1e4])
def test_scores_that_were_all_the_same_are_not_divided(same):
    """0.1 is not its own mean in float32: what is left of it is no scale."""
    state = normalizer.update(Moments(), np.full(17, same, np.float32))
    scores = np.float32([same, same + 2])
    np.testing.assert_allclose(normalizer.normalize(scores, state), [0, 2], rtol=1e-3, atol=1e-6 * abs(same))
    np.testing.assert_array_equal(normalizer.normalize(scores, state, center=False), scores)
