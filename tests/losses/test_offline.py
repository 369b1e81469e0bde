"""ILQL by hand, term by term, and what its pieces learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.offline import (
    bellman_targets,
    conservative,
    expectile,
    ilql,
    perturbed_logits,
    q_regression,
)
from tests.properties import Case, Properties, mask_of, normal

RNG = np.random.default_rng(0)


def of_shape(*shape):
    return lambda rng, lead: rng.normal(size=(*lead, *shape))


def integers(high, *shape):
    return lambda rng, lead: rng.integers(0, high, (*lead, *shape))


class TestProperties(Properties):
    cases = (
        Case(bellman_targets, normal("rewards", "values", mask=mask_of()), {"gamma": 0.9}),
        Case(q_regression, normal("targets", q_values=of_shape(5, 2))),
        Case(expectile, normal("values", "targets"), {"tau": 0.8}),
        Case(conservative, normal("q_values", shape=(5, 6), actions=integers(6, 5))),
        Case(
            perturbed_logits,
            normal("logits", "q_values", shape=(5, 6), values=of_shape(5)),
            {"beta": 2.0},
            aligned=False,
        ),
    )


class TestStoppedGradients(Properties):
    """Its targets have no gradient, so its gradient is not that of its value."""

    test_gradient_equals_finite_differences = None
    cases = (
        Case(
            ilql,
            normal(
                "values",
                "rewards",
                q_values=of_shape(5, 2, 3),
                target_q_values=of_shape(5, 2, 3),
                actions=integers(3, 5),
                mask=mask_of(),
            ),
            {"gamma": 0.9, "tau": 0.8, "cql_coef": 0.3},
        ),
    )


def test_targets_bootstrap_from_the_next_token_and_end_with_the_sequence():
    rewards, values = np.float32([9, 1, 9, 3, 9]), np.float32([9, 2, 9, 4, 9])
    mask = np.array([False, True, False, True, False])
    np.testing.assert_allclose(bellman_targets(rewards, values, mask, gamma=0.5), [0, 1 + 0.5 * 4, 0, 3, 0])


def test_every_head_learns_the_same_target():
    loss, diagnostics = q_regression(np.float32([[1, 4], [2, 2]]), np.float32([3, 2]))
    assert loss.tolist() == [4 + 1, 0] and diagnostics["spread"].tolist() == [3, 0]


@pytest.mark.parametrize("tau", [0.5, 0.7, 0.99])
def test_the_minimum_of_the_expectile_loss_is_the_expectile(tau):
    targets = np.float32([0.0, 1.0, 4.0])

    def slope(value):
        return jax.grad(lambda v: expectile(jnp.full(3, v), targets, tau=tau)[0].sum())(value)

    low, high = jnp.float32(0), jnp.float32(4)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    weights = np.where(targets > low, tau, 1 - tau)  # an expectile is the mean of its targets under these weights
    np.testing.assert_allclose(low, np.average(targets, weights=weights), rtol=1e-4)


def test_the_expectile_loss_by_hand():
    loss, diagnostics = expectile(np.float32([0, 3]), np.float32([1, 1]), tau=0.9)
    np.testing.assert_allclose(loss, [0.9, 0.1 * 4], rtol=1e-6)
    assert diagnostics["advantage"].tolist() == [1, -2]


def test_the_conservative_term_by_hand():
    loss = conservative(np.log(np.float32([[1, 3], [1, 3]])), np.array([0, 1]))[0]
    np.testing.assert_allclose(loss, -np.log([0.25, 0.75]), rtol=1e-6)


def by_hand(q, target_q, values, rewards, actions, mask, *, gamma, tau, cql_coef):
    """One sequence of ILQL in loops, over the tokens that exist."""
    kept, losses = np.flatnonzero(mask), np.zeros(len(mask))
    for at, t in enumerate(kept):
        after = values[kept[at + 1]] if at + 1 < len(kept) else 0
        target = rewards[t] + gamma * after
        u = min(target_q[t, h, actions[t]] for h in range(q.shape[1])) - values[t]
        losses[t] = (tau if u > 0 else 1 - tau) * u**2
        for h in range(q.shape[1]):
            losses[t] += (q[t, h, actions[t]] - target) ** 2
            losses[t] += cql_coef * (np.log(np.exp(q[t, h]).sum()) - q[t, h, actions[t]])
    return losses


def example(batch=4, width=6):
    q, target_q = RNG.normal(size=(2, batch, width, 2, 5)).astype(np.float32)
    values, rewards = RNG.normal(size=(2, batch, width)).astype(np.float32)
    mask = RNG.random((batch, width)) < 0.7
    return q, target_q, values, rewards, RNG.integers(0, 5, (batch, width)), mask


def test_ilql_by_hand():
    arrays = example()
    scalars = {"gamma": 0.9, "tau": 0.8, "cql_coef": 0.3}
    loss, diagnostics = ilql(*arrays, **scalars)
    expected = [by_hand(*row, **scalars) for row in zip(*arrays, strict=True)]
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-5)
    terms = diagnostics["q_loss"] + diagnostics["v_loss"] + 0.3 * diagnostics["cql_loss"]
    np.testing.assert_allclose(loss, terms, rtol=1e-5, atol=1e-6)


def test_with_lambda_q_learns_what_the_sequence_got():
    q, _, values, rewards, actions, mask = example()
    zeros = np.zeros_like(q)
    to_go = np.flip(np.cumsum(np.flip(rewards * mask, -1), -1), -1)
    found = ilql(zeros, zeros, values, rewards, actions, mask, gamma=1.0, lam=1.0)[1]["q_loss"]
    np.testing.assert_allclose(found, 2 * np.square(to_go) * mask, rtol=1e-4, atol=1e-5)
    half = ilql(zeros, zeros, values, rewards, actions, mask, gamma=1.0, lam=0.5)[1]["q_loss"]
    for row, kept in enumerate(mask):
        after, expected = 0.0, np.zeros(len(kept))
        value = 0.0  # of the token after
        for t in np.flatnonzero(kept)[::-1]:
            after = rewards[row, t] + 0.5 * value + 0.5 * after  # R = r + (1 − λ) V + λ R
            expected[t], value = 2 * after**2, values[row, t]
        np.testing.assert_allclose(half[row], expected, rtol=1e-4, atol=1e-5)


def test_targets_have_no_gradient():
    q, target_q, values, *others = example()
    by_target = jax.grad(lambda x: ilql(q, x, values, *others)[0].sum())(target_q)
    assert not by_target.any()
    by_values = jax.grad(lambda x: ilql(q, target_q, x, *others)[0].sum())(values)
    u, mask = np.asarray(ilql(q, target_q, values, *others)[1]["advantage"]), others[-1]
    np.testing.assert_allclose(by_values, -2 * np.where(u < 0, 0.3, 0.7) * u * mask, rtol=1e-5)


def test_actions_of_pads_are_not_looked_at():
    *arrays, actions, mask = example()
    there = ilql(*arrays, actions, mask)
    spoilt = ilql(*arrays, np.where(mask, actions, -99), mask)
    jax.tree.map(np.testing.assert_array_equal, there, spoilt)


def test_the_extracted_policy_weighs_the_behaviour_policy_by_the_advantage():
    logits, q_values = RNG.normal(size=(2, 3, 7)).astype(np.float32)
    values = RNG.normal(size=3).astype(np.float32)
    policy = jax.nn.softmax(perturbed_logits(logits, q_values, values, beta=2.0))
    weighted = jax.nn.softmax(logits) * np.exp(2 * (q_values - values[:, None]))
    np.testing.assert_allclose(policy, weighted / weighted.sum(-1, keepdims=True), rtol=1e-4)
    behaviour = perturbed_logits(logits, q_values, values, beta=0.0)
    np.testing.assert_allclose(behaviour, jax.nn.log_softmax(logits), rtol=1e-6)
    cut = perturbed_logits(np.float32([[0, -np.inf]]), np.ones((1, 2), np.float32), np.zeros(1, np.float32), beta=1.0)
    assert cut[0, 1] == -np.inf and np.isfinite(cut[0, 0])


@pytest.mark.parametrize(
    ("name", "value"), [("tau", 1.0), ("tau", 0.0), ("gamma", 1.5), ("lam", -0.5), ("cql_coef", -1.0)]
)
def test_domains(name, value):
    with pytest.raises(ValueError, match=f"{name} must lie in .*, got {value:g}"):
        ilql(*example(), **{name: value})


def test_a_negative_temperature_is_refused():
    x = np.ones((1, 2), np.float32)
    with pytest.raises(ValueError, match=r"beta must lie in .*, got -1"):
        perturbed_logits(x, x, np.ones(1, np.float32), beta=-1.0)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_softmaxes_are_finite_at_any_q(dtype):
    q_values, actions = jnp.asarray([[1e4, -1e4, 0], [-1e4, 1e4, 1e4]], dtype), np.array([1, 0])
    zeros = jnp.zeros(2, dtype)
    for fn in (lambda q: conservative(q, actions)[0], lambda q: perturbed_logits(-q, q, zeros, beta=1.0)):
        value = jax.value_and_grad(lambda q, f=fn: f(q).sum())(q_values)
        assert all(np.isfinite(np.float32(x)).all() for x in value)
