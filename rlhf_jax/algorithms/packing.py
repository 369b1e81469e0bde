"""Completions of a minibatch laid end to end in longer rows, so that little padding is computed (Krell et al. 2021).

A part is a few such rows, of one of a few shapes; a minibatch takes as many parts as its tokens fill, and its gradient
is their sum. Rows stay whole, and a loss reads them as it always does: only states, and what is made of them, are
computed where the tokens were laid. Each of the batch's shards lays its own rows.

Shapes: b rows of a minibatch, u units of them that stay together, t tokens, d the batch's shards, l tokens of a longer
row, w tokens of a shard's part, c completion tokens of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax import models
from rlhf_jax.lockstep import any_replica
from rlhf_jax.masking import last_index, positions
from rlhf_jax.models import Among, ModelSpec
from rlhf_jax.numerics import require
from rlhf_jax.sharding import constrain, splits
from rlhf_jax.train_step import Parts
from rlhf_jax.types import Params, Rollout


@dataclass(frozen=True)
class Packing:
    """How completions are laid in parts."""

    rows: int = 4
    """Longer rows in a part, on each of the batch's shards."""
    fewer: tuple[int, ...] = ()
    """Smaller numbers of rows, one of which the first part has where its completions fill no more, later ones have
    `rows`; each is compiled of its own: about half of `rows` and three quarters save most of the padding."""
    length: int = 2
    """How often the longest prompt and completion fit in one."""
    completions: float = 1.0
    """Largest share of a part's tokens that are completions; so much of it reaches the vocabulary."""

    def __post_init__(self) -> None:
        require("packing.rows", self.rows, "[1, inf)")
        require("packing.length", self.length, "[1, inf)")
        require("packing.completions", self.completions, "(0, 1]")
        if any(not 1 <= rows < self.rows for rows in self.fewer):
            raise ValueError(f"packing.fewer={self.fewer} must be numbers from 1 to below packing.rows={self.rows}")

    @property
    def sizes(self) -> tuple[int, ...]:
        """The numbers of rows that a part may have, the smallest first."""
        return (*sorted(set(self.fewer)), self.rows)

    def room(self, rows: int, width: int) -> int:
        """Tokens of completions in a part of so many longer rows of so many tokens."""
        return int(self.completions * rows * width + 1e-6)  # 0.7 · 30 is below 21

    def check(self, prompt_length: int, completion_tokens: int, *, together: int = 1) -> None:
        """Raise ValueError unless the longest completions that a step takes `together` fit in a part."""
        if self.length < together:
            raise ValueError(f"packing.length={self.length} must be at least {together}: pairs are laid together")
        room = self.room(self.rows, self.length * (prompt_length + completion_tokens))
        if room < together * completion_tokens:
            raise ValueError(
                f"packing.completions={self.completions} of {self.rows * self.length} longest rows is {room} tokens: "
                f"less than {together} of completion_tokens={completion_tokens}"
            )


