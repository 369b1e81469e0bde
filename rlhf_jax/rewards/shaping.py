"""Between a reward's raw scores and what training sees of them."""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.normalizer import Moments, normalize
from rlhf_jax.numerics import as_float, require
from rlhf_jax.types import ArrayLike, typed


@dataclass(frozen=True)
class EosPenalty:
    """What a completion that does not end with EOS gets."""

    score: float = -1.0
    """replace: the score that it gets; subtract: how much is taken off, as a negative number."""
    how: Literal["replace", "subtract"] = "replace"
    """replace the score (Stiennon et al. 2020), or subtract from it."""

    def __post_init__(self) -> None:
        require("eos_penalty.score", self.score, "(-inf, inf)" if self.how == "replace" else "(-inf, 0]")


@dataclass(frozen=True)
class Shaping:
    """From raw scores to those that make rewards, in the order of the fields."""

    normalize: Literal["none", "std", "mean_std"] = "none"
    """By the moments of the scores of all rollouts so far, this iteration's among them: divided by their standard
    deviation, or brought to mean 0, too (Zheng et al. 2023). The moments are a part of the state. Groups that dynamic
    sampling has replaced, a greedy baseline's completions and a reference's are not among them."""
    scale: float = 1.0
    """Multiplies the scores."""
    clip: float | None = None
    """Clips the scaled scores to ± this."""
    eos_penalty: EosPenalty | None = None
    """What a completion without EOS gets; none: its score stays."""
    whiten: bool = False
    """Scales token rewards, KL penalty included, to variance 1 and keeps their mean (Ziegler et al. 2019)."""

    def __post_init__(self) -> None:
        require("shaping.scale", self.scale, "(-inf, inf)")
        require("shaping.clip", self.clip, "(0, inf)")

    @property
    def sets_numbers(self) -> bool:
        """Whether some scores become numbers that are given here, so that the unit of the others matters."""
        return self.clip is not None or self.eos_penalty is not None


@dataclass(frozen=True)
class OverlongPenalty:
    """What a completion pays for its last tokens before the limit (Yu et al. 2025, DAPO, eq. 13)."""

    buffer: int = 8
    """Tokens before the limit over which the penalty grows from 0 to `score`."""
    score: float = -1.0
    """The penalty of a completion that reaches the limit."""

    def __post_init__(self) -> None:
        require("overlong.buffer", self.buffer, "[1, inf)")
        require("overlong.score", self.score, "(-inf, 0]")


@typed
def overlong_penalties(lengths: Int[ArrayLike, "*b"], config: OverlongPenalty, *, limit: int) -> Float[Array, "*b"]:
    """`score` times the share of the buffer, the last tokens before `limit`, that a completion fills.

    >>> overlong_penalties(jnp.array([6, 8, 9, 10]), OverlongPenalty(buffer=2), limit=10)
    Array([-0. , -0. , -0.5, -1. ], dtype=float32)
    """
    filled = jnp.clip((jnp.asarray(lengths, jnp.float32) - (limit - config.buffer)) / config.buffer, 0, 1)
    return config.score * filled


@typed
def shape_scores(
    scores: Float[ArrayLike, "*b"], has_ended: Bool[ArrayLike, "*b"], config: Shaping, moments: Moments | None = None
) -> Float[Array, "*b"]:
    """Normalise by the moments so far, if they are given, scale and clip scores; penalise completions without EOS.

    >>> shape_scores(jnp.array([3.0, 3.0]), jnp.array([True, False]), Shaping(clip=2.0, eos_penalty=EosPenalty()))
    Array([ 2., -1.], dtype=float32)
    """
    if moments is not None:
        scores = normalize(scores, moments, center=config.normalize == "mean_std")
    scores = as_float(scores) * config.scale
    if config.clip is not None:
        scores = jnp.clip(scores, -config.clip, config.clip)
    if config.eos_penalty is None:
        return scores
    penalty = config.eos_penalty
    penalised = penalty.score if penalty.how == "replace" else scores + penalty.score
    return jnp.where(has_ended, scores, penalised)
