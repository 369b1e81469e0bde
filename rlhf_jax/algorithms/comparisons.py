"""Comparisons for reward models: sampled from a policy and judged by the gold classifier, or a source's rows."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from rlhf_jax import hosts
from rlhf_jax.algorithms.context import (
    Context,
    Role,
    check_field,
    check_positive,
    check_prompt_tokens,
    named,
    own_source,
)
from rlhf_jax.data import formats, preferences
from rlhf_jax.data.counts import Counts
from rlhf_jax.data.encoding import encode_pair, encode_ranked, encode_votes, select
from rlhf_jax.data.fields import Fields
from rlhf_jax.data.formats import Order, Pair, Votes
from rlhf_jax.data.preferences import Annotators, PreferenceGroup
from rlhf_jax.data.prompts import review_prompts
from rlhf_jax.data.reading import first_row, read
from rlhf_jax.data.reviews import Review
from rlhf_jax.data.sources import Data, Mixture, Source
from rlhf_jax.data.text import CHARACTERS_A_TOKEN, fitted, sentence_starts
from rlhf_jax.data.texts import check_texts
from rlhf_jax.errors import UserError
from rlhf_jax.interop.tokenizers import Tokenizer
from rlhf_jax.metrics import Progress
from rlhf_jax.numerics import require
from rlhf_jax.rewards.sentiment import GoldClassifier
from rlhf_jax.sampling import Sample, Sampler, Sampling

Ties = Literal["refuse", "drop"]
"""What becomes of rows whose completions are not told apart as far as a loss needs."""


@dataclass(frozen=True)
class SampledPairs:
    """Completions of held-out reviews' prefixes, judged by the gold classifier (Rafailov et al. 2023, section 6)."""

    policy: str = "sft"
    """The stage that is sampled, or "base"."""
    prompts: int = 1_500
    """Prefixes of validation reviews to train on."""
    heldout_prompts: int = 200
    """Further prefixes, of other reviews, to evaluate on."""
    completions: int = 4
    """Samples a prefix; all their pairs are compared."""
    prompt_tokens: tuple[int, int] = (2, 8)
    """Fewest and most tokens of a prefix, BOS not counted."""
    completion_tokens: int = 40
    """Most tokens of a completion."""
    sampling: Sampling = field(default_factory=Sampling)
    """How completions are drawn."""
    snippets: int = 0
    """Groups, added to the train split, of as many sentences of real train reviews, judged likewise; no prompt."""
    label_noise: float = 0.0
    """Share of the train pairs whose label is flipped."""
    annotators: int = 1
    """Judges among whom the train pairs are dealt."""
    disagreement: float = 0.0
    """Standard deviation of an annotator's own opinion of a completion, in logits of the gold score."""
    batch_size: int = 256
    """Completions sampled at once."""
    earlier: tuple[str, ...] = ()
    """Stages of reward models whose own sampled pairs are trained on too; those held out are new ones alone, of the
    reviews that the first of these stages holds out."""

    def __post_init__(self) -> None:
        names = ("prompts", "heldout_prompts", "completion_tokens", "annotators", "batch_size")
        check_positive(self, *names)
        require("pairs.completions", self.completions, "[2, inf)")
        require("pairs.snippets", self.snippets, "[0, inf)")
        require("pairs.label_noise", self.label_noise, "[0, 0.5)")
        require("pairs.disagreement", self.disagreement, "[0, inf)")
        check_prompt_tokens(self.prompt_tokens)

    @property
    def length(self) -> int:
        """Tokens of the longest row: BOS, prefix, completion."""
        return 1 + self.prompt_tokens[1] + self.completion_tokens

    def requires(self) -> dict[str, tuple[str, Role]]:
        """Who writes, and the earlier stages."""
        earlier = {f"pairs.earlier[{i}]": stage for i, stage in enumerate(self.earlier)}
        return named("policy", **{"pairs.policy": self.policy}) | named("scorer", **earlier)


@dataclass(frozen=True)
class Comparisons:
    """What a reward model trains and is evaluated on."""

    train: Sequence[PreferenceGroup]
    heldout: Sequence[PreferenceGroup]
    completions: int  # of a group, at most
    pairs: int  # of a group, at most
    counts: Counts
    soft: bool = False  # whether of some pair a judge was not certain


