"""Supervised losses, per token. Shapes: *b any leading axes."""

from jaxtyping import Array, Float

from rlhf_jax.numerics import as_float
from rlhf_jax.types import ArrayLike, typed


@typed
def cross_entropy(logps: Float[ArrayLike, "*b"]) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """−log p(token), in nats a token; no diagnostics. `logps` come from `logprobs.next_token_logps`.

    >>> import jax.numpy as jnp
    >>> cross_entropy(jnp.array([-1.5, -0.5]))[0]
    Array([1.5, 0.5], dtype=float32)
    """
    return -as_float(logps), {}
