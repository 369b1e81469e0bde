"""A process reward model on the bundled LM: whether each step of a solution is right.

    rlhf-jax run configs/bundled_process_reward.py --data.path math_steps_human.jsonl

A row has a question, steps, and a rating of each: 1 right, −1 wrong, 0 neither (redundant), null not judged.
"""

from rlhf_jax.algorithms import reward_model
from rlhf_jax.config import Experiment
from rlhf_jax.data.sources import Jsonl
from rlhf_jax.interop.pretrained import Bundled
from rlhf_jax.optim import Optimizer


def get_config() -> Experiment:
    """One stage, on the experiment's own rows."""
    return Experiment(
        model=Bundled(),
        data=Jsonl(
            "steps.jsonl",
            split="all[:120]+all[160:400]",
            heldout="all[120:160]+all[400:]",
            fields={"prompt": "question", "completions": "steps"},
        ),
        seed=0,
        stages={
            "reward_model": reward_model.Config(
                init="base",
                loss="process_bce",
                pairs=None,
                neutral="wrong",
                steps=80,
                evaluate_every=80,
                batch_size=16,
                length=128,
                optimizer=Optimizer(learning_rate=3e-4, schedule="linear", warmup_steps=10),
            ),
        },
    )
