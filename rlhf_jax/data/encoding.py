"""Rows to tokens: by a tokenizer's chat template where it has one and the row has messages, else BOS, text, EOS.

A source's rows are encoded once, and those outside its lengths dropped or cut, and counted.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

from rlhf_jax.data.counts import Counts
from rlhf_jax.data.formats import Example, Pair, Ranked, Rated, Stepwise, Thumb, Votes
from rlhf_jax.data.judged import JudgedRow
from rlhf_jax.data.preferences import PreferenceGroup
from rlhf_jax.data.reading import Mixed, Rows
from rlhf_jax.data.sources import Mixture, Source, describe
from rlhf_jax.data.text import Row, fitted
from rlhf_jax.data.thumbs import Liked
from rlhf_jax.errors import UserError
from rlhf_jax.interop.json_tokenizer import JsonTokenizer
from rlhf_jax.interop.tokenizers import Tokenizer

T = TypeVar("T")


class Encoded(Protocol):
    """A row in tokens."""

    @property
    def longest(self) -> int:
        """Tokens of its longest part that a network reads at once."""
        ...

    def cut(self, length: int) -> Self | None:
        """What is left of it in so many tokens; None where that is of no use."""
        ...


R = TypeVar("R", bound=Encoded)


@dataclass(frozen=True)
class Learnt:
    """A text, and which of its tokens are learnt."""

    tokens: tuple[int, ...]
    counted: tuple[bool, ...]

    @property
    def longest(self) -> int:
        """All of it."""
        return len(self.tokens)

    def cut(self, length: int) -> "Learnt | None":
        """Of what stands before the first counted token the beginning goes first, its first token left; then the end.

        None where no token of it counts.
        """
        first = max(1, self.counted.index(True)) if True in self.counted else len(self.tokens)
        prompt, rest = fitted(self.tokens[:first], self.tokens[first:], length=length)
        counted = (*([False] * len(prompt)), *self.counted[first : first + len(rest)])
        return Learnt((*prompt, *rest), counted) if any(counted) else None

    def row(self) -> Row:
        """As batches are packed of it."""
        return Row(list(self.tokens), list(self.counted))


@dataclass(frozen=True)
class Selected(Generic[T]):
    """Rows in tokens, to train on and held out; mixed by weight where the source is a mixture."""

    train: Sequence[T]
    heldout: list[T]
    counts: Counts


def select(
    source: Source,
    parts: Sequence[Rows[T]],
    encode: Callable[[T], R],
    *,
    length: int,
    tells: Callable[[R], bool] = lambda row: True,
) -> Selected[R]:
    """The parts' rows in tokens, each within its part's lengths and cut to the stage's `length`.

    What then says nothing, by `tells`, is dropped too.
    Raises UserError where no row is left to train on, or none held out.
    """
    train, heldout, counts = [], [], Counts()
    for part in parts:
        limits = Limits(part, length)
        kept = limits.keep(map(encode, part.train), tells), limits.keep(map(encode, part.heldout), tells)
        counts += limits.counts(*kept)
        train.append(kept[0])
        heldout += kept[1]
    return Selected(Mixed(tuple(train), source.weights) if isinstance(source, Mixture) else train[0], heldout, counts)


class Limits:
    """The lengths that a source and a stage allow, and how many rows fell outside of them."""

    def __init__(self, part: Rows[Any], length: int) -> None:
        self._part = part
        self._least, most = part.source.min_tokens, part.source.max_tokens
        self._drop = most is not None and part.source.too_long == "drop"
        self._most = length if most is None else most
        self._room = length if most is None else min(most, length)
        self._dropped = self._cut = 0

    def keep(self, rows: Iterable[R], tells: Callable[[R], bool] = lambda row: True) -> list[R]:
        """The rows that may stay, cut where they must."""
        kept = []
        for row in rows:
            short, long = row.longest < self._least, row.longest > self._most
            fits = None if short or (long and self._drop) else row.cut(self._room)
            if fits is None or not tells(fits):
                self._dropped += 1
                continue
            self._cut += row.longest > self._room
            kept.append(fits)
        return kept

    def counts(self, train: Sequence[Any], heldout: Sequence[Any]) -> Counts:
        """What became of the part's rows, where these are left; UserError where one of the two is empty."""
        for rows, what in ((train, "to train on"), (heldout, "held out")):
            if not rows:
                lengths = f"{self._least} to {self._most} tokens"
                raise UserError(f"{describe(self._part.source)}: no row {what} is left that has {lengths}")
        return Counts(len(train), len(heldout), self._part.merged, self._dropped, self._cut)


