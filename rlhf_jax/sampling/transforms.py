"""What stands between logits and the distribution that is sampled. Shapes: *b any leading axes, v vocabulary."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.numerics import as_float, require
from rlhf_jax.types import ArrayLike, typed

EXCLUDED = -1e30  # finite, so that no inf − inf becomes NaN


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float = 1.0
    """Divides the logits, here and in every log-prob that training compares."""
    top_k: int = 0
    """Keeps the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keeps the fewest most probable tokens whose probabilities reach p (Holtzman et al. 2020); 1 keeps all."""

    def __post_init__(self) -> None:
        require("sampling.temperature", self.temperature, "(0, inf)")
        require("sampling.top_k", self.top_k, "[0, inf)")
        require("sampling.top_p", self.top_p, "(0, 1]")

    @property
    def truncates(self) -> bool:
        """Whether samples come from another distribution than the log-probs describe."""
        return self.top_k > 0 or self.top_p < 1


@typed
def transform_logits(logits: Float[ArrayLike, "*b v"], sampling: Sampling) -> Float[Array, "*b v"]:
    """Logits of the distribution that is sampled: divided by the temperature, then cut by top-k, then by top-p.

    >>> transform_logits(jnp.array([1.0, 2.0, 4.0]), Sampling(temperature=2.0, top_k=2)) > EXCLUDED
    Array([False,  True,  True], dtype=bool)
    """
    logits = as_float(logits) / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits < smallest, EXCLUDED, logits)
    if sampling.top_p < 1:
        descending = -jnp.sort(-logits, axis=-1)
        probabilities = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities  # the mass above each token: 0 for the first
        smallest = jnp.min(jnp.where(before < sampling.top_p, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, EXCLUDED, logits)
    return logits
