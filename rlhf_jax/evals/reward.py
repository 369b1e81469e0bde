"""A reward model on held-out comparisons: how well it ranks, how honest it is, whether it counts length, and whom it
agrees with.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from rlhf_jax.data.preferences import PreferenceGroup
from rlhf_jax.data.reviews import Review
from rlhf_jax.evals.bootstrap import area_under_curve, interval, mean_of, with_interval
from rlhf_jax.evals.preferences import PairReport, evaluate_pairs
from rlhf_jax.files import write_whole
from rlhf_jax.interop.tokenizers import Tokenizer

_MOST_TEXTS = 2_000  # all pairs of them are compared

ScoreRows = Callable[[Sequence[Sequence[int]]], np.ndarray]
"""Rows of tokens to a score each."""


@dataclass(frozen=True)
class RewardReport:
    """A reward model's readings of held-out groups."""

    pairs: PairReport
    scores: Float[np.ndarray, " m"]
    lengths: Float[np.ndarray, " m"]  # of the completions, in tokens
    margins: Float[np.ndarray, " n"]
    prompts: tuple[str, ...]  # one a pair
    annotators: tuple[str | None, ...]  # of the pairs as they were judged, one by one
    agreed: Float[np.ndarray, " a"]  # whether the scores agree with each of these; ½ for a tie

    @property
    def interval(self) -> tuple[float, float]:
        """Of the accuracy, 95%, by the bootstrap over prompts."""
        return interval(mean_of(_won(self.margins)), self.prompts)

    def by_annotator(self) -> dict[str, dict[str, float]]:
        """How often the scores agree with each annotator, where rows say who judged."""
        names = sorted({name for name in self.annotators if name is not None})
        own = {name: self.agreed[[who == name for who in self.annotators]] for name in names}
        return {name: {"n": len(agreed), "accuracy": float(agreed.mean())} for name, agreed in own.items()}


def evaluate_groups(score: ScoreRows, groups: Sequence[PreferenceGroup]) -> RewardReport:
    """Score every completion once, and compare the pairs; where annotators differ, what most of them said."""
    rows, lengths, pairs, prompts, single, annotators = [], [], [], [], [], []
    for group in groups:
        settled = group.settled
        pairs += [(len(rows) + winner, len(rows) + loser) for winner, loser in settled]
        single += [(len(rows) + winner, len(rows) + loser) for winner, loser in group.pairs]
        annotators += group.annotators or (None,) * len(group.pairs)
        prompts += [group.prompt] * len(settled)
        rows += group.rows()
        lengths += [len(tokens) for tokens in group.completion_tokens]
    scores, counts = score(rows), np.asarray(lengths, np.float32)
    (winners, losers), (ups, downs) = (np.asarray(some, np.int64).reshape(-1, 2).T for some in (pairs, single))
    report = evaluate_pairs(scores[winners], scores[losers], scores=scores, lengths=counts)
    margins, agreed = scores[winners] - scores[losers], _won(scores[ups] - scores[downs])
    return RewardReport(report, scores, counts, margins, tuple(prompts), tuple(annotators), agreed)


def evaluate_best(scores: np.ndarray, groups: Sequence[PreferenceGroup]) -> dict[str, float]:
    """best_accuracy: how often the completion that scores highest is one of the best of its group.

    Its baseline is a constant's, which picks any. `scores` are of all completions, group by group.
    """
    ends = np.cumsum([len(group.completions) for group in groups])[:-1]
    best = [np.asarray(group.ranks) == 0 for group in groups]
    picked = [float(own[part.argmax()]) for own, part in zip(best, np.split(scores, ends), strict=True)]
    prompts = [group.prompt for group in groups]
    return {
        **with_interval("best_accuracy", mean_of(picked), prompts, intervals=True),
        "best_accuracy_baseline": float(np.mean([own.mean() for own in best])),
    }


def evaluate_spread(
    members: Sequence[RewardReport], combined: RewardReport, groups: Sequence[PreferenceGroup]
) -> dict[str, float]:
    """Whether an ensemble knows what it does not know: how its members' spread on a pair, the standard deviation of
    their margins, tells the pairs that it ranks wrongly (`spread_wrong_auc`) from others, and those on which annotators
    differed (`spread_differed_auc`). Areas under the ROC curve, of a constant ½; each where there are pairs of both
    kinds.
    """
    spread = np.std([report.margins for report in members], axis=0)
    wrong = combined.margins <= 0
    differed = [(loser, winner) in group.pairs for group in groups for winner, loser in group.settled]
    told = {"spread_wrong_auc": wrong, "spread_differed_auc": np.asarray(differed)}
    figures: dict[str, float] = {}
    for name, which in told.items():
        if 0 < which.sum() < len(which):
            figures |= with_interval(name, area_under_curve(spread, which), combined.prompts, intervals=True)
            figures[f"{name}_baseline"] = 0.5
    return figures


def _won(margins: np.ndarray) -> np.ndarray:
    return (np.sign(margins) + 1) / 2


def review_accuracy(
    score: ScoreRows, reviews: Sequence[Review], tokenizer: Tokenizer, *, length: int
) -> dict[str, Any] | None:
    """Accuracy on all pairs of a positive and a negative text, as people labelled them.

    Of the movie reviews it takes the sentences from Rotten Tomatoes; of another source the first 2,000 texts. None
    where all are of one label.
    """
    sentences = [review for review in reviews if review.source == "rotten_tomatoes"] or reviews[:_MOST_TEXTS]
    rows = [[tokenizer.bos_id, *tokenizer.encode(r.text), tokenizer.eos_id][:length] for r in sentences]
    scores, labels = score(rows), np.asarray([review.label for review in sentences])
    difference = scores[labels == 1][:, None] - scores[labels == 0][None, :]
    if not difference.size:
        return None
    return {
        "n": int(difference.size),
        "sentences": len(rows),
        "accuracy": float(((np.sign(difference) + 1) / 2).mean()),
    }


def comparisons_json(report: RewardReport) -> dict[str, Any]:
    """For the report: the figures, the calibration bins, every score, length and margin."""
    return {
        **report.pairs.to_json(),
        "interval": list(report.interval),
        "annotators": report.by_annotator(),
        "scores": report.scores.tolist(),
        "lengths": report.lengths.astype(int).tolist(),
        "margins": report.margins.tolist(),
    }


def write_evaluation(path: Path, body: dict[str, Any], external: dict[str, Any] | None) -> None:
    """Write evaluation.json; `external` is `review_accuracy`'s."""
    write_whole(path, json.dumps({**body, "external": external}) + "\n")
