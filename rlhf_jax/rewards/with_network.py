"""A reward model's score beside a function's: weight · clip((score − mean) / std) is added, as by `combined.Part`."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.numerics import require
from rlhf_jax.types import ArrayLike


@dataclass(frozen=True)
class NetworkPart:
    """What of a reward model's score is added to that of a function of texts."""

    stage: str = "reward_model"
    """The reward_model stage."""
    weight: float = 1.0
    """Its weight in the sum."""
    mean: float = 0.0
    """What is taken off the score, such as its mean over the starting policy's completions."""
    std: float = 1.0
    """What the rest is divided by."""
    clip: float | None = None
    """Clips the normalised score to ± this; none: no clipping."""

    def __post_init__(self) -> None:
        intervals = {"weight": "(-inf, inf)", "mean": "(-inf, inf)", "std": "(0, inf)", "clip": "(0, inf)"}
        for name, interval in intervals.items():
            require(f"network.{name}", vars(self)[name], interval)

    def shaped(self, scores: Float[ArrayLike, " b"]) -> Float[Array, " b"]:
        """What scores add to the sum."""
        normal = (jnp.asarray(scores) - self.mean) / self.std
        return self.weight * (normal if self.clip is None else jnp.clip(normal, -self.clip, self.clip))
