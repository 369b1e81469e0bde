"""Losses of value functions, per token. Shapes: *b any leading axes."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.numerics import as_float, require
from rlhf_jax.types import ArrayLike, Scalar, typed


@typed
def clipped_value(
    values: Float[ArrayLike, "*b"],
    old_values: Float[ArrayLike, "*b"],
    returns: Float[ArrayLike, "*b"],
    *,
    clip_eps: Scalar | None = None,
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """½ max((V − R)², (V_clip − R)²) with V_clip = V_old + clip(V − V_old, ±ε); ½ (V − R)² if `clip_eps` is None.

    No equation of a paper: the code of Schulman et al. 2017 (OpenAI Baselines) has it, and Ziegler et al. 2019 keep it.
    Diagnostics: `clipped`, 1 where the clipped error is the larger, so that there is no gradient. Raises ValueError if
    clip_eps ≤ 0.

    >>> clipped_value(jnp.array([1.0]), jnp.array([0.0]), jnp.array([1.0]), clip_eps=0.2)[0]
    Array([0.32], dtype=float32)
    """
    require("clip_eps", clip_eps, "(0, inf)")
    values, old_values, returns = as_float(values), as_float(old_values), as_float(returns)
    unclipped = loss = jnp.square(values - returns) / 2
    if clip_eps is not None:
        # Not old + clip(new − old): that is off by rounding inside the range, and would be told as clipped.
        near = jnp.clip(values, old_values - clip_eps, old_values + clip_eps)
        loss = jnp.maximum(unclipped, jnp.square(near - returns) / 2)
    return loss, {"clipped": (loss != unclipped).astype(loss.dtype)}
