"""Scores to rewards: the order of scale, clip and penalty; the penalty's two forms."""

import numpy as np
import pytest

from rlhf_jax.normalizer import Moments
from rlhf_jax.rewards.shaping import EosPenalty, Shaping, shape_scores

SCORES = np.array([3.0, -3.0, 0.5], np.float32)
ENDED = np.array([True, False, False])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (Shaping(), [3.0, -3.0, 0.5]),
        (Shaping(scale=2.0, clip=4.0), [4.0, -4.0, 1.0]),  # scaled before it is clipped
        (Shaping(eos_penalty=EosPenalty(-1.0)), [3.0, -1.0, -1.0]),
        (Shaping(clip=1.0, eos_penalty=EosPenalty(-5.0)), [1.0, -5.0, -5.0]),  # the penalty is not clipped
        (Shaping(scale=2.0, eos_penalty=EosPenalty(-1.5, "subtract")), [6.0, -7.5, -0.5]),
    ],
)
def test_shaping(config, expected):
    np.testing.assert_allclose(shape_scores(SCORES, ENDED, config), expected)


@pytest.mark.parametrize(
    ("normalize", "expected"),
    [("std", [2.0, -2.0, 0.25, -9.0]), ("mean_std", [2.0, -2.0, -0.25, -9.0])],
)
def test_normalised_scores_are_clipped_and_the_penalty_is_neither(normalize, expected):
    """The unit of clip and penalty is that of normalised scores: before this mean 1 and variance 4."""
    config = Shaping(normalize=normalize, clip=2.0, eos_penalty=EosPenalty(-9.0))
    moments = Moments(*np.float32([5, 1, 20]))
    scores, ended = np.float32([8, -8, 0.5, 8]), np.array([True, True, True, False])
    np.testing.assert_allclose(shape_scores(scores, ended, config, moments), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Shaping(scale=float("nan")), "shaping.scale"),
        (lambda: Shaping(clip=0.0), "shaping.clip"),
        (lambda: EosPenalty(1.0, "subtract"), "eos_penalty.score"),
        (lambda: EosPenalty(float("inf")), "eos_penalty.score"),
    ],
)
def test_bad_fields_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
