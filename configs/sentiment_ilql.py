"""Offline RL on movie reviews with the bundled LM: SFT → reward model → 6,000 scored completions → ILQL, filtered BC.

    rlhf-jax run configs/sentiment_ilql.py      (2 CPU cores, 30 minutes on busy ones)

The reward model and the task are the quickstart's. `samples` writes 4 completions each for 1,500 prefixes, and the
reward model scores them; the last two stages learn from these rows alone. Expected gold score of a completion over 256
held-out prefixes, with the KL to the SFT policy in nats (95% intervals of gold ±0.03):

    SFT policy                        0.49
    ILQL, β = 0, the plain policy     0.48    3.3
    ILQL, β = 2                       0.62    4.9
    ILQL, β = 4, as configured        0.72    9.4    distinct-2 0.81 → 0.69
    ILQL, β = 8, 16                   0.87    29     0.99    116: beyond 4 it repeats itself, distinct-2 0.52 and 0.22
    filtered BC, the best quarter     0.64    1.1    distinct-2 0.82 → 0.80

Decoding by values goes further than imitation of the best, at a higher price in KL. `method=Weighted()` in place of
`Filtered` weighs all completions by exp(score).
"""

from pathlib import Path

from rlhf_jax.algorithms import best_of_n, offline
from rlhf_jax.algorithms.offline_ilql import Ilql
from rlhf_jax.algorithms.offline_methods import Filtered
from rlhf_jax.config import Experiment, load_config
from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.data.sources import FromStage
from rlhf_jax.interop.pretrained import Bundled
from rlhf_jax.optim import Optimizer

QUICKSTART = load_config(Path(__file__).with_name("quickstart.py")).stages


def get_config() -> Experiment:
    """The last two stages learn from the same rows, each from the SFT policy."""
    return Experiment(
        model=Bundled(),
        data=MovieReviews(),
        seed=0,
        stages={
            "sft": QUICKSTART["sft"],
            "reward_model": QUICKSTART["reward_model"],
            "samples": best_of_n.Config(
                policy="sft", reward="reward_model", n=4, keep=4, prompts=1_500, batch_size=256
            ),
            "ilql": offline.Config(
                init="sft",
                method=Ilql(lam=0.95, cql_coef=0.02, target_share=0.05, beta=4.0, curve=(0.0, 2.0, 4.0, 8.0, 16.0)),
                data=FromStage("samples"),
                steps=250,
                batch_size=32,
                evaluate_every=50,
                optimizer=Optimizer(learning_rate=1e-3, schedule="linear", warmup_steps=10),
            ),
            "filtered": offline.Config(
                init="sft",
                method=Filtered(top=0.25),
                data=FromStage("samples"),
                steps=120,
                batch_size=32,
                evaluate_every=30,
                optimizer=Optimizer(learning_rate=3e-4, schedule="linear", warmup_steps=10),
            ),
        },
    )
