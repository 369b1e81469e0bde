"""Importance weights for samples of another policy than the one that trains: stale ones, or a sampler's own rounding.

They multiply a loss, have no gradient, and are bounded: a weight is cut to the bound (`truncate`, biased, of bounded
variance) or the sample is dropped (`mask`). Where a loss has a ratio π/π_old of its own, the weight is the other
factor, π_old/π_sampler: the two passes of the same parameters.

Shapes: *b any leading axes, t tokens.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax.logprobs import sequence_logps
from rlhf_jax.numerics import as_float, exp_log_ratio, require
from rlhf_jax.types import ArrayLike, Scalar, typed

Outside = Literal["truncate", "mask"]
"""What becomes of a weight outside the bounds: the bound, or 0."""


def _bounded(log_ratio: Array, low: Scalar | None, high: Scalar, outside: Outside) -> Array:
    require("low", low, "[0, 1]")
    require("high", high, "[1, inf)")
    ratio = exp_log_ratio(jax.lax.stop_gradient(log_ratio))
    bounded = jnp.clip(ratio, low, high)
    return bounded if outside == "truncate" else jnp.where(bounded == ratio, ratio, 0)


@typed
def token_weights(
    logps: Float[ArrayLike, "*b"],
    sampler_logps: Float[ArrayLike, "*b"],
    *,
    low: Scalar | None = None,
    high: Scalar = 2.0,
    outside: Outside = "truncate",
) -> Float[Array, "*b"]:
    """min(π/π_sampler, high) of each token, no less than `low` if that is given.

    Truncated importance sampling (Ionides 2008), which Yao et al. 2025 take against the mismatch of a sampler's and a
    trainer's kernels. `outside="mask"` drops a token beyond the bounds instead (Ling Team 2025, IcePop). A token's
    weight corrects its own probability, not that of the prefix it was drawn after: that is `sequence_weights`'. log
    π/π_sampler is clamped at ±20. Raises ValueError if high < 1 or low is outside [0, 1].

    >>> token_weights(jnp.log(jnp.array([0.5, 0.9])), jnp.log(jnp.array([0.4, 0.1])))
    Array([1.25, 2.  ], dtype=float32)
    >>> token_weights(jnp.log(jnp.array([0.5, 0.9])), jnp.log(jnp.array([0.4, 0.1])), outside="mask")
    Array([1.25, 0.  ], dtype=float32)
    """
    return _bounded(as_float(logps) - as_float(sampler_logps), low, high, outside)


@typed
def sequence_weights(
    logps: Float[ArrayLike, "*b t"],
    sampler_logps: Float[ArrayLike, "*b t"],
    mask: Bool[ArrayLike, "*b t"],
    *,
    low: Scalar | None = None,
    high: Scalar = 2.0,
    outside: Outside = "truncate",
) -> Float[Array, "*b"]:
    """min(Π_t π_t/π_sampler,t, high) over the kept tokens: the weight of a whole sequence, 1 if it keeps none.

    Unbiased but for the bounds, and of a variance that grows with the length: with `outside="mask"`, sequences that the
    policy hardly writes any more are dropped. The sum of the logs is clamped at ±20. Raises as `token_weights`.

    >>> logps, mask = jnp.array([[-1.0, -1.0, 9.0]]), jnp.array([[True, True, False]])
    >>> sequence_weights(logps, jnp.array([[-1.25, -1.25, 0.0]]), mask)
    Array([1.6487], dtype=float32)
    """
    return _bounded(sequence_logps(logps, mask) - sequence_logps(sampler_logps, mask), low, high, outside)
