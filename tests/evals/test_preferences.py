"""Accuracy, log loss and calibration against scikit-learn, hand counts and the inequality that defines the interval."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, log_loss

from rlhf_jax.errors import NonFiniteError
from rlhf_jax.evals import Bin, accuracy_interval, evaluate_pairs, pearson
from rlhf_jax.evals.preferences import Z


def logit(p):
    return math.log(p / (1 - p))


def report_of(margins, scores=(0.0, 1.0), lengths=(1, 2)):
    margins = np.asarray(margins, np.float64)
    shift = np.linspace(-2, 2, margins.size)
    return evaluate_pairs(margins + shift, shift, scores=np.asarray(scores, float), lengths=np.asarray(lengths))


def test_accuracy_and_log_loss_are_scikit_learns():
    rng = np.random.default_rng(0)
    winners, losers = rng.normal(0.7, 1, 400), rng.normal(0, 1, 400)
    report = evaluate_pairs(winners, losers, scores=winners, lengths=np.arange(400))
    # The pair in a random order, with the label that says whether the first one won.
    first_won = rng.random(400) < 0.5
    delta = np.where(first_won, winners - losers, losers - winners)
    assert report.accuracy == pytest.approx(accuracy_score(first_won, delta > 0))
    assert report.log_loss == pytest.approx(log_loss(first_won, 1 / (1 + np.exp(-delta))))
    assert report.mean_margin == pytest.approx(winners.mean() - losers.mean())
    assert report.n == 400


def test_calibration_by_hand():
    # Confidences .52 (wrong), .53 (right) | .72, .74 (both right), .71 (wrong) | .97 (right).
    margins = [logit(p) for p in (0.48, 0.53, 0.72, 0.74, 0.29, 0.97)]
    report = report_of(margins)
    expected = ((0.525, 1 / 2, 2), (2.17 / 3, 2 / 3, 3), (0.97, 1.0, 1))
    assert [one.count for one in report.bins] == [count for _, _, count in expected]
    for found, (confidence, accuracy, _) in zip(report.bins, expected, strict=True):
        assert found.confidence == pytest.approx(confidence) and found.accuracy == pytest.approx(accuracy)
    assert report.ece == pytest.approx((2 * 0.025 + 3 * (0.17 / 3) + 1 * 0.03) / 6)


def test_bins_are_ten_of_equal_width_and_edges_belong_to_the_upper_one():
    centres = np.arange(0.525, 1, 0.05)
    assert [one.count for one in report_of([logit(p) for p in centres]).bins] == [1] * 10
    # σ(0) = ½ and σ(50) = 1 in float64 are in the first and in the last bin.
    assert report_of([0.0, 50.0]).bins == (Bin(0.5, 0.5, 1), Bin(1.0, 1.0, 1))


def test_calibration_sees_overconfidence_alone():
    rng = np.random.default_rng(1)
    honest = rng.normal(0, 1.5, 20_000)
    margins = np.where(rng.random(honest.size) < 1 / (1 + np.exp(-honest)), honest, -honest)
    assert report_of(margins).ece < 0.015
    assert report_of(4 * margins).ece > 0.1
    assert report_of(4 * margins).accuracy == report_of(margins).accuracy


def test_ties_count_half_and_extreme_margins_stay_finite():
    report = report_of([0.0, 0.0, 1.0, -1.0])
    assert report.accuracy == 0.5
    report = evaluate_pairs(
        np.array([1e4, -1e4]), np.zeros(2), scores=np.array([1e4, -1e4]), lengths=np.array([3.0, 4.0])
    )
    assert report.log_loss == pytest.approx(5e3) and report.ece == pytest.approx(0.5)


@pytest.mark.parametrize(("wins", "n"), [(0, 1), (1, 1), (0, 40), (40, 40), (31, 40), (31.5, 40), (800, 1000)])
def test_the_interval_is_the_set_that_wilson_defines(wins, n):
    low, high = accuracy_interval(wins, n)
    share = wins / n
    inside = lambda p: abs(share - p) <= Z * math.sqrt(p * (1 - p) / n) + 1e-12  # noqa: E731
    grid = np.linspace(0, 1, 2001)
    members = grid[[inside(p) for p in grid]]
    assert members.min() == pytest.approx(low, abs=6e-4) and members.max() == pytest.approx(high, abs=6e-4)
    assert 0 <= low <= share <= high <= 1


@pytest.mark.parametrize(("wins", "n"), [(0, 0), (-1, 4), (5, 4), (math.nan, 4)])
def test_an_impossible_share_is_refused(wins, n):
    with pytest.raises(ValueError, match="out of"):
        accuracy_interval(wins, n)


def test_length_correlation_is_pearsons_and_zero_for_constants():
    rng = np.random.default_rng(2)
    lengths = rng.integers(1, 40, 300)
    scores = rng.normal(size=300) + 0.05 * lengths
    report = report_of([1.0], scores, lengths)
    assert report.length_correlation == pytest.approx(pearsonr(scores, lengths).statistic)
    assert report_of([1.0], scores, np.full(300, 40)).length_correlation == 0.0
    assert report_of([1.0], np.full(300, 0.1), lengths).length_correlation == 0.0
    assert pearson(np.array([1.0]), np.array([2.0])) == 0.0
    assert pearson(lengths, 3 * lengths + 1) == pytest.approx(1) and abs(pearson(lengths, -7 * lengths)) <= 1


def test_jax_and_numpy_of_any_precision_agree():
    winners, losers = np.array([1.5, 0.25, -2.0]), np.array([0.5, 0.25, 1.0])
    expected = evaluate_pairs(winners, losers, scores=winners, lengths=np.array([1, 2, 4]))
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        won, lost = jnp.asarray(winners, dtype), jnp.asarray(losers, dtype)
        assert evaluate_pairs(won, lost, scores=won, lengths=jnp.array([1, 2, 4])) == expected


def test_a_report_survives_json():
    report = report_of([1.0, -0.5, 0.0, 3.0])
    found = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert found == report.to_json()
    assert found["n"] == 4 and found["interval"] == list(report.interval)
    assert found["bins"][0] == {"confidence": 0.5, "accuracy": 0.5, "count": 1}


def test_bad_input_names_the_argument():
    two, three = np.zeros(2), np.zeros(3)
    with pytest.raises(NonFiniteError, match="loser_scores: 1 of 2"):
        evaluate_pairs(two, np.array([0.0, np.nan]), scores=two, lengths=two)
    with pytest.raises(ValueError, match="no pairs"):
        evaluate_pairs(np.zeros(0), np.zeros(0), scores=two, lengths=two)
    with pytest.raises(TypeCheckError, match="loser_scores"):
        evaluate_pairs(two, three, scores=two, lengths=two)
    with pytest.raises(TypeCheckError, match="lengths"):
        evaluate_pairs(two, two, scores=two, lengths=three)
