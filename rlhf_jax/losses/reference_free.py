"""Losses of pairs of completions without a reference policy; imported from `losses.preference`.

Shapes: *b any leading axes; a loss is one number a pair, and so is a diagnostic. Units: nats.
"""

import jax.numpy as jnp
from jax.nn import log_sigmoid
from jaxtyping import Array, Float

from rlhf_jax.numerics import LOG_RATIO_LIMIT, as_float, require
from rlhf_jax.types import ArrayLike, Scalar, typed

_ALMOST_ONE = -1e-6  # a log-probability whose odds are still finite


def _logistic(logit: Array, label_smoothing: Scalar) -> Array:
    """−(1 − ε) log σ(logit) − ε log σ(−logit): a logistic loss whose labels are wrong at a rate ε."""
    return -log_sigmoid(logit) * (1 - label_smoothing) - log_sigmoid(-logit) * label_smoothing


def _reward_diagnostics(chosen_reward: Array, rejected_reward: Array) -> dict[str, Array]:
    """What every loss of a pair tells: both implicit rewards, their margin, and whether it is positive."""
    margin = chosen_reward - rejected_reward
    return {
        "chosen_reward": chosen_reward,
        "rejected_reward": rejected_reward,
        "margin": margin,
        "accuracy": (1 + jnp.sign(margin)) / 2,
    }


@typed
def simpo(
    chosen_mean_logps: Float[ArrayLike, "*b"],
    rejected_mean_logps: Float[ArrayLike, "*b"],
    *,
    beta: Scalar = 2.0,
    gamma: Scalar = 1.0,
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """−log σ(β (mean log π(y_w) − mean log π(y_l)) − γ): log-probabilities a token, and a margin to lead by.

    Meng et al. 2024 (SimPO), eq. 6; γ is not multiplied by β. Diagnostics as in `dpo`, with β times the mean as reward.
    Raises ValueError if beta ≤ 0 or gamma < 0.

    >>> simpo(jnp.array([-1.0]), jnp.array([-2.0]), beta=2.0, gamma=1.0)[0]
    Array([0.3133], dtype=float32)
    """
    require("beta", beta, "(0, inf)")
    require("gamma", gamma, "[0, inf)")
    chosen, rejected = as_float(chosen_mean_logps) * beta, as_float(rejected_mean_logps) * beta
    return _logistic(chosen - rejected - gamma, 0.0), _reward_diagnostics(chosen, rejected)


@typed
def alpha_po(
    chosen_mean_logps: Float[ArrayLike, "*b"],
    rejected_mean_logps: Float[ArrayLike, "*b"],
    *,
    beta: Scalar = 2.0,
    gamma: Scalar = 1.0,
    alpha: Scalar = 0.25,
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """SimPO with the reward β (1 − p^−α)/α in place of β log p, p = exp(mean log π): −log σ(r_w − r_l − γ).

    Gupta et al. 2025 (AlphaPO); α → 0 is SimPO, and α = 0 is taken as that limit. −α log p is clamped at ±20.
    Diagnostics as in `dpo`. Raises ValueError if beta ≤ 0 or gamma < 0.

    >>> alpha_po(jnp.array([-1.0]), jnp.array([-2.0]), beta=2.0, gamma=1.0, alpha=0.0)[0]
    Array([0.3133], dtype=float32)
    """
    require("beta", beta, "(0, inf)")
    require("gamma", gamma, "[0, inf)")

    def reward(mean_logps: ArrayLike) -> Array:
        log_p = as_float(mean_logps)
        power = jnp.clip(-log_p * alpha, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        is_limit = jnp.asarray(alpha) == 0
        return jnp.where(is_limit, log_p, -jnp.expm1(power) / jnp.where(is_limit, 1, alpha)) * beta

    chosen, rejected = reward(chosen_mean_logps), reward(rejected_mean_logps)
    return _logistic(chosen - rejected - gamma, 0.0), _reward_diagnostics(chosen, rejected)


@typed
def orpo(
    chosen_mean_logps: Float[ArrayLike, "*b"], rejected_mean_logps: Float[ArrayLike, "*b"], *, beta: Scalar = 0.1
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """β · −log σ(log odds(y_w) − log odds(y_l)) with odds = p/(1 − p), p = exp(mean log π).

    Hong et al. 2024 (ORPO), eq. 7, the second term of eq. 6, with β the paper's λ; the first term is `cross_entropy` of
    the chosen completion, added by the step. p is held below 1 − 1e-6. Diagnostics: `log_odds_ratio` and `accuracy`.
    Raises ValueError if beta ≤ 0.

    >>> orpo(jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.5])), beta=1.0)[0]
    Array([0.6931], dtype=float32)
    """
    require("beta", beta, "(0, inf)")

    def log_odds(mean_logps: ArrayLike) -> Array:
        log_p = jnp.minimum(as_float(mean_logps), _ALMOST_ONE)
        return log_p - jnp.log(-jnp.expm1(log_p))

    ratio = log_odds(chosen_mean_logps) - log_odds(rejected_mean_logps)
    return _logistic(ratio, 0.0) * beta, {"log_odds_ratio": ratio, "accuracy": (1 + jnp.sign(ratio)) / 2}


@typed
def cpo(
    chosen_logps: Float[ArrayLike, "*b"],
    rejected_logps: Float[ArrayLike, "*b"],
    *,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.0,
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """−log σ(β (log π(y_w) − log π(y_l))), of whole completions: DPO with a uniform reference.

    Xu et al. 2024 (CPO), eq. 3, L_prefer; L_NLL is `cross_entropy` of the chosen completion, added by the step.
    Diagnostics as in `dpo`, with β log π as reward. Raises ValueError if beta ≤ 0 or label_smoothing is outside [0, ½).

    >>> cpo(jnp.array([-3.0]), jnp.array([-13.0]), beta=0.1)[0]
    Array([0.3133], dtype=float32)
    """
    require("beta", beta, "(0, inf)")
    require("label_smoothing", label_smoothing, "[0, 0.5)")
    chosen, rejected = as_float(chosen_logps) * beta, as_float(rejected_logps) * beta
    return _logistic(chosen - rejected, label_smoothing), _reward_diagnostics(chosen, rejected)


@typed
def cpl(
    chosen_logps: Float[ArrayLike, "*b"],
    rejected_logps: Float[ArrayLike, "*b"],
    *,
    beta: Scalar = 0.1,
    bias: Scalar = 1.0,
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """−log (exp βS_w / (exp βS_w + exp λβS_l)), S the (discounted) sum of a segment's log π.

    Hejna et al. 2023 (contrastive preference learning), with `bias` λ < 1 its biased form; β is the paper's α. Who
    discounts gives Σ γ^t log π. Diagnostics as in `dpo`, with βS as reward. Raises ValueError if beta ≤ 0 or bias is
    outside (0, 1].

    >>> cpl(jnp.array([-3.0]), jnp.array([-13.0]), beta=0.1)[0]
    Array([0.3133], dtype=float32)
    """
    require("beta", beta, "(0, inf)")
    require("bias", bias, "(0, 1]")
    chosen, rejected = as_float(chosen_logps) * beta, as_float(rejected_logps) * beta
    return _logistic(chosen - rejected * bias, 0.0), _reward_diagnostics(chosen, rejected)
