"""Rewards a token, GAE against its definition, and baselines over a group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.advantages import (
    gae,
    group_centered,
    group_normalized,
    leave_one_out,
    reinforce_plus_plus,
    remax,
    token_rewards,
)
from tests.properties import Case, Properties, mask_of, normal

RNG = np.random.default_rng(0)


def one_a_row(rng, lead):
    return rng.normal(size=lead)


class TestProperties(Properties):
    cases = (
        Case(token_rewards, normal("kl", scores=one_a_row, mask=mask_of()), {"kl_coef": 0.1}),
        Case(gae, normal("rewards", "values", mask=mask_of()), {"gamma": 0.97, "lam": 0.9}),
        Case(group_centered, normal("scores"), aligned=False),
        Case(group_normalized, normal("scores"), {"eps": 1e-4}, {"ddof": 1}, aligned=False),
        Case(group_normalized, normal("scores"), {"eps": 1e-2}, {"ddof": 0}, aligned=False, label="-biased"),
        Case(leave_one_out, normal("scores"), aligned=False),
        Case(remax, normal("scores", "greedy_scores")),
        Case(reinforce_plus_plus, normal("rewards", mask=mask_of()), {"gamma": 0.9}, rowwise=False),
    )


def gae_by_definition(rewards, values, gamma, lam):
    """A_t = Σ_l (γλ)^l δ_{t+l}, Schulman et al. 2016, eq. 16: two loops over the tokens that exist, in float64."""
    after = [*values[1:], 0.0]  # V after the last token is 0
    deltas = [r + gamma * v_next - v for r, v, v_next in zip(rewards, values, after[: len(values)], strict=True)]
    advantages = [sum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, len(deltas))) for t in range(len(deltas))]
    return np.array(advantages)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.5, 0.0), (0.0, 0.5)])
def test_gae_is_its_definition_on_the_kept_tokens(gamma, lam):
    rewards, values = RNG.normal(size=(2, 8, 12))
    mask = RNG.random((8, 12)) < 0.6  # late starts, early ends, holes where a tool spoke
    mask[0], mask[1] = True, False
    advantages, returns = gae(np.float32(rewards), np.float32(values), mask, gamma=gamma, lam=lam)
    for row in range(8):
        kept = mask[row]
        expected = gae_by_definition(rewards[row, kept], values[row, kept], gamma, lam)
        np.testing.assert_allclose(advantages[row, kept], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(returns[row, kept], expected + values[row, kept], rtol=1e-4, atol=1e-5)
        assert not advantages[row, ~kept].any() and not returns[row, ~kept].any()


def gae_by_associative_scan(rewards, values, gamma, lam):
    """A_t = δ_t + γλ A_{t+1} as a product of affine maps, for rows without holes."""
    after = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    deltas = rewards + gamma * after - values
    decays = jnp.full_like(deltas, gamma * lam)

    def compose(later, earlier):
        return later[0] * earlier[0], earlier[1] + earlier[0] * later[1]

    return jax.lax.associative_scan(compose, (decays, deltas), reverse=True, axis=1)[1]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.5, 0.0)])
def test_gae_is_an_associative_scan(gamma, lam):
    rewards, values = RNG.normal(size=(2, 4, 33)).astype(np.float32)
    advantages = gae(rewards, values, np.ones(rewards.shape, bool), gamma=gamma, lam=lam)[0]
    np.testing.assert_allclose(advantages, gae_by_associative_scan(rewards, values, gamma, lam), rtol=1e-4, atol=1e-5)


def test_gae_by_hand():
    # δ = (1 + 0.5·1 − 2, 0 + 0.5·4 − 1, 3 + 0 − 4) = (−0.5, 1, −1); A = (−0.5 + 0.25·0.75, 1 − 0.25, −1).
    rewards, values = np.float32([9, 1, 0, 3, 9]), np.float32([9, 2, 1, 4, 9])
    mask = np.array([False, True, True, True, False])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    np.testing.assert_allclose(advantages, [0, -0.3125, 0.75, -1, 0])
    np.testing.assert_allclose(returns, [0, 1.6875, 1.75, 3, 0])


def test_lambda_one_is_monte_carlo_and_lambda_zero_one_step():
    rewards, values = RNG.normal(size=(2, 3, 6)).astype(np.float32)
    mask = np.ones((3, 6), bool)
    discounts = 0.9 ** np.arange(6)
    to_go = np.stack([(rewards[:, t:] * discounts[: 6 - t]).sum(1) for t in range(6)], 1)
    np.testing.assert_allclose(gae(rewards, values, mask, gamma=0.9, lam=1.0)[1], to_go, rtol=1e-4, atol=1e-5)
    after = np.pad(values[:, 1:], ((0, 0), (0, 1)))
    td = gae(rewards, values, mask, gamma=0.9, lam=0.0)[0]
    np.testing.assert_allclose(td, rewards + 0.9 * after - values, rtol=1e-4, atol=1e-5)


def test_perfect_values_leave_no_advantage():
    rewards = RNG.normal(size=6).astype(np.float32)
    values = np.cumsum(rewards[::-1])[::-1].astype(np.float32)
    advantages, returns = gae(rewards, values, np.ones(6, bool), gamma=1.0, lam=0.95)
    np.testing.assert_allclose(advantages, 0, atol=1e-5)
    np.testing.assert_allclose(returns, values, atol=1e-5)


def test_gae_of_mixed_precision_is_in_the_wider_type(float64):
    advantages, _ = gae(np.ones(3, np.float32), np.ones(3, np.float64), np.ones(3, bool), gamma=1, lam=1)
    assert advantages.dtype == jnp.float64


@pytest.mark.parametrize("scalars", [{"gamma": 1.1, "lam": 1.0}, {"gamma": 1.0, "lam": -0.1}])
def test_gamma_and_lam_lie_in_the_unit_interval(scalars):
    with pytest.raises(ValueError, match=r"gamma|lam"):
        gae(np.ones(3, np.float32), np.ones(3, np.float32), np.ones(3, bool), **scalars)


def test_the_score_sits_on_the_last_kept_token():
    kl = np.float32([[0.5, 1.0, 2.0, 4.0]] * 4)
    mask = np.array([[1, 1, 1, 1], [0, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0]], bool)
    rewards = token_rewards(np.float32([10, 20, 30, 40]), kl, mask, kl_coef=0.5)
    expected = [[-0.25, -0.5, -1, 8], [0, -0.5, 19, 0], [-0.25, 0, 29, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(rewards, expected)


def test_rewards_of_a_sequence_add_up_to_score_minus_kl():
    scores, kl, mask = RNG.normal(size=5), RNG.normal(size=(5, 7)), np.tril(np.ones((5, 7), bool))
    total = token_rewards(np.float32(scores), np.float32(kl), mask, kl_coef=0.3).sum(1)
    np.testing.assert_allclose(total, scores - 0.3 * (kl * mask).sum(1), rtol=1e-4, atol=1e-5)


def test_garbage_kl_in_the_pads_does_not_reach_the_gradient_of_the_coefficient():
    kl, mask = np.float32([1, np.nan]), np.array([True, False])
    gradient = jax.grad(lambda c: token_rewards(np.float32(1), kl, mask, kl_coef=c).sum())(jnp.float32(0.1))
    assert gradient == -1


def test_group_baselines_by_hand():
    scores = np.float32([[1, 2, 6], [5, 5, 5]])
    np.testing.assert_allclose(group_centered(scores), [[-2, -1, 3], [0, 0, 0]])
    np.testing.assert_allclose(leave_one_out(scores), [[1 - 4, 2 - 3.5, 6 - 1.5], [0, 0, 0]])
    unbiased = np.array([-2, -1, 3]) / (np.sqrt(14 / 2) + 1e-4)
    np.testing.assert_allclose(group_normalized(scores), [unbiased, np.zeros(3)], rtol=1e-6)
    biased = np.array([-2, -1, 3]) / np.sqrt(14 / 3)
    np.testing.assert_allclose(group_normalized(scores, ddof=0, eps=0), [biased, np.zeros(3)], rtol=1e-6)


@pytest.mark.parametrize("baseline", [group_centered, group_normalized, leave_one_out])
def test_a_baseline_ignores_a_constant_and_sums_to_zero(baseline):
    scores = RNG.normal(size=(4, 5)).astype(np.float32)
    np.testing.assert_allclose(baseline(scores + np.float32(3)), baseline(scores), atol=1e-5)
    np.testing.assert_allclose(baseline(scores).sum(-1), 0, atol=1e-5)


def test_leave_one_out_does_not_use_a_score_as_its_own_baseline():
    scores = RNG.normal(size=4).astype(np.float32)
    others = [np.delete(scores, i).mean() for i in range(4)]
    np.testing.assert_allclose(leave_one_out(scores), scores - others, rtol=1e-4, atol=1e-6)


def test_equal_scores_have_a_finite_gradient():
    for eps in (0.0, 1e-4):
        gradient = jax.grad(lambda s, e=eps: group_normalized(s, eps=e)[0])(jnp.full(4, 2.0))
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("k", [3, 7, 8, 16])
def test_equal_scores_have_no_advantage_though_their_mean_is_rounded(k):
    for score in (0.1, 333.3, 12345.6):
        scores = jnp.full(k, score)
        for made in (group_centered, group_normalized, leave_one_out, jax.jit(group_normalized)):
            assert not made(scores).any(), (made, score)
    assert np.isnan(group_centered(jnp.full(k, jnp.nan))).all()


def test_a_group_of_one_has_no_baseline():
    one = np.ones((3, 1), np.float32)
    for baseline in (group_normalized, leave_one_out):
        with pytest.raises(ValueError, match="scores must hold more than 1"):
            baseline(one)
    assert not group_normalized(one, ddof=0).any() and not group_centered(one).any()
    with pytest.raises(ValueError, match="eps"):
        group_normalized(np.ones(3, np.float32), eps=-1.0)


def test_remax_is_what_a_sample_has_over_the_greedy_completion():
    scores = RNG.normal(size=(3, 2)).astype(np.float32)
    greedy = RNG.normal(size=3).astype(np.float32)[:, None].repeat(2, 1)
    np.testing.assert_array_equal(remax(scores, greedy), scores - greedy)
    assert not remax(scores, scores).any()


def test_reinforce_plus_plus_whitens_rewards_to_go_over_the_whole_batch():
    scores, kl = RNG.normal(size=6), RNG.normal(size=(6, 5))
    mask = np.arange(5) < np.array([5, 3, 1, 4, 2, 5])[:, None]
    rewards = token_rewards(np.float32(scores), np.float32(kl), mask, kl_coef=0.3)
    advantages = reinforce_plus_plus(rewards, mask)
    to_go = scores[:, None] - 0.3 * np.cumsum((kl * mask)[:, ::-1], 1)[:, ::-1]  # score − β Σ_{u ≥ t} KL_u
    kept = to_go[mask]
    np.testing.assert_allclose(advantages[mask], (kept - kept.mean()) / kept.std(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose((advantages[mask].mean(), advantages[mask].std()), (0, 1), atol=1e-5)
    assert not advantages[~mask].any()


def test_reinforce_plus_plus_discounts():
    even = reinforce_plus_plus(np.float32([1, 2]), np.ones(2, bool), gamma=0.5)  # returns 1 + ½ · 2 and 2
    assert not even.any()
    uneven = reinforce_plus_plus(np.float32([4, 2]), np.ones(2, bool), gamma=0.5)  # 5 and 2
    np.testing.assert_allclose(uneven, [1, -1], rtol=1e-5)
    with pytest.raises(ValueError, match=r"gamma must lie in .*, got 2"):
        reinforce_plus_plus(np.float32([1, 2]), np.ones(2, bool), gamma=2.0)
