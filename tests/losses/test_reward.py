"""Losses of reward models: by hand, and one as a case of another."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.reward import (
    best_of_k,
    bradley_terry,
    centering,
    k_wise,
    ordinal_rating,
    outcome_bce,
    plackett_luce,
    process_bce,
    scalar_rating,
)
from rlhf_jax.masking import sequence_mean, token_mean
from tests.properties import Case, Properties, mask_of, normal

RNG = np.random.default_rng(0)
LOG_2 = np.log(2)
THRESHOLDS = np.float32([-1, 0.5, 1.5])


def integers(high, *shape):
    return lambda rng, lead: rng.integers(0, high, (*lead, *shape))


def always_kept(rng, lead):
    return np.full(lead, 2)


def probabilities(rng, lead):
    return rng.uniform(0.1, 0.9, (*lead, 5))


def bools(rng, lead):
    return rng.random((*lead, 5)) < 0.5


class TestProperties(Properties):
    cases = (
        Case(bradley_terry, normal("chosen_scores", "rejected_scores"), {"margin": 0.5, "label_smoothing": 0.1}),
        Case(bradley_terry, normal("chosen_scores", "rejected_scores", "margin"), label="-margins"),
        Case(centering, normal("scores_a", "scores_b")),
        Case(plackett_luce, normal("ranked_scores")),
        Case(plackett_luce, normal("ranked_scores", where=mask_of()), label="-where"),
        Case(k_wise, normal("scores", ranks=integers(3, 5))),
        Case(k_wise, normal("scores", ranks=integers(3, 5), where=mask_of()), label="-where"),
        Case(best_of_k, normal("scores", best=integers(5))),
        Case(best_of_k, normal("scores", best=always_kept, where=mask_of()), label="-where"),
        Case(scalar_rating, normal("scores", "ratings")),
        Case(outcome_bce, normal("scores", labels=probabilities)),
        Case(outcome_bce, normal("scores", labels=bools), label="-bools"),
        Case(process_bce, normal("scores", labels=probabilities)),
        Case(process_bce, normal("scores", labels=bools, where=mask_of()), label="-where"),
        Case(ordinal_rating, normal("scores", ratings=integers(4, 5)), static={"thresholds": THRESHOLDS}),
    )


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_bradley_terry_by_hand():
    chosen, rejected = np.float32([2, 1, 0, -50]), np.float32([1, 1, 3, 50])
    loss, diagnostics = bradley_terry(chosen, rejected)
    np.testing.assert_allclose(loss, [-np.log(sigmoid(1)), LOG_2, -np.log(sigmoid(-3)), 100], rtol=1e-5)
    assert diagnostics["accuracy"].tolist() == [1, 0.5, 0, 0]
    assert diagnostics["margin"].tolist() == [1, 0, -3, -100]


def test_the_margin_is_subtracted_before_smoothing():
    chosen, rejected, margin = np.float32([2.0]), np.float32([1.0]), np.float32([0.25])
    loss, diagnostics = bradley_terry(chosen, rejected, margin=margin, label_smoothing=0.1)
    np.testing.assert_allclose(loss, -0.9 * np.log(sigmoid(0.75)) - 0.1 * np.log(sigmoid(-0.75)), rtol=1e-6)
    assert diagnostics["margin"] == 1  # the diagnostic is the scores' own


def test_smoothing_is_the_expected_loss_under_wrong_labels():
    a, b = RNG.normal(size=(2, 5)).astype(np.float32)
    expected = 0.7 * bradley_terry(a, b)[0] + 0.3 * bradley_terry(b, a)[0]
    np.testing.assert_allclose(bradley_terry(a, b, label_smoothing=0.3)[0], expected, rtol=1e-5)


def test_the_gradient_of_bradley_terry_is_the_probability_of_the_other_order():
    gradient = jax.grad(lambda x: bradley_terry(x, jnp.float32(0.3))[0])(jnp.float32(1.0))
    np.testing.assert_allclose(gradient, -sigmoid(-0.7), rtol=1e-6)


@pytest.mark.parametrize("label_smoothing", [-0.1, 0.5, 1.0])
def test_smoothing_that_erases_the_label_is_refused(label_smoothing):
    with pytest.raises(ValueError, match="label_smoothing"):
        bradley_terry(np.zeros(2, np.float32), np.zeros(2, np.float32), label_smoothing=label_smoothing)


def test_two_completions_are_bradley_terry_whatever_the_loss():
    scores = RNG.normal(size=(6, 2)).astype(np.float32)
    expected, diagnostics = bradley_terry(scores[:, 0], scores[:, 1])
    for loss, other in (
        plackett_luce(scores),
        k_wise(scores, np.tile([0, 1], (6, 1))),
        best_of_k(scores, np.zeros(6, int)),
        outcome_bce(scores[:, 0] - scores[:, 1], np.ones(6, bool)),
    ):
        np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(other["accuracy"], diagnostics["accuracy"])


def test_plackett_luce_by_hand():
    scores = np.float32([1.0, 0.0, 2.0])
    p = [np.exp(1) / (np.exp(1) + 1 + np.exp(2)), 1 / (1 + np.exp(2)), 1]
    loss, diagnostics = plackett_luce(scores)
    np.testing.assert_allclose(loss, -np.sum(np.log(p)), rtol=1e-5)
    assert diagnostics["accuracy"] == 0
    assert plackett_luce(scores[[2, 0, 1]])[1]["accuracy"] == 1


def test_plackett_luce_is_a_distribution_over_rankings():
    scores = RNG.normal(size=4).astype(np.float32) * 3
    orders = np.array(list(itertools.permutations(range(4))))
    np.testing.assert_allclose(np.exp(-plackett_luce(scores[orders])[0]).sum(), 1, rtol=1e-5)


def test_where_ranks_the_completions_that_exist():
    scores = RNG.normal(size=5).astype(np.float32)
    where = np.array([False, True, True, False, True])
    loss, diagnostics = plackett_luce(scores, where)
    expected, of_three = plackett_luce(scores[where])
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert diagnostics["accuracy"] == of_three["accuracy"]
    one, none = plackett_luce(scores, np.arange(5) == 2)[0], plackett_luce(scores, np.zeros(5, bool))
    assert one == 0 and none[0] == 0 and none[1]["accuracy"] == 0


def test_where_keeps_the_completions_that_exist_in_every_loss_of_a_group():
    scores, ranks = RNG.normal(size=5).astype(np.float32), np.array([9, 1, 0, 9, 2])
    where = np.array([False, True, True, False, True])
    for whole, some in (
        (k_wise(scores, ranks, where), k_wise(scores[where], ranks[where])),
        (best_of_k(scores, np.array(2), where), best_of_k(scores[where], np.array(1))),
    ):
        np.testing.assert_allclose(whole[0], some[0], rtol=1e-6)
        assert whole[1]["accuracy"] == some[1]["accuracy"]
    assert k_wise(scores, ranks, np.arange(5) == 2)[0] == 0  # one completion is no pair
    assert best_of_k(scores, np.array(2), np.zeros(5, bool))[0] == 0


def test_k_wise_is_bradley_terry_over_all_pairs():
    scores, ranks = RNG.normal(size=4).astype(np.float32), np.array([2, 0, 3, 1])
    order = np.argsort(ranks)
    pairs = [bradley_terry(scores[order[i]], scores[order[j]]) for i in range(4) for j in range(i + 1, 4)]
    loss, diagnostics = k_wise(scores, ranks)
    np.testing.assert_allclose(loss, np.mean([pair[0] for pair in pairs]), rtol=1e-5)
    np.testing.assert_allclose(diagnostics["accuracy"], np.mean([pair[1]["accuracy"] for pair in pairs]), rtol=1e-6)


def test_equal_ranks_make_no_pair_and_the_weight_stays():
    loss, diagnostics = k_wise(np.float32([0, 1, 5]), np.array([1, 0, 1]))
    np.testing.assert_allclose(loss, -(np.log(sigmoid(1)) + np.log(sigmoid(-4))) / 3, rtol=1e-6)
    assert diagnostics["accuracy"] == 0.5
    tied = k_wise(np.float32([0, 1, 5]), np.array([2, 2, 2]))
    assert tied[0] == 0 and tied[1]["accuracy"] == 0


def test_best_of_k_is_a_softmax_over_the_completions():
    loss, diagnostics = best_of_k(np.log(np.float32([[1, 2, 5], [1, 2, 5]])), np.array([2, 0]))
    np.testing.assert_allclose(loss, -np.log([5 / 8, 1 / 8]), rtol=1e-6)
    assert diagnostics["accuracy"].tolist() == [1, 0]


def test_ratings_and_centering_by_hand():
    loss, diagnostics = scalar_rating(np.float32([2, 5]), np.float32([5, 5]))
    assert loss.tolist() == [4.5, 0] and diagnostics["error"].tolist() == [-3, 0]
    assert centering(np.float32([1, -2]), np.float32([-0.5, 2]))[0].tolist() == [0.25, 0]


def test_centering_settles_the_constant_that_bradley_terry_leaves_free():
    a, b = np.float32(3.0), np.float32(2.0)
    gradient = jax.grad(lambda shift: bradley_terry(a + shift, b + shift)[0])(jnp.float32(0))
    np.testing.assert_allclose(gradient, 0, atol=1e-7)
    assert centering(a - np.float32(2.5), b - np.float32(2.5))[0] == 0


def test_outcome_bce_by_hand():
    loss, diagnostics = outcome_bce(np.float32([1, 1, -1]), np.array([True, False, False]))
    np.testing.assert_allclose(loss, -np.log([sigmoid(1), sigmoid(-1), sigmoid(1)]), rtol=1e-6)
    assert diagnostics["accuracy"].tolist() == [1, 0, 1]
    soft = outcome_bce(np.float32([1.0]), np.float32([0.25]))[0]
    np.testing.assert_allclose(soft, -0.25 * np.log(sigmoid(1)) - 0.75 * np.log(sigmoid(-1)), rtol=1e-6)


def test_groups_too_small_are_refused():
    with pytest.raises(ValueError, match="k must lie in"):
        k_wise(np.ones((2, 1), np.float32), np.zeros((2, 1), int))
    with pytest.raises(ValueError, match="k must lie in"):
        plackett_luce(np.ones((2, 0), np.float32))


def test_process_bce_is_outcome_bce_of_the_steps_that_there_are():
    scores, labels = RNG.normal(size=(3, 4)).astype(np.float32), RNG.random((3, 4)) < 0.5
    where = np.array([[1, 1, 1, 1], [0, 1, 0, 0], [1, 0, 0, 1]], bool)
    every, diagnostics = outcome_bce(scores, labels)
    loss, others = process_bce(scores, labels, where)
    np.testing.assert_allclose(loss, every * where, rtol=1e-6)
    np.testing.assert_array_equal(others["accuracy"], diagnostics["accuracy"] * where)
    np.testing.assert_allclose(process_bce(scores, labels)[0], every, rtol=1e-6)
    every = np.asarray(every, np.float64)
    np.testing.assert_allclose(token_mean(loss, where).value, every[where].mean(), rtol=1e-6)
    of_solutions = [row[kept].mean() for row, kept in zip(every, where, strict=True)]
    np.testing.assert_allclose(sequence_mean(loss, where).value, np.mean(of_solutions), rtol=1e-6)


def test_process_bce_of_one_logit_is_the_cross_entropy_of_two():
    logits, labels = RNG.normal(size=(5, 2)).astype(np.float32), RNG.random(5) < 0.5
    expected = -jax.nn.log_softmax(logits)[np.arange(5), labels.astype(int)]
    np.testing.assert_allclose(process_bce(logits[:, 1] - logits[:, 0], labels)[0], expected, rtol=1e-5)


def test_ordinal_rating_by_hand():
    scores, ratings = np.float32([0.3, 0.3, 0.3, 0.3]), np.arange(4)
    below = sigmoid(THRESHOLDS.astype(np.float64) - 0.3)  # P(rating ≤ j)
    loss, diagnostics = ordinal_rating(scores, ratings, THRESHOLDS)
    np.testing.assert_allclose(loss, -np.log(np.diff([0, *below, 1])), rtol=1e-5)
    assert diagnostics["accuracy"].tolist() == [0, 1, 0, 0] and diagnostics["error"].tolist() == [1, 0, -1, -2]


def test_ordinal_rating_is_a_distribution_over_ratings():
    scores = np.float32(RNG.normal(size=6))[:, None].repeat(4, 1)
    loss = ordinal_rating(scores, np.arange(4)[None].repeat(6, 0), THRESHOLDS)[0]
    np.testing.assert_allclose(np.exp(-loss).sum(1), 1, rtol=1e-5)


def test_ordinal_rating_of_two_grades_is_outcome_bce():
    scores, labels = RNG.normal(size=7).astype(np.float32), RNG.integers(0, 2, 7)
    loss, diagnostics = ordinal_rating(scores, labels, np.zeros(1, np.float32))
    expected, others = outcome_bce(scores, labels > 0)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_array_equal(diagnostics["accuracy"], others["accuracy"])


def test_thresholds_have_the_gradient_of_finite_differences(float64):
    scores, ratings = RNG.normal(size=20), RNG.integers(0, 4, 20)

    def total(thresholds):
        return ordinal_rating(scores, ratings, thresholds)[0].sum()

    thresholds = THRESHOLDS.astype(np.float64)
    steps = 1e-6 * np.eye(3)
    expected = [(total(thresholds + step) - total(thresholds - step)) / 2e-6 for step in steps]
    np.testing.assert_allclose(jax.grad(total)(thresholds), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_ratings_and_steps_are_finite_at_any_score(dtype):
    scores = jnp.asarray([-1e4, -1e4, 1e4, 1e4], dtype)
    for ratings in ([0, 3, 0, 3], [1, 2, 1, 2]):
        value = jax.value_and_grad(lambda x, r=ratings: ordinal_rating(x, np.array(r), THRESHOLDS)[0].sum())(scores)
        assert all(np.isfinite(x).all() for x in map(np.float32, value))
    labels = np.array([True, False, True, False])
    value = jax.value_and_grad(lambda x: process_bce(x, labels, labels)[0].sum())(scores)
    assert all(np.isfinite(x).all() for x in map(np.float32, value))


def test_ratings_and_thresholds_out_of_order_are_refused():
    scores = np.zeros(2, np.float32)
    for ratings, value in (([0, 4], 4), ([-1, 0], -1)):
        with pytest.raises(ValueError, match=f"ratings must lie in .*0, 3.*, got {value}"):
            ordinal_rating(scores, np.array(ratings), THRESHOLDS)
    with pytest.raises(ValueError, match=r"gap between thresholds must lie in .*, got -1.5"):
        ordinal_rating(scores, np.array([0, 1]), np.float32([0, 1, -0.5]))
    with pytest.raises(ValueError, match="k must lie in"):
        ordinal_rating(scores, np.array([0, 0]), np.zeros(0, np.float32))
