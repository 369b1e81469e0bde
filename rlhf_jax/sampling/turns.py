"""Rows that take turns: a few are decoded at once, one that has ended makes room for the next (Yu et al. 2022, Orca).

All in one program. A slot has p places for its prompt and n more, a ring: what any row draws in a step goes to the same
place, and each row sees its own alone, so that a step is the one of rows that began together.

Shapes: b rows of the batch, w slots, u prompts, p prompt tokens, n new tokens, D model.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.lockstep import any_replica
from rlhf_jax.models import Cache
from rlhf_jax.numerics import require
from rlhf_jax.sampling.prefill import Prefilled, lengthened, rows_of, take
from rlhf_jax.sharding import decoding, splits

Written = tuple[Int[Array, "b n"], Bool[Array, "b n"], Float[Array, "b n"]]
"""Tokens, which of them are a completion's, their log-probs."""
Step = Callable[..., tuple[Array, Array, Array, Cache]]
"""(state [w D], alive [w], t [w], rows [w], cache) -> (tokens [w], log-probs [w], state, cache): the t-th of some rows.
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
    tokens: Int[Array, "w n"]
    logps: Float[Array, "w n"]
    state: Float[Array, "w D"]
    cache: Cache


class Progress(NamedTuple):
    """What a loop carries."""

    slots: Slots
    tokens: Int[Array, "b n"]  # of rows that have ended
    logps: Float[Array, "b n"]
    lengths: Int[Array, " b"]
    begun: Int[Array, " d"]  # rows of each of the batch's shards
    place: Int[Array, ""]  # of the next token in the ring


def in_turn(turns: Turns, step: Step, before: Prefilled, *, copies: int, length: int, last: int | None) -> Written:
    """Every row; `last` is the token that ends it, if one does."""
    with decoding():
        shards = splits("batch")
    rows = len(before.tokens) * copies
    width = min(turns.slots, rows)
    progress = Progress(
        _empty(before, width, rows, length),
        jnp.zeros((rows, length), jnp.int32),
        jnp.zeros((rows, length), jnp.float32),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(shards, jnp.int32),
        jnp.zeros((), jnp.int32),
    )
    for halving in range(turns.halvings + 1):
        follows = width // 2 if halving < turns.halvings and width // 2 % shards == 0 else 0
        progress = _until(turns, step, before, progress, copies=copies, last=last, most=follows // shards)
        if not follows:
            break
        progress = _put_down(progress)
        progress = progress._replace(slots=_fewer(progress.slots, follows, shards))
        width = follows
    progress = _put_down(progress)
    return progress.tokens, jnp.arange(length) < progress.lengths[:, None], progress.logps


@decoding()
def _until(
    turns: Turns, step: Step, before: Prefilled, progress: Progress, *, copies: int, last: int | None, most: int
) -> Progress:
    """Until no row waits, and of each shard at most so many are on their way.

    Replicas of a sweep take each step together: who has room, or is done, goes on with what is on its way until none
    is without. That costs each a few empty slots. Conditions of their own would cost, at every token, a choice for
    each replica between its old cache and its new one, and its place in the ring would be its own.
    """
    shards, width = len(progress.begun), len(progress.slots.row)
    each, length = len(progress.lengths) // shards, progress.tokens.shape[1]
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
        drawn, logps, state, cache = step(s.state, s.alive, s.count, jnp.minimum(s.row, len(p.lengths) - 1), cache)
        count = s.count + s.alive
        goes_on = s.alive & (count < length)
        slots = s.replace(
            alive=goes_on if last is None else goes_on & (drawn != last),
            count=count,
            tokens=_written(s.tokens, drawn, s.alive, p.place),
            logps=_written(s.logps, logps, s.alive, p.place),
            state=state,
            cache=cache,
        )
        return p._replace(slots=slots, place=(p.place + 1) % length)

    def turn(p: Progress) -> Progress:
        return jax.lax.while_loop(lambda p: any_replica(no_room(p)), token, _filled(_put_down(p), before, copies))

    return jax.lax.while_loop(lambda p: any_replica(unfinished(p)), turn, progress)


def _empty(before: Prefilled, width: int, rows: int, length: int) -> Slots:
    """Slots without rows."""
    like = jax.eval_shape(lambda: lengthened(rows_of(before.cache, jnp.zeros(width, jnp.int32)), length))
    return Slots(
        row=jnp.full(width, rows),
        alive=jnp.zeros(width, bool),
        count=jnp.zeros(width, jnp.int32),
        start=jnp.zeros(width, jnp.int32),
        tokens=jnp.zeros((width, length), jnp.int32),
        logps=jnp.zeros((width, length), jnp.float32),
        state=jnp.zeros((width, before.states.shape[1]), before.states.dtype),
        cache=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like),
    )


def _written(ring: Array, new: Array, alive: Array, place: Array) -> Array:
    """The ring with what rows on their way have drawn; one that has ended may wait with a full ring."""
    kept = jax.lax.dynamic_slice_in_dim(ring, place, 1, axis=1)
    return jax.lax.dynamic_update_slice_in_dim(ring, jnp.where(alive[:, None], new[:, None], kept), place, axis=1)


def _put_down(p: Progress) -> Progress:
    """What ended rows have, each where its row stands in the batch, in order from its first token."""
    s, length = p.slots, p.tokens.shape[1]
    where = jnp.where(s.alive, len(p.lengths), s.row)  # past the end: nowhere
    order = (s.start[:, None] + jnp.arange(length)) % length
    tokens, logps = (jnp.take_along_axis(x, order, axis=1) for x in (s.tokens, s.logps))
    own = jnp.arange(length) < s.count[:, None]
    return p._replace(
        slots=s.replace(row=jnp.where(s.alive, s.row, len(p.lengths))),
        tokens=p.tokens.at[where].set(jnp.where(own, tokens, 0), mode="drop"),
        logps=p.logps.at[where].set(jnp.where(own, logps, 0), mode="drop"),
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

    def begun(old: Array, prompts: Array, slot_axis: int) -> Array:
        """With the prompts of new rows, and nothing after them."""
        start = jax.lax.slice_in_dim(old, 0, columns, axis=slot_axis)
        chosen = new.reshape((-1,) + (1,) * (old.ndim - 1 - (slot_axis > 1)))
        return jax.lax.dynamic_update_slice_in_dim(old, jnp.where(chosen, prompts, start), 0, axis=slot_axis)

    cache = dataclasses.replace(
        s.cache,
        keys=begun(s.cache.keys, read.keys, 3),
        values=begun(s.cache.values, read.values, 3),
        positions=begun(s.cache.positions, read.positions, 1),
        mask=begun(s.cache.mask & ~new[:, None], read.mask, 1),
    )
    slots = s.replace(
        row=row,
        alive=s.alive | new,
        count=jnp.where(new, 0, s.count),
        start=jnp.where(new, p.place, s.start),
        state=jnp.where(new[:, None], take(before.states, prompt), s.state),
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
        tokens=take(s.tokens, index),
        logps=take(s.logps, index),
        state=take(s.state, index),
        cache=rows_of(s.cache, index),
    )
