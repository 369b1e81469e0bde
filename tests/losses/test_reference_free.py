"""Losses of pairs without a reference: golden values by hand, limits, finite where a probability is 0 or 1."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import preference
from tests.properties import Case, Properties, all_finite, normal

PAIR = normal("chosen_logps", "rejected_logps", shape=(), scale=3.0)
OF_MEANS = {
    preference.simpo: {"beta": 2.0, "gamma": 0.5},
    preference.alpha_po: {"beta": 2.0, "gamma": 0.5, "alpha": 0.25},
    preference.orpo: {"beta": 0.3},
}
OF_SUMS = {
    preference.cpo: {"beta": 0.3, "label_smoothing": 0.2},
    preference.cpl: {"beta": 0.3, "bias": 0.5},
}


def means(rng, lead):
    """Mean log-probabilities: below 0."""
    return {name: -rng.uniform(0.2, 3, size=lead) for name in ("chosen_mean_logps", "rejected_mean_logps")}


class TestProperties(Properties):
    cases = (
        *(Case(fn, means, scalars) for fn, scalars in OF_MEANS.items()),
        *(Case(fn, PAIR, scalars) for fn, scalars in OF_SUMS.items()),
    )


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def test_without_a_reference_by_hand():
    chosen, rejected = np.float32(-0.5), np.float32(-1.5)
    assert float(preference.simpo(chosen, rejected, beta=2.0, gamma=0.5)[0]) == pytest.approx(-log_sigmoid(1.5))
    odds = [math.log(math.exp(x) / (1 - math.exp(x))) for x in (-0.5, -1.5)]
    expected = -0.3 * log_sigmoid(odds[0] - odds[1])
    assert float(preference.orpo(chosen, rejected, beta=0.3)[0]) == pytest.approx(expected, rel=1e-5)
    rewards = [2 * (1 - math.exp(-0.25 * x)) / 0.25 for x in (-0.5, -1.5)]
    expected = -log_sigmoid(rewards[0] - rewards[1] - 0.5)
    assert float(preference.alpha_po(chosen, rejected, beta=2.0, gamma=0.5, alpha=0.25)[0]) == pytest.approx(expected)
    assert float(preference.cpo(chosen, rejected, beta=0.5)[0]) == pytest.approx(-log_sigmoid(0.5))
    assert float(preference.cpl(chosen, rejected, beta=0.5, bias=0.5)[0]) == pytest.approx(
        -log_sigmoid(0.125), rel=1e-5
    )


def test_alpha_po_without_alpha_is_simpo_and_cpl_without_bias_is_cpo():
    c, r = np.float32([-0.5, -2]), np.float32([-1.5, -1])
    given = {"beta": 2.0, "gamma": 0.3}
    for alpha in (0.0, 1e-4):
        near = preference.alpha_po(c, r, alpha=alpha, **given)[0]
        np.testing.assert_allclose(near, preference.simpo(c, r, **given)[0], rtol=1e-3)
    slope = jax.grad(lambda x, alpha: preference.alpha_po(x, r, alpha=alpha, **given)[0].sum())(jnp.asarray(c), 0.0)
    assert all_finite(slope)
    np.testing.assert_allclose(preference.cpl(c, r)[0], preference.cpo(c, r)[0], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_impossible_and_certain_completions_stay_finite_forward_and_backward(dtype):
    low, high = jnp.array([-1e4, -1e4, 0], dtype), jnp.array([-1e-4, -1e4, 0], dtype)
    for fn, scalars in (OF_MEANS | OF_SUMS).items():
        total = functools.partial(lambda c, r, fn, scalars: fn(c, r, **scalars)[0].sum(), fn=fn, scalars=scalars)
        for pair in ((low, high), (high, low)):
            assert all_finite(jax.value_and_grad(total, argnums=(0, 1))(*pair)), fn


@pytest.mark.parametrize(
    ("fn", "scalars", "message"),
    [
        *((fn, {"beta": 0.0}, "beta must lie in (0, inf), got 0") for fn in OF_MEANS | OF_SUMS),
        (preference.simpo, {"gamma": -1.0}, "gamma must lie in [0, inf), got -1"),
        (preference.alpha_po, {"gamma": -1.0}, "gamma must lie in [0, inf), got -1"),
        (preference.cpo, {"label_smoothing": 0.6}, "label_smoothing must lie in [0, 0.5), got 0.6"),
        (preference.cpl, {"bias": 0.0}, "bias must lie in (0, 1], got 0"),
    ],
)
def test_what_lies_outside_is_refused_with_its_value(fn, scalars, message):
    with pytest.raises(ValueError) as error:
        fn(np.float32([0.0]), np.float32([0.0]), **scalars)
    assert str(error.value) == message
