"""The estimators against the exact sum over a small vocabulary, in value and in gradient, and the controllers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import kl
from rlhf_jax.kl import AdaptiveKL, FixedKL
from tests.properties import Case, Properties, mask_of, normal

# Shared by all rows, and exact in half precision. Their own gradients are in test_from_hidden.py.
UNEMBEDDINGS = np.random.default_rng(0).integers(-4, 5, (2, 3, 6)).astype(np.float32) / 4


class TestProperties(Properties):
    cases = (
        Case(kl.k1, normal("logps", "ref_logps")),
        Case(kl.k2, normal("logps", "ref_logps")),
        Case(kl.k3, normal("logps", "ref_logps")),
        Case(kl.exact, normal("logits", "ref_logits", shape=(5, 6))),
        Case(kl.sequence_kl, normal("kl", mask=mask_of())),
        Case(
            kl.exact_from_hidden,
            normal("hidden", "ref_hidden", shape=(5, 3)),
            {"temperature": 0.7, "softcap": 3.0},
            {"unembedding": UNEMBEDDINGS[0], "ref_unembedding": UNEMBEDDINGS[1], "chunk": 4},
        ),
    )


RNG = np.random.default_rng(0)
LOGITS, REF_LOGITS = RNG.normal(size=(2, 6)).astype(np.float32)


def expected(estimator, logits):
    """The expectation of an estimator's value over tokens sampled from the policy, whose sampling has no gradient."""
    logps, ref_logps = jax.nn.log_softmax(logits), jax.nn.log_softmax(REF_LOGITS)
    return jnp.sum(jax.lax.stop_gradient(jnp.exp(logps)) * estimator(logps, ref_logps))


def test_golden_values():
    logps, ref_logps = np.log(np.float32([0.5, 0.2])), np.log(np.float32([0.25, 0.4]))
    np.testing.assert_allclose(kl.k1(logps, ref_logps), np.log([2, 0.5]), rtol=1e-6)
    np.testing.assert_allclose(kl.k2(logps, ref_logps), np.log(2) ** 2 / 2 * np.ones(2), rtol=1e-6)
    np.testing.assert_allclose(kl.k3(logps, ref_logps), [0.5 - 1 + np.log(2), 2 - 1 - np.log(2)], rtol=1e-5)
    exact = kl.exact(np.log(np.float32([0.5, 0.5])), np.log(np.float32([0.25, 0.75])))
    np.testing.assert_allclose(exact, 0.5 * np.log(2) + 0.5 * np.log(2 / 3), rtol=1e-6)


@pytest.mark.parametrize("estimator", [kl.k1, kl.k3])
def test_k1_and_k3_are_unbiased(estimator):
    np.testing.assert_allclose(expected(estimator, LOGITS), kl.exact(LOGITS, REF_LOGITS), rtol=1e-5)


def test_expected_gradients_as_losses():
    """k1's is zero, k2's that of KL(π‖π_ref), k3's that of KL(π_ref‖π)."""
    reverse = jax.grad(lambda x: kl.exact(x, REF_LOGITS))(LOGITS)
    forward = jax.grad(lambda x: kl.exact(REF_LOGITS, x))(LOGITS)
    for estimator, gradient in ((kl.k1, np.zeros(6)), (kl.k2, reverse), (kl.k3, forward)):
        np.testing.assert_allclose(jax.grad(lambda x, e=estimator: expected(e, x))(LOGITS), gradient, atol=1e-6)


def test_k1_in_the_reward_gives_the_gradient_of_the_kl():
    """REINFORCE with k1 as a cost: Σ π k1 ∇log π = ∇KL."""

    def score_function_surrogate(logits):
        logps = jax.nn.log_softmax(logits)
        cost = jax.lax.stop_gradient(kl.k1(logps, jax.nn.log_softmax(REF_LOGITS)) * jnp.exp(logps))
        return jnp.sum(cost * logps)

    reverse = jax.grad(lambda x: kl.exact(x, REF_LOGITS))(LOGITS)
    np.testing.assert_allclose(jax.grad(score_function_surrogate)(LOGITS), reverse, atol=1e-6)


def test_the_gradient_of_the_exact_sum_is_the_enumerated_one():
    """By the policy's logits p (log p/q − KL), by the reference's q − p."""
    p, q = (np.exp(x) / np.exp(x).sum() for x in (LOGITS.astype(np.float64), REF_LOGITS.astype(np.float64)))
    divergence = np.sum(p * np.log(p / q))
    of_policy, of_reference = jax.grad(kl.exact, argnums=(0, 1))(LOGITS, REF_LOGITS)
    np.testing.assert_allclose(of_policy, p * (np.log(p / q) - divergence), atol=1e-6)
    np.testing.assert_allclose(of_reference, q - p, atol=1e-6)
    at_the_reference = jax.grad(kl.exact)(LOGITS, LOGITS)
    np.testing.assert_allclose(at_the_reference, 0, atol=1e-7)


