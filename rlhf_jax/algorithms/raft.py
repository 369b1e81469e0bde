"""RAFT and ReST: rounds of sampling from a policy and of fine-tuning it on what a reward likes.

They are stages of a config, `best_of_n` and `sft` in turn, so that a run goes on from any of them, and each policy on
the way can be sampled, exported, and built on:

    stages = {"sft": …, "reward_model": …, **raft(best_of_n.Config(n=8), sft.Config(…), rounds=3)}
"""

import dataclasses
from collections.abc import Sequence

from rlhf_jax.algorithms import best_of_n, sft
from rlhf_jax.data.sources import FromStage

Stages = dict[str, best_of_n.Config | sft.Config]


def raft(sample: best_of_n.Config, learn: sft.Config, *, rounds: int, name: str = "") -> Stages:
    """Reward-ranked fine-tuning (Dong et al. 2023): in each round the policy learns from its own best completions.

    `sample_1` writes for `sample.policy`, `learn_1` starts from it and learns what that kept, `sample_2` writes for
    `learn_1`, and so on; each round draws prompts anew. The last policy is `learn_<rounds>`. With a `name` all are
    `<name>_sample_1`, …, so that they may stand beside others.

    >>> list(raft(best_of_n.Config(), sft.Config(), rounds=2))
    ['sample_1', 'learn_1', 'sample_2', 'learn_2']
    """
    stages, policy, prefix = Stages(), sample.policy, f"{name}_" if name else ""
    for number in range(1, rounds + 1):
        written, learnt = f"{prefix}sample_{number}", f"{prefix}learn_{number}"
        stages[written] = dataclasses.replace(sample, policy=policy)
        stages[learnt] = dataclasses.replace(learn, init=policy, data=FromStage(written))
        policy = learnt
    return stages


def rest(
    sample: best_of_n.Config, learn: sft.Config, *, thresholds: Sequence[float], rounds: int = 1, name: str = ""
) -> Stages:
    """Reinforced self-training (Gulcehre et al. 2023): a set of completions improves the policy several times.

    `grow_1` keeps all that `sample.policy` writes; `improve_1_1`, `improve_1_2`, … each start from the policy before
    and learn from the rows whose score is at least the next of the rising thresholds; `grow_2` writes for the last of
    them. With a `name` all are `<name>_grow_1`, …, so that they may stand beside others. Scores of a normalised reward
    model have mean 0 and standard deviation 1 for the policy that it was trained on. Raises ValueError unless the
    thresholds rise.

    >>> list(rest(best_of_n.Config(), sft.Config(), thresholds=(0.0, 1.0)))
    ['grow_1', 'improve_1_1', 'improve_1_2']
    """
    if not thresholds or list(thresholds) != sorted(set(thresholds)):
        raise ValueError(f"thresholds must rise, got {', '.join(map(str, thresholds)) or 'none'}")
    stages, policy, prefix = Stages(), sample.policy, f"{name}_" if name else ""
    for number in range(1, rounds + 1):
        grown = f"{prefix}grow_{number}"
        stages[grown] = dataclasses.replace(sample, policy=policy, keep=sample.n, threshold=None)
        for step, threshold in enumerate(thresholds, start=1):
            rows = FromStage(grown, least={"score": threshold})
            improved = f"{prefix}improve_{number}_{step}"
            stages[improved] = dataclasses.replace(learn, init=policy, data=rows)
            policy = improved
    return stages
