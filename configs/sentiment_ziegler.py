"""Sentiment by PPO with the details of Ziegler et al. 2019: SFT → reward model → PPO, on the bundled LM.

    rlhf-jax run configs/sentiment_ziegler.py      (2 CPU cores, 5 minutes; expected: gold 0.51 -> 0.87 at 10 nats)

As `quickstart.py`, but for the preset `ziegler2019`: the critic is a head on the policy's own trunk, completions of 24
tokens go on past EOS, the reward reads them up to the first full stop after 16 tokens and is -1 where there is none,
rewards and advantages are whitened, Adam is TensorFlow's, and the price of KL follows a target. Batch, steps and
learning rate are those of a small model: in 3,072 episodes the price of KL hardly follows its target yet. What is not
the preset's, older rollouts beside the newest, stands last.
"""

from pathlib import Path

from rlhf_jax.algorithms import ppo
from rlhf_jax.algorithms.ppo_presets import PRESETS
from rlhf_jax.algorithms.replay import Replay
from rlhf_jax.config import Experiment, load_config
from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.interop.pretrained import Bundled
from rlhf_jax.optim import Optimizer

SIZES = {
    "prompt_tokens": (2, 8),
    "batch_size": 128,
    "steps": 24,
    "epochs": 2,
    "minibatches": 4,
    "optimizer": Optimizer(6e-4, schedule="linear", b2=0.999, eps=1e-5, eps_form="tensorflow"),
}

QUICKSTART = load_config(Path(__file__).with_name("quickstart.py")).stages


def get_config() -> Experiment:
    """Three stages; a later one names the earlier ones that it builds on."""
    return Experiment(
        model=Bundled(),
        data=MovieReviews(),
        seed=0,
        stages={
            "sft": QUICKSTART["sft"],
            "reward_model": QUICKSTART["reward_model"],
            "ppo": ppo.Config(**(PRESETS["ziegler2019"] | SIZES), replay=Replay(rollouts=1)),
        },
    )
