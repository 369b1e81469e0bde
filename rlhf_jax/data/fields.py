"""A row of a file or data set with its place: what is wrong in it is said with file, line and field."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.errors import UserError

SPEAKERS = {"system": "System", "user": "Human", "human": "Human", "assistant": "Assistant", "tool": "Tool"}
"""The roles that a message may have, and how plain text names them."""

Messages = Sequence[Mapping[str, Any]]


class Fields:
    """A row's fields by TRL's names; every method that reads one raises a UserError of one line."""

    def __init__(self, place: str, fields: Mapping[str, Any], renamed: Mapping[str, str] | None = None) -> None:
        """`renamed` maps a name that is asked for to the row's own, "a.0.b" and "a.*.b" reaching into what it holds."""
        self.place, self._own = place, fields
        self.fields: Mapping[str, Any] = fields if not renamed else self._view(renamed)

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    @property
    def names(self) -> str:
        """The row's own names, for messages."""
        return ", ".join(map(repr, self._own)) or "none"

    def error(self, what: str) -> UserError:
        """The error that says where."""
        return UserError(f"{self.place}: {what}")

    def without(self, *names: str) -> dict[str, Any]:
        """The fields but for some."""
        return {name: value for name, value in self.fields.items() if name not in names}

    def require(self, name: str) -> Any:
        """A field's value, of any type."""
        if name not in self.fields:
            raise self.error(f"no field {name!r}; the row has {self.names}")
        return self.fields[name]

    def number(self, name: str) -> float:
        """A finite number."""
        return self.check_number(repr(name), self.require(name))

    def check_number(self, name: str, value: Any) -> float:
        """The same of a value that stands in a field."""
        # Compared, not converted: an integer may be too large for a float.
        good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        if not good:
            raise self.error(f"{name} must be a finite number, found {short(value)}")
        return float(value)

    def numbers(self, name: str, completions: int) -> list[float]:
        """A finite number for each of the row's completions."""
        values = enumerate(self.list_for(name, completions), start=1)
        return [self.check_number(f"{name!r}, number {i}", value) for i, value in values]

    def text(self, name: str, *, empty: bool = False) -> str:
        """A string, with something in it unless it may be `empty`."""
        return self._check_text(repr(name), self.require(name), empty)

    def texts(self, name: str, *, least: int) -> tuple[str, ...]:
        """A list of strings that each say something."""
        values = self.list(name)
        if len(values) < least:
            raise self.error(f"{name!r} must hold at least {least} texts, found {len(values)}")
        return tuple(self._check_text(f"{name!r}, number {i}", value, False) for i, value in enumerate(values, start=1))

    def list_for(self, name: str, completions: int) -> list[Any]:
        """A list with something for each of the row's completions."""
        values = self.list(name)
        if len(values) != completions:
            raise self.error(f"{name!r} must have one for each of the {completions} 'completions', found {len(values)}")
        return values

    def list(self, name: str) -> list[Any]:
        """A list."""
        value = self.require(name)
        if not isinstance(value, list):
            raise self.error(f"{name!r} must be a list, found {short(value)}")
        return value

    @property
    def annotator(self) -> str | None:
        """Who judged, by the field of this name, a string or a whole number; None where there is none."""
        value = self.fields.get("annotator")
        if value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
            raise self.error(f"'annotator' must be a string or a whole number, found {short(value)}")
        return None if value is None else str(value)

    def ids(self, name: str) -> tuple[int, ...]:
        """Token ids, at least one."""
        values = self.list(name)
        wrong = [value for value in values if isinstance(value, bool) or not isinstance(value, int) or value < 0]
        if wrong or not values:
            raise self.error(f"{name!r} must be token ids, found {short(wrong[0] if wrong else values)}")
        return tuple(values)

    def label(self, name: str) -> bool:
        """True or false, or 1 or 0."""
        return self.check_label(repr(name), self.require(name))

    def check_label(self, name: str, value: Any) -> bool:
        """The same of a value that stands in a field."""
        if not isinstance(value, bool | int) or value not in (0, 1):
            raise self.error(f"{name} must be true or false, or 1 or 0, found {short(value)}")
        return bool(value)

    def is_conversation(self, name: str) -> bool:
        """Whether a field that must be there holds messages, not text."""
        return isinstance(self.require(name), list | dict)

    def messages(self, name: str, *, prompt: bool = False, empty: bool = False) -> Messages:
        """A conversation; one that is no prompt ends with the assistant's turn, which may be said to be `empty`."""
        value = _rows_of_columns(self.require(name))
        if not isinstance(value, list) or not (value or prompt):
            raise self.error(f"{name!r} must be a list of messages, found {short(value)}")
        for message in value:
            good = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
            if not good or message["role"] not in SPEAKERS:
                roles = ", ".join(SPEAKERS)
                raise self.error(f"{name!r}: a message has a role ({roles}) and a content, found {short(message)}")
            self._check_characters(repr(name), message["content"])
        if not prompt and value[-1]["role"] != "assistant":
            raise self.error(f"{name!r}: the last message must be the assistant's, found {value[-1]['role']!r}")
        if not prompt and not empty and not value[-1]["content"].strip():
            raise self.error(f"{name!r}: the last message is empty")
        return value

    def _check_text(self, name: str, value: Any, empty: bool) -> str:
        if not isinstance(value, str):
            raise self.error(f"{name} must be a string, found {short(value)}")
        if not empty and not value.strip():
            raise self.error(f"{name} is empty")
        self._check_characters(name, value)
        return value

    def _check_characters(self, name: str, text: str) -> None:
        """JSON can spell half of a surrogate pair, which no tokenizer and no file can hold."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise self.error(f"{name}: \\u{ord(text[error.start]):04x} is half a character") from None

    def _view(self, renamed: Mapping[str, str]) -> dict[str, Any]:
        found = {name: self._reach(name, path) for name, path in renamed.items()}
        taken = set(renamed.values())
        return {name: value for name, value in self._own.items() if name not in taken} | found

    def _reach(self, name: str, path: str) -> Any:
        try:
            return self._own[path] if path in self._own else _reach(self._own, path.split("."))
        except LookupError:
            raise self.error(f"no field {path!r}, which is to be {name!r}; the row has {self.names}") from None


def short(value: Any) -> str:
    """A value as JSON, cut to what an error can show."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):  # keys that JSON has not, circles, depth
        text = f"a {type(value).__name__}"
    text = text.encode(errors="replace").decode()
    return text if len(text) <= 60 else text[:57] + "…"


def _reach(value: Any, path: Sequence[str]) -> Any:
    """What stands at the end of a path; LookupError where it does not lead on."""
    if not path:
        return value
    first, *rest = path
    if isinstance(value, list) and first == "*":
        return [_reach(one, rest) for one in value]
    if isinstance(value, list) and first.isdecimal():
        return _reach(value[int(first)], rest)
    if isinstance(value, Mapping):
        return _reach(value[first], rest)
    raise LookupError(first)


def _rows_of_columns(value: Any) -> Any:
    """Messages as TFDS and old Arrow files hold them, {"role": […], "content": […]}, a message each."""
    if not isinstance(value, dict) or not all(isinstance(column, list) for column in value.values()):
        return value
    if len({len(column) for column in value.values()}) != 1:
        return value
    return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
