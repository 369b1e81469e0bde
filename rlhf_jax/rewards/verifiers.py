"""Rewards that check what a completion says: its answer against its row's, its form against a pattern.

Numbers are read by regular expressions and compared as fractions; no text is ever evaluated. This file imports neither
JAX nor NumPy: it is loaded by the process that rewards run in.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

_LONGEST = 200  # characters of a number; a row of digits that is longer is no answer

_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?![\w.]))?"
_NUMBER = re.compile(
    rf"(?<![\w.])(?:(?<![)\]}}])(?P<minus>[-\u2212]))?[$£€]?(?P<sign>(?<=[$£€])[-\u2212])?"
    rf"(?:(?P<whole>\d+)[ ]+(?P<part>\d+)/(?P<of>\d+)|(?P<top>{_DIGITS})(?:[ ]?/[ ]?(?P<bottom>{_DIGITS}))?)"
)
_FRACTION = re.compile(r"(?:(\d)\s*)?\\[dt]?frac\s*\{\s*([-\u2212]?)\s*([\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}")
_SHORT_FRACTION = re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)")
_EXPONENT = re.compile(r"(?<=[A-Za-z}])\^\{?[-\u2212]?\d+\}?")  # of a unit: "m^2"
_MARK = re.compile(r"####|\\boxed\s*\{")

# What makes a number beside it a piece of an expression. An operator needs something on its other side ("**5**" is
# bold, "answer - 5" a dash), as a letter of its own is: a variable; one that may be a unit, as in "5m", is none.
_NEAR = 40  # characters on either side that are looked at
_SIGN = r"(?:[-\u2212\u2013+\u00d7\u00b7\u00f7/]|\\(?:cdot|times|div)(?![A-Za-z]))"
_SPACE = r"[^\S\n]"  # a sign that begins a line is a list's, not an operator
_STARS = rf"(?:\*{{1,2}}|{_SPACE}+\*{{1,2}}{_SPACE}+)"
_FUNCTIONS = "sqrt|pi|frac|dfrac|tfrac|log|ln|exp|sin|cos|tan|binom|pm|mp|theta|alpha|beta|phi|infty|sum|int|prod"
_BEFORE = re.compile(
    rf"(?:(?:[\d)\]}}]|(?<![A-Za-z\\'\u2019])[b-z])(?:{_SPACE}*{_SIGN}{_SPACE}*\{{?|{_STARS})|\d[:,]|[\^_]\{{?|\u221a|\u00b1"
    rf"|\\(?:{_FUNCTIONS})(?![A-Za-z])\s*(?:\[[^\]]*\])?[\s{{(]*|(?<![A-Za-z])(?:sqrt|log|ln|exp|sin|cos|tan)\(|\}}\{{)\Z"
)
_AFTER = re.compile(
    rf"(?:{_SPACE}*{_SIGN}{_SPACE}*|{_STARS})(?:\.?\d|[$(\\{{]|(?<!/)[b-z](?![A-Za-z]))|\s*\^(?!\{{?\\circ)|\s*\\(?:{_FUNCTIONS})(?![A-Za-z])"
    r"|[abeijknqxyz](?![A-Za-z])|[\u03c0\u03b8\u221a\u00b1]|[:,]\d"
)
_GAP = "[ \u00a0\u2009\u202f]"  # between thousands, as "1 000" has it
_THOUSANDS_BEFORE, _THOUSANDS_AFTER = re.compile(rf"(?<!\d)\d{{1,3}}{_GAP}\Z"), re.compile(rf"{_GAP}\d{{3}}(?!\d)")
_RELATION = re.compile(r"=|\\approx(?![A-Za-z])|\u2248")
_MORE = re.compile(
    r"[<>!\u2264\u2265\u221a\u03c0]|\d\(|\\(?:" + _FUNCTIONS + r"|leq?|geq?|neq?|in|cup|cap)(?![A-Za-z])"
)


class _Expression(Exception):
    """What stands where the answer should be is more than a number."""


class Counted(list[float]):
    """Scores, and `counts` of what a run should hear of beside them, by the metric's name."""

    def __init__(self, scores: Iterable[float], counts: Mapping[str, int]) -> None:
        super().__init__(scores)
        self.counts = dict(counts)


