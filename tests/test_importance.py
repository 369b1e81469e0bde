"""Weights for samples of another policy: their bounds, and what they correct."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.importance import sequence_weights, token_weights
from tests.properties import Case, Properties, mask_of, normal

RNG = np.random.default_rng(0)
TOKENS, SEQUENCES = normal("logps", "sampler_logps"), normal("logps", "sampler_logps", mask=mask_of())
BOUNDS = {"low": 0.5, "high": 2.0}


class TestProperties(Properties):
    """They have no gradient, so it is not that of their value."""

    test_gradient_equals_finite_differences = None
    cases = (
        Case(token_weights, TOKENS, {"high": 2.0}),
        Case(token_weights, TOKENS, BOUNDS, {"outside": "mask"}, label="-mask"),
        Case(sequence_weights, SEQUENCES, {"high": 2.0}),
        Case(sequence_weights, SEQUENCES, BOUNDS, {"outside": "mask"}, label="-mask"),
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [0.25, 1, 1.5, 2]),
        ({"high": 1.25}, [0.25, 1, 1.25, 1.25]),
        ({"low": 0.5}, [0.5, 1, 1.5, 2]),
        ({"outside": "mask"}, [0.25, 1, 1.5, 0]),
        ({"low": 0.5, "outside": "mask"}, [0, 1, 1.5, 0]),
    ],
)
def test_what_lies_outside_the_bounds_is_cut_or_dropped(arguments, expected):
    logps = np.log(np.float32([0.25, 1, 1.5, 8]))
    np.testing.assert_allclose(token_weights(logps, np.zeros(4, np.float32), **arguments), expected, rtol=1e-6)
    one_token = sequence_weights(logps[:, None], np.zeros((4, 1), np.float32), np.ones((4, 1), bool), **arguments)
    np.testing.assert_allclose(one_token, expected, rtol=1e-6)


def test_a_sequences_weight_is_the_product_of_its_tokens():
    logps, sampler = -RNG.uniform(0.1, 2, (2, 5, 6)).astype(np.float32)
    mask = RNG.random((5, 6)) < 0.6
    tokens = np.where(mask, token_weights(logps, sampler, high=1e6), 1)
    np.testing.assert_allclose(sequence_weights(logps, sampler, mask, high=1e6), tokens.prod(1), rtol=1e-5)
    assert (sequence_weights(logps, sampler, np.zeros((5, 6), bool)) == 1).all()


def test_the_same_policy_has_weights_of_one():
    logps = RNG.normal(size=(3, 4)).astype(np.float32)
    assert (token_weights(logps, logps, outside="mask") == 1).all()
    assert (sequence_weights(logps, logps, np.ones((3, 4), bool), outside="mask") == 1).all()


def test_weights_stay_within_their_bounds_and_have_no_gradient():
    logps, sampler = 1e4 * RNG.normal(size=(2, 50)).astype(np.float32)
    weights = token_weights(logps, sampler, **BOUNDS)
    assert weights.min() >= 0.5 and weights.max() <= 2
    assert not jax.grad(lambda x: token_weights(x, sampler).sum())(logps).any()


def test_weighted_samples_of_one_policy_are_worth_those_of_another():
    """Enumerated: Σ sampler · w · f = Σ π f while nothing is bounded; bounds from above only make it less."""
    logps, sampler = (np.asarray(jax.nn.log_softmax(x)) for x in RNG.normal(size=(2, 7)).astype(np.float32))
    f = RNG.uniform(size=7).astype(np.float32)
    exact = np.sum(np.exp(logps) * f)
    assert exact == pytest.approx(
        float(jnp.sum(np.exp(sampler) * token_weights(logps, sampler, high=1e6) * f)), rel=1e-5
    )
    assert jnp.sum(np.exp(sampler) * token_weights(logps, sampler, high=1.0) * f) < exact


@pytest.mark.parametrize(("name", "value"), [("high", 0.9), ("low", 1.1), ("low", -0.1)])
def test_bounds_hold_one_between_them(name, value):
    x = np.zeros((1, 2), np.float32)
    for weigh in (lambda **k: token_weights(x, x, **k), lambda **k: sequence_weights(x, x, np.ones((1, 2), bool), **k)):
        with pytest.raises(ValueError, match=f"{name} must lie in .*, got {value:g}"):
            weigh(**{name: value})
