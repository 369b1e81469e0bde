"""Policy-gradient losses: per token, or with one ratio for a whole completion (GSPO, GMPO) or a pair of them (P3O).

Shapes: *b any leading axes, t tokens, 2 completions of one prompt.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax.kl import k3
from rlhf_jax.masking import keep
from rlhf_jax.numerics import LOG_RATIO_LIMIT, as_float, exp_log_ratio, require
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


@typed
def cispo(
    logps: Float[ArrayLike, "*b"],
    old_logps: Float[ArrayLike, "*b"],
    advantages: Float[ArrayLike, "*b"],
    *,
    clip_eps: Scalar | None = None,
    clip_eps_high: Scalar = 4.0,
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """REINFORCE with a clipped importance weight: −sg[clip(ρ, 1 − ε, 1 + ε_high)] A log π with ρ = π/π_old.

    MiniMax 2025 (MiniMax-M1). No token loses its gradient, as PPO's clipped ones do; the value of the loss
    means nothing. The paper sets no lower bound: `clip_eps` None. It leaves ε_high open; TRL's `epsilon_high` is our
    1 + `clip_eps_high`, and 5 the value that it recommends. log ρ is clamped at ±20. Diagnostics: `ratio` ρ, and
    `clipped`, 1 where the weight is not ρ. Raises ValueError if clip_eps is outside (0, 1] or clip_eps_high ≤ 0.

    >>> loss, diagnostics = cispo(jnp.array([-1.0, -1.0]), jnp.array([-1.0, -3.0]), jnp.ones(2), clip_eps_high=1.0)
    >>> loss, diagnostics["clipped"]
    (Array([1., 2.], dtype=float32), Array([0., 1.], dtype=float32))
    """
    require("clip_eps", clip_eps, "(0, 1]")
    require("clip_eps_high", clip_eps_high, "(0, inf)")
    logps = as_float(logps)
    ratio = exp_log_ratio(logps - as_float(old_logps))
    weight = jnp.clip(ratio, None if clip_eps is None else 1 - clip_eps, 1 + clip_eps_high)
    loss = -jax.lax.stop_gradient(weight) * as_float(advantages) * logps
    return loss, {"ratio": ratio, "clipped": (weight != ratio).astype(loss.dtype)}


@typed
def trpo_surrogate(
    logps: Float[ArrayLike, "*b"],
    old_logps: Float[ArrayLike, "*b"],
    advantages: Float[ArrayLike, "*b"],
    kl: Float[ArrayLike, "*b"] | None = None,
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """TRPO's surrogate, negated: −ρ A with ρ = π/π_old, to be minimised while the mean of KL(π_old‖π) stays below δ.

    Schulman et al. 2015, eq. 14. `kl` is that divergence at each token, `kl.exact(old_logits, logits)`; without it,
    the unbiased estimate ρ − 1 − log ρ, which is `kl.k3(old_logps, logps)`, stands in. A step holds the constraint by a
    line search on the mean of the diagnostic, or by adding `trust_region_penalty` of it. log ρ is clamped at ±20.
    Diagnostics: `ratio` ρ, and `kl` in nats, which has a gradient.

    >>> loss, diagnostics = trpo_surrogate(jnp.log(jnp.array([0.6])), jnp.log(jnp.array([0.5])), jnp.array([2.0]))
    >>> loss, diagnostics["kl"]
    (Array([-2.4], dtype=float32), Array([0.0177], dtype=float32))
    """
    ratio = exp_log_ratio(as_float(logps) - as_float(old_logps))
    return -ratio * as_float(advantages), {"ratio": ratio, "kl": k3(old_logps, logps) if kl is None else as_float(kl)}


@typed
def trust_region_penalty(
    kl: Float[ArrayLike, "*b"], *, kl_coef: Scalar, max_kl: Scalar = 0.0
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """kl_coef · max(KL − δ, 0) with δ = `max_kl`: a trust region as a price, to be added to `trpo_surrogate`.

    With δ = 0 it is the penalty C · KL of Schulman et al. 2015, eq. 9, and of Schulman et al. 2017 (PPO), eq. 8. With
    δ > 0 nothing inside the region is taxed: the constraint of TRPO's eq. 11, for each element and not for their mean,
    is met exactly once `kl_coef` is as large as its multiplier. Diagnostics: `violated`, 1 where KL > δ. Raises
    ValueError if kl_coef or max_kl is negative.

    >>> trust_region_penalty(jnp.array([0.01, 0.03]), kl_coef=2.0, max_kl=0.02)[0]
    Array([0.  , 0.02], dtype=float32)
    """
    require("kl_coef", kl_coef, "[0, inf)")
    require("max_kl", max_kl, "[0, inf)")
    excess = as_float(kl) - max_kl
    return jnp.maximum(excess, 0) * kl_coef, {"violated": (excess > 0).astype(excess.dtype)}


def _mean(x: Array, mask: ArrayLike) -> Array:
    """The mean of each row's kept entries, 0 for a row that keeps none."""
    return keep(x, mask).sum(-1) / jnp.maximum(jnp.sum(mask, axis=-1), 1)


