"""Rows that take turns: a few are decoded at once, one that has ended makes room for the next (Yu et al. 2022, Orca).

All in one program. A slot has p places for its prompt and n more, a ring: what any row draws in a step goes to the same
place, and each row sees its own alone, so that a step is the one of rows that began together.

Shapes: b rows of the batch, w slots, u prompts, p prompt tokens, n new tokens, D model.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.lockstep import any_replica
from rlhf_jax.models import Cache
from rlhf_jax.models.kv_cache import rows_axis
from rlhf_jax.numerics import require
from rlhf_jax.sampling.prefill import Prefilled, lengthened, rows_of, take, take_all
from rlhf_jax.sharding import decoding, splits


class Drawn(NamedTuple):
    """What a step makes of each row on its way, and, with an axis of tokens more, what is kept of completions."""

    tokens: Int[Array, " w"]
    logps: Float[Array, " w"]
    values: Float[Array, " w"] | None
    """Before the token; None where no head is read."""
    stopped: Bool[Array, " w"] | None
    """Whether a stop string is whole with the token; None where there are none."""


Step = Callable[..., tuple[Drawn, Array, Any, Cache]]
"""(state, alive [w], t [w], rows [w], cache) -> (the t-th tokens of some rows, which of them end [w], state, cache).

A state is a tree of arrays with an axis of rows.
"""


@dataclass(frozen=True)
class Turns:
    """How many rows are decoded at once. Completions do not depend on it; their cost does, where they end early."""

    slots: int = 32
    """Rows at a time; at most a batch."""
    halvings: int = 2
    """How often, when no row waits any more, the slots are halved as rows end; each is compiled of its own."""
    refill: float = 0.125
    """Share of the slots that must be free before rows are put there."""

    def __post_init__(self) -> None:
        require("turns.slots", self.slots, "[1, inf)")
        require("turns.halvings", self.halvings, "[0, inf)")
        require("turns.refill", self.refill, "[0, 1]")
        if self.slots % 2**self.halvings:
            raise ValueError(f"turns.slots={self.slots} must divide by 2 ** turns.halvings = {2**self.halvings}")

    @property
    def smallest(self) -> int:
        """Slots after the last halving."""
        return self.slots // 2**self.halvings


class Slots(flax.struct.PyTreeNode):
    """Rows on their way."""

    row: Int[Array, " w"]  # of the batch; b where there is none
    alive: Bool[Array, " w"]
    count: Int[Array, " w"]  # tokens that it has
    start: Int[Array, " w"]  # place of its first token in the ring
    drawn: Drawn  # [w, n]
    state: Any
    cache: Cache


class Progress(NamedTuple):
    """What a loop carries."""

    slots: Slots
    drawn: Drawn  # [b, n], of rows that have ended
    lengths: Int[Array, " b"]
    begun: Int[Array, " d"]  # rows of each of the batch's shards
    place: Int[Array, ""]  # of the next token in the ring


def in_turn(
    turns: Turns, step: Step, before: Prefilled, like: Drawn, *, copies: int, length: int
) -> tuple[Drawn, Bool[Array, "b n"]]:
    """Every row, and which tokens are a completion's; `like` has the types of what is drawn."""
    rows = len(before.tokens) * copies
    width = min(turns.slots, rows)
    with decoding():  # which splits a batch over more axes than training: rows may be too few for all
        shards = math.gcd(splits("batch"), width, rows)
    progress = Progress(
        _empty(before, like, width, rows, length),
        nothing(like, rows, length),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(shards, jnp.int32),
        jnp.zeros((), jnp.int32),
    )
    for halving in range(turns.halvings + 1):
        follows = width // 2 if halving < turns.halvings and width // 2 % shards == 0 else 0
        progress = _until(turns, step, before, progress, copies=copies, most=follows // shards)
        if not follows:
            break
        progress = _put_down(progress)
        progress = progress._replace(slots=_fewer(progress.slots, follows, shards))
        width = follows
    progress = _put_down(progress)
    return progress.drawn, jnp.arange(length) < progress.lengths[:, None]


def nothing(like: Drawn, rows: int, length: int) -> Drawn:
    """Of rows that have no token yet."""
    return jax.tree.map(lambda x: jnp.zeros((rows, length), x.dtype), like)


@decoding()
def _until(turns: Turns, step: Step, before: Prefilled, progress: Progress, *, copies: int, most: int) -> Progress:
    """Until no row waits, and of each shard at most so many are on their way.

    Replicas of a sweep take each step together: who has room, or is done, goes on with what is on its way until none
    is without. That costs each a few empty slots. Conditions of their own would cost, at every token, a choice for
    each replica between its old cache and its new one, and its place in the ring would be its own.
    """
    shards, width = len(progress.begun), len(progress.slots.row)
    each, length = len(progress.lengths) // shards, progress.drawn.tokens.shape[1]
    wanted = max(1, int(turns.refill * width / shards))

    def alive(p: Progress) -> Array:
        return p.slots.alive.reshape(shards, -1).sum(-1)

    def unfinished(p: Progress) -> Array:
        return jnp.any(p.begun < each) | (alive(p).max() > most)

    def no_room(p: Progress) -> Array:
        waiting = each - p.begun
        due = (waiting > 0) & (width // shards - alive(p) >= jnp.minimum(wanted, waiting))
        return unfinished(p) & jnp.any(p.slots.alive) & ~jnp.any(due)

    def token(p: Progress) -> Progress:
        s = p.slots
        cache = s.cache.replace(length=before.tokens.shape[1] + p.place)
        drawn, ends, state, cache = step(s.state, s.alive, s.count, jnp.minimum(s.row, len(p.lengths) - 1), cache)
        count = s.count + s.alive
        slots = s.replace(
            alive=s.alive & (count < length) & ~ends,
            count=count,
            drawn=jax.tree.map(lambda ring, new: _written(ring, new, s.alive, p.place), s.drawn, drawn),
            state=state,
            cache=cache,
        )
        return p._replace(slots=slots, place=(p.place + 1) % length)

    def turn(p: Progress) -> Progress:
        return jax.lax.while_loop(lambda p: any_replica(no_room(p)), token, _filled(_put_down(p), before, copies))

    return jax.lax.while_loop(lambda p: any_replica(unfinished(p)), turn, progress)


def _empty(before: Prefilled, like: Drawn, width: int, rows: int, length: int) -> Slots:
    """Slots without rows."""
    cache = jax.eval_shape(lambda: lengthened(rows_of(before.cache, jnp.zeros(width, jnp.int32)), length))
    return Slots(
        row=jnp.full(width, rows),
        alive=jnp.zeros(width, bool),
        count=jnp.zeros(width, jnp.int32),
        start=jnp.zeros(width, jnp.int32),
        drawn=nothing(like, width, length),
        state=jax.tree.map(lambda x: jnp.zeros((width, *x.shape[1:]), x.dtype), before.states),
        cache=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cache),
    )


def _written(ring: Array, new: Array, alive: Array, place: Array) -> Array:
    """The ring with what rows on their way have drawn; one that has ended may wait with a full ring."""
    kept = jax.lax.dynamic_slice_in_dim(ring, place, 1, axis=1)
    return jax.lax.dynamic_update_slice_in_dim(ring, jnp.where(alive[:, None], new[:, None], kept), place, axis=1)


def _put_down(p: Progress) -> Progress:
    """What ended rows have, each where its row stands in the batch, in order from its first token."""
    s, length = p.slots, p.drawn.tokens.shape[1]
    where = jnp.where(s.alive, len(p.lengths), s.row)  # past the end: nowhere
    order = (s.start[:, None] + jnp.arange(length)) % length
    own = jnp.arange(length) < s.count[:, None]

    def put(kept: Array, ring: Array) -> Array:
        in_order = jnp.take_along_axis(ring, order, axis=1)
        return kept.at[where].set(jnp.where(own, in_order, jnp.zeros_like(in_order)), mode="drop")

    return p._replace(
        slots=s.replace(row=jnp.where(s.alive, s.row, len(p.lengths))),
        drawn=jax.tree.map(put, p.drawn, s.drawn),
        lengths=p.lengths.at[where].set(s.count, mode="drop"),
    )


def _filled(p: Progress, before: Prefilled, copies: int) -> Progress:
    """The next rows of each shard in its free slots, as far as there are any."""
    s, rows, shards = p.slots, len(p.lengths), len(p.begun)
    free = ~s.alive.reshape(shards, -1)
    nth = p.begun[:, None] + jnp.cumsum(free, axis=1) - 1
    new = (free & (nth < rows // shards)).reshape(-1)
    row = jnp.where(new, (nth + jnp.arange(shards)[:, None] * (rows // shards)).reshape(-1), s.row)
    prompt = jnp.minimum(row, rows - 1) // copies
    read = rows_of(before.cache, prompt)
    columns = before.tokens.shape[1]

    def chosen(old: Array, theirs: Array, row_axis: int = 0) -> Array:
        """What new rows begin with, and of others what they have."""
        return jnp.where(new.reshape(-1, *(1,) * (old.ndim - 1 - row_axis)), theirs, old)

    def begun(old: Array, prompts: Array, row_axis: int, slot_axis: int) -> Array:
        """With the prompts of new rows, and nothing after them."""
        start = jax.lax.slice_in_dim(old, 0, columns, axis=slot_axis)
        return jax.lax.dynamic_update_slice_in_dim(old, chosen(start, prompts, row_axis), 0, axis=slot_axis)

    axis = rows_axis(s.cache.keys)
    in_heads = partial(begun, row_axis=axis, slot_axis=axis + 2)

    cache = dataclasses.replace(
        s.cache,
        keys=jax.tree.map(in_heads, s.cache.keys, read.keys),
        values=jax.tree.map(in_heads, s.cache.values, read.values),
        positions=begun(s.cache.positions, read.positions, 0, 1),
        mask=begun(s.cache.mask & ~new[:, None], read.mask, 0, 1),
    )
    slots = s.replace(
        row=row,
        alive=s.alive | new,
        count=jnp.where(new, 0, s.count),
        start=jnp.where(new, p.place, s.start),
        state=jax.tree.map(chosen, s.state, take_all(before.states, prompt)),
        cache=cache,
    )
    return p._replace(slots=slots, begun=p.begun + new.reshape(shards, -1).sum(-1))


@decoding()
def _fewer(s: Slots, width: int, shards: int) -> Slots:
    """Of each shard's slots the first with rows on their way, in all so many."""
    order = jnp.argsort(~s.alive.reshape(shards, -1), axis=1, stable=True)[:, : width // shards]
    index = (order + jnp.arange(shards)[:, None] * (len(s.row) // shards)).reshape(-1)
    return Slots(
        row=take(s.row, index),
        alive=take(s.alive, index),
        count=take(s.count, index),
        start=take(s.start, index),
        drawn=take_all(s.drawn, index),
        state=take_all(s.state, index),
        cache=rows_of(s.cache, index),
    )