def test_divergences_of_tokens_add_up_to_that_of_sequences():
    """Enumerated over all sequences of two tokens, the second's distribution depending on the first."""
    first, ref_first = (jax.nn.log_softmax(x) for x in RNG.normal(size=(2, 3)).astype(np.float32))
    second, ref_second = (jax.nn.log_softmax(x) for x in RNG.normal(size=(2, 3, 3)).astype(np.float32))
    logps, ref_logps = (
        np.stack([np.repeat(one, 3), np.ravel(two)], -1) for one, two in ((first, second), (ref_first, ref_second))
    )
    probability, mask = np.exp(logps.sum(1)), np.ones((9, 2), bool)
    exact = np.sum(probability * (logps - ref_logps).sum(1))
    for estimator in (kl.k1, kl.k3):
        sums = kl.sequence_kl(estimator(logps, ref_logps), mask)
        np.testing.assert_allclose(np.sum(probability * sums), exact, rtol=1e-5)
    of_states = np.stack([np.broadcast_to(kl.exact(first, ref_first), 3), kl.exact(second, ref_second)], -1)
    sums = kl.sequence_kl(np.repeat(of_states, 3, 0), mask)
    np.testing.assert_allclose(np.sum(probability * sums), exact, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_finite_at_any_logits_and_log_ratios(dtype):
    far = jnp.asarray([[1e4, -1e4, 0], [-1e4, 1e4, 1e4]], dtype)
    for fn in (kl.exact, kl.k2, kl.k3):
        value = jax.value_and_grad(lambda x, f=fn: f(x, -x).sum())(far)
        assert all(np.isfinite(np.float32(x)).all() for x in value)


def test_what_cannot_be_negative_never_is():
    x = RNG.normal(size=(2000, 6)).astype(np.float32)
    near = x + np.float32(1e-4) * RNG.normal(size=x.shape).astype(np.float32)
    for other in (x, near, x[::-1], 100 * x):
        assert kl.k2(x, other).min() >= 0 and kl.k3(x, other).min() >= 0 and kl.exact(x, other).min() >= 0
    assert not kl.k1(x, x).any() and not kl.k2(x, x).any() and not kl.k3(x, x).any() and not kl.exact(x, x).any()


def test_k3_is_accurate_near_zero_and_finite_far_away():
    small = np.float32([1e-3, -1e-3])
    np.testing.assert_allclose(kl.k3(np.zeros(2, np.float32), small), small**2 / 2, rtol=1e-3)
    assert np.isfinite(kl.k3(np.float32([-1e30, 1e30]), np.zeros(2, np.float32))).all()
    assert jax.grad(lambda x: kl.k3(x, jnp.float32(0)))(jnp.float32(-1e30)) == 0


def test_exact_over_a_cut_vocabulary():
    """Tokens that neither policy may sample count for nothing; one that the reference lacks costs infinitely much."""
    cut, ref_cut = LOGITS.copy(), REF_LOGITS.copy()
    cut[4:] = ref_cut[4:] = -np.inf
    np.testing.assert_allclose(kl.exact(cut, ref_cut), kl.exact(LOGITS[:4], REF_LOGITS[:4]), rtol=1e-5)
    assert np.isfinite(jax.grad(lambda x: kl.exact(x, ref_cut))(cut)).all()
    assert np.isfinite(kl.exact(cut, REF_LOGITS))
    assert kl.exact(LOGITS, ref_cut) == np.inf


def test_fixed_kl_stays():
    controller = FixedKL(0.1)
    assert controller.update(controller.init(), kl=100.0, n_steps=10**9).coef == np.float32(0.1)


@pytest.mark.parametrize(
    ("kl_now", "factor"),
    [(6.0, 1.0), (6.6, 1 + 0.1 * 0.05), (60.0, 1 + 0.2 * 0.05), (0.0, 1 - 0.2 * 0.05), (5.7, 1 - 0.05 * 0.05)],
)
def test_adaptive_kl_moves_with_the_error_up_to_a_fifth(kl_now, factor):
    controller = AdaptiveKL(coef=0.15, target=6.0, horizon=10_000)
    state = controller.update(controller.init(), kl=kl_now, n_steps=500)
    np.testing.assert_allclose(state.coef, 0.15 * factor, rtol=1e-6)
    assert state.coef.dtype == jnp.float32
    traced = jax.jit(controller.update)(controller.init(), jnp.float32(kl_now), 500)
    np.testing.assert_allclose(traced.coef, state.coef, rtol=1e-6)


def test_adaptive_kl_holds_a_policy_at_the_target():
    """A policy whose KL is inverse to its price, as at the optimum of a quadratic: KL = (0.6 / coef)²."""
    controller = AdaptiveKL(coef=1.0, target=6.0, horizon=1_000)
    update, state = jax.jit(controller.update), controller.init()
    for _ in range(300):
        state = update(state, (0.6 / state.coef) ** 2, 100)
    np.testing.assert_allclose((0.6 / state.coef) ** 2, 6.0, rtol=1e-2)


def test_controllers_refuse_what_makes_no_sense():
    for field in ("coef", "target", "horizon"):
        with pytest.raises(ValueError, match=field):
            AdaptiveKL(**{field: 0})
    with pytest.raises(ValueError, match="coef"):
        FixedKL(-0.1)
    controller = AdaptiveKL(horizon=100)
    with pytest.raises(ValueError, match="n_steps"):
        controller.update(controller.init(), kl=1.0, n_steps=500)
