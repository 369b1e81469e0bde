"""Methods of the `policy` stage by their papers' names: each is the fields in which it differs from GRPO.

    policy.Config(**METHODS["rloo"], steps=20)
    policy.Config(**METHODS["rloo"] | {"group_size": 2}, steps=20)      # with a field of its own replaced

Learning rates, sizes and the price of KL are the experiment's to say, and are here the papers' only where they are part
of a method.
"""

from typing import Any

from rlhf_jax.algorithms.trust_region import TrustRegion
from rlhf_jax.kl import FixedKL
from rlhf_jax.rewards.shaping import OverlongPenalty

_BANDIT: dict[str, Any] = {"kl_in": "reward", "kl_estimator": "k1", "clip_eps": None, "scale": "none", "reducer": "sum"}
_NO_KL: dict[str, Any] = {"kl": FixedKL(0.0)}

METHODS: dict[str, dict[str, Any]] = {
    # Williams 1992: whole completions, as REINFORCE's baseline the mean score of the others in the batch.
    "reinforce": {**_BANDIT, "loss": "reinforce", "group_size": 1, "baseline": "batch"},
    # Ahmadian et al. 2024: the baseline is the mean of the prompt's other completions.
    "rloo": {**_BANDIT, "loss": "reinforce", "group_size": 4, "baseline": "leave_one_out"},
    # Hu et al. 2025: rewards to go with k1, whitened over the batch; PPO's clip.
    "reinforce_plus_plus": {
        "group_size": 1, "baseline": "none", "scale": "batch", "credit": "token", "kl_in": "reward",
        "kl_estimator": "k1", "reducer": "token",
    },
    # The same paper's variant with a group's mean for a baseline and k2 in the loss.
    "reinforce_plus_plus_baseline": {"scale": "batch", "kl_estimator": "k2", "reducer": "token"},
    # Li et al. 2023: the baseline is the score of a greedy completion, beside one that is drawn.
    "remax": {**_BANDIT, "loss": "reinforce", "group_size": 2, "baseline": "greedy", "credit": "token"},
    # Shao et al. 2024, section 4.1.
    "grpo": {},
    # Liu et al. 2025: neither the group's spread nor a completion's own length divides; no KL.
    "dr_grpo": {**_NO_KL, "scale": "none", "reducer": "fixed"},
    # Yu et al. 2025: clip-higher, token mean, dynamic sampling, a penalty on the last tokens, which are a fifth of
    # the limit in the paper and `overlong.buffer` here; no KL.
    "dapo": {
        **_NO_KL, "clip_eps_high": 0.28, "reducer": "token", "dynamic_sampling": 8, "overlong": OverlongPenalty(),
    },
    # Zheng et al. 2025: one ratio a completion.
    "gspo": {**_NO_KL, "loss": "gspo", "clip_eps": 3e-4, "clip_eps_high": 4e-4},
    # MiniMax 2025: clipped weights, all tokens keep their gradient.
    "cispo": {**_NO_KL, "loss": "cispo", "clip_eps": None, "clip_eps_high": 4.0, "reducer": "token"},
    # Zhao et al. 2025: the geometric mean of the tokens' ratios.
    "gmpo": {"loss": "gmpo", "clip_eps": 0.4},
    # Wu et al. 2023: pairs of completions.
    "p3o": {
        "loss": "p3o", "group_size": 2, "baseline": "none", "scale": "none", "kl_in": "reward", "kl_estimator": "k1",
    },
    # Schulman et al. 2015: the natural gradient, as far as a divergence allows; RLOO's advantages.
    "trpo": {
        "loss": "surrogate", "clip_eps": None, "group_size": 4, "baseline": "leave_one_out", "scale": "batch",
        "kl_in": "reward", "kl_estimator": "k1", "reducer": "token", "trust_region": TrustRegion(),
    },
}  # fmt: skip
"""The fields in which a method differs from GRPO."""