def encode_example(tokenizer: Tokenizer) -> Callable[[Example], Learnt]:
    """Prompt and completion, whose tokens and EOS are learnt; by a chat template all that the assistant says.

    Of what a policy wrote, the ids that it wrote. Raises UserError where these are another tokenizer's.
    """

    def encode(example: Example) -> Learnt:
        if example.ids is not None:
            prompt, completion = example.ids
            text = example.messages[-1]["content"] if example.messages else example.completion
            _check_ids(tokenizer, prompt, {"completion": (completion, text)})
            return Learnt(prompt + completion, (*([False] * len(prompt)), *([True] * len(completion))))
        chat = chat_tokenizer(tokenizer)
        if chat is not None and example.messages:
            tokens, counted = chat.encode_chat(example.messages, start=example.learnt_from)
            return Learnt(tuple(tokens), tuple(counted))
        prompt = (tokenizer.bos_id, *tokenizer.encode(example.prompt))
        completion = (*tokenizer.encode(example.completion), tokenizer.eos_id)
        return Learnt(prompt + completion, (*([False] * len(prompt)), *([True] * len(completion))))

    return encode


def _check_ids(
    tokenizer: Tokenizer, prompt: tuple[int, ...], completions: Mapping[str, tuple[tuple[int, ...], str]]
) -> None:
    """Raise UserError unless a row's ids are the tokenizer's, and those of completions, by their fields, say the texts.

    Those of a prompt may be a conversation's by a chat template.
    """
    if max(prompt) >= tokenizer.vocab_size:
        raise UserError(
            f"'prompt_tokens' has {max(prompt)}, and this model {tokenizer.vocab_size} tokens; leave ids out"
        )
    for name, (ids, text) in completions.items():
        if max(ids) >= tokenizer.vocab_size or tokenizer.decode(ids).strip() != text.strip():
            raise UserError(f"'{name}_tokens' are not this model's tokens of '{name}': {text[:80]!r}; leave ids out")


def encode_pair(tokenizer: Tokenizer) -> Callable[[Pair], PreferenceGroup]:
    """A chosen and a rejected completion as a group of two, both ended; where one of them is empty, without a pair.

    Of what a policy wrote, the ids that it wrote.
    """

    def encode(pair: Pair) -> PreferenceGroup:
        chat, texts = chat_tokenizer(tokenizer), (pair.chosen, pair.rejected)
        annotators = () if pair.annotator is None else (pair.annotator,)
        soft = () if pair.probability == 1 else (pair.probability,)
        if pair.ids:
            judged = (), ((0, 1),), (pair.margin,), "file", annotators
            return PreferenceGroup(pair.prompt, texts, *_written(tokenizer, pair), *judged, probabilities=soft)
        if not all(texts):
            return encode_group(tokenizer, pair.prompt, texts, (), ())
        if chat is None or not pair.chosen_messages:
            return encode_group(tokenizer, pair.prompt, texts, ((0, 1),), (pair.margin,), annotators, soft)
        prompts, completions = zip(
            *(
                _answered(chat, messages, pair.answered_from)
                for messages in (pair.chosen_messages, pair.rejected_messages)
            ),
            strict=True,
        )
        if prompts[0] != prompts[1]:
            raise UserError(f"the chat template writes the prompt of two answers in two ways: {pair.prompt[:80]!r}")
        judged = (), ((0, 1),), (pair.margin,), "file", annotators
        return PreferenceGroup(pair.prompt, texts, prompts[0], completions, *judged, probabilities=soft)

    return encode


def _written(tokenizer: Tokenizer, pair: Pair) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """A pair's ids, the prompt's and both completions'."""
    prompt, *written = pair.ids
    answers = [messages[-1]["content"] for messages in (pair.chosen_messages, pair.rejected_messages) if messages]
    chosen, rejected = zip(written, answers or (pair.chosen, pair.rejected), strict=True)
    _check_ids(tokenizer, prompt, {"chosen": chosen, "rejected": rejected})
    return prompt, tuple(written)


def encode_ranked(tokenizer: Tokenizer) -> Callable[[Ranked], PreferenceGroup]:
    """All pairs of completions with different ranks, in a group."""

    def encode(row: Ranked) -> PreferenceGroup:
        places = range(len(row.ranks))
        pairs = tuple((a, b) for a in places for b in places if row.ranks[a] < row.ranks[b])
        annotators = () if row.annotator is None else (row.annotator,) * len(pairs)
        return encode_group(tokenizer, row.prompt, row.completions, pairs, (0.0,) * len(pairs), annotators)

    return encode


