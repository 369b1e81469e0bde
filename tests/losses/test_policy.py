"""The clipped surrogates case by case, and each as a case of another: REINFORCE, PPO, GSPO, GMPO, CISPO, P3O, TRPO."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import kl
from rlhf_jax.losses.policy import (
    cispo,
    gmpo,
    gspo,
    gspo_token,
    p3o,
    ppo_clip,
    reinforce,
    trpo_surrogate,
    trust_region_penalty,
)
from rlhf_jax.masking import sequence_mean
from tests.properties import Case, Properties, mask_of, normal

THREE = normal("logps", "old_logps", "advantages")
RNG = np.random.default_rng(0)


def one_a_row(rng, lead):
    return rng.normal(size=lead)


SEQUENCES = normal("logps", "old_logps", advantages=one_a_row, mask=mask_of())
PAIRS = normal("seq_logps", "old_seq_logps", "scores", shape=(2,))


class TestProperties(Properties):
    cases = (
        Case(ppo_clip, THREE, {"clip_eps": 0.2}),
        Case(ppo_clip, THREE, {"clip_eps": 0.2, "clip_eps_high": 0.28, "dual_clip": 3.0}, label="-dual"),
        Case(reinforce, normal("logps", "advantages")),
        Case(gspo, SEQUENCES, {"clip_eps": 0.3, "clip_eps_high": 0.4}),
        Case(gmpo, SEQUENCES, {"clip_eps": 0.4}),
        Case(gmpo, SEQUENCES, {"clip_eps": 0.4, "clip_eps_high": 0.9}, label="-asymmetric"),
        Case(trpo_surrogate, THREE),
        Case(trpo_surrogate, normal("logps", "old_logps", "advantages", "kl"), label="-kl"),
        Case(trust_region_penalty, normal("kl"), {"kl_coef": 2.0, "max_kl": 0.1}),
    )


class TestStoppedGradients(Properties):
    """Their gradient is not that of their value: what weighs the log-probabilities is held still."""

    test_gradient_equals_finite_differences = None
    cases = (
        Case(cispo, THREE, {"clip_eps_high": 1.0}),
        Case(cispo, THREE, {"clip_eps": 0.2, "clip_eps_high": 0.28}, label="-two-sided"),
        Case(gspo_token, normal("logps", "old_logps", "advantages", mask=mask_of()), {"clip_eps": 0.3}),
        Case(p3o, PAIRS, {"clip_eps": 0.2}, aligned=False),
        Case(p3o, PAIRS, {"clip_eps": 0.2}, {"clipping": "joint"}, aligned=False, label="-joint"),
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


def rows(count=6, width=7, spread=0.3):
    """(logps, old_logps, one advantage a row, mask), whose first row keeps one token."""
    old = -RNG.uniform(0.1, 3, (count, width)).astype(np.float32)
    logps = old + spread * RNG.normal(size=old.shape).astype(np.float32)
    mask = RNG.random(old.shape) < 0.7
    mask[:, 0], mask[0] = True, np.arange(width) == 0
    return logps, old, RNG.normal(size=count).astype(np.float32), mask


def value_and_gradient(loss, logps):
    """(loss, gradient of its sum with respect to the log-probabilities)."""
    return loss(logps), jax.grad(lambda x: jnp.sum(loss(x)))(logps)


def assert_same(actual, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected)


def test_gspo_clips_the_geometric_mean_of_the_ratios():
    logps, mask = np.float32([[-1.0, -2.0, 7.0]]), np.array([[True, True, False]])
    old = np.float32([[-1.1, -2.3, 0.0]])  # mean log-ratio 0.2, s = 1.2214
    for advantage, loss, slope in ((2.0, -2.2, 0.0), (-2.0, 2 * np.exp(0.2), np.exp(0.2))):
        given = old, np.float32([advantage]), mask
        out = value_and_gradient(lambda x, g=given: gspo(x, *g, clip_eps=0.1, clip_eps_high=None)[0], logps)
        assert_same(out, (np.float32([loss]), np.float32([[slope, slope, 0]])))
    _, diagnostics = gspo(logps, old, np.float32([2.0]), mask)
    np.testing.assert_allclose(diagnostics["ratio"], np.exp(0.2), rtol=1e-6)
    assert diagnostics["clipped"] == 1


def test_gspo_with_one_ratio_for_all_tokens_is_ppo_on_the_sequence():
    _, old, advantages, mask = rows()
    shift = 0.5 * RNG.normal(size=len(old)).astype(np.float32)
    logps = old + shift[:, None]
    scalars = {"clip_eps": 0.2, "clip_eps_high": 0.3}
    of_sequences = value_and_gradient(lambda x: ppo_clip(x, np.zeros_like(shift), advantages, **scalars)[0], shift)
    of_tokens = value_and_gradient(lambda x: gspo(x, old, advantages, mask, **scalars)[0], logps)
    assert_same(of_tokens[0], of_sequences[0])
    assert_same(of_tokens[1], mask * (of_sequences[1] / mask.sum(1))[:, None])


def test_gspo_token_with_equal_advantages_has_gspos_value_and_gradient():
    logps, old, advantages, mask = rows()
    scalars = {"clip_eps": 0.1, "clip_eps_high": 0.15}
    repeated = np.repeat(advantages[:, None], logps.shape[1], 1)
    of_tokens = value_and_gradient(
        lambda x: sequence_mean(gspo_token(x, old, repeated, mask, **scalars)[0], mask).total, logps
    )
    assert_same(of_tokens, value_and_gradient(lambda x: gspo(x, old, advantages, mask, **scalars)[0].sum(), logps))
    clipped = gspo(logps, old, advantages, mask, **scalars)[1]["clipped"]
    assert 0 < clipped.sum() < len(clipped)


def test_gspo_token_gives_each_token_the_gradient_of_its_own_advantage():
    logps, old, _, mask = rows(1)
    advantages = RNG.normal(size=logps.shape).astype(np.float32)
    ratio = np.exp((logps - old)[mask].mean())
    gradient = jax.grad(lambda x: gspo_token(x, old, advantages, mask, clip_eps=0.99, clip_eps_high=9.0)[0].sum())(
        logps
    )
    np.testing.assert_allclose(gradient, -ratio * advantages * mask, rtol=1e-5)


def test_gmpo_clips_each_token_on_its_own_side():
    logps, old = np.float32([[0.0, -1.0, 0.1]]), np.float32([[-1.0, 0.0, 0.0]])  # log-ratios 1, −1, 0.1
    mask = np.ones((1, 3), bool)
    for advantage, logs, kept in ((2.0, [0.4, -1, 0.1], [0, 1, 1]), (-2.0, [1, -0.4, 0.1], [1, 0, 1])):
        given = old, np.float32([advantage]), mask
        ratio = np.exp(np.mean(logs))
        out = value_and_gradient(lambda x, g=given: gmpo(x, *g)[0], logps)
        assert_same(out, (np.float32([-advantage * ratio]), np.float32([kept]) * np.float32(-advantage * ratio / 3)))
        np.testing.assert_allclose(gmpo(logps, *given)[1]["clipped"], 1 / 3, rtol=1e-6)
    high = gmpo(logps, old, np.float32([2.0]), mask, clip_eps_high=0.7)[1]["ratio"]
    np.testing.assert_allclose(high, np.exp((0.7 - 1 + 0.1) / 3), rtol=1e-6)


def test_gmpo_of_one_token_is_ppo_and_of_any_range_gspo():
    logps, old, advantages, _ = rows(width=1, spread=0.6)
    low, high = 1 - np.exp(-0.4), np.exp(0.4) - 1
    of_tokens = value_and_gradient(lambda x: gmpo(x, old, advantages, np.ones(x.shape, bool))[0], logps)
    of_ppo = value_and_gradient(
        lambda x: ppo_clip(x, old, advantages[:, None], clip_eps=low, clip_eps_high=high)[0][:, 0], logps
    )
    assert_same(of_tokens, of_ppo)
    logps, old, advantages, mask = rows()
    wide = value_and_gradient(lambda x: gmpo(x, old, advantages, mask, clip_eps=50.0)[0], logps)
    plain = value_and_gradient(lambda x: gspo(x, old, advantages, mask, clip_eps=0.99, clip_eps_high=99.0)[0], logps)
    assert_same(wide, plain)


@pytest.mark.parametrize("loss", [gspo, gmpo])
def test_a_sequence_without_tokens_costs_nothing(loss):
    logps, old, advantages, _ = rows()
    out, diagnostics = loss(logps, old, advantages, np.zeros(logps.shape, bool))
    assert not out.any() and not diagnostics["clipped"].any() and (diagnostics["ratio"] == 1).all()


def test_cispos_gradient_is_the_clipped_weight_times_the_policy_gradient():
    logps, old, advantages = (RNG.normal(size=50).astype(np.float32) for _ in range(3))
    ratio = np.exp(logps - old)
    for scalars, weight in (
        ({"clip_eps_high": 0.5}, np.minimum(ratio, 1.5)),
        ({"clip_eps": 0.2, "clip_eps_high": 0.28}, np.clip(ratio, 0.8, 1.28)),
    ):
        loss, gradient = value_and_gradient(lambda x, s=scalars: cispo(x, old, advantages, **s)[0], logps)
        np.testing.assert_allclose(gradient, -weight * advantages, rtol=1e-5)
        np.testing.assert_allclose(loss, -weight * advantages * logps, rtol=1e-5)
        np.testing.assert_array_equal(cispo(logps, old, advantages, **scalars)[1]["clipped"], weight != ratio)


def test_on_policy_every_loss_has_the_policy_gradient():
    _, old, advantages, mask = rows()
    repeated = np.repeat(advantages[:, None], old.shape[1], 1)
    expected = -repeated
    for loss in (ppo_clip, cispo, trpo_surrogate):
        np.testing.assert_allclose(jax.grad(lambda x, f=loss: f(x, old, repeated)[0].sum())(old), expected, rtol=1e-6)
    for loss in (gspo, gmpo):
        gradient = jax.grad(lambda x, f=loss: f(x, old, advantages, mask)[0].sum())(old)
        np.testing.assert_allclose(gradient, mask * expected / mask.sum(1, keepdims=True), rtol=1e-6)


def pair(log_ratios, scores, **arguments):
    """(loss, gradient with respect to the two log-probabilities, diagnostics)."""
    old, logps = np.float32([-5, -7]), np.float32([-5, -7]) + np.float32(log_ratios)
    value = jax.value_and_grad(lambda x: p3o(x, old, np.float32(scores), **arguments), has_aux=True)
    (loss, diagnostics), gradient = value(logps)
    return loss, gradient, diagnostics


@pytest.mark.parametrize("clipping", ["separate", "joint"])
def test_p3os_gradient_is_the_pairwise_policy_gradient(clipping):
    on_policy = pair((0, 0), (3, 1), clipping=clipping)
    np.testing.assert_allclose(on_policy[1], [-1, 1], rtol=1e-6)  # −½ (3 − 1) ∇(log π_1 − log π_2)
    assert on_policy[2]["clipped"] == 0 and on_policy[2]["ratio"] == 1
    weighted = pair((0.1, 0.05), (3, 1), clipping=clipping)
    np.testing.assert_allclose(weighted[1], np.exp(0.15) * np.float32([-1, 1]), rtol=1e-5)
    np.testing.assert_allclose(weighted[2]["ratio"], np.exp(0.15), rtol=1e-6)


@pytest.mark.parametrize("clipping", ["separate", "joint"])
def test_p3o_does_not_mind_the_order_of_a_pair_nor_a_constant(clipping):
    for log_ratios in RNG.normal(size=(8, 2)):
        scores = RNG.normal(size=2)
        loss, gradient, _ = pair(log_ratios, scores, clipping=clipping)
        other, other_gradient, _ = pair(log_ratios[::-1], scores[::-1], clipping=clipping)
        assert_same((other, other_gradient[::-1]), (loss, gradient), rtol=1e-4, atol=1e-5)
        assert_same(pair(log_ratios, scores + 4, clipping=clipping)[:2], (loss, gradient), rtol=1e-4, atol=1e-4)


def test_p3o_separately_clips_the_one_that_has_gone_far_enough():
    loss, gradient, diagnostics = pair((0.5, 0.0), (3, 1))
    # w_1 = 2, ρ_1 = e^½ > 1.2: min(2 e^½, 2.4) = 2.4 and no gradient; w_2 = −2 e^½, ρ_2 = 1.
    np.testing.assert_allclose(loss, -(2.4 - 2 * np.exp(0.5)) / 2, rtol=1e-5)
    np.testing.assert_allclose(gradient, [0, np.exp(0.5)], rtol=1e-5)
    assert diagnostics["clipped"] == 0.5
    wrong_way = pair((-0.5, 0.0), (3, 1))[1]  # the better one has become less likely: nothing is clipped
    np.testing.assert_allclose(wrong_way, np.exp(-0.5) * np.float32([-1, 1]), rtol=1e-5)


def test_p3o_jointly_clips_the_ratio_of_the_ratios():
    loss, gradient, diagnostics = pair((0.5, 0.0), (3, 1), clipping="joint")
    np.testing.assert_allclose(loss, -0.5 * 2 * np.exp(0.5) * 0.2, rtol=1e-5)
    assert not gradient.any() and diagnostics["clipped"] == 1
    both = pair((0.5, 0.5), (3, 1), clipping="joint")  # moved alike: their order is as it was
    np.testing.assert_allclose(both[1], np.e * np.float32([-1, 1]), rtol=1e-5)


def test_p3o_estimates_the_policy_gradient():
    """Pairs enumerated over a vocabulary of five: its expected gradient is −∇ E[score]."""
    logits, scores = RNG.normal(size=(2, 5)).astype(np.float32)
    logps = np.asarray(jax.nn.log_softmax(logits))
    first, second = (x.ravel() for x in np.meshgrid(np.arange(5), np.arange(5)))
    pairs = np.stack([first, second], -1)

    def expected(x):
        loss = p3o(jax.nn.log_softmax(x)[pairs], logps[pairs], scores[pairs])[0]
        return jnp.sum(np.exp(logps[first] + logps[second]) * loss)

    exact = jax.grad(lambda x: -jnp.sum(jax.nn.softmax(x) * scores))(logits)
    np.testing.assert_allclose(jax.grad(expected)(logits), exact, atol=1e-6)


def test_trpo_tells_the_divergence_from_the_old_policy():
    """Enumerated over the old policy: the mean of the estimate is KL(π_old‖π), as is that of the exact one."""
    logits, old_logits = RNG.normal(size=(2, 5)).astype(np.float32)
    logps, old = jax.nn.log_softmax(logits), jax.nn.log_softmax(old_logits)
    exact = kl.exact(old_logits, logits)
    estimate = trpo_surrogate(logps, old, jnp.ones(5))[1]["kl"]
    np.testing.assert_allclose(jnp.sum(jnp.exp(old) * estimate), exact, rtol=1e-5)
    assert trpo_surrogate(logps[0], old[0], jnp.ones(()), exact)[1]["kl"] == exact


def test_a_trust_region_taxes_what_lies_outside():
    divergence = np.float32([0.01, 0.02, 0.05])
    loss, diagnostics = trust_region_penalty(divergence, kl_coef=10.0, max_kl=0.02)
    np.testing.assert_allclose(loss, [0, 0, 0.3], atol=1e-6)
    assert diagnostics["violated"].tolist() == [0, 0, 1]
    np.testing.assert_allclose(trust_region_penalty(divergence, kl_coef=10.0)[0], 10 * divergence, rtol=1e-6)


@pytest.mark.parametrize("fn", [ppo_clip, cispo, trpo_surrogate])
def test_ratios_of_tokens_are_clamped(fn):
    far = np.float32([1e4, -1e4])
    ratio = fn(far, np.zeros(2, np.float32), np.ones(2, np.float32))[1]["ratio"]
    np.testing.assert_allclose(ratio, np.exp([20.0, -20.0]), rtol=1e-5)


@pytest.mark.parametrize("fn", [gspo, gmpo])
def test_ratios_of_sequences_are_clamped(fn):
    far = np.float32([[1e4, 1e4], [-1e4, -1e4]])
    against = np.float32([-1, 1])  # where neither clips
    ratio = fn(far, np.zeros_like(far), against, np.ones(far.shape, bool))[1]["ratio"]
    np.testing.assert_allclose(ratio, np.exp([20.0, -20.0]), rtol=1e-5)
    assert pair((1e4, -1e4), (1, 2))[2]["ratio"] == 1


@pytest.mark.parametrize(
    ("fn", "scalars"),
    [
        (gspo, {"clip_eps": 0.0}),
        (gmpo, {"clip_eps": -0.4}),
        (gmpo, {"clip_eps_high": 0.0}),
        (gspo_token, {"clip_eps": 1.0}),
        (cispo, {"clip_eps": 1.5}),
        (cispo, {"clip_eps_high": 0.0}),
        (p3o, {"clip_eps": 1.0}),
        (trust_region_penalty, {"kl_coef": -1.0}),
        (trust_region_penalty, {"kl_coef": 1.0, "max_kl": -0.1}),
    ],
)
def test_other_ranges_that_make_no_sense_are_refused(fn, scalars):
    name, value = list(scalars.items())[-1]
    case = next(case for suite in (TestProperties, TestStoppedGradients) for case in suite.cases if case.fn is fn)
    with pytest.raises(ValueError, match=f"{name} must lie in .*, got {value:g}"):
        fn(**case.arrays(4), **scalars)
