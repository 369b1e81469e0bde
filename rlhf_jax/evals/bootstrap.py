"""How far a held-out figure would move, had other prompts been held out. Shapes: n rows."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int

Statistic = Callable[[Float[np.ndarray, " n"]], float]
"""A figure of rows that count by a weight each; NaN where these rows do not give it."""


def bootstrap_interval(
    statistic: Statistic, prompts: Int[np.ndarray, " n"], *, draws: int = 1_000, seed: int = 0
) -> tuple[float, float]:
    """The 95% percentile interval of a figure, over prompts drawn with replacement (Efron and Tibshirani 1993, ch. 13).

    `prompts` are the rows' prompts by number, from 0 on without gaps: rows of one prompt come and stay away together,
    since they are not independent. Draws that do not give the figure are left out; NaN where none does.

    >>> low, high = bootstrap_interval(weighted_mean(np.array([0.0, 1.0, 1.0, 1.0])), np.arange(4))
    >>> low, high
    (0.25, 1.0)
    """
    rng, count = np.random.default_rng(seed), int(prompts.max()) + 1
    found = [statistic(rng.multinomial(count, np.full(count, 1 / count))[prompts].astype(float)) for _ in range(draws)]
    known = np.asarray([value for value in found if np.isfinite(value)])
    low, high = np.quantile(known, [0.025, 0.975]) if known.size else (np.nan, np.nan)
    return float(low), float(high)


def weighted_mean(values: Float[np.ndarray, " n"]) -> Statistic:
    """The mean of values as a figure of their weights."""
    wide = np.asarray(values, np.float64)
    return lambda weights: float(wide @ weights / weights.sum())


def auc(scores: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> Statistic:
    """The area under the ROC curve as a figure of the rows' weights: how often a positive row has the higher score.

    A tie counts half; NaN where a kind has no weight. A score that is the same for all rows gives 1/2.

    >>> auc(np.array([0.1, 0.4, 0.4]), np.array([False, True, False]))(np.ones(3))
    0.75
    """
    places = np.unique(scores, return_inverse=True)[1]

    def area(weights: Float[np.ndarray, " n"]) -> float:
        up, down = (np.bincount(places, weights * kind) for kind in (positive, ~positive))
        pairs = up.sum() * down.sum()
        return float(up @ (np.cumsum(down) - down / 2) / pairs) if pairs else float("nan")

    return area
