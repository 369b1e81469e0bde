"""Policy-gradient losses, per token. Shapes: *b any leading axes."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.numerics import as_float, exp_log_ratio, require
from rlhf_jax.types import ArrayLike, Scalar, typed


@typed
def ppo_clip(
    logps: Float[ArrayLike, "*b"],
    old_logps: Float[ArrayLike, "*b"],
    advantages: Float[ArrayLike, "*b"],
    *,
    clip_eps: Scalar = 0.2,
    clip_eps_high: Scalar | None = None,
    dual_clip: Scalar | None = None,
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """PPO's clipped surrogate, negated: −min(ρ A, clip(ρ, 1 − ε, 1 + ε_high) A) with ρ = π/π_old.

    Schulman et al. 2017, eq. 7. `clip_eps_high` (ε unless given) is the upper range of Yu et al. 2025 (DAPO), eq. 10;
    `dual_clip` c bounds the loss at −c A where A < 0 (Ye et al. 2020). log ρ is clamped at ±20. Diagnostics: `ratio` ρ,
    and `clipped`, 1 where the loss is not −ρ A, so that it has no gradient. Raises ValueError if clip_eps is outside
    (0, 1), clip_eps_high ≤ 0 or dual_clip ≤ 1.

    >>> loss, diagnostics = ppo_clip(jnp.log(jnp.array([1.1, 1.5])), jnp.zeros(2), jnp.ones(2))
    >>> loss, diagnostics["clipped"]
    (Array([-1.1, -1.2], dtype=float32), Array([0., 1.], dtype=float32))
    """
    require("clip_eps", clip_eps, "(0, 1)")
    require("clip_eps_high", clip_eps_high, "(0, inf)")
    require("dual_clip", dual_clip, "(1, inf)")
    ratio, advantages = exp_log_ratio(as_float(logps) - as_float(old_logps)), as_float(advantages)
    unclipped = -ratio * advantages
    high = clip_eps if clip_eps_high is None else clip_eps_high
    loss = jnp.maximum(unclipped, -jnp.clip(ratio, 1 - clip_eps, 1 + high) * advantages)
    if dual_clip is not None:
        loss = jnp.where(advantages < 0, jnp.minimum(loss, -dual_clip * advantages), loss)
    return loss, {"ratio": ratio, "clipped": (loss != unclipped).astype(loss.dtype)}


@typed
def reinforce(
    logps: Float[ArrayLike, "*b"], advantages: Float[ArrayLike, "*b"]
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """−A log π: its gradient is the policy gradient of on-policy samples. Williams 1992; no diagnostics.

    Give whole sequences (`seq_logps`, one advantage each) or tokens; the value of the loss means nothing.

    >>> reinforce(jnp.array([-1.5]), jnp.array([2.0]))[0]
    Array([3.], dtype=float32)
    """
    return -as_float(advantages) * as_float(logps), {}
