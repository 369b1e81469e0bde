"""A K-wise reward model on the bundled LM: human scores of several summaries of an article.

    rlhf-jax run configs/bundled_ranked_reward.py --data.path cnndm_summaries_ranked.jsonl

A row has a reference (here the prompt) and summaries with a text and an overall score each; ties make no pair, and rows
in which all tie are dropped. The last fifth is held out. Expected of 503 rows, after 70 seconds of a CPU: 0.65 of the
held-out pairs in order, 95% interval 0.60 to 0.69 over prompts, a constant's being 0.50; the best of 4 to 6 summaries
found for 0.57 of 101 prompts, interval 0.49 to 0.67, by chance 0.36. Rows are cut to the bundled LM's 128 tokens.
"""

from rlhf_jax.algorithms import reward_model
from rlhf_jax.config import Experiment
from rlhf_jax.data.sources import Jsonl
from rlhf_jax.interop.pretrained import Bundled
from rlhf_jax.optim import Optimizer

FIELDS = {"prompt": "reference", "completions": "summaries.*.text", "scores": "summaries.*.overall"}


def get_config() -> Experiment:
    """One stage, on the experiment's own rows."""
    return Experiment(
        model=Bundled(),
        data=Jsonl("ranked.jsonl", heldout=0.2, fields=FIELDS),
        seed=0,
        stages={
            "reward_model": reward_model.Config(
                init="base",
                loss="k_wise",
                pairs=None,
                ties="drop",
                steps=50,
                evaluate_every=50,
                batch_size=8,
                length=128,
                samples=64,
                optimizer=Optimizer(learning_rate=3e-4, schedule="linear", warmup_steps=10),
            ),
        },
    )
