"""Where a config's rows come from: `Jsonl("pairs.jsonl")`, `TFDS("imdb_reviews")`, `HuggingFace("Anthropic/hh-rlhf")`,
or a `Mixture` of these. What the rows mean is in `formats`, how they are read in `reading`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.data.splits import parse
from rlhf_jax.numerics import require


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Fields of every source: which rows are taken, and what they are called."""

    fields: Mapping[str, str] = field(default_factory=dict)
    """The row's own names of fields, by TRL's, where they differ: {"prompt": "question"}. "turns.0.text" and
    "turns.*.text" reach into lists and objects."""
    heldout: float | str = 0.05
    """What is held out for evaluation: a share of the rows, the last ones, or a split of its own such as "test"."""
    least: Mapping[str, float] = field(default_factory=dict)
    """Least numbers of fields, by TRL's names: {"score": 0.5} leaves out the rows whose score is below."""
    min_tokens: int = 0
    """Rows of fewer tokens, special ones included, are dropped."""
    max_tokens: int | None = None
    """Most tokens of a row, special ones included; none: as many as the stage takes."""
    too_long: Literal["drop", "cut"] = "drop"
    """What becomes of rows of more than `max_tokens`."""

    def __post_init__(self) -> None:
        if isinstance(self.heldout, str):
            parse(self.heldout)
        else:
            require("heldout", self.heldout, "(0, 1)")
        require("min_tokens", self.min_tokens, "[0, inf)")
        require("max_tokens", self.max_tokens, "[2, inf)")
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least min_tokens={self.min_tokens}")


@dataclass(frozen=True)
class Jsonl(Selection):
    """A file of JSON objects, one a line; compressed if its name ends in .gz."""

    path: Path | str
    """The file."""
    split: str = "all"
    """The rows: "all", or a slice such as "all[:90%]" or "all[100:200]"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse(self.split)


@dataclass(frozen=True)
class TFDS(Selection):
    """A data set of TensorFlow Datasets, prepared as array_record, read without TensorFlow."""

    name: str
    """Its name, such as "imdb_reviews", "anthropic_hh" or "glue/sst2"."""
    split: str = "train"
    """The rows: a split, or slices such as "train[:90%]+test"."""
    data_dir: Path | str | None = None
    """Where data sets are kept; none: TFDS's own folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse(self.split)


@dataclass(frozen=True)
class HuggingFace(Selection):
    """A data set of the Hugging Face hub, or a folder of one: parquet, JSON, CSV or Arrow files; no script is run."""

    path: str
    """A folder, or a name on the hub such as "Anthropic/hh-rlhf"; what its cache holds is read offline."""
    name: str | None = None
    """Its configuration, or the folder in it that holds the files."""
    split: str = "train"
    """The rows: a split, or slices such as "train[:90%]+test"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse(self.split)


@dataclass(frozen=True)
class FromStage(Selection):
    """Rows that an earlier stage of the experiment has made: what it selected, or a judge's preferences."""

    stage: str
    """Its name."""
    split: str = "all"
    """The rows: "all", or a slice such as "all[:90%]"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse(self.split)


@dataclass(frozen=True)
class Mixture:
    """Rows of several sources: each is shuffled and repeated on its own, and drawn as often as its weight says."""

    parts: tuple[Jsonl | TFDS | HuggingFace | FromStage, ...]
    """The sources; what they hold out is held out together."""
    weights: tuple[float, ...]
    """How often each is drawn, beside the others."""

    def __post_init__(self) -> None:
        if not self.parts or len(self.parts) != len(self.weights):
            raise ValueError(
                f"weights must have one for each of the parts, got {len(self.weights)} for {len(self.parts)}"
            )
        for weight in self.weights:
            require("weights", weight, "(0, inf)")


Source = Jsonl | TFDS | HuggingFace | FromStage | Mixture
"""What a stage may name as its own rows."""

Data = MovieReviews | Jsonl | TFDS | HuggingFace | Mixture
"""What an experiment may name."""


def describe(source: Jsonl | TFDS | HuggingFace | FromStage) -> str:
    """How messages name a source."""
    if isinstance(source, FromStage):
        return f"the rows of stage {source.stage!r}"
    return f"{source.name}" if isinstance(source, TFDS) else f"{source.path}"
