"""A constitution: principles by which a model criticises and revises what it said, and chooses between two answers.

A file of one is JSON, a list of objects with "critique", "revision" and "preference", each a request in words (Bai et
al. 2022, appendix C).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from rlhf_jax.errors import UserError

_FIELDS = ("critique", "revision", "preference")


@dataclass(frozen=True)
class Principle:
    """One principle, as three requests."""

    critique: str
    """What an answer's critique is asked for with."""
    revision: str
    """What the answer is rewritten by."""
    preference: str
    """By what the better of two answers is chosen."""


def read_constitution(path: str | None) -> Sequence[Principle]:
    """The principles of a file, or, without one, of the package; UserError, one line, for what is wrong with them."""
    if path is None:
        text = resources.files("rlhf_jax").joinpath("bundled/constitution.json").read_text(encoding="utf-8")
        return _principles(json.loads(text), "the package's constitution")
    try:
        found = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    return _principles(found, path)


def _principles(found: object, where: str) -> Sequence[Principle]:
    if not isinstance(found, list) or not found:
        raise UserError(f"{where}: a constitution is a list of objects with {', '.join(_FIELDS)}")
    for number, one in enumerate(found, start=1):
        wrong = [name for name in _FIELDS if not isinstance(one, dict) or not isinstance(one.get(name), str)]
        if wrong:
            raise UserError(f"{where}: principle {number} has no text {wrong[0]!r}; it needs {', '.join(_FIELDS)}")
    return [Principle(**{name: one[name].strip() for name in _FIELDS}) for one in found]
