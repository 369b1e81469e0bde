"""A source's rows by what they are, to train on and held out: `read_pairs(Jsonl("pairs.jsonl"))` and its like.

Every row is read and checked; an error names the file, the row and the field. A row that stands twice is taken once,
and of a prompt that is held out no row is trained on.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from rlhf_jax.data import formats
from rlhf_jax.data.fields import Fields
from rlhf_jax.data.formats import Example, Pair, Prompt, Ranked, Rated, Scored, Stepwise, Text, Thumb, Valued, Votes
from rlhf_jax.data.hf_files import HuggingFaceTable
from rlhf_jax.data.sources import TFDS, FromStage, HuggingFace, Jsonl, Mixture, Source, describe
from rlhf_jax.data.splits import Span, overlap, resolve
from rlhf_jax.data.tables import JsonlTable, Located, Table, TFDSTable
from rlhf_jax.errors import UserError

T = TypeVar("T")
Part = Jsonl | TFDS | HuggingFace | FromStage


@dataclass(frozen=True)
class Rows(Generic[T]):
    """One source's rows."""

    source: Part
    train: list[T]
    heldout: list[T]
    merged: int
    """Rows that stood twice, or that are held out and stood among those to train on."""


@dataclass(frozen=True)
class Mixed(Sequence[T]):
    """Rows of several sources, one after the other, and how often each source is drawn."""

    parts: tuple[Sequence[T], ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        for part in self.parts:
            if 0 <= place < len(part):
                return part[place]
            place -= len(part)
        raise IndexError(f"row {index} of {len(self)}")


@dataclass(frozen=True)
class Split(Generic[T]):
    """What a stage trains on, drawn by weight where it is `Mixed`, what it is evaluated on, and what was left out."""

    train: Sequence[T]
    heldout: Sequence[T]
    merged: int = 0

    def __iter__(self) -> Iterator[Sequence[T]]:
        """`train, heldout = read_pairs(source)`."""
        return iter((self.train, self.heldout))


def read_prompts(source: Source) -> Split[Prompt]:
    """Prompts with the row's other fields, see `formats.prompt`."""
    return join(source, read(source, formats.prompt))


def read_examples(source: Source) -> Split[Example]:
    """Completions to learn, see `formats.example`."""
    return join(source, read(source, formats.example))


def read_pairs(source: Source) -> Split[Pair]:
    """Preferences, see `formats.pair`."""
    return join(source, read(source, formats.pair))


def read_scored(source: Source) -> Split[Scored]:
    """Texts with scores, see `formats.scored`."""
    return join(source, read(source, formats.scored))


def read_thumbs(source: Source) -> Split[Thumb]:
    """Completions that were liked or not, see `formats.thumb`."""
    return join(source, read(source, formats.thumb))


def read_ranked(source: Source) -> Split[Ranked]:
    """Completions in order, see `formats.ranked`."""
    return join(source, read(source, formats.ranked))


def read_rated(source: Source) -> Split[Rated]:
    """Completions with ratings, see `formats.rated`."""
    return join(source, read(source, formats.rated))


def read_stepwise(source: Source) -> Split[Stepwise]:
    """Solutions in judged steps, see `formats.stepwise`."""
    return join(source, read(source, formats.stepwise))


def read_votes(source: Source) -> Split[Votes]:
    """What several annotators said of two completions, see `formats.votes`."""
    return join(source, read(source, formats.votes))


def read_texts(source: Source) -> Split[Text]:
    """Texts, with labels where they have them, see `formats.text`."""
    return join(source, read(source, formats.text))


def read_judged(source: Part, *, neutral: bool = True) -> list[Any]:
    """All rows of a split, of the kind of the first one: pairs, texts with scores, or completions judged one by one.

    `neutral` is `formats.stepwise`'s.
    """
    table = open_table(source)
    rows = [Fields(place, row, source.fields) for place, row in _located(table, source.split, source)]
    parse = _kind(rows[0], neutral=neutral)
    return [parse(row) for row in rows]


def _kind(row: Fields, *, neutral: bool) -> Callable[[Fields], Any]:
    """What reads rows such as this one."""
    if "chosen" in row or formats.SHP[0] in row:
        return formats.pair
    if "completions" in row and ("labels" in row or "ratings" in row):
        return partial(formats.stepwise, neutral=neutral)
    for name, parse in (("rating", formats.rated), ("label", formats.thumb)):
        if name in row and "completion" in row:
            return parse
    if "text" in row:
        return formats.scored
    raise row.error(
        "expected 'prompt', 'chosen' and 'rejected', or 'text' and 'score', or 'prompt', 'completion' and 'rating' or "
        f"'label', or 'prompt', 'completions' and 'labels'; the row has {row.names}"
    )


def read(source: Source, parse: Callable[[Fields], T]) -> tuple[Rows[T], ...]:
    """Each part's rows, by one of the functions of `formats`; raises UserError for what is wrong with them."""
    if not isinstance(source, Mixture):
        return (_read_part(source, parse),)
    parts = [_read_part(part, parse) for part in source.parts]
    heldout = [row for part in parts for row in part.heldout]
    return tuple(_without(part, heldout) for part in parts)


def join(source: Source, parts: Sequence[Rows[T]]) -> Split[T]:
    """The parts as one, drawn by a mixture's weights."""
    merged = sum(part.merged for part in parts)
    heldout = [row for part in parts for row in part.heldout]
    if isinstance(source, Mixture):
        return Split(Mixed(tuple(part.train for part in parts), source.weights), heldout, merged)
    return Split(parts[0].train, heldout, merged)


def first_row(source: Part) -> Fields:
    """The first row of a source's split."""
    place, row = next(_located(open_table(source), source.split, source))
    return Fields(place, row, source.fields)


def open_table(source: Part) -> Table:
    """The source's rows as they lie."""
    if isinstance(source, FromStage):
        raise UserError(f"{describe(source)} can be read by a later stage's own data alone")
    if isinstance(source, Jsonl):
        return JsonlTable(source)
    return TFDSTable(source) if isinstance(source, TFDS) else HuggingFaceTable(source)


def _read_part(source: Part, parse: Callable[[Fields], T]) -> Rows[T]:
    table = open_table(source)

    def parsed(split: str) -> list[T]:
        rows = (Fields(place, row, source.fields) for place, row in _located(table, split, source))
        return [parse(row) for row in (_at_least(list(rows), source) if source.least else rows)]

    if not isinstance(source.heldout, str):
        rows, merged = _unique(parsed(source.split))
        return Rows(source, *_hold_out(rows, source.heldout, source), merged)
    _check_apart(table, source, source.heldout)
    heldout, twice = _unique(parsed(source.heldout))
    train, merged = _unique(parsed(source.split))
    return _without(Rows(source, train, heldout, merged + twice), heldout)


def _at_least(rows: list[Fields], source: Part) -> list[Fields]:
    """The rows whose numbers are not below those that the source asks for; UserError where none is left."""
    for name, least in source.least.items():
        numbers = [row.number(name) for row in rows]
        if rows and max(numbers) < least:
            raise UserError(f"{describe(source)}: least={dict(source.least)}: the largest {name!r} is {max(numbers):g}")
        rows = [row for row, number in zip(rows, numbers, strict=True) if number >= least]
    return rows


def _located(table: Table, split: str, source: Part) -> Iterator[Located]:
    """The rows of a split or of slices, in order, each with its place."""
    return (row for span in _spans(table, split, source) for row in table.rows(span.name, span.start, span.stop))


def _spans(table: Table, split: str, source: Part) -> tuple[Span, ...]:
    try:
        return resolve(split, table.size)
    except ValueError as error:
        raise UserError(f"{describe(source)}: {error}") from None


def _check_apart(table: Table, source: Part, heldout: str) -> None:
    shared = overlap(_spans(table, source.split, source), _spans(table, heldout, source))
    if shared:
        raise UserError(
            f"{describe(source)}: heldout={heldout!r} and split={source.split!r} have {shared} rows in common"
        )


def _hold_out(rows: list[T], share: float, source: Part) -> tuple[list[T], list[T]]:
    """All but the last `share` of the rows, and these; at least one each, and all rows of a prompt together."""
    key = _key_of(rows)
    keys = [key(row) for row in rows]
    distinct = list(dict.fromkeys(keys))
    if len(distinct) < 2:
        raise UserError(
            f"{describe(source)}: a single row, not counting repetitions; at least 2 are needed, one of them held out"
        )
    last = set(distinct[-min(max(1, round(len(distinct) * share)), len(distinct) - 1) :])
    train = [row for row, key in zip(rows, keys, strict=True) if key not in last]
    return train, [row for row, key in zip(rows, keys, strict=True) if key in last]


def _without(part: Rows[T], heldout: list[T]) -> Rows[T]:
    """The part without the rows to train on that, or whose prompts, are held out anywhere; these count as merged."""
    key = _key_of([*part.train, *heldout])
    taken = {key(row) for row in heldout}
    train = [row for row in part.train if key(row) not in taken]
    if not train:
        raise UserError(f"{describe(part.source)}: all {len(part.train)} rows to train on are held out, too")
    return Rows(part.source, train, part.heldout, part.merged + len(part.train) - len(train))


def _unique(rows: list[T]) -> tuple[list[T], int]:
    """Each row once, and how many were left out."""
    first: dict[bytes, T] = {}
    for row in rows:
        first.setdefault(_digest(row), row)
    return list(first.values()), len(rows) - len(first)


def _key_of(rows: Sequence[Any]) -> Callable[[Any], bytes]:
    """What must not be in both splits: a prompt, whatever else its row says; the row, where all have one prompt."""
    by_prompt = (rows and isinstance(rows[0], Prompt)) or len({_prompt(row) for row in rows}) > 1
    return _prompt if by_prompt else _digest


def _prompt(row: Any) -> bytes:
    """Of a row without one, all of it."""
    if isinstance(row, Prompt):
        return _digest((row.prompt, row.messages))
    asked = row.example if isinstance(row, Valued) else row
    return _digest(row if isinstance(asked, Text) else asked.prompt or row)


def _digest(row: Any) -> bytes:
    return hashlib.blake2b(repr(row).encode(errors="surrogatepass"), digest_size=16).digest()
