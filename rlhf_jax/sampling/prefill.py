"""Prompts before their completions: read once, however many completions each has, and handed to the rows that go on.

Shapes: u different prompts, b rows, p prompt tokens, s slots of a cache, L layers, K key/value heads, H head, D model.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax import models
from rlhf_jax.models import Cache, ModelSpec
from rlhf_jax.models.kv_cache import CacheType, rows_axis
from rlhf_jax.sharding import constrain, decoding, splits
from rlhf_jax.types import Params

CACHE_AXES = ("batch", "kv", None, None)
"""Logical names of the axes of a layer's keys and values: rows, heads, slots, entries. Scales have all but the last."""


class State(NamedTuple):
    """What a row's next token hangs on, besides its cache."""

    hidden: Float[Array, "b D"]
    """The final hidden state of the last token."""
    matched: Int[Array, " b"] | None
    """How much of a stop string the completion's text ends with (`stopping.Stops`); None where there are none."""


class Prefilled(NamedTuple):
    """Prompts that have been read."""

    tokens: Int[Array, "u p"]
    mask: Bool[Array, "u p"]
    states: State
    cache: Cache
    """Of p slots."""


def prefill(
    spec: ModelSpec,
    params: Params,
    tokens: Int[Array, "u p"],
    mask: Bool[Array, "u p"],
    *,
    stops: bool,
    kind: CacheType = "model",
) -> Prefilled:
    """Read prompts, padded on the left, at once; `stops` says whether strings end completions."""
    with decoding(prompts=True):
        tokens, mask = (constrain(jnp.asarray(x), "batch", None) for x in (tokens, mask))
        cache = constrained(models.init_cache(spec, *tokens.shape, kind=kind))
        states, cache = models.prefill(spec, params, tokens, mask, cache)
    matched = jnp.zeros(len(tokens), jnp.int32) if stops else None
    return Prefilled(tokens, mask, State(states[:, -1], matched), cache)


def lengthened(cache: Cache, more: int) -> Cache:
    """With so many more slots, which are empty."""
    rows = [(0, 0), (0, more)]

    slots = rows_axis(cache.keys) + 2

    def in_heads(x: Array) -> Array:
        return jnp.pad(x, [(0, more) if axis == slots else (0, 0) for axis in range(x.ndim)])

    return constrained(
        dataclasses.replace(
            cache,
            keys=jax.tree.map(in_heads, cache.keys),
            values=jax.tree.map(in_heads, cache.values),
            positions=jnp.pad(cache.positions, rows),
            mask=jnp.pad(cache.mask, rows),
        )
    )


def rows_of(cache: Cache, index: Int[Array, " b"]) -> Cache:
    """Some rows of a cache, each once or several times; of as many runs as devices hold, each device its own."""
    return constrained(
        dataclasses.replace(
            cache,
            keys=take_all(cache.keys, index, axis=rows_axis(cache.keys)),
            values=take_all(cache.values, index, axis=rows_axis(cache.values)),
            positions=take(cache.positions, index),
            mask=take(cache.mask, index),
        )
    )


def take_all(tree: Any, index: Int[Array, " b"], *, axis: int = 0) -> Any:
    """`take` of every array of a tree."""
    return jax.tree.map(lambda x: take(x, index, axis=axis), tree)


def take(x: Array, index: Int[Array, " b"], *, axis: int = 0) -> Array:
    """Rows of an array by index, where every index lies in the same of the batch's shards as its place in `index`.

    Written shard by shard, so that no device reads what another holds.
    """
    shards = math.gcd(splits("batch"), len(index), x.shape[axis])
    if shards == 1:
        return jnp.take(x, index, axis=axis)
    size = x.shape[axis] // shards
    own = index.reshape(shards, -1) % size
    apart = x.reshape(*x.shape[:axis], shards, size, *x.shape[axis + 1 :])
    taken = jax.vmap(lambda part, rows: jnp.take(part, rows, axis=axis), (axis, 0), axis)(apart, own)
    return taken.reshape(*x.shape[:axis], len(index), *x.shape[axis + 1 :])


def constrained(cache: Cache) -> Cache:
    """The cache as decoding lays it out."""
    axes = (*(None,) * rows_axis(cache.keys), *CACHE_AXES)
    keys, values = jax.tree.map(lambda x: constrain(x, *axes[: x.ndim]), (cache.keys, cache.values))
    return cache.replace(keys=keys, values=values)
