"""Reductions, whitening and positions under a mask. Masks are bool and True keeps.

What stands outside the mask, NaN included, changes neither a value nor a gradient here. It must be finite all the same
if it was computed from parameters: the backward pass of whatever made it multiplies 0 by it, and 0 · inf is NaN.

Shapes: *b any leading axes, t tokens, *s any axes.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.numerics import as_float, require
from rlhf_jax.types import ArrayLike, Mean, Scalar, typed

VARIANCE_EPS = 1e-8


@typed
def keep(x: Float[ArrayLike, "*s"], mask: Bool[ArrayLike, "*s"]) -> Float[Array, "*s"]:
    """`x` where the mask is True and 0 elsewhere, in at least float32."""
    return jnp.where(mask, as_float(x), 0)


@typed
def token_mean(x: Float[ArrayLike, "*s"] | Bool[ArrayLike, "*s"], mask: Bool[ArrayLike, "*s"]) -> Mean:
    """Every kept entry weighs the same: Σ x / Σ mask.

    >>> token_mean(jnp.array([[1.0, 3.0], [8.0, 9.0]]), jnp.array([[True, True], [True, False]])).value
    Array(4., dtype=float32)
    """
    x = keep(as_float(x), mask)
    return Mean(x.sum(), jnp.sum(mask, dtype=x.dtype))


@typed
def sequence_mean(x: Float[ArrayLike, "*b t"] | Bool[ArrayLike, "*b t"], mask: Bool[ArrayLike, "*b t"]) -> Mean:
    """Every sequence weighs the same: the mean over its kept tokens, then over the sequences that keep any.

    >>> sequence_mean(jnp.array([[1.0, 3.0], [8.0, 9.0]]), jnp.array([[True, True], [True, False]])).value
    Array(5., dtype=float32)
    """
    x = keep(as_float(x), mask)
    lengths = jnp.sum(mask, axis=-1, dtype=x.dtype)
    return Mean(jnp.sum(x.sum(-1) / jnp.maximum(lengths, 1)), jnp.sum(lengths > 0, dtype=x.dtype))


@typed
def fixed_length_mean(
    x: Float[ArrayLike, "*b t"] | Bool[ArrayLike, "*b t"], mask: Bool[ArrayLike, "*b t"], *, length: Scalar
) -> Mean:
    """Each sequence's sum over its kept tokens divided by one constant, then the mean over the sequences that keep any.

    Liu et al. 2025 (Dr. GRPO), section 3.2: divided by its own length, as in `sequence_mean`, a long wrong answer costs
    less a token than a short one. `length` is the most tokens that a completion may have, or any constant. TRL's
    `dr_grpo` counts the sequences that keep nothing as well. Raises ValueError if length ≤ 0.

    >>> fixed_length_mean(jnp.array([[1.0, 3.0], [8.0, 9.0]]), jnp.array([[True, True], [True, False]]), length=4).value
    Array(1.5, dtype=float32)
    """
    require("length", length, "(0, inf)")
    x = keep(as_float(x), mask)
    return Mean(jnp.sum(x.sum(-1) / length), jnp.sum(jnp.any(mask, axis=-1), dtype=x.dtype))


REDUCERS = {"token": token_mean, "sequence": sequence_mean}
"""How a config names the reducer of a loss."""


@typed
def masked_mean(x: Float[ArrayLike, "*s"], mask: Bool[ArrayLike, "*s"]) -> Float[Array, ""]:
    """The mean of the kept entries over all axes; 0 when nothing is kept."""
    return token_mean(x, mask).value


@typed
def masked_var(x: Float[ArrayLike, "*s"], mask: Bool[ArrayLike, "*s"]) -> Float[Array, ""]:
    """The biased variance of the kept entries over all axes, Σ (x − μ)² / n; 0 when nothing is kept.

    >>> masked_var(jnp.array([1.0, 3.0, 99.0]), jnp.array([True, True, False]))
    Array(1., dtype=float32)
    """
    x = keep(x, mask)
    return masked_mean(jnp.square(x - masked_mean(x, mask)), mask)


@typed
def whiten(x: Float[ArrayLike, "*s"], mask: Bool[ArrayLike, "*s"], *, shift_mean: bool = True) -> Float[Array, "*s"]:
    """Scale the kept entries to variance 1: (x − μ) · rsqrt(σ² + 1e-8), plus μ unless `shift_mean`; 0 outside the mask.

    Mean and (biased) variance are taken over all axes at once, so the result depends on the whole batch. In Ziegler et
    al. 2019 advantages are whitened with the mean shifted to 0, rewards with it put back.

    >>> whiten(jnp.array([1.0, 3.0, 99.0]), jnp.array([True, True, False]))
    Array([-1.,  1.,  0.], dtype=float32)
    >>> whiten(jnp.array([1.0, 3.0, 99.0]), jnp.array([True, True, False]), shift_mean=False)
    Array([1., 3., 0.], dtype=float32)
    """
    x = keep(x, mask)
    mean, var = masked_mean(x, mask), masked_var(x, mask)
    whitened = (x - mean) * jax.lax.rsqrt(var + VARIANCE_EPS)
    return keep(whitened if shift_mean else whitened + mean, mask)


@typed
def last_index(mask: Bool[ArrayLike, "*b t"]) -> Int[Array, "*b"]:
    """The index of the last True of each row; −1 for a row without one.

    >>> last_index(jnp.array([[False, True, True, False], [False, False, False, False]]))
    Array([ 2, -1], dtype=int32)
    """
    return jnp.max(jnp.where(mask, jnp.arange(mask.shape[-1], dtype=jnp.int32), -1), axis=-1, initial=-1)


@typed
def positions(mask: Bool[ArrayLike, "*b t"]) -> Int[Array, "*b t"]:
    """How many tokens are kept before each one: an exclusive cumulative sum, so that padding shifts nothing.

    >>> positions(jnp.array([False, False, True, True, True]))
    Array([0, 0, 0, 1, 2], dtype=int32)
    """
    kept = jnp.asarray(mask, jnp.int32)
    return jnp.cumsum(kept, axis=-1) - kept
