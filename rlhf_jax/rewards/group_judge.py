"""A judge as a reward: what it makes of the completions of one prompt, pair by pair.

Shapes: g prompts, k completions of each, beside each other.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from rlhf_jax.rewards.host import HostFunction, Texts
from rlhf_jax.rewards.judging import Ask, Judge, LocalJudge, Pair, Verdict, verdicts


@dataclass(frozen=True)
class JudgeReward:
    """The mean probability that a completion is better than each other one of its prompt, as a judge says."""

    judge: Judge = field(default_factory=LocalJudge)
    """What judges them, each pair in both orders."""
    principle: str = "Which of the two options answers the prompt better?"
    """By what, in words."""


Reward = HostFunction | JudgeReward
"""What scores texts."""


class GroupJudge:
    """Scores of completions that stand in groups."""

    def __init__(self, reward: JudgeReward, ask: Ask, *, size: int) -> None:
        """`ask` is the judge, and `size` a group's; every process of the run asks it for all rows."""
        self._reward, self.ask, self._size, self._verdicts = reward, ask, size, list[Verdict]()

    def __call__(self, rows: Sequence[Texts]) -> Float[np.ndarray, " b"]:
        """One score a row, in [0, 1]; those of a pair are p and 1 − p."""
        k = self._size
        groups = [rows[start : start + k] for start in range(0, len(rows), k)]
        pairs = list(itertools.combinations(range(k), 2))
        first = np.reshape(self.better([(own[i], own[j]) for own in groups for i, j in pairs]), (len(groups), -1))
        scores = np.zeros((len(groups), k))
        for (i, j), p in zip(pairs, first.T, strict=True):
            scores[:, i] += p
            scores[:, j] += 1 - p
        return (scores / (k - 1)).reshape(-1).astype(np.float32)

    def better(self, pairs: Sequence[tuple[Texts, Texts]]) -> Float[np.ndarray, " n"]:
        """The probability of each pair's first completion to be the better one; 0.5 where the judge says nothing."""
        asked = [Pair(self._reward.principle, one.prompt, one.completion, other.completion) for one, other in pairs]
        found = verdicts(self.ask, asked)
        self._verdicts += found
        return np.asarray([verdict.probability for verdict in found])

    def metrics(self) -> dict[str, Any]:
        """Of the questions since it was last asked for them, the share whose answer was neither letter, and of those
        whose prompt lost its start; nothing where there were none.
        """
        found, self._verdicts = self._verdicts, []
        names = {"judge_unread": [v.unread for v in found], "judge_cut": [v.cut for v in found]}
        asked = max(sum(v.asked for v in found), 1)
        return {name: sum(counts) / asked for name, counts in names.items()} if found else {}
