"""Losses of pairs of completions, with a reference policy: log-ratios in, one number a pair out.

A log-ratio is log π(y|x) − log π_ref(y|x), the sum over a completion's tokens of `logps − ref_logps`; it is a mean
over the tokens only where an argument's name says so. Δ = chosen_logratio − rejected_logratio, and β times a log-ratio
is the implicit reward, in units of the score. Losses without a reference stand in `reference_free` and are names of
this module too. Of TRL's loss types two have no function here: `sft` is `supervised.cross_entropy` of the chosen
completion, and `sigmoid_norm` is `dpo` of mean log-ratios.

Shapes: *b any leading axes; a loss is one number a pair, and so is a diagnostic.
"""

import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid
from jaxtyping import Array, Float

from rlhf_jax.losses.reference_free import _logistic, _reward_diagnostics, alpha_po, cpl, cpo, orpo, simpo
from rlhf_jax.numerics import LOG_RATIO_LIMIT, as_float, exp_log_ratio, require
from rlhf_jax.types import ArrayLike, Scalar, typed

__all__ = [
    "alpha_po",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "bco_pair",
    "cpl",
    "cpo",
    "discopop",
    "dpo",
    "exo_pair",
    "f_dpo",
    "hinge",
    "ipo",
    "nca_pair",
    "orpo",
    "robust_dpo",
    "simpo",
    "sppo_hard",
]


def _rewards(chosen: ArrayLike, rejected: ArrayLike, beta: Scalar) -> tuple[Array, Array]:
    """The implicit rewards β · log-ratio, in at least float32."""
    require("beta", beta, "(0, inf)")
    return as_float(chosen) * beta, as_float(rejected) * beta


