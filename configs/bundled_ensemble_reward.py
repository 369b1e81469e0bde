"""Four reward models at once on the bundled LM, of what three annotators said, each on its own sample of the rows.

    rlhf-jax run configs/bundled_ensemble_reward.py --data.path pandalm_three_annotators.jsonl

A row has a prompt, two responses, and what each annotator preferred: 1, 2, or 0 for a tie. Every vote is a pair to
train on, so that where annotators differ they are noise; held-out figures are of what most of them said.
As heads on one trunk (`--stages.reward_model.ensemble.of heads --stages.reward_model.ensemble.no_bootstrap`), after 35
seconds of a CPU: the mean of the four is right on 0.61 of 180 held-out pairs, 95% interval 0.49 to 0.72 over prompts, a
constant on 0.50, and single members on 0.46 to 0.67; they differ by 0.17 in score, whose deviation is 0.44. As whole
models it takes four times as long, and was not measured.
"""

from rlhf_jax.algorithms import reward_model
from rlhf_jax.config import Experiment
from rlhf_jax.data.sources import Jsonl
from rlhf_jax.interop.pretrained import Bundled
from rlhf_jax.optim import Optimizer
from rlhf_jax.rewards.ensemble import Combine, Ensemble


def get_config() -> Experiment:
    """One stage, on the experiment's own rows."""
    return Experiment(
        model=Bundled(),
        data=Jsonl("votes.jsonl", split="all[:157]+all[165:800]", heldout="all[800:]"),
        seed=0,
        stages={
            "reward_model": reward_model.Config(
                init="base",
                pairs=None,
                ties="drop",
                ensemble=Ensemble(members=4, bootstrap=True, combine=Combine("mean")),
                steps=40,
                batch_size=8,
                evaluate_every=40,
                length=128,
                samples=64,
                optimizer=Optimizer(learning_rate=3e-4, schedule="linear", warmup_steps=10),
            ),
        },
    )
