import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from rlhf_jax.errors import NonFiniteError
from rlhf_jax.evals.ranking import evaluate_ranking


def test_by_hand():
    report = evaluate_ranking(np.array([3.0, 1.0, 1.0, 0.0]), np.array([2, 1, 0, 0]))
    # pairs (better, worse): (0,1) won, (0,2) won, (0,3) won, (1,2) tied, (1,3) won; texts 2 and 3 make none
    assert report.pairs == 5
    assert report.accuracy == pytest.approx(4.5 / 5)
    assert report.mean_margin == pytest.approx((2 + 2 + 3 + 0 + 1) / 5)


def test_two_targets_are_the_area_under_the_roc_curve():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2, 200)
    scores = np.round(rng.normal(size=200) + targets, 1)  # with ties
    assert evaluate_ranking(scores, targets).accuracy == pytest.approx(roc_auc_score(targets, scores))


def test_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    truth = 0.7602499389065233  # Φ(1/√2): a positive's score over a negative's
    held = 0
    for _ in range(300):
        targets = np.arange(80) % 2
        low, high = evaluate_ranking(rng.normal(size=80) + targets, targets).interval
        held += low <= truth <= high
    assert 0.92 <= held / 300 <= 0.98


def test_interval_of_a_perfect_ranking_has_width():
    low, high = evaluate_ranking(np.arange(10.0), np.arange(10)).interval
    assert 0.5 < low < 0.8
    assert high == 1


def test_refuses():
    with pytest.raises(ValueError, match="all targets are equal"):
        evaluate_ranking(np.zeros(3), np.ones(3))
    with pytest.raises(NonFiniteError, match="1 of 2 scores"):
        evaluate_ranking(np.array([np.nan, 1.0]), np.arange(2))
