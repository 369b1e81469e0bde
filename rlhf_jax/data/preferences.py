"""Groups of completions with the pairs that were judged: made, and kept as a TFDS dataset of array_records."""

import contextlib
import itertools
import math
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from rlhf_jax import digests
from rlhf_jax.data.text import fitted

_WRITING = threading.Lock()  # stdout is one for all runs of a sweep
_SCORE_LIMIT = 1e-6  # a probability of exactly 0 or 1 has no logit


@dataclass(frozen=True)
class PreferenceGroup:
    """Completions of one prompt and which of them were preferred to which."""

    prompt: str
    completions: tuple[str, ...]
    prompt_tokens: tuple[int, ...]  # BOS first, or what a chat template begins with
    completion_tokens: tuple[tuple[int, ...], ...]  # with EOS where a completion ended
    scores: tuple[float, ...]  # the judge's, in [0, 1]; empty where people judged
    pairs: tuple[tuple[int, int], ...]  # (winner, loser), indices into completions
    margins: tuple[float, ...]  # one a pair
    source: str
    annotators: tuple[str, ...] = ()  # who judged, one a pair; empty where that is not known
    ref_logps: tuple[float, ...] = ()  # of each completion under a reference, where that was read
    probabilities: tuple[float, ...] = ()  # that a winner is the better one, one a pair; empty where it is certain

    def rows(self) -> list[list[int]]:
        """Prompt and completion, one row a completion."""
        return [[*self.prompt_tokens, *tokens] for tokens in self.completion_tokens]

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return len(self.prompt_tokens) + max(map(len, self.completion_tokens))

    @property
    def tells(self) -> bool:
        """Whether the completions of some pair differ; else there is nothing to prefer."""
        return any(self.completion_tokens[a] != self.completion_tokens[b] for a, b in self.pairs)

    @property
    def ranks(self) -> tuple[int, ...]:
        """How many others were preferred to each completion: 0 is the best, equal ones tie."""
        return tuple(sum(loser == i for _, loser in self.pairs) for i in range(len(self.completions)))

    @property
    def settled(self) -> tuple[tuple[int, int], ...]:
        """The pairs that more annotators judged so than the other way round, each once."""
        votes = Counter(self.pairs)
        return tuple(pair for pair, count in votes.items() if count > votes[pair[1], pair[0]])

    def cut(self, length: int) -> "PreferenceGroup":
        """The same in rows of at most `length` tokens: the prompt, which all share, loses what follows its first token,
        from its start on, to make room for the longest completion; then completions lose their end.
        """
        if self.longest <= length:
            return self
        prompt, longest = fitted(self.prompt_tokens, max(self.completion_tokens, key=len), length=length)
        completions = tuple(tokens[: len(longest)] for tokens in self.completion_tokens)
        return replace(self, prompt_tokens=tuple(prompt), completion_tokens=completions)


class Annotators:
    """Judges who compare completions by a score in [0, 1], each with opinions of their own, and who sometimes slip."""

    def __init__(
        self, rng: np.random.Generator, *, count: int = 1, disagreement: float = 0.0, label_noise: float = 0.0
    ) -> None:
        """`disagreement`: standard deviation of an annotator's opinion, added to a completion's logit; `label_noise`:
        share of the pairs that are recorded the wrong way round.
        """
        self._rng, self._count = rng, count
        self._disagreement, self._label_noise = disagreement, label_noise

    def judge(self, scores: Sequence[float]) -> tuple[tuple[tuple[int, int], ...], tuple[float, ...]]:
        """All pairs as (winner, loser) with the gap of their logits as margin; equal scores make no pair.

        Each pair goes to one annotator, whose opinion of a completion is the same in all its pairs.
        """
        logits = [_logit(score) for score in scores]
        opinions = self._disagreement * self._rng.standard_normal((self._count, len(scores)))
        pairs, margins = [], []
        for i, j in itertools.combinations(range(len(scores)), 2):
            annotator = self._rng.integers(self._count)
            gap = (logits[i] + opinions[annotator, i]) - (logits[j] + opinions[annotator, j])
            flipped = self._rng.random() < self._label_noise
            if gap != 0:
                pairs.append((i, j) if (gap > 0) != flipped else (j, i))
                margins.append(float(abs(gap)))
        return tuple(pairs), tuple(margins)


