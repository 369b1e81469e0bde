"""Several rewards in one: each normalised, clipped and weighed, then summed."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_jax.rewards.lexical import Length, Rouge, Sentiment, Vader, check_finite
from rlhf_jax.rewards.mathematics import MathChecker
from rlhf_jax.rewards.python import PythonReward
from rlhf_jax.rewards.verifiers import AnswerChecker, Counted, PatternMatch

Single = AnswerChecker | PatternMatch | MathChecker | Sentiment | Vader | Rouge | Length | PythonReward
"""The rewards that are functions of texts, one by one."""


@dataclass(frozen=True)
class Part:
    """weight · clip((score − mean) / std)."""

    reward: Single
    """What scores."""
    weight: float = 1.0
    """Its weight in the sum."""
    mean: float = 0.0
    """What is taken off the score, such as its mean over the starting policy's completions."""
    std: float = 1.0
    """What the rest is divided by."""
    clip: float | None = None
    """Clips the normalised score to ± this; none: no clipping."""

    def __post_init__(self) -> None:
        check_finite("reward.parts.weight", self.weight)
        check_finite("reward.parts.mean", self.mean)
        for name, value in (("std", self.std), ("clip", self.clip)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"reward.parts.{name} must be over 0 and finite, got {value}")

    def shaped(self, score: float) -> float:
        """What a score adds to the sum."""
        normal = (score - self.mean) / self.std
        return self.weight * (normal if self.clip is None else min(max(normal, -self.clip), self.clip))


@dataclass(frozen=True)
class Combined:
    """The sum of several rewards.

    Combined((Part(AnswerChecker()), Part(PatternMatch(r"####"), weight=0.2), Part(Length(60), weight=0.1, clip=1.0)))
    """

    parts: tuple[Part, ...]
    """The rewards and what becomes of their scores."""

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("reward.parts: at least one is needed")

    @property
    def seconds(self) -> float:
        """Longest time that a batch may take: that of all parts, one after the other."""
        return sum(part.reward.seconds for part in self.parts)

    @property
    def counted(self) -> tuple[str, ...]:
        """What parts count."""
        return tuple(dict.fromkeys(name for part in self.parts for name in part.reward.counted))

    def prepare(self) -> None:
        """Load what the parts need."""
        for part in self.parts:
            part.reward.prepare()

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Counted:
        """One score a completion, and what parts count.

        Raises ValueError for a part that gives another number of them, or no number.
        """
        totals, counts = [0.0] * len(completions), Counter[str]()
        for part in self.parts:
            name, said = type(part.reward).__name__, part.reward(prompts, completions, metadata)
            scores = [float(score) for score in said]
            counts.update(said.counts if isinstance(said, Counted) else {})
            if len(scores) != len(totals):
                raise ValueError(f"{name} returned {len(scores)} scores for {len(totals)} completions")
            if not all(map(math.isfinite, scores)):  # clipping would hide it
                raise ValueError(f"{name} returned {next(score for score in scores if not math.isfinite(score))}")
            totals = [total + part.shaped(score) for total, score in zip(totals, scores, strict=True)]
        return Counted(totals, counts)

    def check_inputs(self) -> None:
        """Raise UserError for a part's missing file or package."""
        for part in self.parts:
            part.reward.check_inputs()

    def check_row(self, row: Mapping[str, Any]) -> None:
        """Raise ValueError for a row that lacks what a part reads of it."""
        for part in self.parts:
            part.reward.check_row(row)
