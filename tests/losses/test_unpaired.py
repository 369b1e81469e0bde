"""Losses of single completions: by hand, against their paired forms, and the baselines they are seen from."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from rlhf_jax.losses import preference
from rlhf_jax.losses.unpaired import RewardShift, bco, kto, kto_kl_baseline
from tests.properties import Case, Properties, all_finite

KTO = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.8, "kl_baseline": 0.4}


def thumbed(rng, lead):
    return {"logratios": rng.normal(size=lead) * 3, "desirable": rng.random(lead) < 0.5}


class TestProperties(Properties):
    cases = (
        Case(kto, thumbed, KTO),
        Case(bco, thumbed, {"beta": 0.3, "delta": 0.2}),
        Case(
            kto_kl_baseline,
            lambda rng, lead: {"mismatched_logratios": rng.normal(size=(*lead, 3)) + 1},
            rowwise=False,
            aligned=False,
        ),
    )

    def test_gradient_equals_finite_differences(self, case, float64):
        """But for the baseline, whose gradient is stopped."""
        if case.fn is kto_kl_baseline:
            _, gradients = case.total_and_gradients(case.arrays(4, dtype=np.float64))
            assert not gradients["mismatched_logratios"].any()
        else:
            super().test_gradient_equals_finite_differences(case, float64)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_kto_by_hand():
    loss, diagnostics = kto(
        np.float32([2.0, 2.0]), np.array([True, False]), 0.5, beta=0.4, desirable_weight=1.5, undesirable_weight=0.5
    )
    expected = [1.5 * (1 - sigmoid(0.4 * 1.5)), 0.5 * (1 - sigmoid(-0.4 * 1.5))]
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(diagnostics["reward"], [0.8, 0.8], rtol=1e-6)


def test_at_the_baseline_kto_is_half_the_weight_and_pulls_apart():
    r, desirable = jnp.float32([1.0, 1.0]), np.array([True, False])
    loss, _ = kto(r, desirable, 1.0, beta=0.7, desirable_weight=1.2, undesirable_weight=0.8)
    np.testing.assert_allclose(loss, [0.6, 0.4], rtol=1e-6)
    slope = jax.grad(lambda r: kto(r, desirable, 1.0, beta=0.7)[0].sum())(r)
    np.testing.assert_allclose(slope, [-0.7 / 4, 0.7 / 4], rtol=1e-6)  # ∓ w β σ′(0)


def test_the_baseline_is_clamped_and_never_learns():
    assert kto_kl_baseline(np.float32([1.0, 2.0])) == 1.5 and kto_kl_baseline(np.float32([-1.0, -2.0])) == 0
    moving = jnp.float32([3.0, 1.0])
    slope = jax.grad(lambda x: kto(jnp.zeros(2), np.array([True, False]), kto_kl_baseline(x))[0].sum())(moving)
    assert not slope.any()


def test_bco_without_a_shift_is_its_paired_form():
    c, r = np.float32([0.5, -1, 3]), np.float32([-0.5, 2, 1])
    liked, disliked = bco(c, np.ones(3, bool), 0.0)[0], bco(r, np.zeros(3, bool), 0.0)[0]
    np.testing.assert_allclose(liked + disliked, preference.bco_pair(c, r)[0], rtol=1e-6)


def test_bco_is_log_two_at_the_shift():
    loss, _ = bco(np.float32([5.0, 5.0]), np.array([True, False]), 2.0, beta=0.4)
    np.testing.assert_allclose(loss, [math.log(2)] * 2, rtol=1e-6)


def test_the_shift_lies_halfway_between_the_running_means():
    rng = np.random.default_rng(0)
    shift, rewards, desirable = RewardShift.init(), [], []
    assert shift.delta == 0
    update = jax.jit(lambda shift, *batch: shift.update(*batch))
    for size in (3, 3, 3):
        rewards.append(rng.normal(size=size).astype(np.float32))
        desirable.append(rng.random(size) < 0.3)
        shift = update(shift, rewards[-1], desirable[-1])
    r, d = np.concatenate(rewards), np.concatenate(desirable)
    assert d.any() and not d.all()
    assert float(shift.delta) == pytest.approx((r[d].mean() + r[~d].mean()) / 2, abs=1e-6)
    slope = jax.grad(lambda x: RewardShift.init().update(x, d).delta)(jnp.asarray(r))
    assert not slope.any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_extreme_log_ratios_stay_finite(dtype):
    ends, desirable = jnp.array([1e4, -1e4, 1e4, -1e4], dtype), np.array([True, True, False, False])
    for fn in (lambda x: kto(x, desirable, 0.0)[0].sum(), lambda x: bco(x, desirable, 0.0)[0].sum()):
        assert all_finite(jax.value_and_grad(fn)(ends))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, d: kto(x, d, 0.0, beta=0.0), "beta must lie in (0, inf), got 0"),
        (lambda x, d: kto(x, d, 0.0, desirable_weight=-1.0), "desirable_weight must lie in (0, inf), got -1"),
        (lambda x, d: kto(x, d, 0.0, undesirable_weight=0.0), "undesirable_weight must lie in (0, inf), got 0"),
        (lambda x, d: bco(x, d, 0.0, beta=-2.0), "beta must lie in (0, inf), got -2"),
    ],
)
def test_what_lies_outside_is_refused_with_its_value(call, message):
    with pytest.raises(ValueError) as error:
        call(np.zeros(2, np.float32), np.array([True, False]))
    assert str(error.value) == message


@pytest.mark.parametrize("rewards", [np.ones(2, np.int32), np.ones((2, 1), np.float32)], ids=["integers", "[b, 1]"])
def test_the_shift_refuses_integers_and_other_shapes_by_name(rewards):
    with pytest.raises(TypeCheckError, match=r"RewardShift\.update"):
        RewardShift.init().update(rewards, np.array([True, False]))
