"""RAFT on movie reviews with the bundled LM: SFT → reward model → three rounds of best of 8 and SFT on these.

    rlhf-jax run configs/sentiment_raft.py      (2 CPU cores, 7 minutes; expected: gold 0.51 -> 0.67 -> 0.82 -> 0.90)

The reward model and the task are the quickstart's. Expected are the gold scores of a completion, over 128 held-out
prefixes: of the SFT policy, and after each round. In the figures of each `sample` stage "before" is one completion of
the policy that the round before has made, and "after" the best of 8; `afterwards` reads the last policy
beside the SFT policy.
"""

from pathlib import Path

from rlhf_jax.algorithms import best_of_n, compare, sft
from rlhf_jax.algorithms.raft import raft
from rlhf_jax.config import Experiment, load_config
from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.interop.pretrained import Bundled
from rlhf_jax.optim import Optimizer

QUICKSTART = load_config(Path(__file__).with_name("quickstart.py")).stages


def get_config() -> Experiment:
    """A round is two stages: one that makes rows, and one that learns from them."""
    return Experiment(
        model=Bundled(),
        data=MovieReviews(),
        seed=0,
        stages={
            "sft": QUICKSTART["sft"],
            "reward_model": QUICKSTART["reward_model"],
            **raft(
                best_of_n.Config(
                    policy="sft", reward="reward_model", n=8, prompts=256, batch_size=256, evaluation_prompts=128
                ),
                sft.Config(
                    steps=16,
                    batch_size=16,
                    heldout_rows=32,
                    evaluate_every=8,
                    optimizer=Optimizer(learning_rate=5e-4, schedule="linear", warmup_steps=2),
                ),
                rounds=3,
            ),
            "afterwards": compare.Config(
                policy="learn_3", reward="reward_model", batch_size=256, evaluation_prompts=128
            ),
        },
    )
