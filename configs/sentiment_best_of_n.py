"""Best of 16 and rejection sampling on movie reviews with the bundled LM: SFT → reward model → best of 16 → SFT on it.

    rlhf-jax run configs/sentiment_best_of_n.py      (2 CPU cores, about 8 minutes)

The reward model and the task are the quickstart's. Expected gold score over 256 held-out prefixes, with 95% intervals:

    one completion of the SFT policy       0.51 (0.49 to 0.52)
    the best of 2, 4, 8 of its own         0.62, 0.71, 0.78     at 0.19, 0.64, 1.20 nats of KL, log n − (n − 1)/n
    the best of 16                         0.84 (0.82 to 0.85)  at 1.84 nats
    one completion after SFT on these      0.71 (0.70 to 0.73)

The last stage reads that policy ("after") beside the SFT policy ("before"), with its KL.
"""

from pathlib import Path

from rlhf_jax.algorithms import best_of_n, compare, sft
from rlhf_jax.config import Experiment, load_config
from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.data.sources import FromStage
from rlhf_jax.interop.pretrained import Bundled
from rlhf_jax.optim import Optimizer

QUICKSTART = load_config(Path(__file__).with_name("quickstart.py")).stages


def get_config() -> Experiment:
    """Rejection sampling is two stages: one that makes rows, and one that learns from them."""
    return Experiment(
        model=Bundled(),
        data=MovieReviews(),
        seed=0,
        stages={
            "sft": QUICKSTART["sft"],
            "reward_model": QUICKSTART["reward_model"],
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
            "afterwards": compare.Config(policy="rejection", reward="reward_model", batch_size=256),
        },
    )
