"""Prompts that a policy answers, with what a reward has to know of their rows; what is too long is cut or dropped."""

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

from rlhf_jax.data import formats
from rlhf_jax.data.encoding import Selected, chat_tokenizer, select
from rlhf_jax.data.formats import Prompt
from rlhf_jax.data.pipeline import READ, by_part, endless
from rlhf_jax.data.prompts import PromptBatch, pad_left
from rlhf_jax.data.reading import read
from rlhf_jax.data.sources import Source
from rlhf_jax.errors import UserError
from rlhf_jax.interop.json_tokenizer import JsonTokenizer
from rlhf_jax.interop.tokenizers import Tokenizer

TooLong = Literal["paragraph", "start", "drop"]


@dataclass(frozen=True)
class PromptRow:
    """A prompt as a policy and as a reward read it."""

    tokens: Sequence[int]
    """Its ids, BOS first."""
    text: str
    metadata: Mapping[str, Any]
    messages: Sequence[Mapping[str, Any]] = ()
    """Of a conversation, as the row has them, before anything was cut."""


@dataclass(frozen=True)
class Asked:
    """A prompt that may be longer than it can stay."""

    row: PromptRow
    encoding: "_Encoding"
    tokenizer: Tokenizer
    too_long: TooLong

    @property
    def longest(self) -> int:
        """All of it."""
        return len(self.row.tokens)

    def cut(self, length: int) -> "Asked | None":
        """Without its start, after the first token, or its middle (`cut_paragraph`); None where it is to be dropped."""
        tokens = list(self.row.tokens)
        if len(tokens) <= length:
            return self
        if self.too_long == "paragraph":
            tokens = self.encoding.tokens(cut_paragraph(self.encoding.body, partial(_fits, self.encoding, length)))
        elif self.too_long == "start":
            tokens = [tokens[0], *tokens[len(tokens) - length + 1 :]]
        if len(tokens) > length:
            return None
        return replace(self, row=replace(self.row, tokens=array("i", tokens), text=self.tokenizer.decode(tokens)))


def select_prompts(
    source: Source, tokenizer: Tokenizer, *, length: int, too_long: TooLong, as_chat: bool = False
) -> Selected[PromptRow]:
    """A source's prompts of at most `length` tokens, special ones included, and what became of longer ones.

    Conversations go by the chat template, where there is one; with `as_chat` a text does, too, as what a user says.
    Raises UserError where that is asked of a tokenizer without a chat template.
    """
    chat = chat_tokenizer(tokenizer)
    if as_chat and chat is None:
        raise UserError("as_chat: the model's tokenizer has no chat template")

    def encode(row: Prompt) -> Asked:
        messages = row.messages or ({"role": "user", "content": row.prompt},) * as_chat
        encoding = _text(row.prompt, tokenizer) if chat is None or not messages else _conversation(messages, chat)
        tokens = array("i", encoding.tokens(encoding.body))
        return Asked(PromptRow(tokens, row.prompt, row.metadata, messages), encoding, tokenizer, too_long)

    selected = select(source, read(source, formats.prompt), encode, length=length)
    return Selected(
        by_part(selected.train, lambda rows: [asked.row for asked in rows]),
        [asked.row for asked in selected.heldout],
        selected.counts,
    )


class Prompts:
    """Endless batches of prompts and their rows, see `endless`; a `Cursor`.

    Each prompt stands `copies` times in its batch, one beside the other; `batch_size` counts them all.
    """

    def __init__(
        self, rows: Sequence[PromptRow], *, length: int, pad_id: int, batch_size: int, seed: int, copies: int = 1
    ) -> None:
        def batch(rows: Sequence[PromptRow]) -> tuple[PromptBatch, list[PromptRow]]:
            copied = [row for row in rows for _ in range(copies)]
            return pad_left([row.tokens for row in copied], length=length, pad_id=pad_id), copied

        different = batch_size // copies
        self._batches = iter(endless(rows, seed=seed).batch(different, batch_fn=batch).to_iter_dataset(READ))

    def __next__(self) -> tuple[PromptBatch, list[PromptRow]]:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """A JSON-able position."""
        return self._batches.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        self._batches.set_state(state)


def cut_paragraph(text: str, fits: Callable[[str], bool]) -> str:
    r"""The longest beginning that fits, back to its last line break, as TL;DR's posts were cut (Stiennon et al. 2020).

    Where that would take more than half of it, as in a single long paragraph, it ends where it fits.

    >>> cut_paragraph("one two\nthree four\nfive six seven", lambda part: len(part.split()) <= 5)
    'one two\nthree four'
    """
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(text[:middle]) else (low, middle - 1)
    end = text.rfind("\n", 0, low + 1)
    return text[: end if end >= low / 2 else low].rstrip()


class _Encoding(NamedTuple):
    """How a prompt becomes tokens, and which text of it may be cut."""

    tokens: Callable[[str], list[int]]
    body: str


def _fits(encoding: _Encoding, most: int, body: str) -> bool:
    return len(encoding.tokens(body)) <= most


def _text(prompt: str, tokenizer: Tokenizer) -> _Encoding:
    """BOS and text; its last paragraph stays, such as the "TL;DR:" that asks for what the policy is to write."""
    body, gap, ending = prompt.rpartition("\n\n")
    if not body:
        body, gap, ending = prompt, "", ""
    return _Encoding(lambda body: [tokenizer.bos_id, *tokenizer.encode(body + gap + ending)], body)


def _conversation(messages: Sequence[Mapping[str, Any]], tokenizer: JsonTokenizer) -> _Encoding:
    """What the chat template makes of it; its last message may be cut."""
    *before, last = messages
    return _Encoding(lambda body: tokenizer.encode_chat_prompt([*before, {**last, "content": body}]), last["content"])