Pairs = SampledPairs | Source | None
"""Comparisons sampled and judged, rows of a source, or, if None, the rows of the experiment's data."""


def of(pairs: Pairs, context: Context, name: str, *, length: int, certain: str | None = None) -> Comparisons:
    """A stage's comparisons, in rows of at most `length` tokens, see `load`."""
    if isinstance(pairs, SampledPairs):
        return sample(pairs, context, name)
    return load(source_of(pairs, context.data), context.tokenizer, length=length, certain=certain)


def check_pairs(pairs: Pairs, data: Data, *, certain: str | None = None) -> None:
    """Raise UserError, which begins with the field, for rows or texts that they cannot be read or made from."""
    if isinstance(pairs, SampledPairs):
        check_field("pairs=SampledPairs", lambda: check_texts(data, labelled=True))
    else:
        check_field("pairs", lambda: check(source_of(pairs, data), certain=certain))


def source_of(pairs: Source | None, data: Data) -> Source:
    """A stage's own rows, or the experiment's; UserError where these are movie reviews."""
    return own_source(pairs, data, instead="pairs=SampledPairs() makes comparisons of them")


def sample(pairs: SampledPairs, context: Context, name: str) -> Comparisons:
    """The sampled comparisons, which are made once and kept in `<stage>/data`; made again where these are damaged."""
    earlier = [group for stage in pairs.earlier for group in _earlier(pairs, context, name, stage)]
    folder = context.stage_dir(name) / "data"
    damaged = hosts.from_writer(lambda: preferences.set_aside_if_damaged(folder))
    if damaged is not None:
        Progress(name, 0).note(f"{name}: {damaged} and made again")
    if not hosts.from_writer(lambda: preferences.exists(folder)):
        splits = _sample(pairs, context, name)
        hosts.from_writer(lambda: preferences.write(folder, splits))
    splits = preferences.read(folder)
    train = [*earlier, *splits["train"]] if earlier else splits["train"]
    completions = max([pairs.completions, *(len(group.completions) for group in earlier)])
    counts = Counts(len(train), len(splits["heldout"]))
    return Comparisons(train, splits["heldout"], completions, math.comb(completions, 2), counts)


def check_apart(where: str, pairs: SampledPairs, stage: str, apart: int) -> None:
    """Raise UserError where more is held out than `apart`, what the first of the earlier stages holds out."""
    if pairs.heldout_prompts > apart:
        raise UserError(
            f"{where}.pairs.heldout_prompts={pairs.heldout_prompts}: {stage!r} holds {apart} out and has trained "
            f"on other reviews, so at most {apart}"
        )


def _earlier(pairs: SampledPairs, context: Context, name: str, stage: str) -> Sequence[PreferenceGroup]:
    """What another stage has sampled to train on; UserError where that is not there, or too long."""
    folder, where = context.stage_dir(stage) / "data", f"stages.{name}.pairs.earlier"
    damaged = hosts.from_writer(lambda: preferences.set_aside_if_damaged(folder))
    if not hosts.from_writer(lambda: preferences.exists(folder)):
        raise UserError(
            f"{where}: {damaged or f'{folder}, the pairs of {stage!r}, is not there'}: remove "
            f"{context.stage_dir(stage) / 'summary.json'} and run again; {stage!r} then samples the same once more"
        )
    splits = preferences.read(folder)
    groups = splits["train"]
    check_apart(f"stages.{name}", pairs, stage, len(splits["heldout"]))
    longest = max(group.longest for group in groups)
    if longest > pairs.length:
        raise UserError(f"{where}: {stage!r} has rows of {longest} tokens; prompt and completion have {pairs.length}")
    return groups


