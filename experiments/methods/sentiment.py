"""Every method on one task: the quickstart's SFT policy and reward model, and after them one stage, or a few, a method.

    rlhf-jax run experiments/methods/sentiment.py --seed 0 --workdir runs/methods/sentiment_0

`run.py` does so for three seeds, and makes the table. All on-policy methods see as many completions as the quickstart's
PPO, at its learning rate; what differs is said where it stands. Stages are named by their methods.
"""

import dataclasses
from pathlib import Path
from typing import Any

from rlhf_jax.algorithms import (
    best_of_n,
    compare,
    distill,
    offline,
    online_preference,
    policy,
    ppo,
    preference,
    reward_model,
    sft,
)
from rlhf_jax.algorithms.comparisons import SampledPairs
from rlhf_jax.algorithms.iterated import iterated
from rlhf_jax.algorithms.offline_ilql import Ilql
from rlhf_jax.algorithms.offline_methods import Filtered, Weighted
from rlhf_jax.algorithms.policy_methods import METHODS
from rlhf_jax.algorithms.preference_losses import Term
from rlhf_jax.algorithms.raft import raft, rest
from rlhf_jax.config import Experiment, load_config
from rlhf_jax.data.sources import FromStage
from rlhf_jax.kl import FixedKL
from rlhf_jax.optim import Optimizer

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.py"
LINEAR = Optimizer(learning_rate=4e-4, schedule="linear")


def optimizer(learning_rate: float) -> Optimizer:
    """Of stages that do not sample as they learn."""
    return Optimizer(learning_rate=learning_rate, schedule="linear", warmup_steps=10)


def on_policy(method: str, **fields: Any) -> policy.Config:
    """A method of the `policy` stage."""
    shared = {"policy": "sft", "reward": "reward_model", "steps": 18, "batch_size": 128, "entropy_coef": 0.015}
    return policy.Config(**{"optimizer": LINEAR, **shared, **METHODS[method], **fields})


def online(method: str, **fields: Any) -> online_preference.Config:
    """A method of the `online_preference` stage, at half the learning rate: β alone holds it to the reference."""
    shared = {"policy": "sft", "reward": "reward_model", "steps": 18, "batch_size": 128, "epochs": 2, "minibatches": 2}
    half = Optimizer(learning_rate=2e-4, schedule="linear")
    return online_preference.Config(**{"optimizer": half, **shared, **online_preference.METHODS[method], **fields})


def of_pairs(term: Term, **fields: Any) -> preference.Config:
    """A loss of the `preference` stage, on pairs that the SFT policy has written and the gold classifier has judged."""
    return preference.Config(
        init="sft",
        pairs=SampledPairs(policy="sft", prompts=1_500, completions=4),
        losses=(term,),
        steps=120,
        evaluate_every=40,
        **{"batch_size": 16, "optimizer": optimizer(2e-4), **fields},
    )


def of_scores(method: Ilql | Weighted | Filtered, **fields: Any) -> offline.Config:
    """A method of the `offline` stage, on completions of the SFT policy that the reward model has scored."""
    learning = {"steps": 120, "batch_size": 32, "evaluate_every": 60, "optimizer": optimizer(3e-4), **fields}
    return offline.Config(init="sft", method=method, data=FromStage("samples"), **learning)


def in_rounds(refresh: reward_model.Config, learn: ppo.Config) -> dict[str, Any]:
    """Iterated RLHF in two rounds, half the quickstart's PPO each, and a reward model trained anew between them."""
    pairs = SampledPairs(prompts=400, heldout_prompts=200, completions=4)
    refresh, half = dataclasses.replace(refresh, pairs=pairs, steps=400), dataclasses.replace(learn, steps=9)
    return iterated(refresh, half, rounds=2, name="iterated")


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
    own: dict[str, Any] = dict(quickstart.stages)
    price = {"kl": FixedKL(0.2)}  # the quickstart's, where KL is paid in the reward
    several, once = {"epochs": 2, "minibatches": 4}, {"minibatches": 4}  # of losses with a ratio, and without
    sample = best_of_n.Config(policy="sft", reward="reward_model", n=8, prompts=256, batch_size=256)
    stages: dict[str, Any] = {
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
        "dpo": of_pairs(Term("dpo", beta=0.1)),
        "ipo": of_pairs(Term("ipo")),
        "kto": of_pairs(Term("kto", beta=0.1), batch_size=32),
        "simpo": of_pairs(Term("simpo")),
        "cpl": of_pairs(Term("cpl", beta=0.1)),
        **in_rounds(own["reward_model"], own["ppo"]),
        "best_of_16": dataclasses.replace(sample, n=16),
        "rejection": dataclasses.replace(fine_tuning(32), data=FromStage("best_of_16")),
        **raft(sample, fine_tuning(16), rounds=2),
        **rest(dataclasses.replace(sample, n=4, prompts=512), fine_tuning(32), thresholds=(0.0, 1.0)),
        "samples": dataclasses.replace(sample, n=4, keep=4, prompts=1_500),
        "ilql": of_scores(
            Ilql(lam=0.95, cql_coef=0.02, target_share=0.05, beta=4.0), steps=250, optimizer=optimizer(1e-3)
        ),
        "weighted": of_scores(Weighted()),
        "filtered": of_scores(Filtered(top=0.25)),
        "distilled": distill.Config(student="sft", teacher="ppo", steps=30, batch_size=128, optimizer=LINEAR),
    }
    last = {"raft": "learn_2", "rest": "improve_1_2", "iterated": "iterated_learn_2"}
    for method in ("rejection", "raft", "rest", "iterated", "distilled"):
        stages[f"{method}_read"] = compare.Config(policy=last.get(method, method), reward="reward_model")
    return dataclasses.replace(quickstart, stages={**quickstart.stages, **stages})