@typed
def dpo(
    chosen_logratio: Float[ArrayLike, "*b"],
    rejected_logratio: Float[ArrayLike, "*b"],
    *,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.0,
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """Direct preference optimisation: −(1 − ε) log σ(βΔ) − ε log σ(−βΔ).

    Rafailov et al. 2023, eq. 7. `label_smoothing` ε > 0 is conservative DPO (Mitchell 2023), which takes ε for the rate
    of wrong labels. Diagnostics: `chosen_reward`, `rejected_reward`, `margin` βΔ, and `accuracy`, 1 if it is positive,
    ½ for a tie. Raises ValueError if beta ≤ 0 or label_smoothing is outside [0, ½).

    >>> loss, diagnostics = dpo(jnp.array([2.0]), jnp.array([-1.0]), beta=0.1)
    >>> loss, diagnostics["accuracy"]
    (Array([0.55435], dtype=float32), Array([1.], dtype=float32))
    """
    require("label_smoothing", label_smoothing, "[0, 0.5)")
    chosen, rejected = _rewards(chosen_logratio, rejected_logratio, beta)
    return _logistic(chosen - rejected, label_smoothing), _reward_diagnostics(chosen, rejected)


@typed
def robust_dpo(
    chosen_logratio: Float[ArrayLike, "*b"],
    rejected_logratio: Float[ArrayLike, "*b"],
    *,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.1,
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """DPO's loss estimated without bias where labels are flipped at a rate ε: ((1−ε) ℓ(Δ) − ε ℓ(−Δ)) / (1 − 2ε).

    Chowdhury et al. 2024 (rDPO), with ℓ(Δ) = −log σ(βΔ). It is not bounded below. Diagnostics as in `dpo`.
    Raises ValueError if beta ≤ 0 or label_smoothing is outside [0, ½).

    >>> robust_dpo(jnp.array([0.0]), jnp.array([0.0]), label_smoothing=0.3)[0]
    Array([0.6931], dtype=float32)
    """
    require("label_smoothing", label_smoothing, "[0, 0.5)")
    chosen, rejected = _rewards(chosen_logratio, rejected_logratio, beta)
    right, wrong = -log_sigmoid(chosen - rejected), -log_sigmoid(rejected - chosen)
    loss = (right * (1 - label_smoothing) - wrong * label_smoothing) / (1 - 2 * label_smoothing)
    return loss, _reward_diagnostics(chosen, rejected)


@typed
def hinge(
    chosen_logratio: Float[ArrayLike, "*b"], rejected_logratio: Float[ArrayLike, "*b"], *, beta: Scalar = 0.1
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """max(0, 1 − βΔ). Zhao et al. 2023 (SLiC) in the normalised form of Liu et al. 2023 (RSO).

    Diagnostics as in `dpo`. Raises ValueError if beta ≤ 0.

    >>> hinge(jnp.array([3.0, 20.0]), jnp.array([0.0, 0.0]), beta=0.1)[0]
    Array([0.7, 0. ], dtype=float32)
    """
    chosen, rejected = _rewards(chosen_logratio, rejected_logratio, beta)
    return jnp.maximum(1 - (chosen - rejected), 0), _reward_diagnostics(chosen, rejected)


@typed
def ipo(
    chosen_logratio: Float[ArrayLike, "*b"], rejected_logratio: Float[ArrayLike, "*b"], *, beta: Scalar = 0.1
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """Identity preference optimisation: (Δ − 1/(2β))², with β the paper's τ.

    Azar et al. 2023, eq. 17, where Δ is of whole completions: sums over tokens. TRL averages over tokens instead; give
    mean log-ratios for that reading. Diagnostics as in `dpo`. Raises ValueError if beta ≤ 0.

    >>> ipo(jnp.array([5.0]), jnp.array([0.0]), beta=0.1)[0]
    Array([0.], dtype=float32)
    """
    chosen, rejected = _rewards(chosen_logratio, rejected_logratio, beta)
    delta = as_float(chosen_logratio) - as_float(rejected_logratio)
    return jnp.square(delta - 1 / (2 * beta)), _reward_diagnostics(chosen, rejected)


@typed
def exo_pair(
    chosen_logratio: Float[ArrayLike, "*b"],
    rejected_logratio: Float[ArrayLike, "*b"],
    *,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 1e-3,
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """KL(σ(βΔ), σ(−βΔ) ‖ 1−ε, ε): the policy's preference against the label's, with the KL in reverse.

    Ji et al. 2024 (EXO), eq. 16 for two completions; `label_smoothing` is the paper's ε, without which the KL is
    infinite. Diagnostics as in `dpo`. Raises ValueError if beta ≤ 0 or label_smoothing is outside (0, ½).

    >>> exo_pair(jnp.array([0.0]), jnp.array([0.0]), label_smoothing=0.25)[0]
    Array([0.1438], dtype=float32)
    """
    require("label_smoothing", label_smoothing, "(0, 0.5)")
    chosen, rejected = _rewards(chosen_logratio, rejected_logratio, beta)
    logit, eps = chosen - rejected, jnp.asarray(label_smoothing)
    for_chosen = sigmoid(logit) * (log_sigmoid(logit) - jnp.log1p(-eps))
    for_rejected = sigmoid(-logit) * (log_sigmoid(-logit) - jnp.log(eps))
    return for_chosen + for_rejected, _reward_diagnostics(chosen, rejected)


@typed
def nca_pair(
    chosen_logratio: Float[ArrayLike, "*b"], rejected_logratio: Float[ArrayLike, "*b"], *, beta: Scalar = 0.1
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """−log σ(r_w) − ½ log σ(−r_w) − ½ log σ(−r_l), r = β · log-ratio: each against zero, not against the other.

    Chen et al. 2024 (noise contrastive alignment), its loss of preferences. Diagnostics as in `dpo`. Raises ValueError
    if beta ≤ 0.

    >>> nca_pair(jnp.array([0.0]), jnp.array([0.0]))[0]
    Array([1.3863], dtype=float32)
    """
    chosen, rejected = _rewards(chosen_logratio, rejected_logratio, beta)
    loss = -log_sigmoid(chosen) - (log_sigmoid(-chosen) + log_sigmoid(-rejected)) / 2
    return loss, _reward_diagnostics(chosen, rejected)


@typed
def bco_pair(
    chosen_logratio: Float[ArrayLike, "*b"], rejected_logratio: Float[ArrayLike, "*b"], *, beta: Scalar = 0.1
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """−log σ(r_w) − log σ(−r_l), r = β · log-ratio: chosen and rejected as two classes.

    Jung et al. 2024 (BCO), without the shift δ, which `unpaired.bco` has. Diagnostics as in `dpo`. Raises
    ValueError if beta ≤ 0.

    >>> bco_pair(jnp.array([0.0]), jnp.array([0.0]))[0]
    Array([1.3863], dtype=float32)
    """
    chosen, rejected = _rewards(chosen_logratio, rejected_logratio, beta)
    return -log_sigmoid(chosen) - log_sigmoid(-rejected), _reward_diagnostics(chosen, rejected)


@typed
def sppo_hard(
    chosen_logratio: Float[ArrayLike, "*b"], rejected_logratio: Float[ArrayLike, "*b"], *, beta: Scalar = 0.1
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """(log-ratio_w − 1/(2β))² + (log-ratio_l + 1/(2β))²: self-play with the winner's probability set to 1.

    Wu et al. 2024 (SPPO), eq. 4.7 with η = 1/β and P(y_w ≻ y_l) = 1. Diagnostics as in `dpo`. Raises ValueError if
    beta ≤ 0.

    >>> sppo_hard(jnp.array([5.0]), jnp.array([-4.0]), beta=0.1)[0]
    Array([1.], dtype=float32)
    """
    chosen, rejected = _rewards(chosen_logratio, rejected_logratio, beta)
    aim = 1 / (2 * beta)
    loss = jnp.square(as_float(chosen_logratio) - aim) + jnp.square(as_float(rejected_logratio) + aim)
    return loss, _reward_diagnostics(chosen, rejected)


@typed
def apo_zero(
    chosen_logratio: Float[ArrayLike, "*b"], rejected_logratio: Float[ArrayLike, "*b"], *, beta: Scalar = 0.1
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """1 − σ(r_w) + σ(r_l), r = β · log-ratio: the chosen goes up and the rejected down, each from zero.

    D'Oosterlinck et al. 2024 (APO-zero), for completions better than the policy's; up to the constant 1. Diagnostics as
    in `dpo`. Raises ValueError if beta ≤ 0.

    >>> apo_zero(jnp.array([0.0]), jnp.array([0.0]))[0]
    Array([1.], dtype=float32)
    """
    chosen, rejected = _rewards(chosen_logratio, rejected_logratio, beta)
    return sigmoid(-chosen) + sigmoid(rejected), _reward_diagnostics(chosen, rejected)


@typed
def apo_down(
    chosen_logratio: Float[ArrayLike, "*b"], rejected_logratio: Float[ArrayLike, "*b"], *, beta: Scalar = 0.1
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """σ(r_w) + 1 − σ(r_w − r_l), r = β · log-ratio: both go down, the rejected further.

    D'Oosterlinck et al. 2024 (APO-down), for completions worse than the policy's; up to the constant 1. Diagnostics as
    in `dpo`. Raises ValueError if beta ≤ 0.

    >>> apo_down(jnp.array([0.0]), jnp.array([0.0]))[0]
    Array([1.], dtype=float32)
    """
    chosen, rejected = _rewards(chosen_logratio, rejected_logratio, beta)
    return sigmoid(chosen) + sigmoid(rejected - chosen), _reward_diagnostics(chosen, rejected)


@typed
def discopop(
    chosen_logratio: Float[ArrayLike, "*b"],
    rejected_logratio: Float[ArrayLike, "*b"],
    *,
    beta: Scalar = 0.1,
    temperature: Scalar = 0.05,
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """(1 − m) · −log σ(βΔ) + m · exp(−βΔ), m = σ(βΔ / τ): logistic where the pair is wrong, exponential where right.

    Lu et al. 2024 (DiscoPOP, log-ratio modulated loss), eq. 5; found by a search over programs. βΔ is clamped at ±20 in
    the exponential. Diagnostics as in `dpo`. Raises ValueError if beta or temperature ≤ 0.

    >>> discopop(jnp.array([0.0]), jnp.array([0.0]))[0]
    Array([0.8466], dtype=float32)
    """
    require("temperature", temperature, "(0, inf)")
    chosen, rejected = _rewards(chosen_logratio, rejected_logratio, beta)
    logit = chosen - rejected
    share = sigmoid(logit / temperature)
    loss = -log_sigmoid(logit) * (1 - share) + exp_log_ratio(-logit) * share
    return loss, _reward_diagnostics(chosen, rejected)


@typed
def f_dpo(
    chosen_logratio: Float[ArrayLike, "*b"],
    rejected_logratio: Float[ArrayLike, "*b"],
    *,
    beta: Scalar = 0.1,
    divergence: str = "reverse_kl",
    alpha: Scalar = 0.5,
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """−log σ(β f′(u_w) − β f′(u_l)), u = π/π_ref: DPO under another divergence from the reference than the reverse KL.

        reverse_kl: f′ = log u      forward_kl: f′ = −1/u      js: f′ = log(2u/(1 + u))      alpha: f′ = (1 − u^−α)/α

    Wang et al. 2023 (f-DPO), up to constants that cancel. α → 0 is the reverse, α → 1 the forward
    KL; TRL's `f_alpha_divergence_coef` is 1 − α. log u is clamped at ±20 where it is exponentiated. Diagnostics as in
    `dpo`, of β f′. Raises ValueError if beta ≤ 0, alpha is outside (0, 1) or the divergence has another name.

    >>> f_dpo(jnp.array([1.0]), jnp.array([0.0]), beta=1.0, divergence="forward_kl")[0]
    Array([0.42622], dtype=float32)
    """
    require("alpha", alpha, "(0, 1)")
    require("beta", beta, "(0, inf)")
    derivatives = {
        "reverse_kl": lambda u: u,
        "forward_kl": lambda u: 1 - exp_log_ratio(-u),
        "js": lambda u: jnp.log(2.0) + log_sigmoid(u),
        # expm1: 1 − exp(−αu) would keep no digit of a small α
        "alpha": lambda u: -jnp.expm1(jnp.clip(u * -alpha, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)) / alpha,
    }
    if divergence not in derivatives:
        raise ValueError(f"divergence must be one of {', '.join(derivatives)}, got {divergence!r}")
    chosen, rejected = (derivatives[divergence](as_float(u)) * beta for u in (chosen_logratio, rejected_logratio))
    return _logistic(chosen - rejected, 0.0), _reward_diagnostics(chosen, rejected)


@typed
def aot(
    chosen_logps: Float[ArrayLike, "*b n"],
    rejected_logps: Float[ArrayLike, "*b n"],
    ref_chosen_logps: Float[ArrayLike, "*b n"],
    ref_rejected_logps: Float[ArrayLike, "*b n"],
    *,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.0,
) -> tuple[Float[Array, "*b n"], dict[str, Float[Array, "*b n"]]]:
    """DPO's loss of sorted margins: the policy's i-th smallest against the reference's i-th smallest.

    Melnyk et al. 2024 (AOT), on paired data. Sequence log-probabilities, sorted over the last axis: entry i of
    the loss is of rank i in the batch, not of pair i. Diagnostics: `accuracy` and `margin` of the ranks. Raises
    ValueError if beta ≤ 0 or label_smoothing is outside [0, ½).

    >>> aot(*(jnp.array(x) for x in ([1.0, 3.0], [0.0, 0.0], [2.0, 0.0], [0.0, 0.0])), beta=1.0)[0]
    Array([0.3133, 0.3133], dtype=float32)
    """
    margins = as_float(chosen_logps) - as_float(rejected_logps)
    return _sorted_gap(margins, as_float(ref_chosen_logps) - as_float(ref_rejected_logps), beta, label_smoothing)


@typed
def aot_unpaired(
    chosen_logps: Float[ArrayLike, "*b n"],
    rejected_logps: Float[ArrayLike, "*b n"],
    ref_chosen_logps: Float[ArrayLike, "*b n"],
    ref_rejected_logps: Float[ArrayLike, "*b n"],
    *,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.0,
) -> tuple[Float[Array, "*b n"], dict[str, Float[Array, "*b n"]]]:
    """DPO's loss of sorted log-ratios: the i-th smallest chosen against the i-th smallest rejected.

    Melnyk et al. 2024 (AOT), on unpaired data; else as `aot`.

    >>> aot_unpaired(*(jnp.array(x) for x in ([1.0, 3.0], [2.0, 0.0], [0.0, 0.0], [0.0, 0.0])), beta=1.0)[0]
    Array([0.3133, 0.3133], dtype=float32)
    """
    chosen = as_float(chosen_logps) - as_float(ref_chosen_logps)
    return _sorted_gap(chosen, as_float(rejected_logps) - as_float(ref_rejected_logps), beta, label_smoothing)


def _sorted_gap(larger: Array, smaller: Array, beta: Scalar, label_smoothing: Scalar) -> tuple[Array, dict[str, Array]]:
    require("beta", beta, "(0, inf)")
    require("label_smoothing", label_smoothing, "[0, 0.5)")
    gap = (jnp.sort(larger, axis=-1) - jnp.sort(smaller, axis=-1)) * beta
    return _logistic(gap, label_smoothing), {"accuracy": (1 + jnp.sign(gap)) / 2, "margin": gap}
