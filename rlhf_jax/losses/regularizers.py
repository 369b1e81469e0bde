"""Terms that are added to another loss, per token. Shapes: *b any leading axes."""

from jaxtyping import Array, Float

from rlhf_jax.numerics import as_float
from rlhf_jax.types import ArrayLike, typed


@typed
def entropy_bonus(entropy: Float[ArrayLike, "*b"]) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """−H(π), which a positive coefficient turns into a bonus. Schulman et al. 2017, eq. 9; no diagnostics.

    `entropy` comes from `logprobs.entropy`, in nats a token.

    >>> import jax.numpy as jnp
    >>> entropy_bonus(jnp.array([1.5]))[0]
    Array([-1.5], dtype=float32)
    """
    return -as_float(entropy), {}
