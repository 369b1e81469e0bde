"""A reward model on held-out ratings, outcomes and steps: its figures, and beside them those of the best constant.

The constants are those of the rows that were trained on. `intervals` are of 95%, by the bootstrap over prompts.
Shapes: m judged places, of which those with one entry of `clusters` share a prompt.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax.evals.bootstrap import area_under_curve, mean_of, with_interval
from rlhf_jax.evals.preferences import pearson

Figures = dict[str, float]


def evaluate_ratings(
    scores: np.ndarray, ratings: np.ndarray, clusters: Sequence[Any], *, mean: float, intervals: bool = True
) -> Figures:
    """rmse: √ mean (score − rating)²; rmse_baseline: the same of the `mean` of the ratings that were trained on.

    correlation: Pearson's, of scores and ratings.
    """
    squared = mean_of((scores - ratings) ** 2)
    return {
        **with_interval("rmse", lambda weights: squared(weights) ** 0.5, clusters, intervals=intervals),
        "rmse_baseline": float(np.sqrt(np.mean((mean - ratings) ** 2))),
        "correlation": pearson(scores, ratings),
    }


def evaluate_levels(
    scores: np.ndarray,
    levels: np.ndarray,
    clusters: Sequence[Any],
    *,
    thresholds: np.ndarray,
    shares: np.ndarray,
    intervals: bool = True,
) -> Figures:
    """accuracy: how often the likeliest level is the rated one; log_loss: −log P(level), nats.

    P(level ≤ j) = σ(θ_j − score), as in `losses.ordinal_rating`. The baselines are those of the `shares` of the levels
    that were trained on. Levels count from 0.
    """
    below = 1 / (1 + np.exp(np.clip(scores[:, None] - thresholds[None], -500, 500)))
    edges = np.concatenate([np.zeros((len(scores), 1)), below, np.ones((len(scores), 1))], axis=1)
    likely, places = np.diff(edges, axis=1), np.arange(len(scores))
    log_loss = -np.log(np.maximum(likely[places, levels], 1e-12))
    return {
        **with_interval("accuracy", mean_of(likely.argmax(1) == levels), clusters, intervals=intervals),
        "accuracy_baseline": float(np.mean(levels == shares.argmax())),
        **with_interval("log_loss", mean_of(log_loss), clusters, intervals=intervals),
        "log_loss_baseline": float(-np.log(shares[levels]).mean()),
        "correlation": pearson(scores, levels.astype(np.float64)),
    }


def evaluate_outcomes(
    scores: np.ndarray, labels: np.ndarray, clusters: Sequence[Any], *, share: float, intervals: bool = True
) -> Figures:
    """Scores are logits of P(label = 1). accuracy: how often score > 0 is the label; auc: the area under the ROC curve,
    ½ of any constant; log_loss, nats.

    The baselines of the other two are those of the constant `share` of labels 1 that was trained on.
    """
    log_loss = np.logaddexp(0, np.where(labels == 1, -scores, scores))
    constant = np.where(labels == 1, share, 1 - share)
    return {
        **with_interval("accuracy", mean_of((scores > 0) == (labels == 1)), clusters, intervals=intervals),
        "accuracy_baseline": float(np.mean(labels == float(share > 0.5))),
        **with_interval("auc", area_under_curve(scores, labels), clusters, intervals=intervals),
        "auc_baseline": 0.5,
        "log_loss": float(log_loss.mean()),
        "log_loss_baseline": float(-np.log(constant).mean()),
    }


FOLDS = {
    "last": lambda logps: logps[-1],
    "min": lambda logps: logps.min(),
    "product": lambda logps: logps.sum(),
}
"""How P(right) of a solution's steps, as logs, becomes one of the solution (Lightman et al. 2023, section 2.6)."""


def evaluate_solutions(
    scores: np.ndarray, labels: np.ndarray, rows: np.ndarray, clusters: Sequence[Any], *, intervals: bool = True
) -> Figures:
    """Whether a solution's steps are all right, by what a process reward model says of each: auc by each of `FOLDS`.

    scores and labels [m] are of steps, NaN where a step was not judged, as those after the first wrong one may be: all
    are read, or the number of steps would tell. `rows` [m] are the solutions that they stand in, `clusters` those
    solutions'. Empty where all solutions are right or all wrong.
    """
    logps, ids = -np.logaddexp(0, -scores), np.unique(rows)
    right = np.asarray([np.nanmin(labels[rows == one]) for one in ids])
    if right.min() == right.max():
        return {}
    figures: Figures = {"solutions_right": float(right.mean())}
    for name, fold in FOLDS.items():
        folded = np.asarray([fold(logps[rows == one]) for one in ids])
        area = area_under_curve(folded, right)
        figures |= with_interval(f"solution_auc_{name}", area, clusters, intervals=intervals and name == "product")
    return figures
