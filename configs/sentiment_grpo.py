"""The quickstart without a critic: SFT → reward model → GRPO.

    rlhf-jax run configs/sentiment_grpo.py      (2 CPU cores, minutes; figures not measured yet)

A completion is compared with the seven others of its prompt (Shao et al. 2024). The other names of
`policy_methods.METHODS` may stand in GRPO's place; "dapo" then with dynamic_sampling=0, for a network's scores are
never equal.
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
            "grpo": policy.Config(
                **METHODS["grpo"],
                policy="sft",
                reward="reward_model",
                group_size=8,
                steps=18,
                batch_size=128,
                epochs=2,
                minibatches=4,
                entropy_coef=0.015,
                kl=FixedKL(coef=0.04),
                optimizer=Optimizer(learning_rate=4e-4, schedule="linear"),
            ),
        },
    )