def encode_votes(tokenizer: Tokenizer) -> Callable[[Votes], PreferenceGroup]:
    """Two completions, with a pair for each annotator who preferred one, whose number is the annotator's name."""

    def encode(row: Votes) -> PreferenceGroup:
        said = [(str(i), vote) for i, vote in enumerate(row.votes) if vote is not None]
        pairs, annotators = tuple((vote, 1 - vote) for _, vote in said), tuple(who for who, _ in said)
        return encode_group(tokenizer, row.prompt, row.completions, pairs, (0.0,) * len(pairs), annotators)

    return encode


def encode_rated(tokenizer: Tokenizer) -> Callable[[Rated | Thumb], JudgedRow]:
    """A completion, ended, with its rating, or with 1 or 0 for its label."""

    def encode(row: Rated | Thumb) -> JudgedRow:
        target = row.rating if isinstance(row, Rated) else float(row.label)
        prompt, completion = _completed(tokenizer, row)
        return JudgedRow(row.prompt, prompt, (completion,), (target,), row.annotator)

    return encode


def encode_steps(tokenizer: Tokenizer) -> Callable[[Stepwise], JudgedRow]:
    """A solution's steps, a line each, the last one ended; the prompt's own line ends before them."""

    def encode(row: Stepwise) -> JudgedRow:
        prompt = (tokenizer.bos_id, *tokenizer.encode(row.prompt + "\n"))
        *first, last = row.completions
        lines = [tuple(tokenizer.encode(step + "\n")) for step in first]
        parts = (*lines, (*tokenizer.encode(last), tokenizer.eos_id))
        targets = tuple(None if label is None else float(label) for label in row.labels)
        return JudgedRow(row.prompt, prompt, parts, targets, row.annotator)

    return encode


def encode_thumb(tokenizer: Tokenizer) -> Callable[[Thumb], Liked]:
    """A completion that was liked or not, ended."""

    def encode(thumb: Thumb) -> Liked:
        prompt, completion = _completed(tokenizer, thumb)
        return Liked(prompt, (completion,), thumb.label)

    return encode


def _completed(tokenizer: Tokenizer, row: Rated | Thumb) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A prompt, and its completion, ended; by the chat template where the row has messages."""
    chat = chat_tokenizer(tokenizer)
    if chat is not None and isinstance(row, Thumb) and row.messages:
        return _answered(chat, row.messages, row.answered_from)
    return (tokenizer.bos_id, *tokenizer.encode(row.prompt)), (*tokenizer.encode(row.completion), tokenizer.eos_id)


def chat_tokenizer(tokenizer: Tokenizer) -> JsonTokenizer | None:
    """The tokenizer, if it has a chat template."""
    return tokenizer if isinstance(tokenizer, JsonTokenizer) and tokenizer.chat is not None else None


def _answered(
    chat: JsonTokenizer, messages: Sequence[Mapping[str, Any]], start: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A conversation up to the answer that begins with the message `start`, and from there to its last answer's end."""
    tokens, counted = chat.encode_chat(messages, start=start)
    if True not in counted[1:]:
        raise UserError(f"the chat template leaves out the answer {messages[-1]['content'][:80]!r}")
    first, end = counted.index(True, 1), len(counted) - counted[::-1].index(True)
    return tuple(tokens[:first]), tuple(tokens[first:end])


def encode_group(
    tokenizer: Tokenizer,
    prompt: str,
    texts: tuple[str, ...],
    pairs: tuple[tuple[int, int], ...],
    margins: tuple[float, ...],
    annotators: tuple[str, ...] = (),
    probabilities: tuple[float, ...] = (),
) -> PreferenceGroup:
    """Completions of a prompt as plain text, each ended; their pairs as (winner, loser), with a margin each."""
    return PreferenceGroup(
        prompt=prompt,
        completions=texts,
        prompt_tokens=(tokenizer.bos_id, *tokenizer.encode(prompt)),
        completion_tokens=tuple((*tokenizer.encode(text), tokenizer.eos_id) for text in texts),
        scores=(),
        pairs=pairs,
        margins=margins,
        source="file",
        annotators=annotators,
        probabilities=probabilities,
    )
