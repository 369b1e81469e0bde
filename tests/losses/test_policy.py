"""PPO's clipped surrogate case by case, and REINFORCE as its gradient on-policy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.policy import ppo_clip, reinforce
from tests.properties import Case, Properties, normal

THREE = normal("logps", "old_logps", "advantages")


class TestProperties(Properties):
    cases = (
        Case(ppo_clip, THREE, {"clip_eps": 0.2}),
        Case(ppo_clip, THREE, {"clip_eps": 0.2, "clip_eps_high": 0.28, "dual_clip": 3.0}, label="-dual"),
        Case(reinforce, normal("logps", "advantages")),
    )


def ppo(ratio, advantage, **scalars):
    """(loss, gradient with respect to log π, clipped) at one ratio."""
    value = jax.value_and_grad(
        lambda logps: (lambda out: (out[0], out[1]["clipped"]))(
            ppo_clip(logps, jnp.zeros(()), jnp.float32(advantage), **scalars)
        ),
        has_aux=True,
    )
    (loss, clipped), gradient = value(jnp.log(jnp.float32(ratio)))
    return float(loss), float(gradient), float(clipped)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),  # on-policy
        (1.1, 2.0, -2.2, -2.2),  # inside
        (1.5, 2.0, -2.4, 0.0),  # up enough already
        (0.5, 2.0, -1.0, -1.0),  # wrong way: not clipped
        (0.5, -2.0, 1.6, 0.0),  # down enough already
        (1.5, -2.0, 3.0, 3.0),  # wrong way: not clipped
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_the_clipped_surrogate_case_by_case(ratio, advantage, loss, gradient):
    clipped = float(gradient == 0 and advantage != 0)
    np.testing.assert_allclose(ppo(ratio, advantage, clip_eps=0.2), (loss, gradient, clipped), rtol=1e-5, atol=1e-7)


def test_the_upper_range_may_be_wider():
    np.testing.assert_allclose(ppo(1.5, 1.0, clip_eps=0.2, clip_eps_high=0.28), (-1.28, 0, 1), rtol=1e-6)
    np.testing.assert_allclose(ppo(1.25, 1.0, clip_eps=0.2, clip_eps_high=0.28), (-1.25, -1.25, 0), rtol=1e-6)
    np.testing.assert_allclose(ppo(0.5, -1.0, clip_eps=0.2, clip_eps_high=0.28), (0.8, 0, 1), rtol=1e-6)


def test_dual_clip_bounds_the_loss_of_negative_advantages_alone():
    np.testing.assert_allclose(ppo(10.0, -1.0, dual_clip=3.0), (3, 0, 1), rtol=1e-6)
    np.testing.assert_allclose(ppo(2.0, -1.0, dual_clip=3.0), (2, 2, 0), rtol=1e-6)
    np.testing.assert_allclose(ppo(10.0, 1.0, dual_clip=3.0), (-1.2, 0, 1), rtol=1e-6)


def test_the_ratio_is_told_and_cannot_overflow():
    logps, old_logps = np.float32([-1, -1, 0, -1e30]), np.float32([-1, -1.5, -1e30, 0])
    ratio = ppo_clip(logps, old_logps, np.ones(4, np.float32))[1]["ratio"]
    np.testing.assert_allclose(ratio, np.exp([0, 0.5, 20, -20]), rtol=1e-5)


def test_on_policy_the_gradient_is_reinforce():
    logps, advantages = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    clipped = jax.grad(lambda x: ppo_clip(x, logps, advantages)[0].sum())(logps)
    np.testing.assert_allclose(clipped, jax.grad(lambda x: reinforce(x, advantages)[0].sum())(logps), rtol=1e-6)
    np.testing.assert_allclose(clipped, -advantages, rtol=1e-6)
    assert not ppo_clip(logps, logps, advantages)[1]["clipped"].any()


def test_reinforce_estimates_the_policy_gradient():
    """Σ_v π(v) ∇(−A log π(v)), tokens sampled from π, is −∇ E[A]."""
    logits, reward = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)

    def sampled(x):
        logps = jax.nn.log_softmax(x)
        return jnp.sum(jax.lax.stop_gradient(jnp.exp(logps)) * reinforce(logps, reward)[0])

    exact = jax.grad(lambda x: -jnp.sum(jax.nn.softmax(x) * reward))(logits)
    np.testing.assert_allclose(jax.grad(sampled)(logits), exact, atol=1e-6)


@pytest.mark.parametrize(
    "scalars", [{"clip_eps": 0.0}, {"clip_eps": 1.0}, {"clip_eps_high": 0.0}, {"dual_clip": 1.0}, {"clip_eps": -0.2}]
)
def test_ranges_that_make_no_sense_are_refused(scalars):
    x = np.zeros(2, np.float32)
    with pytest.raises(ValueError, match=next(iter(scalars))):
        ppo_clip(x, x, x, **scalars)
