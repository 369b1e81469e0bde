"""Losses of pairs: golden values by hand, what each is at the reference, limits and identities of the papers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax import losses
from rlhf_jax.losses import preference
from tests.losses import test_reference_free
from tests.properties import Case, Properties, all_finite, normal

PAIR = normal("chosen_logratio", "rejected_logratio", shape=(), scale=3.0)
FOUR = normal("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps", scale=3.0)
BETA, SMOOTH = {"beta": 0.3}, {"beta": 0.3, "label_smoothing": 0.2}
WITH_REFERENCE = {
    preference.dpo: SMOOTH,
    preference.robust_dpo: SMOOTH,
    preference.hinge: BETA,
    preference.ipo: BETA,
    preference.exo_pair: SMOOTH,
    preference.nca_pair: BETA,
    preference.bco_pair: BETA,
    preference.sppo_hard: BETA,
    preference.apo_zero: BETA,
    preference.apo_down: BETA,
    preference.discopop: {"beta": 0.3, "temperature": 0.5},
    preference.f_dpo: BETA,
}


class TestProperties(Properties):
    cases = (
        *(Case(fn, PAIR, scalars) for fn, scalars in WITH_REFERENCE.items()),
        *(
            Case(preference.f_dpo, PAIR, BETA, {"divergence": name}, label=f"-{name}")
            for name in ("forward_kl", "js", "alpha")
        ),
        *(Case(fn, FOUR, SMOOTH, aligned=False) for fn in (preference.aot, preference.aot_unpaired)),
    )


def test_every_public_loss_is_in_the_table_and_exported():
    tested = {case.fn.__name__ for case in (*TestProperties.cases, *test_reference_free.TestProperties.cases)}
    assert tested == set(preference.__all__)
    assert all(vars(losses)[name] is vars(preference)[name] for name in preference.__all__)


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


C, R, B = 1.5, -2.0, 0.4  # log-ratios and β: rewards 0.6 and −0.8, margin 1.4
GOLDEN = {
    preference.dpo: ({}, -log_sigmoid(1.4)),
    preference.robust_dpo: ({"label_smoothing": 0.25}, (-0.75 * log_sigmoid(1.4) + 0.25 * log_sigmoid(-1.4)) / 0.5),
    preference.hinge: ({}, 0.0),
    preference.ipo: ({}, (3.5 - 1.25) ** 2),
    preference.exo_pair: (
        {"label_smoothing": 0.1},
        sigmoid(1.4) * (log_sigmoid(1.4) - math.log(0.9)) + sigmoid(-1.4) * (log_sigmoid(-1.4) - math.log(0.1)),
    ),
    preference.nca_pair: ({}, -log_sigmoid(0.6) - log_sigmoid(-0.6) / 2 - log_sigmoid(0.8) / 2),
    preference.bco_pair: ({}, -log_sigmoid(0.6) - log_sigmoid(0.8)),
    preference.sppo_hard: ({}, (1.5 - 1.25) ** 2 + (-2 + 1.25) ** 2),
    preference.apo_zero: ({}, 1 - sigmoid(0.6) + sigmoid(-0.8)),
    preference.apo_down: ({}, sigmoid(0.6) + 1 - sigmoid(1.4)),
    preference.discopop: (
        {"temperature": 1.0},
        -log_sigmoid(1.4) * (1 - sigmoid(1.4)) + math.exp(-1.4) * sigmoid(1.4),
    ),
    preference.f_dpo: ({}, -log_sigmoid(1.4)),
    functools.partial(preference.f_dpo, divergence="forward_kl"): (
        {},
        -log_sigmoid(0.4 * (math.exp(2.0) - math.exp(-1.5))),
    ),
    functools.partial(preference.f_dpo, divergence="js"): (
        {},
        -log_sigmoid(0.4 * (log_sigmoid(1.5) - log_sigmoid(-2.0))),
    ),
    functools.partial(preference.f_dpo, divergence="alpha", alpha=0.5): (
        {},
        -log_sigmoid(0.4 * (2 * math.exp(1.0) - 2 * math.exp(-0.75))),
    ),
}


@pytest.mark.parametrize(("fn", "scalars", "expected"), [(fn, *rest) for fn, rest in GOLDEN.items()])
def test_by_hand(fn, scalars, expected):
    loss, diagnostics = fn(np.float32(C), np.float32(R), beta=B, **scalars)
    assert float(loss) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert diagnostics["accuracy"] == 1
    assert float(diagnostics["margin"]) == pytest.approx(
        float(diagnostics["chosen_reward"] - diagnostics["rejected_reward"])
    )


def test_rewards_are_beta_times_the_log_ratio():
    for fn in WITH_REFERENCE:
        _, diagnostics = fn(np.float32(C), np.float32(R), beta=B)
        assert (float(diagnostics["chosen_reward"]), float(diagnostics["rejected_reward"])) == pytest.approx(
            (0.6, -0.8)
        )


@given(st.floats(0.01, 5), st.floats(-20, 20))
@settings(max_examples=25, deadline=None)
def test_at_the_reference_dpo_is_log_two_whatever_beta(beta, shift):
    """A log-ratio that both completions share, as at the reference itself, moves nothing."""
    loss, _ = preference.dpo(np.float32(shift), np.float32(shift), beta=beta)
    assert float(loss) == pytest.approx(math.log(2), rel=1e-5)


@given(st.floats(0.05, 2), st.floats(-5, 5), st.floats(-5, 5))
@settings(max_examples=25, deadline=None)
def test_dpo_gradient_is_the_weighted_difference_of_the_paper(beta, chosen, rejected):
    """Rafailov et al. 2023, the equation after 7: −β σ(r_l − r_w) (∇log π(y_w) − ∇log π(y_l))."""
    gradient = jax.grad(lambda c, r: preference.dpo(c, r, beta=beta)[0], argnums=(0, 1))
    weight = beta * sigmoid(beta * (rejected - chosen))
    np.testing.assert_allclose(gradient(jnp.float32(chosen), jnp.float32(rejected)), (-weight, weight), rtol=2e-4)


def test_conservative_dpo_mixes_both_labels_and_robust_dpo_undoes_flips():
    c, r, eps = np.float32([0.5, -1, 3]), np.float32([-0.5, 2, 1]), 0.2
    right, wrong = preference.dpo(c, r)[0], preference.dpo(r, c)[0]
    mixed = preference.dpo(c, r, label_smoothing=eps)[0]
    np.testing.assert_allclose(mixed, (1 - eps) * right + eps * wrong, rtol=1e-5)
    # Labels are right with probability 1 − ε: the expectation over both cases is the clean loss.
    kept, flipped = (preference.robust_dpo(*pair, label_smoothing=eps)[0] for pair in ((c, r), (r, c)))
    np.testing.assert_allclose((1 - eps) * kept + eps * flipped, right, rtol=1e-5)


def test_divergences_have_their_limits():
    c, r = np.float32([0.5, -1, 3]), np.float32([-0.5, 2, 1])
    reverse = preference.dpo(c, r, beta=0.7)[0]
    np.testing.assert_allclose(preference.f_dpo(c, r, beta=0.7)[0], reverse, rtol=1e-6)
    for alpha, name in ((1e-3, "reverse_kl"), (1 - 1e-6, "forward_kl")):
        near = preference.f_dpo(c, r, beta=0.7, divergence="alpha", alpha=alpha)[0]
        np.testing.assert_allclose(near, preference.f_dpo(c, r, beta=0.7, divergence=name)[0], rtol=5e-3)
    for alpha in (1e-4, 1e-6):  # in float32, in which 1 − exp(−αu) would have no digit left
        near = preference.f_dpo(c, r, beta=0.7, divergence="alpha", alpha=alpha)[0]
        np.testing.assert_allclose(near, reverse, rtol=1e-3)
    small = np.float32(1e-3)  # all divergences agree near the reference, but for f″: 1 for KL, ½ for JS
    slopes = [
        float(jax.grad(lambda u, d=d: preference.f_dpo(u, -u, beta=1.0, divergence=d)[0])(small))
        for d in ("reverse_kl", "forward_kl", "alpha", "js")
    ]
    np.testing.assert_allclose(slopes, [-1, -1, -1, -0.5], atol=5e-3)


def test_ipo_is_least_at_its_margin_and_sppo_at_both():
    beta = 0.25
    margins = np.linspace(0, 4, 401, dtype=np.float32)
    assert margins[np.argmin(preference.ipo(margins, np.zeros_like(margins), beta=beta)[0])] == pytest.approx(2)
    assert float(preference.sppo_hard(np.float32(2), np.float32(-2), beta=beta)[0]) == pytest.approx(0)


def test_exo_is_a_kl_that_ends_at_the_smoothed_label():
    eps = 0.1
    aim = np.float32(math.log((1 - eps) / eps))
    zero = np.float32(0)
    assert float(preference.exo_pair(aim, zero, beta=1.0, label_smoothing=eps)[0]) == pytest.approx(0, abs=1e-6)
    assert float(preference.exo_pair(aim + 1, zero, beta=1.0, label_smoothing=eps)[0]) > 1e-3


def test_discopop_is_one_or_the_other_far_from_zero():
    far = np.float32([30, -30])
    loss, _ = preference.discopop(far, np.zeros_like(far), beta=0.1)
    np.testing.assert_allclose(loss, [math.exp(-3), -log_sigmoid(-3)], rtol=1e-5)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_sorting_losses_see_the_batch_as_a_set(name):
    fn = vars(preference)[name]
    rng = np.random.default_rng(0)
    c, r, rc, rr = rng.normal(size=(4, 6)).astype(np.float32)
    order, other = rng.permutation(6), rng.permutation(6)
    loss = fn(c, r, rc, rr, beta=0.5)[0]
    if name == "aot":  # pairs of the policy and pairs of the reference are two sets
        shuffled = fn(c[order], r[order], rc[other], rr[other], beta=0.5)[0]
        by_hand = np.sort(c - r) - np.sort(rc - rr)
    else:  # chosen ones and rejected ones are
        shuffled = fn(c[order], r[other], rc[order], rr[other], beta=0.5)[0]
        by_hand = np.sort(c - rc) - np.sort(r - rr)
    np.testing.assert_allclose(shuffled, loss, rtol=1e-6)
    np.testing.assert_allclose(loss, np.log1p(np.exp(-0.5 * by_hand)), rtol=1e-5)
    one = fn(c[:1], r[:1], rc[:1], rr[:1], beta=0.5)[0]
    np.testing.assert_allclose(one, preference.dpo(c[:1] - rc[:1], r[:1] - rr[:1], beta=0.5)[0], rtol=1e-5)
    deep = fn(*(np.stack([x, x + 1]) for x in (c, r, rc, rr)), beta=0.5)[0]
    np.testing.assert_allclose(deep, np.stack([loss, loss]), rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_extreme_log_ratios_stay_finite_forward_and_backward(dtype):
    ends = jnp.array([1e4, -1e4, 1e4, -1e4], dtype), jnp.array([1e4, 1e4, -1e4, -1e4], dtype)
    for case in TestProperties.cases:
        total = functools.partial(lambda *x, case: case.fn(*x, **case.scalars, **case.static)[0].sum(), case=case)
        given = (*ends, *ends[::-1])[: len(case.arrays())]
        assert all_finite(jax.value_and_grad(total, argnums=tuple(range(len(given))))(*given)), case


@pytest.mark.parametrize(
    ("fn", "scalars", "message"),
    [
        *((fn, {"beta": 0.0}, "beta must lie in (0, inf), got 0") for fn in WITH_REFERENCE),
        (preference.dpo, {"beta": -1.0}, "beta must lie in (0, inf), got -1"),
        (preference.dpo, {"label_smoothing": 0.5}, "label_smoothing must lie in [0, 0.5), got 0.5"),
        (preference.robust_dpo, {"label_smoothing": 0.5}, "label_smoothing must lie in [0, 0.5), got 0.5"),
        (preference.exo_pair, {"label_smoothing": 0.0}, "label_smoothing must lie in (0, 0.5), got 0"),
        (preference.discopop, {"temperature": 0.0}, "temperature must lie in (0, inf), got 0"),
        (preference.f_dpo, {"alpha": 1.0}, "alpha must lie in (0, 1), got 1"),
        (preference.f_dpo, {"divergence": "kl"},
         "divergence must be one of reverse_kl, forward_kl, js, alpha, got 'kl'"),
        *((functools.partial(fn, np.zeros(1), np.zeros(1)), {"beta": 0.0}, "beta must lie in (0, inf), got 0")
          for fn in (preference.aot, preference.aot_unpaired)),
    ],
)  # fmt: skip
def test_what_lies_outside_is_refused_with_its_value(fn, scalars, message):
    with pytest.raises(ValueError) as error:
        fn(np.float32([0.0]), np.float32([0.0]), **scalars)
    assert str(error.value) == message
