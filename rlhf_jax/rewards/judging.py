"""Which of two completions is better, by a model's "A" or "B": the question, and what its answer says.

Each pair is asked for in both orders and the two are averaged, as models favour a place (Lee et al. 2023, RLAIF, §3.1).
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rlhf_jax.numerics import require
from rlhf_jax.rewards.endpoint import Answer, Endpoint, Question

TEMPLATE = """{principle}

Prompt: {prompt}

Option A: {first}

Option B: {second}

Which option is better? Answer with A or B alone."""
"""The question to a model that follows instructions."""

LETTERS = ("A", "B")
_LETTER = re.compile(r"[\W_]*(?:option\s+)?([AB])(?:\W*$|[).:*\"])", re.IGNORECASE)  # not the article: "A good one"


@dataclass(frozen=True)
class LocalJudge:
    """A model of the run: the log-probs of "A" and "B" as its next token."""

    model: str = "base"
    """The stage that made it, or "base"."""
    template: str = TEMPLATE
    """The question, with {principle}, {prompt}, {first} and {second}; by the chat template where there is one."""
    length: int = 512
    """Most tokens of a question, two whole completions among them; of a longer one the prompt loses its start."""
    batch_size: int = 16
    """Questions read at once."""

    def __post_init__(self) -> None:
        check_template(self.template)
        require("judge.length", self.length, "[2, inf)")
        require("judge.batch_size", self.batch_size, "[1, inf)")


@dataclass(frozen=True)
class EndpointJudge:
    """A model behind an OpenAI-compatible endpoint: its first token's log-probs, or, without, the letter it says."""

    endpoint: Endpoint
    """Where it is."""
    template: str = TEMPLATE
    """The question, with {principle}, {prompt}, {first} and {second}."""
    top_logprobs: int = 20
    """How many likely first tokens are asked for; 0 for an endpoint that gives none."""

    def __post_init__(self) -> None:
        check_template(self.template)
        require("judge.top_logprobs", self.top_logprobs, "[0, inf)")

    def question(self, text: str) -> Question:
        """A question as the endpoint is asked it."""
        return Question(text, top_logprobs=self.top_logprobs)


Judge = LocalJudge | EndpointJudge


class Pair(NamedTuple):
    """Two completions of a prompt, and by what they are judged."""

    principle: str
    prompt: str
    first: str
    second: str

    @property
    def swapped(self) -> "Pair":
        """In the other order."""
        return self._replace(first=self.second, second=self.first)

    def question(self, template: str) -> str:
        """What is asked of it."""
        return ask(template, **self._asdict())


class Said(NamedTuple):
    """The answer to one question."""

    a: float | None
    """P(A); None where the answer was neither letter."""
    is_cut: bool = False
    """Whether the question was asked without the start of its prompt."""


Ask = Callable[[Sequence[Pair]], list[Said]]
"""What is said of each pair, the first completion standing as A."""


@dataclass(frozen=True)
class Verdict:
    """What a judge made of a pair in both orders."""

    as_a: float
    """P(A) where the first completion stood as A; 0.5 where the answer was neither letter."""
    as_b: float
    """P(B) where it stood as B."""
    unread: int = 0
    """Answers, of the two, that were neither letter."""
    cut: int = 0
    """Questions, of the two, whose prompt lost its start."""
    asked: int = 2
    """Questions that were asked: none about a completion and itself."""

    @property
    def probability(self) -> float:
        """That the first is better."""
        return (self.as_a + self.as_b) / 2

    @property
    def is_flipped(self) -> bool:
        """Whether the judge prefers a place to a completion."""
        return (self.as_a - 0.5) * (self.as_b - 0.5) < 0


def verdicts(judge: Ask, pairs: Sequence[Pair]) -> list[Verdict]:
    """What a judge makes of each pair. It is not asked about two completions that are the same: neither is better."""
    differ = [pair for pair in pairs if pair.first != pair.second]
    said = iter(judge([ordered for pair in differ for ordered in (pair, pair.swapped)]))
    return [
        _verdict(next(said), next(said)) if pair.first != pair.second else Verdict(0.5, 0.5, asked=0) for pair in pairs
    ]


def _verdict(one: Said, other: Said) -> Verdict:
    """Of what is said of a pair, and of it in the other order."""
    return Verdict(
        0.5 if one.a is None else one.a,
        0.5 if other.a is None else 1 - other.a,
        unread=(one.a is None) + (other.a is None),
        cut=one.is_cut + other.is_cut,
    )


def check_template(template: str) -> None:
    """Raise ValueError unless a template can be filled."""
    try:
        ask(template, principle="<p>", prompt="<q>", first="<a>", second="<b>")
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"judge.template: {error} cannot be filled; it may have {{principle}}, {{prompt}}, {{first}} and {{second}}"
        ) from None
    for name in ("first", "second"):
        if f"{{{name}}}" not in template:
            raise ValueError(f"judge.template has no {{{name}}}")


def ask(template: str, *, principle: str, prompt: str, first: str, second: str) -> str:
    """The question."""
    return template.format(principle=principle, prompt=prompt, first=first, second=second)


def letter_probability(logprobs: Mapping[str, float]) -> float | None:
    """P(A) of A and B by their log-probs; None where neither is there. One that is not there weighs nothing."""
    weights = [sum(math.exp(logprob) for token, logprob in logprobs.items() if token.strip() == x) for x in LETTERS]
    return weights[0] / sum(weights) if sum(weights) else None


def read_answer(answer: Answer) -> float | None:
    """P(A) by an endpoint's answer; None where it says neither letter."""
    probability = letter_probability(answer.logprobs)
    if probability is not None:
        return probability
    said = _LETTER.match(answer.text)
    return None if said is None else {"A": 1.0, "B": 0.0}[said[1].upper()]
