"""Rows in TRL's formats, and what each means.

Conversations (lists of {"role", "content"}) become plain text, a paragraph a turn, since a base model's tokenizer has
no chat template; the messages are kept, for a tokenizer that has one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from rlhf_jax.data.fields import SPEAKERS, Fields, Messages, short

Order = Literal["none", "some", "best", "all"]
"""How far completions must be told apart: not at all, somehow, one of them the best, or every one from every other."""


@dataclass(frozen=True)
class Prompt:
    """What a policy answers; the row's other fields say what a reward has to know, such as the right answer."""

    prompt: str
    messages: tuple[Mapping[str, Any], ...]
    """The conversation so far, where the row has one."""
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """A completion to learn, after its prompt (which may be empty)."""

    prompt: str
    completion: str
    messages: tuple[Mapping[str, Any], ...] = ()
    """The conversation, where the row has one; by a chat template all that the assistant says in it is learnt …"""
    learnt_from: int = 0
    """… from this message on."""
    ids: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    """Prompt and completion as a policy read and wrote them, special tokens included, where the row has them."""


@dataclass(frozen=True)
class Pair:
    """Two completions of a prompt, the first preferred; the margin says by how much, where the row does."""

    prompt: str
    chosen: str
    """Empty, as `rejected` may be, where a raw transcript ends before its last answer: nothing is compared then."""
    rejected: str
    margin: float = 0.0
    chosen_messages: tuple[Mapping[str, Any], ...] = ()
    """The whole conversation with the chosen answer, where the row has messages; and with the rejected one."""
    rejected_messages: tuple[Mapping[str, Any], ...] = ()
    answered_from: int = 0
    """The message of both with which the answer begins."""
    annotator: str | None = None
    """Who judged, where the row says."""
    probability: float = 1.0
    """That the first is the better one, in (0, 1], where the row says."""
    ids: tuple[tuple[int, ...], ...] = ()
    """Prompt and both completions as a policy read and wrote them, special tokens included, where the row has them."""


@dataclass(frozen=True)
class Scored:
    """A text, after its prompt (which may be empty), and the score that it was given."""

    prompt: str
    text: str
    score: float


@dataclass(frozen=True)
class Thumb:
    """A completion that somebody liked or did not."""

    prompt: str
    completion: str
    label: bool
    messages: tuple[Mapping[str, Any], ...] = ()
    """The conversation, the completion its end, where the row has messages …"""
    answered_from: int = 0
    """… and the message with which the completion begins."""
    annotator: str | None = None


@dataclass(frozen=True)
class Ranked:
    """Two or more completions of a prompt; rank 0 is the best, equal ranks are a tie."""

    prompt: str
    completions: tuple[str, ...]
    ranks: tuple[int, ...]
    annotator: str | None = None


@dataclass(frozen=True)
class Votes:
    """Two completions of a prompt, and what each of several annotators said: the first, the second, or (None) a tie."""

    prompt: str
    completions: tuple[str, str]
    votes: tuple[int | None, ...]


@dataclass(frozen=True)
class Rated:
    """A completion and the rating that it was given."""

    prompt: str
    completion: str
    rating: float
    annotator: str | None = None


@dataclass(frozen=True)
class Valued:
    """A completion to learn from, and the score that it was given."""

    example: Example
    score: float


@dataclass(frozen=True)
class Stepwise:
    """A solution in steps, each right or wrong; None for a step that nobody judged."""

    prompt: str
    completions: tuple[str, ...]
    labels: tuple[bool | None, ...]
    annotator: str | None = None


@dataclass(frozen=True)
class Text:
    """A text on its own, with its label (1 positive, 0 negative) where it has one."""

    text: str
    label: int | None


SHP = ("human_ref_A", "human_ref_B")
"""The answers of a raw row of the Stanford Human Preferences, whose `labels` is 1 where the first is preferred."""


_TURN = "\n\nAssistant:"


def render(messages: Messages) -> str:
    r"""A conversation as text, a paragraph a turn.

    >>> render([{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}])
    '\n\nHuman: Hi.\n\nAssistant: Hello.'
    """
    return "".join(f"\n\n{SPEAKERS[message['role']]}: {message['content']}" for message in messages)


def prompt(row: Fields) -> Prompt:
    """Of prompt, of messages up to the assistant's last answer, or of what chosen and rejected begin with."""
    if "prompt" in row:
        text, messages = _prompt(row, empty=False)
        return Prompt(text, _for_template(messages), row.without("prompt"))
    if "messages" in row:
        messages = row.messages("messages", prompt=True)
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise row.error("'messages': nobody but the assistant speaks, so there is no prompt")
        return Prompt(render(messages), _for_template(messages), row.without("messages"))
    if "chosen" in row:
        judged = pair(row)
        if not judged.prompt.strip():
            raise row.error("'chosen' and 'rejected' have no beginning in common, so there is no prompt")
        return Prompt(judged.prompt, judged.chosen_messages[: judged.answered_from], dict(row.fields))
    raise row.error(f"expected 'prompt', 'messages', or 'chosen' and 'rejected'; the row has {row.names}")


