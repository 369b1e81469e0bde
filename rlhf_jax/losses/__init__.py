"""Losses as plain functions: arrays in, (unreduced loss, dict of per-element diagnostics) out.

All take NumPy or JAX arrays of any leading axes, promote bfloat16 and float16 to float32, and refuse integers and wrong
shapes with an error that names the argument. `masking.token_mean` and `masking.sequence_mean` reduce them.
"""

from rlhf_jax.losses import policy, regularizers, reward, supervised, value
from rlhf_jax.losses.policy import ppo_clip, reinforce
from rlhf_jax.losses.regularizers import entropy_bonus
from rlhf_jax.losses.reward import (
    best_of_k,
    bradley_terry,
    centering,
    k_wise,
    outcome_bce,
    plackett_luce,
    scalar_rating,
)
from rlhf_jax.losses.supervised import cross_entropy
from rlhf_jax.losses.value import clipped_value

__all__ = [
    "best_of_k",
    "bradley_terry",
    "centering",
    "clipped_value",
    "cross_entropy",
    "entropy_bonus",
    "k_wise",
    "outcome_bce",
    "plackett_luce",
    "policy",
    "ppo_clip",
    "regularizers",
    "reinforce",
    "reward",
    "scalar_rating",
    "supervised",
    "value",
]
