"""What stands between logits and the distribution that is sampled. Shapes: *b any leading axes, v vocabulary."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax.models.kv_cache import CacheType
from rlhf_jax.numerics import EXCLUDED, as_float, require
from rlhf_jax.types import ArrayLike, Key, typed


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float = 1.0
    """Divides the logits, here and in every log-prob that training compares."""
    top_k: int = 0
    """Keeps the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keeps the fewest most probable tokens whose probabilities reach p (Holtzman et al. 2020); 1 keeps all."""
    ends: bool = True
    """Whether a completion ends with EOS. False: EOS is a token like any other, and every completion has the most
    tokens that it may have (Ziegler et al. 2019)."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion as EOS does: with the first token after which one of them stands in its text, which
    begins after the prompt. Special tokens are no text."""
    cache: CacheType = "model"
    """How keys and values are kept while a completion is written: as the model computes them, or in 8 bits with a scale
    for each token and head (half the memory of bfloat16). Then tokens are drawn, and `logps` read, from what 8 bits
    leave: on the bundled LM log-probs are 0.007 nats from the plain ones, of 2,372 tokens at most 0.21."""

    def __post_init__(self) -> None:
        require("sampling.temperature", self.temperature, "(0, inf)")
        require("sampling.top_k", self.top_k, "[0, inf)")
        require("sampling.top_p", self.top_p, "(0, 1]")
        if "" in self.stop:
            raise ValueError('sampling.stop: "" stands in every text; name strings of at least one character')
        if self.stop and not self.ends:
            raise ValueError("sampling.stop ends completions: sampling.ends must be True")

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


def draw_token(key: Key, logits: Float[Array, " v"]) -> Int[Array, ""]:
    """One token from softmax(logits): a block of the vocabulary, then a token of the block.

    Each of the two is drawn by a uniform number of its own, which inverts the cumulative distribution: on a CPU three
    times as fast as the Gumbel trick of `jax.random.categorical`, which draws a number a token. One number for all of
    the vocabulary would often fall within rounding of a step, and the draw depend on the mesh: at 49,152 tokens logits
    that differ by 5e-6 change 42 of 20,000 draws so, and 1 with about √v steps a number. A token is drawn only if its
    weight is not 0; one of probability below 2**-23 in its block, the grain of the uniform number, may never be.
    """
    size = math.isqrt(logits.shape[-1] - 1) + 1
    weights = jnp.exp(logits - logits.max())
    weights = jnp.pad(weights, (0, size * size - logits.shape[-1])).reshape(size, size)
    first, second = jax.random.uniform(key, (2,))
    block = _drawn(first, weights.sum(axis=1))
    return block * size + _drawn(second, weights[block])


def _drawn(uniform: Array, weights: Array) -> Array:
    upto = jnp.cumsum(weights)
    return _first_above(upto, uniform * upto[-1], weights)


def _first_above(cumulative: Array, target: Array, weights: Array) -> Array:
    """The first index whose cumulative sum exceeds the target; where rounding leaves none, the last that weighs."""
    last = jnp.max(jnp.where(weights > 0, jnp.arange(weights.shape[0], dtype=jnp.int32), 0))
    return jnp.minimum(jnp.sum(cumulative <= target, dtype=jnp.int32), last)
