"""Stacked layers as the stages of a pipeline (GPipe, Huang et al. 2019): the parts of a batch pass one after another.

Of S stages and M microbatches a stage is idle for S − 1 turns of M + S − 1. Each keeps what went into its M parts and
computes the rest again in the backward pass, which is the same loop the other way, by automatic differentiation.

Shapes: B rows, M microbatches, b rows of one, T positions, D model, L layers, S stages.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax import sharding

Stage = Callable[[Any, Array, Any], tuple[Array, Any]]
"""(its layers, x [b, T, D], what else it reads of these rows) -> (x, what each of its layers leaves [L, b, …])."""


def through_stages(
    stage: Stage, layers: Any, x: Float[Array, "B T D"], rows: Any, *, stages: int, opaque: bool = False
) -> tuple[Float[Array, "B T D"], Any]:
    """Rows through all layers, and what these leave, [L, B, …].

    Every array of `layers` has a leading axis of layers, of which a stage has its run; every one of `rows` a leading
    axis of rows. The rows come out split over the stages too, so that what follows is shared by them. An `opaque`
    stage calls `sharding.on_shards`. Raises UserError where rows do not divide into parts.
    """
    shards, microbatches = sharding.passing(x.shape[0])

    def parted(x: Array) -> Array:
        """[B, …] -> [M, b, …], in each part the same share of every device's rows."""
        parts = x.reshape(shards, microbatches, -1, *x.shape[1:]).swapaxes(0, 1)
        return sharding.constrain(parts.reshape(microbatches, -1, *x.shape[1:]), None, "batch", *(None,) * (x.ndim - 1))

    def whole(parts: Array) -> Array:
        """The way back."""
        split = parts.reshape(microbatches, shards, -1, *parts.shape[2:])
        return split.swapaxes(0, 1).reshape(-1, *parts.shape[2:])

    f = partial(_pass, stage, stages, x.dtype)
    passed = sharding.over_stages(f, split=(True, False, False), opaque=opaque)
    # Sums over stages, of which all but one add zeros, are in float32: XLA's CPU compiler fails on bfloat16 there.
    out, left = passed(layers, parted(x.astype(jnp.float32)), jax.tree.map(parted, rows))
    out = sharding.constrain(whole(out).astype(x.dtype), "rows", "length", None)
    return out, jax.tree.map(jax.vmap(whole), left)


def _pass(stage: Stage, stages: int, dtype: Any, layers: Any, x: Array, rows: Any) -> tuple[Array, Any]:
    """One stage's turns: one for each microbatch, and S − 1 in which the first or the last ones are still elsewhere."""
    index, microbatches = jax.lax.axis_index("pipeline"), x.shape[0]
    x = jax.lax.pcast(x, "pipeline", to="varying")  # here, so that its gradient is summed over stages once, as float32

    @jax.checkpoint
    def work(x: Array, turn: Array) -> tuple[Array, Any]:
        part = jnp.clip(turn - index, 0, microbatches - 1)
        mine = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, part, keepdims=False), rows)
        return stage(layers, x, mine)

    def take(received: Array, at: tuple[Array, Array]) -> tuple[Array, Any]:
        turn, fresh = at
        out, left = work(jnp.where(index == 0, fresh.astype(dtype), received), turn)
        return jax.lax.ppermute(out, "pipeline", [(i, i + 1) for i in range(stages - 1)]), (out, left)

    turns = jnp.arange(microbatches + stages - 1)
    fresh = jnp.pad(x, ((0, stages - 1), *((0, 0),) * (x.ndim - 1)))
    nothing = jax.lax.pcast(jnp.zeros(x.shape[1:], dtype), "pipeline", to="varying")
    _, (outs, left) = jax.lax.scan(take, nothing, (turns, fresh))
    out = jnp.where(index == stages - 1, outs[stages - 1 :], 0).astype(x.dtype)
    left = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, index, microbatches).swapaxes(0, 1), left)
    return jax.lax.psum_scatter(out, "pipeline", tiled=True), left