@typed
def gspo(
    logps: Float[ArrayLike, "*b t"],
    old_logps: Float[ArrayLike, "*b t"],
    advantages: Float[ArrayLike, "*b"],
    mask: Bool[ArrayLike, "*b t"],
    *,
    clip_eps: Scalar = 3e-4,
    clip_eps_high: Scalar | None = None,
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """PPO's clip of one ratio a sequence, s = (π/π_old)^(1/|y|) = exp(mean over tokens of log π/π_old).

        loss = −min(s A, clip(s, 1 − ε, 1 + ε_high) A)

    Zheng et al. 2025 (GSPO). Its ranges are 3e-4 and 4e-4, for s moves far less than the ratio of a token.
    One loss and one advantage a sequence; 0 for a sequence that keeps no token. log s is clamped at ±20. Diagnostics:
    `ratio` s, and `clipped` as in `ppo_clip`. Raises as `ppo_clip`.

    >>> logps, mask = jnp.array([[-1.0, -2.0, 9.0]]), jnp.array([[True, True, False]])
    >>> gspo(logps, jnp.array([[-1.2, -2.0, 0.0]]), jnp.array([-1.0]), mask)[0]
    Array([1.1052], dtype=float32)
    """
    log_ratio = _mean(as_float(logps) - as_float(old_logps), mask)
    advantages = keep(advantages, jnp.any(mask, axis=-1))
    return ppo_clip(log_ratio, jnp.zeros_like(log_ratio), advantages, clip_eps=clip_eps, clip_eps_high=clip_eps_high)


@typed
def gspo_token(
    logps: Float[ArrayLike, "*b t"],
    old_logps: Float[ArrayLike, "*b t"],
    advantages: Float[ArrayLike, "*b t"],
    mask: Bool[ArrayLike, "*b t"],
    *,
    clip_eps: Scalar = 3e-4,
    clip_eps_high: Scalar | None = None,
) -> tuple[Float[Array, "*b t"], dict[str, Float[Array, "*b t"]]]:
    """GSPO with an advantage a token: each has the sequence's ratio as its value, and a gradient of its own.

        loss_t = −min(s_t A_t, clip(s_t, 1 − ε, 1 + ε_high) A_t),   s_t = sg[s] π_t / sg[π_t]

    Zheng et al. 2025, eq. 13 and 14. Under `masking.sequence_mean` equal advantages give GSPO's value and gradient.
    Loss and diagnostics are 0 outside the mask; all else is as in `gspo`.

    >>> logps, mask = jnp.array([[-1.0, -2.0, 9.0]]), jnp.array([[True, True, False]])
    >>> gspo_token(logps, jnp.array([[-1.2, -2.0, 0.0]]), -jnp.ones((1, 3)), mask)[0].round(2)
    Array([[1.11, 1.11, 0.  ]], dtype=float32)
    """
    logps, old_logps, advantages = keep(logps, mask), keep(old_logps, mask), keep(advantages, mask)
    log_ratio = jax.lax.stop_gradient(_mean(logps - old_logps, mask))[..., None]
    log_ratio = log_ratio + (logps - jax.lax.stop_gradient(logps))
    loss, diagnostics = ppo_clip(
        log_ratio, jnp.zeros_like(log_ratio), advantages, clip_eps=clip_eps, clip_eps_high=clip_eps_high
    )
    return keep(loss, mask), {name: keep(x, mask) for name, x in diagnostics.items()}


@typed
def gmpo(
    logps: Float[ArrayLike, "*b t"],
    old_logps: Float[ArrayLike, "*b t"],
    advantages: Float[ArrayLike, "*b"],
    mask: Bool[ArrayLike, "*b t"],
    *,
    clip_eps: Scalar = 0.4,
    clip_eps_high: Scalar | None = None,
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """−A times the geometric mean of the tokens' ratios, each clipped on the side where PPO clips it.

        log c_t = min(log ρ_t, ε_high) if A > 0 else max(log ρ_t, −ε);   loss = −A exp(mean over tokens of log c_t)

    Zhao et al. 2025 (GMPO), section 3. The range is one of log ρ, [e^−ε, e^ε_high] of ρ; ε_high is ε unless given. One
    loss and one advantage a sequence; 0 for a sequence that keeps no token. The mean of the logs is clamped at ±20.
    Diagnostics: `ratio`, the geometric mean; `clipped`, the share of its tokens that are. Raises ValueError if clip_eps
    or clip_eps_high ≤ 0.

    >>> logps, mask = jnp.array([[-1.0, -2.0, 9.0]]), jnp.array([[True, True, False]])
    >>> gmpo(logps, jnp.array([[-1.2, -5.0, 0.0]]), jnp.array([1.0]), mask)[0]
    Array([-1.3499], dtype=float32)
    """
    require("clip_eps", clip_eps, "(0, inf)")
    require("clip_eps_high", clip_eps_high, "(0, inf)")
    high = clip_eps if clip_eps_high is None else clip_eps_high
    advantages = keep(advantages, jnp.any(mask, axis=-1))
    log_ratio = keep(as_float(logps) - as_float(old_logps), mask)
    up = advantages[..., None] > 0
    clipped = jnp.where(up, jnp.minimum(log_ratio, high), jnp.maximum(log_ratio, -clip_eps))
    ratio = exp_log_ratio(_mean(clipped, mask))
    return -ratio * advantages, {"ratio": ratio, "clipped": _mean((clipped != log_ratio).astype(ratio.dtype), mask)}


@typed
def p3o(
    seq_logps: Float[ArrayLike, "*b 2"],
    old_seq_logps: Float[ArrayLike, "*b 2"],
    scores: Float[ArrayLike, "*b 2"],
    *,
    clip_eps: Scalar = 0.2,
    clipping: Literal["separate", "joint"] = "separate",
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """Pairwise PPO: of two completions of a prompt, the difference of their scores is all that counts.

        separate: −½ Σ_i min(w_i ρ_i, w_i clip(ρ_i, 1 − ε, 1 + ε)),   w_i = sg[(r_i − r_j) ρ_j], j the other one
        joint:    −½ min(w d, w clip(d, −ε, ε)),   w = sg[(r_1 − r_2) ρ_1 ρ_2],  d = log ρ_1 − log ρ_2

    Wu et al. 2023 (P3O), section 4.2, V1 and V2: ρ = π/π_old of whole completions. Where nothing is clipped, the
    gradient of both is −½ (r_1 − r_2) ρ_1 ρ_2 ∇(log π_1 − log π_2), that of their Theorem 1 with importance weights.
    Which of the two comes first does not matter, nor does a constant added to both scores. `scores` r are after the KL
    penalty, and `seq_logps` come from `logprobs.sequence_logps`. log ρ is clamped at ±20. Diagnostics: `ratio` ρ_1 ρ_2;
    `clipped`, the share of the minima that the clip decides, so that they have no gradient. Raises ValueError if
    clip_eps is outside (0, 1).

    >>> on_policy, scores = jnp.array([[-5.0, -7.0]]), jnp.array([[3.0, 1.0]])
    >>> jax.grad(lambda seq_logps: p3o(seq_logps, on_policy, scores)[0].sum())(on_policy)
    Array([[-1.,  1.]], dtype=float32)
    """
    require("clip_eps", clip_eps, "(0, 1)")
    log_ratio = jnp.clip(as_float(seq_logps) - as_float(old_seq_logps), -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio, difference = jnp.exp(log_ratio), as_float(scores) - as_float(scores)[..., ::-1]
    if clipping == "separate":
        moved, near = ratio, jnp.clip(ratio, 1 - clip_eps, 1 + clip_eps)
        weight = difference * ratio[..., ::-1]
    else:
        moved = log_ratio[..., :1] - log_ratio[..., 1:]
        near, weight = jnp.clip(moved, -clip_eps, clip_eps), (difference * ratio * ratio[..., ::-1])[..., :1]
    weight = jax.lax.stop_gradient(weight)
    loss = jnp.maximum(-weight * moved, -weight * near)
    clipped = (loss != -weight * moved).astype(loss.dtype)
    return loss.sum(-1) / 2, {"ratio": ratio.prod(-1), "clipped": clipped.mean(-1)}
