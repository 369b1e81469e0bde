"""The quickstart without a critic or a clip: SFT → reward model → RLOO.

    rlhf-jax run configs/sentiment_rloo.py      (2 CPU cores, minutes; figures of the method: experiments/methods)

Whole completions are the actions, and the mean score of a prompt's other completions is the baseline (Ahmadian et al.
2024): one step an iteration, of all its completions.
"""

from pathlib import Path

from rlhf_jax.algorithms import policy
from rlhf_jax.algorithms.policy_methods import METHODS
from rlhf_jax.config import Experiment, load_config
from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.interop.pretrained import Bundled
from rlhf_jax.kl import FixedKL
from rlhf_jax.optim import Optimizer

QUICKSTART = load_config(Path(__file__).with_name("quickstart.py")).stages


def get_config() -> Experiment:
    """The quickstart's stages, with another last one."""
    return Experiment(
        model=Bundled(),
        data=MovieReviews(),
        seed=0,
        stages={
            "sft": QUICKSTART["sft"],
            "reward_model": QUICKSTART["reward_model"],
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
