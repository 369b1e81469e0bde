"""Texts to rows of tokens: whole texts in rows that start at sentences; an opening split into prompt and rest."""

import bisect
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from rlhf_jax.interop.tokenizers import Tokenizer

_SENTENCE_START = re.compile(r"(?<=[.!?])[\"')]*\s+(?=\S)")
CHARACTERS_A_TOKEN = 16
"""More than running text has: bounds what is encoded of a long text for one row."""


class Row(NamedTuple):
    """A row of tokens and which of them a loss counts."""

    tokens: list[int]
    loss_mask: list[bool]


class Opening(NamedTuple):
    """The first tokens of a text, cut between words: a prompt (with BOS) and what follows it."""

    prompt: list[int]
    completion: list[int]  # ends with EOS where the text does


def fitted(prompt: Sequence[int], completion: Sequence[int], *, length: int) -> tuple[list[int], list[int]]:
    """Prompt and completion cut to `length` tokens together: the prompt's first token, BOS, always stays; what follows
    it goes first, from its start on, then the end of the completion.

    >>> fitted([1, 5, 6, 7], [8, 9], length=4)
    ([1, 7], [8, 9])
    """
    bos, *rest = prompt
    kept = list(completion[: length - 1])
    room = length - 1 - len(kept)
    return [bos, *rest[max(0, len(rest) - room) :]], kept


def sentence_starts(text: str) -> list[int]:
    """Offsets at which a sentence starts: 0, and after ., ! or ? and a space.

    >>> sentence_starts("Fine. It is! (Really.) Yes")
    [0, 6, 13, 23]
    """
    return [0, *(match.end() for match in _SENTENCE_START.finditer(text))]


def sentence_rows(texts: Iterable[str], tokenizer: Tokenizer, *, row_length: int) -> list[Row]:
    """Cut texts into rows of at most `row_length` tokens: BOS, text from a sentence's start on, EOS at a text's end.

    A sentence that the end of a row cuts starts the next row, unless it started this one.
    """
    rows = []
    for text in texts:
        starts = sentence_starts(text)
        start: int | None = 0
        while start is not None:
            tokens = tokenizer.encode(text[start : start + CHARACTERS_A_TOKEN * row_length])[: row_length - 1]
            end = start + len(tokenizer.decode(tokens))
            whole = end >= len(text) and len(tokens) < row_length - 1
            tokens = [tokenizer.bos_id, *tokens, *([tokenizer.eos_id] if whole else [])]
            rows.append(Row(tokens, [False] + [True] * (len(tokens) - 1)))
            start = None if whole else _next_start(starts, start, end)
    return rows


def _next_start(starts: list[int], start: int, end: int) -> int | None:
    """The start of the sentence that `end` cuts; of the one after it, if that one started the row."""
    cut = starts[bisect.bisect_right(starts, end) - 1]
    if cut > start:
        return cut
    later = bisect.bisect_right(starts, start)
    return starts[later] if later < len(starts) else None


def opening(
    tokens: Sequence[int], tokenizer: Tokenizer, rng: np.random.Generator, *, prompt: tuple[int, int], completion: int
) -> Opening | None:
    """Cut an encoded text after `prompt[0]` to `prompt[1]` tokens, at a random one of the spaces there.

    Returns None for a text without a space in that range. The completion has at most `completion` tokens; EOS is one.
    """
    low, high = prompt
    cuts = [i for i in range(low, min(high, len(tokens) - 1) + 1) if tokenizer.starts_word(tokens[i])]
    if not cuts:
        return None
    cut = int(rng.choice(cuts))
    rest = [*tokens[cut:], tokenizer.eos_id][:completion]
    return Opening([tokenizer.bos_id, *tokens[:cut]], rest)
