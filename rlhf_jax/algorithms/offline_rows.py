"""What the offline stage learns from: completions with a score each, of a source's rows or cut from labelled texts.

Shapes: b rows, t tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import flax.struct
import numpy as np
from jaxtyping import Bool, Float, Int

from rlhf_jax.algorithms.context import Context, check_field, own_source
from rlhf_jax.algorithms.sft import Openings, check_openings, opening_row
from rlhf_jax.data import formats
from rlhf_jax.data.encoding import Learnt, Selected, encode_example, select
from rlhf_jax.data.formats import Valued
from rlhf_jax.data.pipeline import by_part
from rlhf_jax.data.reading import read
from rlhf_jax.data.reviews import Review
from rlhf_jax.data.sources import Data, Source
from rlhf_jax.data.texts import check_texts
from rlhf_jax.interop.tokenizers import Tokenizer
from rlhf_jax.types import ArrayLike

if TYPE_CHECKING:
    from rlhf_jax.algorithms.offline import Config


@dataclass(frozen=True)
class ScoredRow:
    """A prompt and its completion in tokens, and the completion's score."""

    learnt: Learnt
    score: float

    @property
    def prompt(self) -> tuple[int, ...]:
        """What stands before the first token of the completion."""
        return self.learnt.tokens[: self.learnt.counted.index(True)]

    @property
    def longest(self) -> int:
        """All of it."""
        return self.learnt.longest

    def cut(self, length: int) -> "ScoredRow | None":
        """The same in at most `length` tokens, see `Learnt.cut`."""
        kept = self.learnt.cut(length)
        return None if kept is None else replace(self, learnt=kept)


@flax.struct.dataclass
class OfflineBatch:
    """Rows, padded on the right."""

    tokens: Int[ArrayLike, "b t"]
    mask: Bool[ArrayLike, "b t"]
    loss_mask: Bool[ArrayLike, "b t"]  # the completion's tokens
    numbers: Float[ArrayLike, " b"]  # what a method makes of a row's score: its reward, or its weight


def check(config: "Config", data: Data) -> None:
    """Raise UserError, which begins with the field, for rows or texts that cannot be used."""
    if isinstance(config.data, Openings):
        check_field("data=Openings", lambda: check_texts(data, labelled=True))
    else:
        check_field("data", lambda: read(_source(config, data), formats.valued))


def load(config: "Config", context: Context, name: str) -> Selected[ScoredRow]:
    """The rows to train on and held out, in tokens."""
    openings = config.data
    if not isinstance(openings, Openings):
        source, tokenizer = _source(config, context.data), context.tokenizer
        return select(source, read(source, formats.valued), _encode(tokenizer), length=config.row_length)
    reviews, rng = context.reviews, context.rng(f"{name}/openings")
    make_row = opening_row(openings, context.tokenizer)

    def rows(texts: Sequence[Review]) -> list[ScoredRow]:
        check_openings(openings, texts, make_row, name)
        cut = [(make_row(review, rng), float(review.label or 0)) for review in texts]
        return [ScoredRow(Learnt(tuple(row.tokens), tuple(row.loss_mask)), label) for row, label in cut if row]

    return Selected(by_part(reviews.train, rows), rows(reviews.validation), reviews.counts)


def batch_rows(rows: Sequence[ScoredRow], *, pad_id: int, length: int) -> OfflineBatch:
    """Stack rows of at most `length` tokens; their scores are the batch's numbers."""
    tokens = np.full((len(rows), length), pad_id, np.int32)
    mask, loss_mask = (np.zeros((len(rows), length), bool) for _ in range(2))
    for i, row in enumerate(rows):
        tokens[i, : row.longest] = row.learnt.tokens
        mask[i, : row.longest] = True
        loss_mask[i, : row.longest] = row.learnt.counted
    return OfflineBatch(tokens, mask, loss_mask, np.asarray([row.score for row in rows], np.float32))


def _encode(tokenizer: Tokenizer) -> Callable[[Valued], ScoredRow]:
    encode = encode_example(tokenizer)
    return lambda row: ScoredRow(encode(row.example), row.score)


def _source(config: "Config", data: Data) -> Source:
    assert not isinstance(config.data, Openings)
    return own_source(config.data, data, instead="data=Openings() cuts prompts and completions from them")