def pair(row: Fields) -> Pair:
    """Of prompt, chosen and rejected; without prompt, it is what both begin with (TRL's implicit prompt).

    A raw row of the Stanford Human Preferences (Ethayarajh et al. 2022) has other names, see `SHP`. A probability is a
    judge's that the chosen one is better: the label is soft (Bai et al. 2022, Constitutional AI, section 4.1). Beside
    the three, prompt_tokens, chosen_tokens and rejected_tokens are ids as in `example`.
    """
    if "probability" not in row:
        return _pair(row)
    probability = row.number("probability")
    if not 0 < probability <= 1:
        raise row.error(f"'probability' must lie in (0, 1], found {probability:g}")
    return replace(_pair(row), probability=probability)


def _pair(row: Fields) -> Pair:
    """But for its probability."""
    margin = row.number("margin") if "margin" in row else 0.0
    if "score_chosen" in row and "score_rejected" in row:
        margin = row.number("score_chosen") - row.number("score_rejected")
    margin = max(margin, 0.0)  # where the scores contradict the choice, the choice counts
    if SHP[0] in row:
        chosen, rejected = (row.text(name) for name in (SHP if row.label("labels") else SHP[::-1]))
        return Pair(row.text("history"), chosen, rejected, margin)
    named = ("prompt", "chosen", "rejected") if "chosen_tokens" in row else ()
    ids = tuple(row.ids(f"{name}_tokens") for name in named)
    if row.is_conversation("chosen"):
        return replace(_conversations(row, margin, empty=bool(ids)), ids=ids)
    chosen, rejected = (row.text(name, empty=bool(ids)) for name in ("chosen", "rejected"))
    if "prompt" in row or ids:
        return Pair(_prompt(row)[0], chosen, rejected, margin, annotator=row.annotator, ids=ids)
    # The prompt ends at a space before the texts part, so that no word is split, and leaves each something to say; of
    # raw transcripts (HH-RLHF) where the last answer begins that both have, whatever words the two have in common.
    shared = _shared(chosen, rejected)
    texts, turn = (chosen, rejected), chosen.rfind(_TURN, 0, shared)
    if turn >= 0:
        shared = turn + len(_TURN)
        said = [text[shared:] if text.rpartition(_TURN)[2].strip() else "" for text in texts]
        if not all(said):
            return Pair(chosen[:shared], said[0], said[1], margin, annotator=row.annotator)
    while shared and not all(text[shared : shared + 1].isspace() and text[shared:].strip() for text in texts):
        shared -= 1
    return Pair(chosen[:shared], chosen[shared:], rejected[shared:], margin, annotator=row.annotator)


def example(row: Fields) -> Example:
    """Of prompt and completion, of messages (as plain text the last one is the completion), or of text.

    Beside prompt and completion, prompt_tokens and completion_tokens are ids that a policy of this tokenizer read and
    wrote: they are learnt as they stand, with EOS only where it was written.
    """
    ids = (row.ids("prompt_tokens"), row.ids("completion_tokens")) if "completion_tokens" in row else None
    if "messages" in row and ids is None:
        messages = row.messages("messages")
        return Example(render(messages[:-1]), render(messages[-1:]), _for_template(messages))
    if "completion" in row:
        if row.is_conversation("completion"):
            before, after = row.messages("prompt", prompt=True), row.messages("completion", empty=ids is not None)
            messages = _for_template([*before, *after])
            return Example(render(before), render(after), messages, learnt_from=len(before), ids=ids)
        return Example(row.text("prompt", empty=True), row.text("completion", empty=ids is not None), ids=ids)
    if "text" in row:
        return Example("", row.text("text"))
    raise row.error(f"expected 'prompt' and 'completion', 'messages', or 'text'; the row has {row.names}")


def scored(row: Fields) -> Scored:
    """Of text and score, and prompt where there is one."""
    before = row.text("prompt", empty=True) if "prompt" in row else ""
    return Scored(before, row.text("text"), row.number("score"))


def thumb(row: Fields) -> Thumb:
    """Of prompt, completion and label (TRL's unpaired preference)."""
    label = row.label("label")
    if row.is_conversation("completion"):
        before, after = row.messages("prompt", prompt=True), row.messages("completion")
        return Thumb(render(before), render(after), label, _for_template([*before, *after]), len(before), row.annotator)
    return Thumb(_prompt(row)[0], row.text("completion"), label, annotator=row.annotator)


def ranked(row: Fields, *, needs: Order = "some") -> Ranked:
    """Of prompt, completions, and ranks (the least is the best), scores (the largest is the best), or best, the number
    of the one that was picked, from 0.

    Raises UserError where the completions are not told apart as far as a loss `needs`.
    """
    before, completions = _prompt(row)[0], row.texts("completions", least=2)
    if "best" in row:
        best = row.require("best")
        if not isinstance(best, int) or isinstance(best, bool) or not 0 <= best < len(completions):
            raise row.error(f"'best' must be a number from 0 to {len(completions) - 1}, found {short(best)}")
        name, values = "best", [float(i != best) for i in range(len(completions))]
    else:
        name = "ranks" if "ranks" in row else "scores"
        values = [-value if name == "scores" else value for value in row.numbers(name, len(completions))]
    order = sorted(set(values))
    if needs != "none" and len(order) == 1:
        raise row.error(f"{name!r}: all {len(values)} completions tie, so there is nothing to compare")
    if needs == "best" and values.count(order[0]) > 1:
        raise row.error(f"{name!r}: {values.count(order[0])} completions tie for the best; one is needed")
    if needs == "all" and len(order) < len(values):
        raise row.error(f"{name!r}: some of {len(values)} completions tie; an order of all is needed")
    return Ranked(before, completions, tuple(order.index(value) for value in values), row.annotator)


