"""Rewards that read words: a lexicon of sentiment, overlap with a reference, length.

Each is loaded by the process that rewards run in, which has no use for JAX: packages are imported where they are used.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.errors import UserError
from rlhf_jax.rewards.verifiers import TextReward, check_seconds

if TYPE_CHECKING:
    from rlhf_jax.rewards.sentiment import GoldClassifier


@dataclass(frozen=True)
class Vader(TextReward):
    """VADER's sentiment of prompt and completion, in [−1, 1]: a lexicon and rules (Hutto and Gilbert 2014)."""

    seconds: float = 30.0
    """Longest time that a batch may take."""

    def __post_init__(self) -> None:
        check_seconds(self.seconds)

    def prepare(self) -> None:
        """Read the lexicon."""
        from rlhf_jax.rewards.sentiment import vader

        vader(["good"])

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        """One score a completion."""
        del metadata
        from rlhf_jax.rewards.sentiment import vader

        return vader([prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]).tolist()


@dataclass(frozen=True)
class Sentiment(TextReward):
    """P(positive) of prompt and completion, in [0, 1], by a classifier of words fitted on the reviews that train.

    It is the judge of the figures called gold (`rewards.sentiment.GoldClassifier`): learnt from, these are the reward.
    """

    reviews: MovieReviews = field(default_factory=MovieReviews)
    """What it is fitted on, once: the result is kept in the user's cache folder."""
    seconds: float = 30.0
    """Longest time that a batch may take."""

    def __post_init__(self) -> None:
        check_seconds(self.seconds)

    def prepare(self) -> None:
        """Fit the classifier, or read what was fitted before."""
        self._classifier(["good"])

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        """One score a completion."""
        del metadata
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        return self._classifier(texts).tolist()

    def check_inputs(self) -> None:
        """Raise UserError where the reviews cannot be read."""
        self.reviews.load()

    @property
    def _classifier(self) -> "GoldClassifier":
        return _classifier(self.reviews)


@cache
def _classifier(reviews: MovieReviews) -> "GoldClassifier":
    from rlhf_jax.rewards.sentiment import GoldClassifier

    return GoldClassifier.fit(reviews.load().train)


@dataclass(frozen=True)
class Rouge(TextReward):
    """Overlap of a completion with its row's reference, in [0, 1] (Lin 2004), as the package rouge-score counts it."""

    reference: str = "reference"
    """The row's field that holds the reference."""
    kind: Literal["rouge1", "rouge2", "rougeL", "rougeLsum"] = "rougeL"
    """Common words, common pairs of words, or the longest common subsequence, of the text or summed over its lines."""
    measure: Literal["fmeasure", "precision", "recall"] = "fmeasure"
    """What is made of the overlap."""
    stem: bool = True
    """Whether words are cut to their stems, by Porter's rules."""
    seconds: float = 60.0
    """Longest time that a batch may take."""

    def __post_init__(self) -> None:
        check_seconds(self.seconds)

    def prepare(self) -> None:
        """Load the package."""
        self([""], [""], [{self.reference: ""}])

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        """One score a completion."""
        del prompts
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([self.kind], use_stemmer=self.stem)
        pairs = zip(completions, metadata, strict=True)
        scores = (scorer.score(row[self.reference], completion)[self.kind] for completion, row in pairs)
        return [score._asdict()[self.measure] for score in scores]

    def check_inputs(self) -> None:
        """Raise UserError without the package."""
        check_package("reward=Rouge", "rouge_score", "rouge-score")

    def check_row(self, row: Mapping[str, Any]) -> None:
        """Raise ValueError for a row without a reference."""
        if not isinstance(row.get(self.reference), str):
            there = ", ".join(map(repr, row)) or "none"
            raise ValueError(f"reward.reference: the row has no text {self.reference!r}; its other fields: {there}")


@dataclass(frozen=True)
class Length(TextReward):
    """How near a completion comes to a length: 1 − |n / target − 1|, at most 1 (Singhal et al. 2023).

    As a reward of its own it is the baseline that much of RLHF's gain is measured against.
    """

    target: int = 40
    """The length that scores 1."""
    unit: Literal["words", "characters"] = "words"
    """What is counted: what white space parts, or characters."""
    seconds: float = 30.0
    """Longest time that a batch may take."""

    def __post_init__(self) -> None:
        if self.target < 1:
            raise ValueError(f"reward.target must be at least 1, got {self.target}")
        check_seconds(self.seconds)

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        """One score a completion."""
        del prompts, metadata
        counts = [len(text.split()) if self.unit == "words" else len(text) for text in completions]
        return [1 - abs(count / self.target - 1) for count in counts]


def check_package(what: str, module: str, package: str) -> None:
    """Raise UserError where a package that a reward needs is not installed."""
    if find_spec(module) is None:
        raise UserError(f"{what} needs the package {package}: pip install {package}")


def check_finite(name: str, value: float) -> None:
    """Raise ValueError for a number of a config that is none."""
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
