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


@typed
def weighted_cross_entropy(
    logps: Float[ArrayLike, "*b"], weights: Float[ArrayLike, "*b"]
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """−w log p(token): examples or tokens that count for more or for less. Weights of 1 make it `cross_entropy`.

    Advantage-weighted behaviour cloning is w = exp(β A) (Peng et al. 2019). The reducers divide by how many
    tokens there are and not by Σ w: a weight of 0 still counts. For the weighted mean, divide by the mean of `weight`,
    the diagnostic. The gradient of the weights flows; who computes them from parameters stops it.

    >>> import jax.numpy as jnp
    >>> weighted_cross_entropy(jnp.array([-1.5, -0.5]), jnp.array([2.0, 0.0]))[0]
    Array([3., 0.], dtype=float32)
    """
    weights = as_float(weights)
    return -weights * as_float(logps), {"weight": weights}
