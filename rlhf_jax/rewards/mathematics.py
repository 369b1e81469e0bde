"""Whether a completion's mathematical answer is its row's: expressions, sets, equations, not numbers alone."""

import functools
import logging
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rlhf_jax.rewards.lexical import check_finite, check_package
from rlhf_jax.rewards.verifiers import Counted, TextReward, check_seconds

_TIMEOUTS = "reward_timeouts"


class _Late(BaseException):
    """An answer takes longer than it may; sympy and the package go on after any Exception."""


@dataclass(frozen=True)
class MathChecker(TextReward):
    """Whether the last answer of a completion equals its row's, by the package math-verify (sympy).

    It reads LaTeX and plain expressions, "(x+1)^2" and "x^2+2x+1" are the same. For numbers `AnswerChecker` does the
    same exactly, and a hundred times as fast. How many completions took too long is the metric `reward_timeouts`.
    """

    answer: str = "answer"
    """The row's field that holds the right one."""
    correct: float = 1.0
    """The score of the right answer."""
    wrong: float = 0.0
    """The score of another one, of none, and of one that takes too long to read."""
    seconds_each: int = 2
    """Longest time for the reading of one completion and its comparison, in seconds that a processor works on them:
    whatever else the machine does, the same completion is in time or late."""
    seconds: float = 120.0
    """Longest time that a batch may take."""

    def __post_init__(self) -> None:
        check_finite("reward.correct", self.correct)
        check_finite("reward.wrong", self.wrong)
        check_seconds(self.seconds)
        if self.seconds_each < 1:
            raise ValueError(f"reward.seconds_each must be at least 1, got {self.seconds_each}")

    @property
    def counted(self) -> tuple[str, ...]:
        """Completions that took too long."""
        return (_TIMEOUTS,)

    def prepare(self) -> None:
        """Load the package, and all of its grammar that answers are read by: no completion's time goes to that."""
        for answer in (r"\boxed{\frac{1}{2}+\sqrt{x}}", "$x^2-1$", "$(1, 2)$", "1"):
            for said in (answer, "the answer is $(x+1)(x-1)$"):
                _is_right(answer, said)

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Counted:
        """One score a completion, `correct` or `wrong`."""
        del prompts
        scores, late = [], 0
        for completion, row in zip(completions, metadata, strict=True):
            try:
                with _at_most(self.seconds_each):
                    is_right = _is_right(str(row[self.answer]), completion)
            except _Late:
                is_right, late = False, late + 1
            scores.append(self.correct if is_right else self.wrong)
        return Counted(scores, {_TIMEOUTS: late})

    def check_inputs(self) -> None:
        """Raise UserError without the package."""
        check_package("reward=MathChecker", "math_verify", "math-verify")

    def check_row(self, row: Mapping[str, Any]) -> None:
        """Raise ValueError for a row without an answer, or with one in which there is nothing to compare."""
        value = row.get(self.answer)
        if not isinstance(value, str | int | float):
            there = ", ".join(map(repr, row)) or "none"
            raise ValueError(f"reward.answer: the row has no field {self.answer!r}; its other fields: {there}")
        if not _reads(str(value)):
            raise ValueError(f"reward.answer: the row's {self.answer!r} holds no mathematical answer: {value!r:.80}")


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise _Late in the block once this process has worked on it for so long; in a process's main thread alone."""

    def late(number: int, frame: Any) -> None:
        raise _Late

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1.0)  # again each second: a destructor would swallow the first
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    finally:  # it may come while the inner one begins
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _parsed(text: str) -> list[Any]:
    """What math-verify reads in a text, without a limit of time."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it tells each answer that it cannot read
    from math_verify import parse

    return parse(text, parsing_timeout=None)  # pyright: ignore[reportArgumentType]  # as its messages say


def _answer(value: str) -> str:
    """A row's answer as the package reads one."""
    # Bare, as in most sets; as LaTeX its letters are symbols.
    return value if "$" in value or "\\boxed" in value else f"${value}$"


@functools.cache
def _reads(value: str) -> bool:
    """Whether the package finds anything in a row's answer; without a limit, which a sweep's threads could not set."""
    return bool(_parsed(_answer(value)))


def _is_right(answer: str, completion: str) -> bool:
    from math_verify import verify

    return verify(_parsed(_answer(answer)), _parsed(completion), timeout_seconds=None)
