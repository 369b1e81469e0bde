"""A process reward model on the bundled LM: whether each step of a solution is right.

    rlhf-jax run configs/bundled_process_reward.py --data.path math_steps_human.jsonl

A row has a question, steps, and a rating of each: 1 right, −1 wrong, 0 neither (redundant), which counts as wrong here,
null not judged. Where the file is in an order, as that one, slices take the held-out rows from each part of it.
Expected of its 458 rows, after 40 seconds of a CPU: nothing. The model has read movie reviews alone, in rows of 128
tokens, which cut 441 of the solutions: area under the ROC curve of steps 0.48, 95% interval 0.41 to 0.56, a constant's
being 0.50; accuracy 0.79, the constant's too. A model that has read mathematics is what this config is for.
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