def load(
    source: Source,
    tokenizer: Tokenizer,
    *,
    length: int,
    needs: Order = "some",
    ties: Ties = "refuse",
    certain: str | None = None,
) -> Comparisons:
    """A source's comparisons, told apart as far as a loss needs, in rows of at most `length` tokens.

    `certain` is the loss, where it is one that takes no pairs with a probability; UserError for such.
    """
    parse, encode = _reader(source, needs, ties, certain)

    def tells(group: PreferenceGroup) -> bool:
        return group.tells and _is_ordered(group, needs)

    selected = select(source, read(source, parse), encode(tokenizer), length=length, tells=tells)
    if not any(group.settled for group in selected.heldout):
        raise UserError("of the rows held out there is none on whose completions most annotators agree")
    groups = [*selected.train, *selected.heldout]
    completions = max(len(group.completions) for group in groups)
    pairs = max(math.comb(completions, 2), *(len(group.pairs) for group in groups))
    soft = any(group.probabilities for group in groups)
    return Comparisons(selected.train, selected.heldout, completions, pairs, selected.counts, soft)


def check(source: Source, *, needs: Order = "some", ties: Ties = "refuse", certain: str | None = None) -> None:
    """Read all rows; raises UserError for what is wrong with them."""
    read(source, _reader(source, needs, ties, certain)[0])


def _reader(
    source: Source, needs: Order, ties: Ties, certain: str | None
) -> tuple[Callable[[Fields], Any], Callable[[Tokenizer], Callable[[Any], PreferenceGroup]]]:
    """How rows are read and encoded: the first one says whether they are pairs, orders or votes."""
    first = first_row(source.parts[0] if isinstance(source, Mixture) else source)
    if "completions" in first:
        return partial(formats.ranked, needs="none" if ties == "drop" else needs), encode_ranked
    if "annotators" in first:
        if needs != "some":
            raise first.error("the votes of 'annotators' are no order; they are for loss='bradley_terry' or 'k_wise'")
        return partial(_settled, ties=ties), encode_votes
    return formats.pair if certain is None else partial(_certain, loss=certain), encode_pair


def _certain(row: Fields, *, loss: str) -> Pair:
    pair = formats.pair(row)
    if pair.probability != 1:
        raise row.error(f"'probability' is {pair.probability:g}, but {loss} takes no soft labels: leave the field out")
    return pair


def _settled(row: Fields, *, ties: Ties) -> Votes:
    votes = formats.votes(row)
    if ties == "refuse" and not any(vote is not None for vote in votes.votes):
        raise row.error(f"'annotators': all {len(votes.votes)} say that it is a tie, so there is nothing to compare")
    return votes


def _is_ordered(group: PreferenceGroup, needs: Order) -> bool:
    if needs == "all":
        return len(set(group.ranks)) == len(group.ranks)
    return needs != "best" or group.ranks.count(0) == 1


class Prompted(Protocol):
    """A row that begins with a prompt."""

    @property
    def prompt_tokens(self) -> tuple[int, ...]:
        """BOS first, or what a chat template begins with."""
        ...


R = TypeVar("R", covariant=True)


class Splits(Protocol[R]):
    """Rows to train on and held out."""

    @property
    def train(self) -> Sequence[R]:
        """To train on."""
        ...

    @property
    def heldout(self) -> Sequence[R]:
        """Held out."""
        ...


def first_rows(data: Splits[R], count: int) -> list[R]:
    """So many of the rows, the held-out ones first."""
    return [*data.heldout, *data.train[: max(0, count - len(data.heldout))]][:count]


def policy_samples(
    data: Splits[Prompted],
    context: Context,
    name: str,
    *,
    policy: str,
    count: int,
    completion_tokens: int,
    length: int,
    batch_size: int,
) -> list[list[int]]:
    """Rows of `count` of the prompts, the held-out ones first, each completed by a policy."""
    room = length - completion_tokens
    sampler = Sampler(
        context.spec,
        context.mesh,
        context.tokenizer,
        prompt_length=room,
        max_new_tokens=completion_tokens,
        sampling=Sampling(),
        batch_size=batch_size,
    )
    prompts = [fitted(group.prompt_tokens, (), length=room)[0] for group in first_rows(data, count)]
    samples = sampler(context.policy(policy), prompts, context.key(f"{name}/normalize"))
    return [sample.prompt + sample.tokens for sample in samples]


