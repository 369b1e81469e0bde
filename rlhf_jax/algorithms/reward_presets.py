"""Reward models of four papers by name, every one fields of `reward_model.Config`: what `ppo_presets` is to PPO.

    reward_model.Config(**PRESETS["nplus"], init="sft", pairs=COMPARISONS)

Comparisons, data and model are the experiment's, and so is which of its completions are references: those of its data,
or of a source that `normalize_on` names. One pass over the paper's own number of comparisons.
"""

from typing import Any

from rlhf_jax.optim import Optimizer

_UNCLIPPED = 1e9  # a gradient's norm
_TLDR: dict[str, Any] = {
    "loss": "bradley_terry", "steps": 92_832 // 64, "batch_size": 64,
    "length": 512 + 169, "completion_tokens": 53,
    "normalize": "mean", "normalize_on": "references", "samples": 123_169,
}  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    # Samples are drawn at temperature 1, theirs at 0.7.
    "ziegler2019": {
        "loss": "best_of_k", "steps": 4_992 // 32, "batch_size": 32, "length": 1 + 64 + 24, "completion_tokens": 24,
        "normalize": "mean_std", "normalize_on": "samples", "normalize_before": True, "samples": 256,
        "optimizer": Optimizer(
            5e-5, schedule="linear", b2=0.999, eps=1e-5, eps_form="tensorflow", clip_norm=_UNCLIPPED
        ),
    },
    # The learning rate is that of 1.3B (5e-6 of 6.7B); Adam's other numbers are those of Huang et al. 2024.
    "stiennon2020": {
        **_TLDR, "optimizer": Optimizer(1.5e-5, schedule="cosine", b2=0.999, eps=1e-5, clip_norm=_UNCLIPPED),
    },
    "nplus": {
        **_TLDR,
        "optimizer": Optimizer(
            3e-6, schedule="cosine", b2=0.999, eps=1e-5, weight_decay=0.01, clip_norm=_UNCLIPPED
        ),
    },
    # Ouyang et al. 2022, appendix C.2: prompts with 4 to 9 ranked responses, all pairs of one a batch element.
    "instructgpt": {
        "loss": "k_wise", "steps": 33_207 // 64, "batch_size": 64, "length": 2048, "completion_tokens": 1024,
        "normalize": "mean", "normalize_on": "references", "samples": 12_725,
        "optimizer": Optimizer(9e-6, schedule="cosine", final_share=0.1),
    },
}  # fmt: skip
"""The fields that a paper sets."""
