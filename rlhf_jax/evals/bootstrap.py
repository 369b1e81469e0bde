"""Intervals of figures by the bootstrap over prompts (Efron 1979): what shares a prompt is drawn together.

Shapes: m items, of which those of one cluster share a prompt.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

RESAMPLES = 1_000

Statistic = Callable[[np.ndarray], float]
"""Weights [m], how often each item was drawn, to a figure; NaN where these items have none."""


def interval(statistic: Statistic, clusters: Sequence[Any], *, seed: int = 0) -> tuple[float, float]:
    """The 95% percentile interval of a statistic over draws, with replacement, of as many clusters as there are.

    Draws in which the statistic is NaN do not count. Raises ValueError where it is in all of them.

    >>> interval(lambda weights: float(np.average([0.0, 1.0, 1.0, 1.0], weights=weights)), ["a", "b", "c", "d"])
    (0.25, 1.0)
    """
    numbers: dict[Any, int] = {}
    index = np.asarray([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])
    n, rng = len(numbers), np.random.default_rng(seed)
    draws = rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    values = np.asarray([statistic(draw[index].astype(np.float64)) for draw in draws])
    if np.isnan(values).all():
        raise ValueError(f"{n} prompts are too few for an interval")
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def mean_of(values: Any) -> Statistic:
    """The mean of values [m]; NaN where nothing is drawn."""
    values = np.asarray(values, np.float64)

    def mean(weights: np.ndarray) -> float:
        return float(values @ weights / weights.sum()) if weights.sum() else float("nan")

    return mean


def area_under_curve(scores: Any, labels: Any) -> Statistic:
    """The area under the ROC curve of scores [m] for labels [m] of 1 and 0: P(score of a 1 > that of a 0), ties ½.

    NaN without a 1 or without a 0.

    >>> area_under_curve([0.1, 0.4, 0.4, 0.9], [0, 0, 1, 1])(np.ones(4))
    0.875
    """
    ranks = np.unique(np.asarray(scores), return_inverse=True)[1]
    labels = np.asarray(labels, np.float64)

    def area(weights: np.ndarray) -> float:
        ones, zeros = np.bincount(ranks, weights * labels), np.bincount(ranks, weights * (1 - labels))
        if not (ones.sum() and zeros.sum()):
            return float("nan")
        below = np.cumsum(zeros) - zeros / 2
        return float(ones @ below / (ones.sum() * zeros.sum()))

    return area


def with_interval(name: str, statistic: Statistic, clusters: Sequence[Any], *, intervals: bool) -> dict[str, float]:
    """{name, name_low, name_high}, the latter two with `intervals`."""
    figures = {name: statistic(np.ones(len(clusters)))}
    if not intervals:
        return figures
    low, high = interval(statistic, clusters)
    return figures | {f"{name}_low": low, f"{name}_high": high}
