"""Best of 16 and rejection sampling on movie reviews with the bundled LM: SFT → reward model → best of 16 → SFT on it.

    rlhf-jax run configs/sentiment_best_of_n.py

The reward model and the task are the quickstart's. The last stage reads what the policy that learned from the best
completions writes: "before" is one completion of it, "after" the best of 4.
"""

from rlhf_jax.algorithms import best_of_n, reward_model, sft
from rlhf_jax.config import Experiment
from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.data.sources import FromStage
from rlhf_jax.interop.pretrained import Bundled
from rlhf_jax.optim import Optimizer


def get_config() -> Experiment:
    """Rejection sampling is two stages: one that makes rows, and one that learns from them."""
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
            "best_of_n": best_of_n.Config(policy="sft", reward="reward_model", n=16, prompts=1_000, batch_size=256),
            "rejection": sft.Config(
                init="sft",
                data=FromStage("best_of_n"),
                steps=90,
                batch_size=16,
                heldout_rows=32,
                evaluate_every=30,
                optimizer=Optimizer(learning_rate=5e-4, schedule="linear", warmup_steps=5),
            ),
            "afterwards": best_of_n.Config(policy="rejection", reward="reward_model", n=4, prompts=16, batch_size=256),
        },
    )
