"""The quickstart without a critic or a clip: SFT → reward model → RLOO.

    rlhf-jax run configs/sentiment_rloo.py      (2 CPU cores, minutes; figures not measured yet)

Whole completions are the actions, and the mean score of a prompt's other completions is the baseline (Ahmadian et al.
2024): one step an iteration, of all its completions.
"""

from rlhf_jax.algorithms import policy, reward_model, sft
from rlhf_jax.algorithms.policy_methods import METHODS
from rlhf_jax.config import Experiment
from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.interop.pretrained import Bundled
from rlhf_jax.kl import FixedKL
from rlhf_jax.optim import Optimizer


def get_config() -> Experiment:
    """The quickstart's stages, with another last one."""
    return Experiment(
        model=Bundled(),
        data=MovieReviews(),
        seed=0,
        stages={
            "sft": sft.Config(
                steps=100,
                batch_size=32,
                evaluate_every=20,
                optimizer=Optimizer(learning_rate=1e-3, schedule="linear", warmup_steps=10),
            ),
            "reward_model": reward_model.Config(
                init="sft",
                pairs=reward_model.SampledPairs(
                    policy="sft", prompts=1_200, heldout_prompts=500, completions=4, snippets=4_400
                ),
                steps=700,
                batch_size=8,
                optimizer=Optimizer(learning_rate=1e-3, schedule="linear", warmup_steps=10),
            ),
            "rloo": policy.Config(
                **METHODS["rloo"],
                policy="sft",
                reward="reward_model",
                steps=40,
                batch_size=128,
                kl=FixedKL(coef=0.1),
                optimizer=Optimizer(learning_rate=1e-3, schedule="linear", warmup_steps=2),
            ),
        },
    )