class TextReward:
    """What most functions of texts have nothing to do for; see `rewards.host.RewardFunction`."""

    @property
    def counted(self) -> tuple[str, ...]:
        """Nothing but scores."""
        return ()

    def prepare(self) -> None:
        """Nothing is loaded."""

    def check_inputs(self) -> None:
        """No file is read, and no package that this one does not need."""

    def check_row(self, row: Mapping[str, Any]) -> None:
        """Any row will do."""


@dataclass(frozen=True)
class AnswerChecker(TextReward):
    r"""Whether a completion ends in its row's number (GSM8K, Cobbe et al. 2021; sums).

    The answer is what stands in the last \boxed{…} or after the last "####", on its line or, where that is empty, the
    next; without either, or where nothing follows, the last number. Commas,
    dollars and percent signs are passed over; 0.5, 1/2, \frac{1}{2} and 50/100 are the same number, 1 1/2 and 1.5 too.
    An expression (2\pi, 10^5, 5*3, 1 000) is no number: a completion's is not right, a row's is refused. `MathChecker`
    reads these.
    """

    answer: str = "answer"
    """The row's field that holds the right one: a number, or a text that is read as a completion is."""
    correct: float = 1.0
    """The score of the right number."""
    wrong: float = 0.0
    """The score of another number, or of none."""
    seconds: float = 30.0
    """Longest time that a batch may take."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.correct) and math.isfinite(self.wrong)):
            raise ValueError(f"reward.correct and reward.wrong must be finite, got {self.correct} and {self.wrong}")
        check_seconds(self.seconds)

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        """One score a completion, `correct` or `wrong`."""
        del prompts
        return [
            self.correct if read_answer(completion) == self.expected(row) else self.wrong
            for completion, row in zip(completions, metadata, strict=True)
        ]

    def check_row(self, row: Mapping[str, Any]) -> None:
        """Raise ValueError where a row's other fields do not hold a right answer."""
        self.expected(row)

    def expected(self, row: Mapping[str, Any]) -> Fraction:
        """The right number of a row; raises ValueError where it has none."""
        if self.answer not in row:
            there = ", ".join(map(repr, row)) or "none"
            raise ValueError(f"reward.answer: the row has no field {self.answer!r}, but {there}")
        value = row[self.answer]
        try:
            number = _read(value) if isinstance(value, str) else _exact(value)
        except _Expression:
            told = f"{value if len(value) <= 80 else '…' + value[-79:]!r}"
            raise ValueError(
                f"reward.answer: the row's {self.answer!r} is more than a number: {told}; MathChecker reads expressions"
            ) from None
        if number is None:
            raise ValueError(f"reward.answer: the row's {self.answer!r} holds no number: {value!r:.80}")
        return number


