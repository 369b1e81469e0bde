"""JSONL files in TRL's formats, read strictly: an error names the file, the line and the field.

Conversations (lists of {"role", "content"}) become plain text, since a base model's tokenizer has no chat template; an
example keeps its messages too, for a tokenizer that has one.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rlhf_jax.errors import UserError

_SPEAKERS = {"system": "System", "user": "Human", "human": "Human", "assistant": "Assistant", "tool": "Tool"}

T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """A completion to learn, after its prompt (which may be empty)."""

    prompt: str
    completion: str
    messages: tuple[Mapping[str, str], ...] = ()
    """The conversation, where the file has one; by a chat template all that the assistant says in it is learnt …"""
    learnt_from: int = 0
    """… from this message on."""


@dataclass(frozen=True)
class Pair:
    """Two completions of a prompt, the first preferred; the margin says by how much, where the file does."""

    prompt: str
    chosen: str
    rejected: str
    margin: float = 0.0


@dataclass(frozen=True)
class Scored:
    """A text, after its prompt (which may be empty), and the score that it was given."""

    prompt: str
    text: str
    score: float


def read_pairs(path: Path) -> list[Pair]:
    """Rows of prompt, chosen and rejected; without prompt, it is what both begin with (TRL's implicit prompt)."""
    return _read(path, _pair)


def read_examples(path: Path) -> list[Example]:
    """Rows of prompt and completion, of messages (as plain text the last one is the completion), or of text."""
    return _read(path, _example)


def read_judged(path: Path) -> list[Pair] | list[Scored]:
    """Pairs, or rows of text and score: the first row says which."""
    first = next(_rows(path), None)
    if first is None or "chosen" in first[1]:
        return _read(path, _pair)
    if "text" in first[1]:
        return _read(path, _scored)
    row = _Row(path, *first)
    raise row.error(f"expected 'prompt', 'chosen' and 'rejected', or 'text' and 'score'; the row has {row.names}")


def hold_out(rows: Sequence[T], share: float, path: Path) -> tuple[Sequence[T], Sequence[T]]:
    """A file's rows to train on, and the last `share` of them, at least one, held out; UserError if none is left."""
    if len(rows) < 2:
        raise UserError(f"{path}: a single row; at least 2 are needed, one of them held out")
    heldout = min(max(1, round(len(rows) * share)), len(rows) - 1)
    return rows[:-heldout], rows[-heldout:]


def render(messages: Sequence[dict[str, str]]) -> str:
    r"""A conversation as text, a paragraph a turn.

    >>> render([{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}])
    '\n\nHuman: Hi.\n\nAssistant: Hello.'
    """
    return "".join(f"\n\n{_SPEAKERS[message['role']]}: {message['content']}" for message in messages)


class _Row:
    """A row with its place, for errors that say where."""

    def __init__(self, path: Path, number: int, fields: dict[str, Any]) -> None:
        self.place, self.fields = f"{path}, line {number}", fields

    def error(self, what: str) -> UserError:
        return UserError(f"{self.place}: {what}")

    @property
    def names(self) -> str:
        return ", ".join(map(repr, self.fields)) or "none"

    def number(self, name: str) -> float:
        value = self.require(name)
        # Compared, not converted: an integer may be too large for a float.
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
            raise self.error(f"{name!r} must be a finite number, found {_short(value)}")
        return float(value)

    def require(self, name: str) -> Any:
        if name not in self.fields:
            raise self.error(f"no field {name!r}; the row has {self.names}")
        return self.fields[name]

    def text(self, name: str, *, empty: bool = False) -> str:
        value = self.require(name)
        if not isinstance(value, str):
            raise self.error(f"{name!r} must be a string, found {_short(value)}")
        if not empty and not value.strip():
            raise self.error(f"{name!r} is empty")
        self.check_characters(name, value)
        return value

    def check_characters(self, name: str, text: str) -> None:
        """JSON can spell half of a surrogate pair, which no tokenizer and no file can hold."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise self.error(f"{name!r}: \\u{ord(text[error.start]):04x} is half a character") from None

    def messages(self, name: str, *, prompt: bool = False) -> list[dict[str, str]]:
        """A conversation; one that is no prompt ends with the assistant's turn, which says something."""
        value = self.require(name)
        if not isinstance(value, list) or not (value or prompt):
            raise self.error(f"{name!r} must be a list of messages, found {_short(value)}")
        for message in value:
            good = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
            if not good or message["role"] not in _SPEAKERS:
                roles = ", ".join(_SPEAKERS)
                raise self.error(f"{name!r}: a message has a role ({roles}) and a content, found {_short(message)}")
            self.check_characters(name, message["content"])
        if not prompt and value[-1]["role"] != "assistant":
            raise self.error(f"{name!r}: the last message must be the assistant's, found {value[-1]['role']!r}")
        if not prompt and not value[-1]["content"].strip():
            raise self.error(f"{name!r}: the last message is empty")
        return value

    def is_list(self, name: str) -> bool:
        return isinstance(self.require(name), list)


def _pair(row: _Row) -> Pair:
    margin = row.number("margin") if "margin" in row.fields else 0.0
    if {"score_chosen", "score_rejected"} <= row.fields.keys():
        margin = row.number("score_chosen") - row.number("score_rejected")
    margin = max(margin, 0.0)  # where the scores contradict the choice, the choice counts
    conversation = row.is_list("chosen")
    if conversation:
        chosen, rejected = (row.messages(name) for name in ("chosen", "rejected"))
        if "prompt" in row.fields:
            prompt = row.messages("prompt", prompt=True) if row.is_list("prompt") else row.text("prompt", empty=True)
        else:
            shared = _shared(chosen[:-1], rejected[:-1])
            prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        before = prompt if isinstance(prompt, str) else render(prompt)
        return Pair(before, render(chosen), render(rejected), margin)
    chosen, rejected = row.text("chosen"), row.text("rejected")
    if "prompt" in row.fields:
        prompt = (
            render(row.messages("prompt", prompt=True)) if row.is_list("prompt") else row.text("prompt", empty=True)
        )
        return Pair(prompt, chosen, rejected, margin)
    # The prompt ends at a space before the texts part, so that no word is split, and leaves each something to say.
    shared = _shared(chosen, rejected)
    texts = (chosen, rejected)
    while shared and not all(text[shared : shared + 1].isspace() and text[shared:].strip() for text in texts):
        shared -= 1
    return Pair(chosen[:shared], chosen[shared:], rejected[shared:], margin)


def _example(row: _Row) -> Example:
    if "messages" in row.fields:
        messages = row.messages("messages")
        return Example(render(messages[:-1]), render(messages[-1:]), _for_template(messages))
    if "completion" in row.fields:
        if row.is_list("completion"):
            prompt, completion = row.messages("prompt", prompt=True), row.messages("completion")
            messages = _for_template([*prompt, *completion])
            return Example(render(prompt), render(completion), messages, learnt_from=len(prompt))
        return Example(row.text("prompt", empty=True), row.text("completion"))
    if "text" in row.fields:
        return Example("", row.text("text"))
    raise row.error(f"expected 'prompt' and 'completion', 'messages', or 'text'; the row has {row.names}")


def _for_template(messages: Sequence[Mapping[str, str]]) -> tuple[Mapping[str, str], ...]:
    """The messages with the one role that templates call otherwise."""
    return tuple({**message, "role": "user"} if message["role"] == "human" else message for message in messages)


def _scored(row: _Row) -> Scored:
    prompt = row.text("prompt", empty=True) if "prompt" in row.fields else ""
    return Scored(prompt, row.text("text"), row.number("score"))


def _shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many elements two sequences begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _read(path: Path, parse: Callable[[_Row], T]) -> list[T]:
    parsed = [parse(_Row(path, number, fields)) for number, fields in _rows(path)]
    if not parsed:
        raise UserError(f"{path}: no rows; a JSONL file holds one JSON object a line")
    return parsed


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.is_dir():
        raise UserError(f"{path} is a folder; a JSONL file is needed")
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError:
            raise UserError(f"{path}, line {number}: not UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(fields, dict):
            raise UserError(f"{path}, line {number}: expected a JSON object, found {_short(fields)}")
        yield number, fields


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False).encode(errors="replace").decode()
    return text if len(text) <= 60 else text[:57] + "…"
