"""Where completions that were liked or not come from: a source's rows, or comparisons, whose winners were liked."""

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_jax.algorithms import comparisons
from rlhf_jax.algorithms.comparisons import Pairs, SampledPairs
from rlhf_jax.algorithms.context import Context, check_field
from rlhf_jax.data import formats
from rlhf_jax.data.counts import Counts
from rlhf_jax.data.encoding import encode_thumb, select
from rlhf_jax.data.pipeline import by_part
from rlhf_jax.data.reading import first_row, read
from rlhf_jax.data.sources import Data, Mixture, Source
from rlhf_jax.data.thumbs import Liked, from_groups, with_others
from rlhf_jax.errors import UserError


@dataclass(frozen=True)
class Thumbs:
    """What is trained and evaluated on."""

    train: Sequence[Liked]
    heldout: Sequence[Liked]
    completions: int  # of a row: 2 where another prompt's stands beside it
    counts: Counts


def of(pairs: Pairs, context: Context, name: str, *, length: int, beside: bool, certain: str | None = None) -> Thumbs:
    """A stage's completions, in rows of at most `length` tokens; `beside`: each with one of another prompt.

    Comparisons may have no probabilities where `certain` names the loss, see `comparisons.load`.
    Raises UserError where all were liked, or none, and where all have one prompt.
    """
    if isinstance(pairs, SampledPairs) or not _are_thumbs(comparisons.source_of(pairs, context.data)):
        judged = comparisons.of(pairs, context, name, length=length, certain=certain)
        train, heldout, counts = by_part(judged.train, from_groups), from_groups(judged.heldout), judged.counts
    else:
        source = comparisons.source_of(pairs, context.data)
        parts = read(source, formats.thumb)
        selected = select(source, parts, encode_thumb(context.tokenizer), length=length)
        train, heldout, counts = selected.train, selected.heldout, selected.counts
    for rows, what in ((train, "to train on"), (heldout, "held out")):
        if len({row.desirable for row in rows}) < 2:
            raise UserError(f"stages.{name}.pairs: the {len(rows)} rows {what} must hold both labels, true and false")
    if not beside:
        return Thumbs(train, heldout, 1, counts)
    rng = context.rng(f"{name}/beside")
    try:
        train = by_part(train, lambda rows: with_others(rows, rng, length=length))
        return Thumbs(train, with_others(heldout, rng, length=length), 2, counts)
    except ValueError as error:
        raise UserError(f"stages.{name}.pairs: {error}; kto needs completions of other prompts, bco does not") from None


def check_thumbs(pairs: Pairs, data: Data, *, certain: str | None = None) -> None:
    """Raise UserError, which begins with the field, for rows or texts that they cannot be read or made from."""
    if isinstance(pairs, SampledPairs):
        comparisons.check_pairs(pairs, data)
    else:
        check_field("pairs", lambda: _check(comparisons.source_of(pairs, data), certain))


def _check(source: Source, certain: str | None) -> None:
    if _are_thumbs(source):
        read(source, formats.thumb)
    else:
        comparisons.check(source, certain=certain)


def _are_thumbs(source: Source) -> bool:
    """Whether rows are completions with a label each, not comparisons; the first row says which."""
    first = first_row(source.parts[0] if isinstance(source, Mixture) else source)
    compared = any(name in first for name in ("chosen", "completions", formats.SHP[0]))
    if not compared and "completion" not in first:
        wanted = "'prompt', 'completion' and 'label', or 'chosen' and 'rejected'"
        raise first.error(f"expected {wanted}; the row has {first.names}")
    return not compared