def _sample(pairs: SampledPairs, context: Context, name: str) -> dict[str, list[PreferenceGroup]]:
    """Both splits; held-out pairs are judged without noise or disagreement."""
    tokenizer, rng = context.tokenizer, context.rng(f"{name}/data")
    count, k = pairs.prompts + pairs.heldout_prompts, pairs.completions
    shared = context.rng(f"{pairs.earlier[0]}/data") if pairs.earlier else None
    prompts = review_prompts(
        context.reviews.validation,
        tokenizer,
        tokens=pairs.prompt_tokens,
        count=count,
        rng=rng,
        apart=pairs.heldout_prompts,
        apart_rng=shared,
    )
    completions = [sample.tokens for sample in _complete(pairs, context, name, prompts)]
    grouped = [(prompt, completions[i * k : (i + 1) * k]) for i, prompt in enumerate(prompts)]
    heldout, train = grouped[: pairs.heldout_prompts], grouped[pairs.heldout_prompts :]
    train += [([tokenizer.bos_id], snippets) for snippets in _snippets(pairs, context, rng)]
    gold = GoldClassifier.fit(context.reviews.train)
    annotators = Annotators(rng, count=pairs.annotators, disagreement=pairs.disagreement, label_noise=pairs.label_noise)
    return {
        "heldout": _judge(heldout, gold, tokenizer, Annotators(rng)),
        "train": _judge(train, gold, tokenizer, annotators),
    }


def _complete(pairs: SampledPairs, context: Context, name: str, prompts: Sequence[list[int]]) -> list[Sample]:
    """`completions` samples a prompt, those of one prompt side by side."""
    sampler = Sampler(
        context.spec,
        context.mesh,
        context.tokenizer,
        prompt_length=1 + pairs.prompt_tokens[1],
        max_new_tokens=pairs.completion_tokens,
        sampling=pairs.sampling,
        batch_size=pairs.batch_size,
    )
    repeated = [prompt for prompt in prompts for _ in range(pairs.completions)]
    params, key = context.policy(pairs.policy), context.key(f"{name}/data")
    samples: list[Sample] = []
    with Progress(f"{name}: sampling", len(repeated)) as progress:
        for part in sampler.batches(params, repeated, key):
            samples += part
            progress.update(len(samples), {})
    return samples


def _snippets(pairs: SampledPairs, context: Context, rng: np.random.Generator) -> list[list[list[int]]]:
    """Groups of sentences of train reviews, half of them from each source, with EOS where they end in time."""
    by_source: dict[str, list[Review]] = {}
    for review in context.reviews.train:
        by_source.setdefault(review.source, []).append(review)
    sources = list(by_source.values())
    limit = pairs.length - 1

    def snippet(index: int) -> list[int]:
        source = sources[index % len(sources)]
        text = source[rng.integers(len(source))].text
        start = int(rng.choice(sentence_starts(text)))
        tokens = context.tokenizer.encode(text[start : start + CHARACTERS_A_TOKEN * limit])
        return [*tokens, context.tokenizer.eos_id][:limit]

    return [[snippet(group + i) for i in range(pairs.completions)] for group in range(pairs.snippets)]


def _judge(
    grouped: Sequence[tuple[list[int], Sequence[list[int]]]],
    gold: GoldClassifier,
    tokenizer: Tokenizer,
    annotators: Annotators,
) -> list[PreferenceGroup]:
    """Groups with the pairs that the gold classifier prefers, which reads prompt and completion."""
    scores = iter(gold([tokenizer.decode([*prompt, *tokens]) for prompt, own in grouped for tokens in own]).tolist())
    groups = []
    for prompt, own in grouped:
        own_scores = tuple(itertools.islice(scores, len(own)))
        judged, margins = annotators.judge(own_scores)
        groups.append(
            PreferenceGroup(
                prompt=tokenizer.decode(prompt),
                completions=tuple(tokenizer.decode(tokens) for tokens in own),
                prompt_tokens=tuple(prompt),
                completion_tokens=tuple(tuple(tokens) for tokens in own),
                scores=own_scores,
                pairs=judged,
                margins=margins,
                source="sampled" if len(prompt) > 1 else "reviews",
            )
        )
    return groups
