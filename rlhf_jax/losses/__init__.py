"""Losses as plain functions: arrays in, (unreduced loss, dict of per-element diagnostics) out.

All take NumPy or JAX arrays of any leading axes, promote bfloat16 and float16 to float32, and refuse integers and wrong
shapes with an error that names the argument. The reducers of `masking` reduce them: `token_mean`, `sequence_mean`,
`fixed_length_mean`. What is no loss returns its array alone: `bellman_targets`, `perturbed_logits`, `fisher_diagonal`.
"""

from rlhf_jax.losses import offline, policy, regularizers, reward, supervised, value
from rlhf_jax.losses.offline import (
    bellman_targets,
    conservative,
    expectile,
    ilql,
    perturbed_logits,
    q_regression,
)
from rlhf_jax.losses.policy import (
    cispo,
    gmpo,
    gspo,
    gspo_token,
    p3o,
    ppo_clip,
    reinforce,
    trpo_surrogate,
    trust_region_penalty,
)
from rlhf_jax.losses.regularizers import (
    elastic_weight_consolidation,
    entropy_bonus,
    fisher_diagonal,
    pretraining_mix,
)
from rlhf_jax.losses.reward import (
    best_of_k,
    bradley_terry,
    centering,
    k_wise,
    ordinal_rating,
    outcome_bce,
    plackett_luce,
    process_bce,
    scalar_rating,
)
from rlhf_jax.losses.supervised import cross_entropy, weighted_cross_entropy
from rlhf_jax.losses.value import clipped_value

__all__ = [
    "bellman_targets",
    "best_of_k",
    "bradley_terry",
    "centering",
    "cispo",
    "clipped_value",
    "conservative",
    "cross_entropy",
    "elastic_weight_consolidation",
    "entropy_bonus",
    "expectile",
    "fisher_diagonal",
    "gmpo",
    "gspo",
    "gspo_token",
    "ilql",
    "k_wise",
    "offline",
    "ordinal_rating",
    "outcome_bce",
    "p3o",
    "perturbed_logits",
    "plackett_luce",
    "policy",
    "ppo_clip",
    "pretraining_mix",
    "process_bce",
    "q_regression",
    "regularizers",
    "reinforce",
    "reward",
    "scalar_rating",
    "supervised",
    "trpo_surrogate",
    "trust_region_penalty",
    "value",
    "weighted_cross_entropy",
]
