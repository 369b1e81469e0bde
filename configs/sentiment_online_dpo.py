"""The quickstart with online DPO in PPO's place: SFT → reward model → pairs of the policy's own, judged as it writes.

    rlhf-jax run configs/sentiment_online_dpo.py      (2 CPU cores, minutes; expected: gold 0.49 -> 0.91, 8 nats of KL)

Two completions of each prompt, of which the reward model says which is better, and steps of DPO's loss against the SFT
policy (Guo et al. 2024). The other names of `online_preference.METHODS` may stand in its place.
"""

from pathlib import Path

from rlhf_jax.algorithms import online_preference
from rlhf_jax.algorithms.online_preference import METHODS
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
            "online_dpo": online_preference.Config(
                **METHODS["online_dpo"],
                policy="sft",
                reward="reward_model",
                steps=24,
                batch_size=128,
                epochs=2,
                minibatches=2,
                kl=FixedKL(coef=0.1),
                optimizer=Optimizer(learning_rate=2e-4, schedule="linear"),
            ),
        },
    )
