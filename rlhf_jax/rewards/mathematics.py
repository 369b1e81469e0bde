"""Whether a completion's mathematical answer is its row's: expressions, sets, equations, not numbers alone."""

import logging
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_jax.rewards.lexical import check_finite, check_package
from rlhf_jax.rewards.verifiers import TextReward, check_seconds


@dataclass(frozen=True)
class MathChecker(TextReward):
    """Whether the last answer of a completion equals its row's, by the package math-verify (sympy).

    It reads LaTeX and plain expressions, "(x+1)^2" and "x^2+2x+1" are the same. For numbers `AnswerChecker` does the
    same exactly, and a hundred times as fast.
    """

    answer: str = "answer"
    """The row's field that holds the right one."""
    correct: float = 1.0
    """The score of the right answer."""
    wrong: float = 0.0
    """The score of another one, of none, and of one that takes too long to read."""
    seconds_each: int = 2
    """Longest time for the reading of one completion, and for its comparison."""
    seconds: float = 120.0
    """Longest time that a batch may take."""

    def __post_init__(self) -> None:
        check_finite("reward.correct", self.correct)
        check_finite("reward.wrong", self.wrong)
        check_seconds(self.seconds)
        if self.seconds_each < 1:
            raise ValueError(f"reward.seconds_each must be at least 1, got {self.seconds_each}")

    def prepare(self) -> None:
        """Load the package."""
        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it tells each answer that it cannot read
        self([""], ["1"], [{self.answer: "1"}])

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        """One score a completion, `correct` or `wrong`."""
        del prompts
        left, _ = signal.setitimer(signal.ITIMER_REAL, 0)  # the process's own limit: the package takes the alarm
        scores = [
            self.correct if self._is_right(completion, row) else self.wrong
            for completion, row in zip(completions, metadata, strict=True)
        ]
        signal.setitimer(signal.ITIMER_REAL, left)
        return scores

    def _is_right(self, completion: str, row: Mapping[str, Any]) -> bool:
        from math_verify import parse, verify

        value = str(row[self.answer])
        if "$" not in value and "\\boxed" not in value:  # bare, as in most sets; as LaTeX its letters are symbols
            value = f"${value}$"
        gold, said = (parse(text, parsing_timeout=self.seconds_each) for text in (value, completion))
        return verify(gold, said, timeout_seconds=self.seconds_each)

    def check_inputs(self) -> None:
        """Raise UserError without the package."""
        check_package("reward=MathChecker", "math_verify", "math-verify")

    def check_row(self, row: Mapping[str, Any]) -> None:
        """Raise ValueError for a row without an answer."""
        if not isinstance(row.get(self.answer), str | int | float):
            there = ", ".join(map(repr, row)) or "none"
            raise ValueError(f"reward.answer: the row has no field {self.answer!r}; its other fields: {there}")