def write(folder: Path, splits: Mapping[str, Sequence[PreferenceGroup]]) -> None:
    """Write a TFDS dataset of array_records in place of an older one; it appears whole or not at all.

    A split must hold at least one group.
    """
    if (folder / _NAME).exists():
        shutil.rmtree(folder / _NAME)  # what a killed run left, too, under a name that TFDS gives unfinished work
    builder = _Preferences(folder, splits)
    # TFDS writes progress bars of its own, and prints to stdout, which belongs to --json.
    with _WRITING, open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence):
        tfds.disable_progress_bar()
        builder.download_and_prepare()
    digests.seal(_dataset_folder(folder))


def exists(folder: Path) -> bool:
    """Whether `write` finished here."""
    return (_dataset_folder(folder) / digests.SEAL).exists()


def set_aside_if_damaged(folder: Path) -> str | None:
    """Rename what `write` finished here if a file is not as it was written; returns a line that says so, or None."""
    wrong = digests.damage(_dataset_folder(folder)) if exists(folder) else None
    return wrong and f"{wrong}; the comparisons are set aside as {digests.set_aside(folder / _NAME)}"


def read(folder: Path) -> dict[str, Sequence[PreferenceGroup]]:
    """The splits of a dataset that `write` made, read row by row as they are asked for."""
    builder = tfds.builder_from_directory(_dataset_folder(folder))
    # Its decorator hides the parameters of as_data_source from type checkers.
    return {name: _Groups(builder.as_data_source(name)) for name in builder.info.splits}  # pyright: ignore[reportCallIssue]


class _Groups(Sequence[PreferenceGroup]):
    """A TFDS data source whose rows are groups."""

    def __init__(self, source: Sequence[dict[str, Any]]) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return _from_row(self._source[int(index) % len(self)])


def _dataset_folder(folder: Path) -> Path:
    return folder / _NAME / _VERSION


_NAME, _VERSION = "preferences", "1.0.0"
_INTS = {"shape": (None,), "dtype": np.int32}
_FLOATS = {"shape": (None,), "dtype": np.float32}


class _Preferences(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Groups of completions with judged pairs."""

    VERSION = tfds.core.Version(_VERSION)
    name = _NAME

    def __init__(self, folder: Path, splits: Mapping[str, Sequence[PreferenceGroup]]) -> None:
        self._splits = splits
        super().__init__(data_dir=str(folder), file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        tensor = tfds.features.Tensor
        features = {
            "prompt": tfds.features.Text(),
            "completions": tfds.features.Sequence(tfds.features.Text()),
            "prompt_tokens": tensor(**_INTS),
            "completion_tokens": tensor(**_INTS),  # one after the other: ragged features would need TensorFlow
            "completion_lengths": tensor(**_INTS),
            "scores": tensor(**_FLOATS),
            "pairs": tensor(**_INTS),  # winner, loser, winner, loser, …
            "margins": tensor(**_FLOATS),
            "source": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager
        return {name: self._generate_examples(groups) for name, groups in self._splits.items()}

    def _generate_examples(self, groups: Sequence[PreferenceGroup]) -> Iterator[tuple[int, dict[str, Any]]]:
        return ((index, _to_row(group)) for index, group in enumerate(groups))


def _to_row(group: PreferenceGroup) -> dict[str, Any]:
    return {
        "prompt": group.prompt,
        "completions": list(group.completions),
        "prompt_tokens": np.asarray(group.prompt_tokens, np.int32),
        "completion_tokens": np.asarray([token for row in group.completion_tokens for token in row], np.int32),
        "completion_lengths": np.asarray([len(row) for row in group.completion_tokens], np.int32),
        "scores": np.asarray(group.scores, np.float32),
        "pairs": np.asarray(group.pairs, np.int32).reshape(-1),
        "margins": np.asarray(group.margins, np.float32),
        "source": group.source,
    }


def _from_row(row: dict[str, Any]) -> PreferenceGroup:
    ends = np.cumsum(row["completion_lengths"])[:-1]
    return PreferenceGroup(
        prompt=row["prompt"].decode(),
        completions=tuple(text.decode() for text in row["completions"]),
        prompt_tokens=tuple(row["prompt_tokens"].tolist()),
        completion_tokens=tuple(tuple(part.tolist()) for part in np.split(row["completion_tokens"], ends)),
        scores=tuple(row["scores"].tolist()),
        pairs=tuple(tuple(pair) for pair in row["pairs"].reshape(-1, 2).tolist()),
        margins=tuple(row["margins"].tolist()),
        source=row["source"].decode(),
    )


def _logit(probability: float) -> float:
    p = min(max(probability, _SCORE_LIMIT), 1 - _SCORE_LIMIT)
    return math.log(p / (1 - p))
