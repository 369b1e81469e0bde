"""How well scores rank texts that were scored on their own. Shapes: n texts."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Real

from rlhf_jax.errors import NonFiniteError
from rlhf_jax.evals.preferences import accuracy_interval
from rlhf_jax.types import ArrayLike, typed


@dataclass(frozen=True)
class RankingReport:
    """What `evaluate_ranking` finds."""

    pairs: int  # of texts that the targets tell apart
    accuracy: float
    interval: tuple[float, float]  # of the accuracy, 95%
    mean_margin: float  # of score(better) − score(worse)


@typed
def evaluate_ranking(scores: Float[ArrayLike, " n"], targets: Real[ArrayLike, " n"]) -> RankingReport:
    """Accuracy over all pairs of texts with different targets: the share that the scores order alike, a tie counting ½.

    With two targets it is the area under the ROC curve. A text is in many pairs, so that these are far from
    independent: with w_i of text i's c_i pairs won and P pairs in all, the jackknife over texts gives
    var(accuracy) ≈ Σ_i (w_i − accuracy · c_i)² / P², and the interval is `accuracy_interval`'s for as many independent
    pairs as have that variance; half as many as texts where it is 0.

    Raises ValueError where all targets are equal, `NonFiniteError` where a score is not finite.

    >>> evaluate_ranking(np.array([0.5, 2.0, 1.0]), np.array([1, 2, 3])).accuracy
    0.667
    """
    scores, targets = (np.asarray(one).astype(np.float64) for one in (scores, targets))
    if not np.isfinite(scores).all():
        raise NonFiniteError(f"{int((~np.isfinite(scores)).sum())} of {scores.size} scores are not finite")
    won, counted, margin = np.zeros(scores.size), np.zeros(scores.size), 0.0
    for i in range(scores.size):  # row by row: memory stays linear in n
        worse = targets[i] > targets
        gaps = scores[i] - scores[worse]
        wins = (np.sign(gaps) + 1) / 2
        won[i] += wins.sum()
        won[worse] += wins
        counted[i] += worse.sum()
        counted[worse] += 1
        margin += gaps.sum()
    pairs = int(counted.sum()) // 2
    if pairs == 0:
        raise ValueError("all targets are equal: there is nothing to rank")
    accuracy = float(won.sum() / counted.sum())
    variance = float(np.sum((won - accuracy * counted) ** 2)) / pairs**2
    alike = accuracy * (1 - accuracy) / variance if variance > 0 and 0 < accuracy < 1 else scores.size / 2
    independent = max(math.floor(alike), 1)
    return RankingReport(pairs, accuracy, accuracy_interval(accuracy * independent, independent), margin / pairs)
