"""Every method on one task: the quickstart's SFT policy and reward model, and after them one stage, or a few, a method.

    rlhf-jax run experiments/methods/sentiment.py --seed 0 --workdir runs/methods/sentiment_0

`run.py` does so for three seeds, and makes the table. All on-policy methods see as many completions as the quickstart's
PPO, at its learning rate; what differs is said where it stands. Stages are named by their methods.
"""

import dataclasses
from pathlib import Path
from typing import Any

from rlhf_jax.algorithms import best_of_n, compare, distill, online_preference, policy, preference, sft
from rlhf_jax.algorithms.comparisons import SampledPairs
from rlhf_jax.algorithms.policy_methods import METHODS
from rlhf_jax.algorithms.preference_losses import Term
from rlhf_jax.algorithms.raft import raft, rest
from rlhf_jax.config import Experiment, load_config
from rlhf_jax.data.sources import FromStage
from rlhf_jax.kl import FixedKL
from rlhf_jax.optim import Optimizer

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.py"
LINEAR = Optimizer(learning_rate=4e-4, schedule="linear")


def on_policy(method: str, **fields: Any) -> policy.Config:
    """A method of the `policy` stage."""
    shared = {"policy": "sft", "reward": "reward_model", "steps": 18, "batch_size": 128, "entropy_coef": 0.015}
    return policy.Config(**{"optimizer": LINEAR, **shared, **METHODS[method], **fields})


def online(method: str, **fields: Any) -> online_preference.Config:
    """A method of the `online_preference` stage, at half the learning rate: β alone holds it to the reference."""
    shared = {"policy": "sft", "reward": "reward_model", "steps": 18, "batch_size": 128, "epochs": 2, "minibatches": 2}
    half = Optimizer(learning_rate=2e-4, schedule="linear")
    return online_preference.Config(**{"optimizer": half, **shared, **online_preference.METHODS[method], **fields})


def offline(term: Term, **fields: Any) -> preference.Config:
    """A loss of the `preference` stage, on pairs that the SFT policy has written and the gold classifier has judged."""
    return preference.Config(
        init="sft",
        pairs=SampledPairs(policy="sft", prompts=1_500, completions=4),
        losses=(term,),
        steps=120,
        evaluate_every=40,
        **{"batch_size": 16, "optimizer": Optimizer(learning_rate=2e-4, schedule="linear", warmup_steps=10), **fields},
    )


def fine_tuning(steps: int) -> sft.Config:
    """SFT on what another stage has kept."""
    return sft.Config(
        init="sft",
        steps=steps,
        batch_size=16,
        heldout_rows=32,
        evaluate_every=steps,
        optimizer=Optimizer(learning_rate=5e-4, schedule="linear", warmup_steps=2),
    )


def get_config() -> Experiment:
    """The quickstart's three stages, then those of the other methods, which build on its first two."""
    quickstart = load_config(QUICKSTART)
    price = {"kl": FixedKL(0.2)}  # the quickstart's, where KL is paid in the reward
    several, once = {"epochs": 2, "minibatches": 4}, {"minibatches": 4}  # of losses with a ratio, and without
    sample = best_of_n.Config(policy="sft", reward="reward_model", n=8, prompts=256, batch_size=256)
    stages = {
        "reinforce": on_policy("reinforce", **price, **once),
        "rloo": on_policy("rloo", **price, **once),
        "reinforce_plus_plus": on_policy("reinforce_plus_plus", **price, **several),
        "remax": on_policy("remax", **price, **once),
        "p3o": on_policy("p3o", **price, **several),
        "grpo": on_policy("grpo", **several),
        "dr_grpo": on_policy("dr_grpo", **several),
        "dapo": on_policy("dapo", dynamic_sampling=0, overlong=None, **several),  # scores are never equal
        "gspo": on_policy("gspo", **several),
        "cispo": on_policy("cispo", **several),
        "gmpo": on_policy("gmpo", **several),
        "trpo": on_policy("trpo", **price),
        "online_dpo": online("online_dpo"),
        "online_ipo": online("online_ipo"),
        "xpo": online("xpo"),
        "dpo": offline(Term("dpo", beta=0.1)),
        "ipo": offline(Term("ipo")),
        "kto": offline(Term("kto", beta=0.1), batch_size=32),
        "simpo": offline(Term("simpo")),
        "best_of_16": dataclasses.replace(sample, n=16),
        "rejection": dataclasses.replace(fine_tuning(32), data=FromStage("best_of_16")),
        **raft(sample, fine_tuning(16), rounds=2),
        **rest(dataclasses.replace(sample, n=4, prompts=512), fine_tuning(32), thresholds=(0.0, 1.0)),
        "distilled": distill.Config(student="sft", teacher="ppo", steps=30, batch_size=128, optimizer=LINEAR),
    }
    read = {"rejection": "rejection", "raft": "learn_2", "rest": "improve_1_2"}
    for method, last in read.items():
        stages[f"{method}_read"] = compare.Config(policy=last, reward="reward_model")
    return dataclasses.replace(quickstart, stages={**quickstart.stages, **stages})
