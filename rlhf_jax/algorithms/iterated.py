"""Iterated RLHF: the newest policy writes pairs, they are judged, the reward model is trained anew on all pairs so far,
and a policy learns from it (Bai et al. 2022, section 4.5; Touvron et al. 2023, section 3.2).

The rounds are stages of a config, so that a run goes on from any of them, and each policy and reward model on the way
can be sampled, scored with, and built on:

    stages = {"sft": …, "reward_model": …, **iterated(reward_model.Config(…), ppo.Config(…), rounds=3)}
"""

import dataclasses
from typing import Any, Literal, TypeVar

from rlhf_jax.algorithms import ai_feedback, ppo, reward_model
from rlhf_jax.algorithms.comparisons import SampledPairs
from rlhf_jax.algorithms.context import StageConfig
from rlhf_jax.algorithms.policy_gradient import PolicyGradientConfig
from rlhf_jax.data.sources import FromStage, Mixture, Source
from rlhf_jax.numerics import require

Learn = TypeVar("Learn", bound=PolicyGradientConfig)


def iterated(
    refresh: reward_model.Config,
    learn: PolicyGradientConfig,
    *,
    rounds: int,
    start: Literal["newest", "first"] = "newest",
    feedback: ai_feedback.Config | None = None,
    name: str = "",
) -> dict[str, StageConfig]:
    """`learn_1` learns from `learn.reward`; `reward_2` of pairs that `learn_1` has written, and of all earlier ones;
    `learn_2` from it, and so on. The last policy is `learn_<rounds>`. With a `name` all are `<name>_learn_1`, …, so
    that they may stand beside others.

    Pairs are `refresh.pairs`: sampled and judged by the gold classifier, with those of the stage `learn.reward` for the
    first. Or `feedback` judges them, in stages `pairs_2`, `pairs_3`, …; the first are then the rows that
    `refresh.pairs` names. Each policy goes on from the newest, which is also its reference, or begins anew at the
    first, `learn.policy` (Bai et al.). Raises ValueError for a reward that is no stage, or pairs of another kind.

    >>> list(iterated(reward_model.Config(), ppo.Config(), rounds=2))
    ['learn_1', 'reward_2', 'learn_2']
    """
    require("rounds", rounds, "[1, inf)")
    if not isinstance(learn.reward, str):
        raise ValueError("learn.reward: rounds refresh a reward model; name the stage of the first")
    if not isinstance(refresh.pairs, SampledPairs if feedback is None else Source):
        wanted = "the rows of a source" if feedback is not None else "SampledPairs(…), or give feedback"
        raise ValueError(f"refresh.pairs: {wanted}, to which rounds add pairs")
    prefix = f"{name}_" if name else ""
    stages: dict[str, StageConfig] = {f"{prefix}learn_1": learn}
    rewards = [learn.reward]
    for number in range(2, rounds + 1):
        newest, reward = f"{prefix}learn_{number - 1}", f"{prefix}reward_{number}"
        if feedback is not None:
            stages[f"{prefix}pairs_{number}"] = dataclasses.replace(feedback, policy=newest)
            written = [f"{prefix}pairs_{k}" for k in range(2, number + 1)]
            pairs = _together(refresh.pairs, written)
        else:
            pairs = dataclasses.replace(refresh.pairs, policy=newest, earlier=tuple(rewards))
        stages[reward] = dataclasses.replace(refresh, pairs=pairs)
        rewards.append(reward)
        stages[f"{prefix}learn_{number}"] = _next(learn, reward, newest if start == "newest" else learn.policy)
    return stages


def _together(first: Any, written: list[str]) -> Mixture:
    """The first rows and those of each round, as often drawn."""
    before: tuple[Source, ...] = first.parts if isinstance(first, Mixture) else (first,)
    weights = first.weights if isinstance(first, Mixture) else (1.0,)
    return Mixture((*before, *map(FromStage, written)), (*weights, *(1.0 for _ in written)))


def _next(learn: Learn, reward: str, policy: str) -> Learn:
    """The same stage with another reward model, which is its critic's start too where the first was."""
    critic = {"critic": reward} if isinstance(learn, ppo.Config) and learn.critic == learn.reward else {}
    return dataclasses.replace(learn, reward=reward, policy=policy, **critic)