class Reading(NamedTuple):
    """States that predict completion tokens, as they lie in rows or in a part."""

    states: Float[Array, "*c D"]
    tokens: Int[Array, "*c"]
    """That they predict."""
    mask: Bool[Array, "r l"]
    """Of all that the transformer read."""
    routing: Any
    """Where a mixture of experts sent it; None without."""
    where: Int[Array, "d c"] | None
    """The tokens' places among a shard's b t; None where they lie in rows."""
    shape: tuple[int, int]
    """(b, t)."""

    def in_rows(self, x: Float[Array, "*c"], *, prompt: int) -> Float[Array, "b n"]:
        """What was computed of them, in the rows' columns after the prompt; 0 where there is nothing."""
        if self.where is None:
            return x
        empty = jnp.zeros((len(self.where), self.shape[0] // len(self.where) * self.shape[1]), x.dtype)
        laid_out = jax.vmap(lambda row, at, new: row.at[at].set(new, mode="drop"))(empty, self.where, x)
        return laid_out.reshape(self.shape)[:, prompt:]


def parts(packing: Packing, batch: Rollout, learnt: Bool[Array, "*b t"]) -> Parts:
    """A minibatch in parts: of each the minibatch with its other rows masked, in all shapes that the first may have.

    `learnt` are the tokens that are learnt from: rows without any take no room. Rows of a pair, [b / 2, 2, t], stay in
    one part.
    """
    shape, t = learnt.shape, learnt.shape[-1]
    together = 1 if learnt.ndim == 2 else shape[1]
    learnt = learnt.reshape(-1, t)
    mask = batch.mask.reshape(-1, t) & learnt.any(-1, keepdims=True)
    width, sizes = packing.length * t, (mask.sum(-1), learnt.sum(-1))
    bins, starts, used = jax.vmap(lambda n, c: _laid(packing, n, c, width=width))(
        *(x.reshape(_shards(len(mask)), -1, together).sum(-1) for x in sizes)
    )
    lengths = mask.sum(-1).reshape(-1, together)
    ahead = jnp.cumsum(lengths, axis=1) - lengths  # of the unit's other rows
    first = (bins % packing.rows * width + starts).reshape(-1, 1) + ahead
    place = first.reshape(-1, 1) + positions(mask)
    number = jnp.repeat(bins.reshape(-1) // packing.rows, together)

    def part(index: Array) -> tuple[Array | int, Sequence[Rollout]]:
        inside = mask & (number == index)[:, None]
        placed = jnp.where(inside, place, packing.rows * width).reshape(shape)
        rows = jnp.where(inside, place // width + 1, 0).max()
        completions = jnp.where(inside, learnt, False).reshape(len(used), -1).sum(-1).max()
        small = [(rows > size) | (completions > packing.room(size, width)) for size in packing.sizes[:-1]]
        which = sum((any_replica(too).astype(jnp.int32) for too in small), jnp.int32(0))
        one = batch.replace(
            prompt_mask=batch.prompt_mask & inside.reshape(shape),
            completion_mask=batch.completion_mask & inside.reshape(shape),
            placed=placed,
        )
        return which, [one.replace(laid=size) for size in packing.sizes]

    return Parts(-(-used.max() // packing.rows), part)


def _shards(rows: int) -> int:
    """How many shards lay rows apart; pairs of them never part."""
    return splits("batch") if rows % (2 * splits("batch")) == 0 else 1


def _laid(
    packing: Packing, sizes: Int[Array, " u"], completions: Int[Array, " u"], *, width: int
) -> tuple[Int[Array, " u"], Int[Array, " u"], Int[Array, ""]]:
    """Of each unit its bin and where it begins there, and how many bins are used: first fit, the longest first."""
    units, room = len(sizes), packing.room(packing.rows, width)
    parts = units if packing.completions < 1 else -(-units // packing.rows)  # of which one may hold one unit alone
    free = jnp.full((parts, packing.rows), width), jnp.full(parts, room)
    order = jnp.argsort(-sizes)

    def lay(free: tuple[Array, Array], unit: Array) -> Any:
        fits = (free[0] >= sizes[unit]) & (free[1] >= completions[unit])[:, None]
        which = jnp.argmax(fits)
        part, row = which // packing.rows, which % packing.rows
        start = width - free[0][part, row]
        taken = free[0].at[part, row].add(-sizes[unit]), free[1].at[part].add(-completions[unit])
        return taken, (which, start)

    _, (bins, starts) = jax.lax.scan(lay, free, order)
    back = jnp.argsort(order)
    return bins[back], starts[back], jnp.max(jnp.where(sizes[order] > 0, bins, -1)) + 1


def read(packing: Packing | None, spec: ModelSpec, params: Params, batch: Rollout, *, prompt: int) -> Reading:
    """The states of a transformer's own `params`: of rows as they are, or where `parts` has placed them."""
    b, t = batch.tokens.shape
    if batch.placed is None or packing is None:
        read = slice(prompt - 1, -1)
        states, routing = models.hidden_and_routing(spec, params, batch.tokens, batch.mask, read=read)
        return Reading(states, batch.tokens[:, prompt:], batch.mask, routing, None, (b, t))
    shards, size = _shards(b), batch.laid * packing.length * t
    places, tokens, learnt = (x.reshape(shards, -1) for x in (batch.placed, batch.tokens, batch.completion_mask))
    kept = packing.room(batch.laid, packing.length * t)
    where = jax.vmap(lambda x: jnp.nonzero(x, size=kept, fill_value=b // shards * t)[0])(learnt)
    at = jnp.minimum(where, b // shards * t - 1)
    before = jnp.clip(_of_each(places, at) - 1, 0, size - 1)
    states, mask, routing = _states(packing, spec, params, batch, before)
    return Reading(states, _of_each(tokens, at), mask, routing, where, (b, t))


def at_last(
    packing: Packing, spec: ModelSpec, params: Params, batch: Rollout, mask: Bool[Array, "b t"]
) -> Float[Array, "b D"]:
    """The states of a transformer's own `params` at each row's last token of `mask`; of rows of other parts, any."""
    last = jnp.take_along_axis(batch.placed, jnp.maximum(last_index(mask), 0)[:, None], axis=1)
    size = batch.laid * packing.length * mask.shape[1]
    states, *_ = _states(packing, spec, params, batch, jnp.minimum(last, size - 1).reshape(_shards(len(mask)), -1))
    return states.reshape(len(mask), -1)


def summed(packing: Packing, fn: Callable[[Rollout], Any], batch: Rollout) -> Any:
    """fn(batch) for a row-wise function, computed for a part at a time: of a row that is not there it is not asked."""
    laid = parts(packing, batch, batch.completion_mask)

    def one(rows: Rollout, index: Array) -> Any:
        del index
        there = rows.mask.any(-1)
        return jax.tree.map(lambda x: jnp.where(there.reshape(-1, *(1,) * (x.ndim - 1)), x, 0), fn(rows))

    return laid.summed(one)


def _states(
    packing: Packing, spec: ModelSpec, params: Params, batch: Rollout, read: Int[Array, "d c"]
) -> tuple[Float[Array, "d c D"], Bool[Array, "r l"], Any]:
    """A transformer's states at places where tokens were laid; what of the longer rows is read, where it was routed."""
    b, t = batch.tokens.shape
    width, shards = packing.length * t, _shards(b)
    row = jnp.arange(b // shards).repeat(t) + 1

    def lay(place: Array, tokens: Array) -> tuple[Array, Array]:
        empty = jnp.zeros(batch.laid * width, jnp.int32)
        return empty.at[place].set(tokens, mode="drop"), empty.at[place].set(row, mode="drop")

    laid = jax.vmap(lay)(batch.placed.reshape(shards, -1), batch.tokens.reshape(shards, -1))
    tokens, segments = (constrain(x.reshape(-1, width), "batch", None) for x in laid)
    mask = segments > 0
    states, routing = models.hidden_and_routing(spec, params, tokens, mask, segment_ids=segments, read=Among(read))
    return states, mask, routing


def _of_each(x: Array, index: Array) -> Array:
    """Of each shard's entries some."""
    return jax.vmap(lambda own, at: own[at])(x, index)