@dataclass(frozen=True)
class PatternMatch(TextReward):
    """Whether a completion has a form: a regular expression is found in it."""

    pattern: str
    """What is looked for anywhere; \\A and \\Z stand for its two ends, (?s) lets . run over lines."""
    found: float = 1.0
    """The score of a completion that has it."""
    missing: float = 0.0
    """The score of one that has not."""
    seconds: float = 30.0
    """Longest time that a batch may take."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"reward.pattern: {self.pattern!r} is no regular expression: {error}") from None
        if not (math.isfinite(self.found) and math.isfinite(self.missing)):
            raise ValueError(f"reward.found and reward.missing must be finite, got {self.found} and {self.missing}")
        check_seconds(self.seconds)

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        """One score a completion, `found` or `missing`."""
        del prompts, metadata
        return [self.found if re.search(self.pattern, completion) else self.missing for completion in completions]


def read_answer(text: str) -> Fraction | None:
    r"""The number that a text gives as its answer, exactly; None where it gives none, or more than a number.

    >>> read_answer("It is 12/60 of $50, so \\boxed{$1{,}000.50}.")
    Fraction(2001, 2)
    >>> read_answer("She has 3 left.\n#### 1 1/2 apples of 7")
    Fraction(3, 2)
    >>> read_answer("10-3 = 7%") == 7
    True
    >>> read_answer("\\boxed{2\\pi}")
    """
    try:
        return _read(text)
    except _Expression:
        return None


def _read(text: str) -> Fraction | None:
    """The same; raises _Expression for what is more than a number."""
    marks = list(_MARK.finditer(text))
    if not marks:
        return _number(text, last=True)
    mark = marks[-1]
    if mark.group() == "####":
        after = text[mark.end() :].lstrip()
        if not after:
            return _number(text[: mark.start()], last=True)
        return _number(after.partition("\n")[0], last=False)
    return _number(_braced(text[mark.end() :]), last=True, alone=True)


def _braced(text: str) -> str:
    """What stands before the brace that closes the one in front of the text; all of it where none does."""
    depth = 1
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:place]
    return text


def _number(text: str, *, last: bool, alone: bool = False) -> Fraction | None:
    """The first or the last number in a text, after its last "=" where it should stand there `alone`; None where there
    is none. Raises _Expression where it is a piece of an expression.
    """
    for plain, written in (("{,}", ","), ("\\,", ""), ("\\!", ""), ("\\$", "$"), ("\\%", "%")):
        text = text.replace(plain, written)
    text = _SHORT_FRACTION.sub(r"\1/\2", _FRACTION.sub(_plain_fraction, _EXPONENT.sub("", text)))
    if alone:
        text = _RELATION.split(text)[-1]
    found = [(match, value) for match in _NUMBER.finditer(text) if (value := _value(match)) is not None]
    if not found:
        return None
    match, value = found[-1 if last else 0]
    if _is_piece(match, text) or (alone and (len(found) > 1 or _MORE.search(text))):
        raise _Expression
    return value


def _is_piece(match: re.Match[str], text: str) -> bool:
    """Whether what stands beside a number makes an expression of it."""
    before, after = text[max(0, match.start() - _NEAR) : match.start()], text[match.end() :][:_NEAR]
    if _BEFORE.search(before) or _AFTER.match(after):
        return True
    is_short, is_group = (match["top"] or "").isdigit() and len(match["top"]) <= 3, len(match.group()) == 3
    return bool((is_group and _THOUSANDS_BEFORE.search(before)) or (is_short and _THOUSANDS_AFTER.match(after)))


def _plain_fraction(match: re.Match[str]) -> str:
    r"""\frac{1}{2} as 1/2, apart from a whole number before it."""
    before, sign, top, bottom = match.groups(default="")
    return f"{before} {sign}{top}/{bottom}" if before else f"{sign}{top}/{bottom}"


def _value(match: re.Match[str]) -> Fraction | None:
    """The number of a match; None for one that is too long, or divided by 0."""
    if len(match.group()) > _LONGEST:
        return None
    sign = -1 if match["minus"] or match["sign"] else 1
    if match["whole"] is not None:
        whole, part, of = (int(match[name]) for name in ("whole", "part", "of"))
        if of == 0:
            return None
        # Two numbers side by side, "12 60/3", are no mixed one: the later counts.
        return sign * (whole + Fraction(part, of)) if part < of else Fraction(part, of)
    top, bottom = (Fraction((match[name] or "1").replace(",", "")) for name in ("top", "bottom"))
    return sign * top / bottom if bottom else None


def _exact(value: Any) -> Fraction | None:
    """A number of a row as it is written: 0.1 is a tenth."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return None
    return Fraction(repr(value) if isinstance(value, float) else value) if math.isfinite(value) else None


def check_seconds(seconds: float) -> None:
    """Raise ValueError for a limit of time that is none."""
    if not 0 < seconds < math.inf:
        raise ValueError(f"reward.seconds must be over 0 and finite, got {seconds}")
