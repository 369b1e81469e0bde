"""PPO's details of four papers by name, every one a field of `ppo.Config`, which may be given anew.

    ppo.Config(**PRESETS["nplus"], policy="sft", reward="reward_model", data=POSTS)

Data, model and mesh are the experiment's. Where a paper's detail has no field here, its entry says what stands instead.
The same papers' reward models are in `reward_presets`.
"""

from typing import Any

from rlhf_jax.algorithms.onpolicy import SharedTrunk
from rlhf_jax.algorithms.pretraining_mix import PretrainingMix
from rlhf_jax.algorithms.truncation import Truncation
from rlhf_jax.kl import AdaptiveKL, FixedKL
from rlhf_jax.optim import Optimizer
from rlhf_jax.rewards.shaping import EosPenalty, Shaping
from rlhf_jax.sampling import Sampling

_UNCLIPPED = 1e9  # a gradient's norm
_TLDR: dict[str, Any] = {
    "prompt_tokens": (1, 511), "completion_tokens": 53, "too_long": "paragraph",
    "sampling": Sampling(temperature=0.7), "evaluation_sampling": Sampling(temperature=0.01),
    "batch_size": 512, "steps": 1_000_000 // 512, "epochs": 4, "minibatches": 1,
    "kl": FixedKL(0.05), "whiten_advantages": True, "gamma": 1.0, "lam": 0.95, "clip_eps": 0.2, "value_clip": 0.2,
    "shaping": Shaping(eos_penalty=EosPenalty(score=-1.0, how="replace")),
    "critic": "reward_model",
}  # fmt: skip


def _both(optimizer: Optimizer) -> dict[str, Any]:
    return {"optimizer": optimizer, "critic_optimizer": optimizer}


_LINEAR: dict[str, Any] = {"schedule": "linear", "b2": 0.999, "eps": 1e-5, "clip_norm": _UNCLIPPED}

PRESETS: dict[str, dict[str, Any]] = {
    # The reward is read at the full stop that a completion is cut at, not at the last of the pads behind it, and " ."
    # is one. Their queries had 64 tokens each: here shorter ones stay as they are.
    "ziegler2019": {
        "prompt_tokens": (1, 64), "completion_tokens": 24, "too_long": "start",
        "sampling": Sampling(temperature=0.7, ends=False), "truncate": Truncation(".", after=16, score=-1.0),
        "batch_size": 512, "steps": 1_000_000 // 512, "epochs": 4, "minibatches": 1,
        "kl": AdaptiveKL(coef=0.15, target=6.0, horizon=10_000),
        "shaping": Shaping(whiten=True), "whiten_advantages": True,
        "gamma": 1.0, "lam": 0.95, "clip_eps": 0.2, "value_clip": 0.2,
        "critic": SharedTrunk(value_coef=0.1),
        "optimizer": Optimizer(
            1e-5, schedule="linear", b2=0.999, eps=1e-5, eps_form="tensorflow", clip_norm=_UNCLIPPED
        ),
    },
    # TL;DR, a critic of its own from the reward model. What Stiennon et al. 2020 leave open is as Huang et al. 2024
    # (N+) found it; the learning rate is that of 1.3B (of 6.7B: 7e-6, batches of 256).
    "stiennon2020": {**_TLDR, **_both(Optimizer(1.5e-5, **_LINEAR))},
    "nplus": {**_TLDR, **_both(Optimizer(3e-6, weight_decay=0.01, **_LINEAR))},
    # Ouyang et al. 2022. Eight rows of pretraining text an episode; the mean over tokens makes 27.8 weigh less than
    # their sum over a text (losses.pretraining_mix).
    # Of this paper's pretraining texts 8,192 rows stand in memory, each drawn many times; clipping is the default.
    "instructgpt": {
        "prompt_tokens": (1, 1023), "completion_tokens": 1024,
        "batch_size": 512, "steps": 256_000 // 512, "epochs": 1, "minibatches": 8,
        "kl": FixedKL(0.02), "gamma": 1.0, "lam": 0.95, "clip_eps": 0.2, "value_clip": 0.2,
        "ptx": PretrainingMix(coef=27.8, batch_size=512, row_length=1024, rows=8192), "average": 0.992,
        "critic": "reward_model", **_both(Optimizer(9e-6, warmup_steps=80)),
    },
}  # fmt: skip
"""The fields that a paper sets."""
