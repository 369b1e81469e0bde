"""The natural step against the closed form on a bandit, and a stage's step inside its region."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms.trust_region import TrustRegion, natural_step

ADVANTAGES = np.array([1.0, -0.5, 0.2])
THETA = np.array([0.3, -0.2, 0.1])


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


def step(config, advantages=ADVANTAGES, times=1):
    old = jnp.asarray(softmax(THETA), jnp.float32)
    new, metrics = jax.jit(
        lambda theta: natural_step(
            config,
            theta,
            lambda theta: -(jax.nn.softmax(theta) * jnp.asarray(advantages, jnp.float32)).sum(),
            lambda theta: -(old * jax.nn.log_softmax(theta)).sum(),
            lambda theta: times * (old * (jnp.log(old) - jax.nn.log_softmax(theta))).sum(),
        )
    )(jnp.asarray(THETA, jnp.float32))
    return np.asarray(new, np.float64), {name: float(value) for name, value in metrics.items()}


def whole_step(config):
    """Solved by hand: F = diag(p) − ppᵀ, g = −p (A − pᵀA)."""
    p = softmax(THETA)
    damped = np.diag(p) - np.outer(p, p) + config.damping * np.eye(3)
    gradient = -p * (ADVANTAGES - p @ ADVANTAGES)
    x = np.linalg.solve(damped, gradient)
    return np.sqrt(2 * config.max_kl / (x @ damped @ x)) * x


def test_a_step_is_that_of_the_closed_form():
    config = TrustRegion(max_kl=1e-3, damping=0.1)
    new, metrics = step(config)
    assert metrics["step_share"] == 1
    np.testing.assert_allclose(new, THETA - whole_step(config), atol=1e-5)


def test_a_step_that_goes_too_far_is_halved():
    """The divergence itself is held, not its quadratic form: three times it is too much by the whole step."""
    config = TrustRegion(max_kl=1e-3)
    new, metrics = step(config, times=3)
    assert metrics["step_share"] == 0.5
    np.testing.assert_allclose(new, THETA - whole_step(config) / 2, atol=1e-5)


@pytest.mark.parametrize("advantages", [np.zeros(3), np.full(3, np.nan)])
def test_no_step_is_taken_that_does_not_improve(advantages):
    new, metrics = step(TrustRegion(backtracks=3), advantages)
    np.testing.assert_allclose(new, THETA, atol=1e-7)
    assert metrics["step_share"] == 0
