"""Losses of single completions, each marked desirable or not, with a reference policy.

A log-ratio is log π(y|x) − log π_ref(y|x), summed over a completion's tokens.

Shapes: *b any leading axes; a loss is one number a completion, and so is a diagnostic.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid
from jaxtyping import Array, Bool, Float

from rlhf_jax.masking import token_mean
from rlhf_jax.numerics import as_float, require
from rlhf_jax.types import ArrayLike, Mean, Scalar, typed


@typed
def kto(
    logratios: Float[ArrayLike, "*b"],
    desirable: Bool[ArrayLike, "*b"],
    kl_baseline: Scalar,
    *,
    beta: Scalar = 0.1,
    desirable_weight: Scalar = 1.0,
    undesirable_weight: Scalar = 1.0,
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """The value lost, w (1 − σ(±β (r − z))), + for desirable completions: gains and losses seen from a baseline z.

    Ethayarajh et al. 2024 (KTO), with w the paper's λ_D or λ_U. `kl_baseline` z comes from `kto_kl_baseline`,
    or from elsewhere clamped at 0 and without a gradient. Diagnostics: `reward` βr. Raises ValueError if beta or a
    weight ≤ 0.

    >>> kto(jnp.array([1.0, 1.0]), jnp.array([True, False]), 1.0, beta=0.5)[0]
    Array([0.5, 0.5], dtype=float32)
    """
    require("beta", beta, "(0, inf)")
    require("desirable_weight", desirable_weight, "(0, inf)")
    require("undesirable_weight", undesirable_weight, "(0, inf)")
    ratios = as_float(logratios)
    gain = jnp.where(desirable, 1, -1) * beta * (ratios - kl_baseline)
    weight = jnp.where(desirable, desirable_weight, undesirable_weight)
    return weight * sigmoid(-gain), {"reward": ratios * beta}


@typed
def kto_kl_baseline(mismatched_logratios: Float[ArrayLike, "*b"]) -> Float[Array, ""]:
    """KTO's z = max(0, mean log-ratio of completions beside prompts that are not theirs), with its gradient stopped.

    Ethayarajh et al. 2024 (KTO), section 4.1: y_j after x_i, j = i + 1 in the batch, estimates the KL of the policy to
    the reference. Taken from the batch's own completions instead, z is what the loss moves, and another number.

    >>> kto_kl_baseline(jnp.array([1.0, 3.0])), kto_kl_baseline(jnp.array([-5.0, 3.0]))
    (Array(2., dtype=float32), Array(0., dtype=float32))
    """
    return jax.lax.stop_gradient(jnp.maximum(as_float(mismatched_logratios).mean(), 0))


@typed
def bco(
    logratios: Float[ArrayLike, "*b"],
    desirable: Bool[ArrayLike, "*b"],
    delta: Scalar,
    *,
    beta: Scalar = 0.1,
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """−log σ(±(βr − δ)), + where a completion is desirable: a classifier whose logit is the implicit reward.

    Jung et al. 2024 (BCO). `delta` δ is the reward shift, from `RewardShift`. Diagnostics: `reward` βr. Raises
    ValueError if beta ≤ 0.

    >>> bco(jnp.array([1.0, 1.0]), jnp.array([True, False]), 0.5, beta=0.5)[0]
    Array([0.6931, 0.6931], dtype=float32)
    """
    require("beta", beta, "(0, inf)")
    rewards = as_float(logratios) * beta
    return -log_sigmoid(jnp.where(desirable, 1, -1) * (rewards - delta)), {"reward": rewards}


@flax.struct.dataclass
class RewardShift:
    """BCO's δ: halfway between the mean rewards of the desirable and of the undesirable completions seen so far.

    Jung et al. 2024 (BCO), with running means over all batches; state in, state out. TRL takes one mean
    over both, which is the same where both are equally many.

    >>> shift = RewardShift.init().update(jnp.array([1.0, 3.0, -2.0]), jnp.array([True, True, False]))
    >>> shift.delta
    Array(0., dtype=float32)
    """

    desirable: Mean
    undesirable: Mean

    @classmethod
    def init(cls) -> "RewardShift":
        """Nothing seen: δ is 0."""
        return cls(*(Mean(jnp.zeros(()), jnp.zeros(())) for _ in range(2)))

    @typed
    def update(self, rewards: Float[ArrayLike, "*b"], desirable: Bool[ArrayLike, "*b"]) -> "RewardShift":
        """The state after a batch of rewards β · log-ratio, which get no gradient through it."""
        rewards, desirable = jax.lax.stop_gradient(as_float(rewards)), jnp.asarray(desirable)
        return RewardShift(
            self.desirable + token_mean(rewards, desirable), self.undesirable + token_mean(rewards, ~desirable)
        )

    @property
    def delta(self) -> Float[Array, ""]:
        """δ."""
        return (self.desirable.value + self.undesirable.value) / 2
