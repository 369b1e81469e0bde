"""Held-out figures of ratings, outcomes and steps, against scikit-learn and by hand."""

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from rlhf_jax.evals import bootstrap
from rlhf_jax.evals.judgements import evaluate_levels, evaluate_outcomes, evaluate_ratings, evaluate_solutions
from rlhf_jax.losses import ordinal_rating

RNG = np.random.default_rng(0)


def test_outcomes_are_scikit_learns_figures_and_the_constants():
    labels = (RNG.random(200) < 0.7).astype(float)
    scores = np.round(RNG.normal(size=200) + labels, 1)  # with ties
    found = evaluate_outcomes(scores, labels, range(200), share=0.6)
    assert found["auc"] == pytest.approx(roc_auc_score(labels, scores))
    assert found["log_loss"] == pytest.approx(log_loss(labels, 1 / (1 + np.exp(-scores))))
    assert found["log_loss_baseline"] == pytest.approx(log_loss(labels, np.full(200, 0.6)))
    assert found["accuracy"] == pytest.approx(np.mean((scores > 0) == (labels == 1)))
    assert found["accuracy_baseline"] == labels.mean() and found["auc_baseline"] == 0.5
    for name in ("accuracy", "auc"):
        assert found[f"{name}_low"] < found[name] < found[f"{name}_high"]
    assert "auc_low" not in evaluate_outcomes(scores, labels, range(200), share=0.6, intervals=False)


def test_weights_are_rows_that_stand_so_often():
    scores, labels = RNG.normal(size=30), (RNG.random(30) < 0.5).astype(float)
    weights = RNG.integers(0, 4, 30)
    area = bootstrap.area_under_curve(scores, labels)(weights.astype(float))
    assert area == pytest.approx(roc_auc_score(np.repeat(labels, weights), np.repeat(scores, weights)))
    mean = bootstrap.mean_of(scores)(weights.astype(float))
    assert mean == pytest.approx(np.repeat(scores, weights).mean())
    assert np.isnan(bootstrap.area_under_curve(scores, np.ones(30))(np.ones(30)))


def test_the_interval_is_the_means_normal_one_and_wider_where_prompts_repeat():
    values = RNG.normal(size=400)
    low, high = bootstrap.interval(bootstrap.mean_of(values), range(400))
    half = 1.96 * values.std() / 20
    np.testing.assert_allclose([low, high], [values.mean() - half, values.mean() + half], atol=0.02)
    tenfold, prompts = np.repeat(values[:40], 10), np.repeat(range(40), 10)
    low, high = bootstrap.interval(bootstrap.mean_of(tenfold), prompts)
    assert high - low == pytest.approx(2 * 1.96 * values[:40].std() / 40**0.5, rel=0.2)
    assert bootstrap.interval(bootstrap.mean_of(tenfold), prompts) == (low, high)  # the same each time
    with pytest.raises(ValueError, match="1 prompts are too few"):
        bootstrap.interval(lambda weights: float("nan"), ["a"])


def test_ratings_are_read_beside_their_mean():
    found = evaluate_ratings(np.array([1.0, 2, 5]), np.array([1.0, 3, 4]), ["a", "b", "c"], mean=2.0)
    assert found["rmse"] == pytest.approx((2 / 3) ** 0.5) and found["rmse_baseline"] == pytest.approx(2**0.5)
    assert found["rmse_low"] == 0 and found["rmse_high"] == 1
    assert found["correlation"] == pytest.approx(np.corrcoef([1, 2, 5], [1, 3, 4])[0, 1])


def test_levels_have_the_loss_that_is_trained():
    scores, levels = RNG.normal(size=60).astype(np.float32), RNG.integers(0, 4, 60)
    places, shares = np.float32([-1, 0.2, 1.5]), np.array([0.1, 0.2, 0.3, 0.4])
    found = evaluate_levels(scores, levels, range(60), thresholds=places, shares=shares)
    assert found["log_loss"] == pytest.approx(float(ordinal_rating(scores, levels, places)[0].mean()), rel=1e-5)
    assert found["log_loss_baseline"] == pytest.approx(-np.log(shares[levels]).mean())
    assert found["accuracy_baseline"] == np.mean(levels == 3)


def test_a_solution_is_as_right_as_its_steps_say():
    scores = np.array([2.0, -1.0, 3.0, 3.0, 0.0, 4.0, 5.0])  # of the last step nothing was said, and yet it is read
    labels, rows = np.array([1.0, 0, 1, 1, 1, 0, np.nan]), np.array([0, 0, 1, 1, 2, 2, 2])
    found = evaluate_solutions(scores, labels, rows, ["a", "b", "c"])
    assert found["solutions_right"] == pytest.approx(1 / 3)  # solution 1 alone: the others have a wrong step
    p = 1 / (1 + np.exp(-scores))
    for name, fold in {"last": lambda x: x[-1], "min": np.min, "product": np.prod}.items():
        folded = [fold(p[rows == i]) for i in range(3)]
        assert found[f"solution_auc_{name}"] == roc_auc_score([0, 1, 0], folded)
    assert found["solution_auc_last"] == 0.5 and found["solution_auc_min"] == found["solution_auc_product"] == 1
    assert evaluate_solutions(scores, np.ones(7), rows, ["a", "b", "c"]) == {}
