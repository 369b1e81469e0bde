"""RAFT on movie reviews with the bundled LM: SFT → reward model → three rounds of best of 8 and SFT on these.

    rlhf-jax run configs/sentiment_raft.py

The reward model and the task are the quickstart's. In the figures of each `sample` stage "before" is one completion of
the policy that the round before has made, and "after" the best of 8; `afterwards` reads the last policy.
"""

from rlhf_jax.algorithms import best_of_n, reward_model, sft
from rlhf_jax.algorithms.raft import raft
from rlhf_jax.config import Experiment
from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.interop.pretrained import Bundled
from rlhf_jax.optim import Optimizer


def get_config() -> Experiment:
    """A round is two stages: one that makes rows, and one that learns from them."""
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
            "afterwards": best_of_n.Config(
                policy="learn_3", reward="reward_model", n=2, prompts=8, batch_size=256, evaluation_prompts=128
            ),
        },
    )
