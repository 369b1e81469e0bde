"""Supervised fine-tuning: cross-entropy on completions, given prompts (Ziegler et al. 2019; Ouyang et al. 2022)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlhf_jax.algorithms.context import (
    BASE,
    Context,
    Role,
    check_field,
    check_prompt_tokens,
    named,
    own_source,
)
from rlhf_jax.algorithms.supervised import SupervisedConfig, fit
from rlhf_jax.data import formats
from rlhf_jax.data.encoding import Learnt, encode_example, select
from rlhf_jax.data.pipeline import WHOLE, packed
from rlhf_jax.data.reading import read
from rlhf_jax.data.reviews import Review
from rlhf_jax.data.sources import Data, Source
from rlhf_jax.data.text import CHARACTERS_A_TOKEN, Row, opening
from rlhf_jax.data.texts import check_texts
from rlhf_jax.errors import UserError
from rlhf_jax.interop.tokenizers import Tokenizer
from rlhf_jax.sharding import Shard, process_shard

MakeRow = Callable[[Any, np.random.Generator], Row | None]


@dataclass(frozen=True)
class Openings:
    """The openings of reviews: a prefix is the prompt and what follows it the completion, cut anew in each epoch."""

    prompt_tokens: tuple[int, int] = (2, 8)
    """Fewest and most tokens of a prefix, BOS not counted; it ends between words."""
    completion_tokens: int = 40
    """Most tokens of a completion; EOS, where the text ends inside them, is one."""

    def __post_init__(self) -> None:
        check_prompt_tokens(self.prompt_tokens)
        if self.completion_tokens < 1:
            raise ValueError(f"completion_tokens must be at least 1, got {self.completion_tokens}")

    @property
    def length(self) -> int:
        """Tokens of the longest row: BOS, prefix, completion."""
        return 1 + self.prompt_tokens[1] + self.completion_tokens


@dataclass(frozen=True)
class Config(SupervisedConfig):
    """Supervised fine-tuning of a language model on prompts and completions."""

    init: str = BASE
    """The stage whose weights it starts from, or "base", the experiment's model."""
    data: Openings | Source | None = field(default_factory=Openings)
    """Prompts and completions: cut from the experiment's texts, rows of a source of its own, or, if None, the rows of
    the experiment's. Rows have prompt and completion, messages, or text; of messages all that the assistant says is
    learnt, by the tokenizer's chat template where it has one."""
    row_length: int = 98
    """Tokens in a row; several examples are packed into one."""

    def requires(self) -> dict[str, tuple[str, Role]]:
        """The stage in `init`."""
        return named("policy", init=self.init)

    def check_inputs(self, data: Data) -> None:
        """The rows, or the texts that openings are cut from."""
        if isinstance(self.data, Openings):
            check_field("data=Openings", lambda: check_texts(data, labelled=False))
        else:
            check_field("data", lambda: read(_rows(self, data), formats.example))

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.data, Openings) and self.data.length > self.row_length:
            raise ValueError(
                f"row_length={self.row_length} must hold BOS, prompt and completion of data: {self.data.length} tokens"
            )


def train(config: Config, context: Context, name: str) -> dict[str, float]:
    """Train on the completions; the figures are for summary.json."""
    if isinstance(config.data, Openings):
        make_row = opening_row(config.data, context.tokenizer)
        reviews = context.reviews
        rows, heldout, counts = reviews.train, reviews.validation, reviews.counts
        for texts in (rows, heldout):
            check_openings(config.data, texts, make_row, name)
    else:
        source, encode = _rows(config, context.data), encode_example(context.tokenizer)
        selected = select(source, read(source, formats.example), encode, length=config.row_length)
        rows, heldout, counts = selected.train, selected.heldout, selected.counts
        make_row = learnt_row

    def batches(source: Sequence[Any], seed: int, shard: Shard) -> Any:
        return packed(
            source,
            make_row,
            pad_id=context.tokenizer.pad_id,
            row_length=config.row_length,
            batch_size=config.batch_size,
            seed=seed,
            shard=shard,
        )

    start = context.policy_params(config.init)
    training = batches(rows, context.seed, process_shard(context.mesh))
    _, figures = fit(config, context, name, start, training, batches(heldout, 0, WHOLE), note=counts.line())
    return {**figures, **counts.figures()}


def learnt_row(row: Learnt, rng: np.random.Generator) -> Row:
    """A row of a source, which is the same in each epoch."""
    del rng
    return row.row()


def opening_row(data: Openings, tokenizer: Tokenizer) -> MakeRow:
    """A review to a row whose completion alone is counted; None where its opening has no space to cut at."""

    def make_row(review: Review, rng: np.random.Generator) -> Row | None:
        text = review.text[: CHARACTERS_A_TOKEN * data.length]
        cut = opening(
            tokenizer.encode(text), tokenizer, rng, prompt=data.prompt_tokens, completion=data.completion_tokens
        )
        return None if cut is None else _row(cut.prompt, cut.completion)

    return make_row


def check_openings(data: Openings, texts: Sequence[Review], make_row: MakeRow, name: str) -> None:
    """Raise UserError where no text can be cut: batches would wait for ever."""
    rng = np.random.default_rng(0)
    if all(make_row(text, rng) is None for text in texts):
        low, high = data.prompt_tokens
        raise UserError(
            f"stages.{name}.data.prompt_tokens: none of {len(texts)} texts has a space after {low} to {high} tokens"
        )


def _rows(config: Config, data: Data) -> Source:
    assert not isinstance(config.data, Openings)
    return own_source(config.data, data, instead="data=Openings() cuts prompts and completions from them")


def _row(prompt: list[int], completion: list[int]) -> Row:
    return Row([*prompt, *completion], [False] * len(prompt) + [True] * len(completion))