def votes(row: Fields) -> Votes:
    """Of prompt, response_1, response_2 and annotators (PandaLM's): 1, 2, or 0 for a tie, one an annotator.

    A response may be empty.
    """
    texts = (row.text("response_1", empty=True), row.text("response_2", empty=True))
    values = row.list("annotators")
    for i, value in enumerate(values, start=1):
        if isinstance(value, bool) or value not in (0, 1, 2):
            raise row.error(f"'annotators', number {i} must be 1, 2, or 0 for a tie, found {short(value)}")
    if not values:
        raise row.error("'annotators' is empty")
    return Votes(_prompt(row)[0], texts, tuple(value - 1 if value else None for value in values))


def rated(row: Fields) -> Rated:
    """Of prompt, completion and rating."""
    return Rated(_prompt(row)[0], row.text("completion"), row.number("rating"), row.annotator)


def valued(row: Fields) -> Valued:
    """Of what `example` reads but a text alone, and score, rating, or label, which counts as 1 or 0."""
    if not any(name in row for name in ("completion", "completion_tokens", "messages")):
        raise row.error(f"expected 'prompt' and 'completion', or 'messages', with a score; the row has {row.names}")
    for name in ("score", "rating"):
        if name in row:
            return Valued(example(row), row.number(name))
    if "label" in row:
        return Valued(example(row), float(row.label("label")))
    raise row.error(f"expected 'score', 'rating' or 'label' beside the completion; the row has {row.names}")


def level(row: Fields) -> Rated:
    """The same with a rating that is a whole number."""
    one = rated(row)
    if not one.rating.is_integer():
        raise row.error(f"'rating' must be a whole number, found {one.rating:g}")
    return one


def stepwise(row: Fields, *, neutral: bool = True) -> Stepwise:
    """Of prompt, completions, and labels (TRL's stepwise supervision) or ratings (PRM800K's): 1 right, −1 wrong, and 0,
    of which `neutral` says whether it is right. A label or rating may be null.
    """
    before, steps = _prompt(row)[0], row.texts("completions", least=1)
    name = "ratings" if "ratings" in row and "labels" not in row else "labels"
    values = row.list_for(name, len(steps))

    def right(i: int, value: Any) -> bool:
        if name == "labels":
            return row.check_label(f"'labels', number {i}", value)
        if isinstance(value, bool) or value not in (-1, 0, 1):
            raise row.error(f"'ratings', number {i} must be 1, 0, −1 or null, found {short(value)}")
        return value > 0 or (neutral and value == 0)

    checked = [None if value is None else right(i, value) for i, value in enumerate(values, start=1)]
    return Stepwise(before, steps, tuple(checked), row.annotator)


def text(row: Fields) -> Text:
    """Of text, and label where there is one that says positive or negative."""
    label = row.fields.get("label")
    return Text(row.text("text"), int(label) if isinstance(label, bool | int) and label in (0, 1) else None)


def labelled_text(row: Fields) -> Text:
    """Of text and label."""
    return Text(row.text("text"), int(row.label("label")))


def _conversations(row: Fields, margin: float, *, empty: bool) -> Pair:
    chosen, rejected = (row.messages(name, empty=empty) for name in ("chosen", "rejected"))
    answers = all(messages[0]["role"] == "assistant" for messages in (chosen, rejected))
    if "prompt" in row and not row.is_conversation("prompt") and answers:
        return Pair(row.text("prompt", empty=True), render(chosen), render(rejected), margin, annotator=row.annotator)
    if "prompt" in row and row.is_conversation("prompt"):
        before = row.messages("prompt", prompt=True)
    else:
        shared = _shared(chosen[:-1], rejected[:-1])
        before, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    whole = (_for_template([*before, *answer]) for answer in (chosen, rejected))
    prompt, texts = render(before), (render(chosen), render(rejected))
    return Pair(prompt, *texts, margin, *whole, answered_from=len(before), annotator=row.annotator)


def _prompt(row: Fields, *, empty: bool = True) -> tuple[str, Messages]:
    """The field of this name as text, and its messages where it holds them."""
    if not row.is_conversation("prompt"):
        return row.text("prompt", empty=empty), ()
    messages = row.messages("prompt", prompt=True)
    if not messages and not empty:
        raise row.error("'prompt' is empty")
    return render(messages), messages


def _for_template(messages: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """The messages with the one role that templates call otherwise."""
    return tuple({**message, "role": "user"} if message["role"] == "human" else message for message in messages)


def _shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many elements two sequences begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
