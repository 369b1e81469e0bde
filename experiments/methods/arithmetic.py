"""The group methods on sums with a checkable answer: SFT on them, then each method on whether the number is right.

    rlhf-jax run experiments/methods/arithmetic.py --data.path sums.jsonl --seed 0 --workdir runs/methods/arithmetic_0

`run.py` writes the sums of three digits, and does so for three seeds. Each is answered twice: by a careful hand,
rightly, and by a hasty one, which writes "about" and is off by up to five. The SFT policy answers as either, at about
equal shares; which of the two to be is what the reward teaches.
"""

from typing import Any

from rlhf_jax.algorithms import policy, sft
from rlhf_jax.algorithms.policy_methods import METHODS
from rlhf_jax.config import Experiment
from rlhf_jax.data.sources import Jsonl
from rlhf_jax.interop.pretrained import Bundled
from rlhf_jax.optim import Optimizer
from rlhf_jax.rewards.shaping import OverlongPenalty
from rlhf_jax.rewards.verifiers import AnswerChecker

SUMS = Jsonl("sums.jsonl", heldout=0.2)


def on_policy(method: str, **fields: Any) -> policy.Config:
    """A method of the `policy` stage, on 30 batches of 16 sums with eight answers each."""
    shared = {
        "policy": "sft",
        "reward": AnswerChecker(),
        "data": SUMS,
        "prompt_tokens": (1, 16),
        "completion_tokens": 6,
        "evaluation_prompts": 400,
        "steps": 30,
        "batch_size": 128,
        "optimizer": Optimizer(learning_rate=5e-5, schedule="linear"),
    }
    return policy.Config(**{**shared, **METHODS[method], "group_size": 8, "minibatches": 2, **fields})


def get_config() -> Experiment:
    """One SFT policy, and one stage a method."""
    twice = {"epochs": 2}
    stages = {
        "sft": sft.Config(
            data=None,
            steps=450,
            batch_size=16,
            row_length=64,
            heldout_rows=16,
            evaluate_every=150,
            optimizer=Optimizer(learning_rate=1e-3, schedule="linear", warmup_steps=10),
        ),
        "rloo": on_policy("rloo"),
        "grpo": on_policy("grpo", **twice),
        "dr_grpo": on_policy("dr_grpo", **twice),
        "dapo": on_policy("dapo", overlong=OverlongPenalty(buffer=2), dynamic_sampling=2, **twice),
        "gspo": on_policy("gspo", **twice),
        "cispo": on_policy("cispo", **twice),
        "gmpo": on_policy("gmpo", **twice),
    }
    return Experiment(model=Bundled(), data=SUMS, seed=0, stages=stages)
