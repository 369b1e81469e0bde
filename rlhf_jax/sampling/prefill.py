"""Prompts before their completions: read once, however many completions each has, and handed to the rows that go on.

Shapes: u different prompts, b rows, p prompt tokens, s slots of a cache, L layers, K key/value heads, H head, D model.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax import models
from rlhf_jax.models import Cache, ModelSpec
from rlhf_jax.sharding import constrain, decoding, splits
from rlhf_jax.types import Params

CACHE_AXES = (None, "batch", "kv", None, None)
"""Logical names of the axes of a cache's keys and values."""


class Prefilled(NamedTuple):
    """Prompts that have been read."""

    tokens: Int[Array, "u p"]
    mask: Bool[Array, "u p"]
    states: Float[Array, "u D"]
    """Of the last token."""
    cache: Cache
    """Of p slots."""


def prefill(spec: ModelSpec, params: Params, tokens: Int[Array, "u p"], mask: Bool[Array, "u p"]) -> Prefilled:
    """Read prompts, padded on the left, at once."""
    with decoding(prompts=True):
        tokens, mask = (constrain(jnp.asarray(x), "batch", None) for x in (tokens, mask))
        cache = constrained(models.init_cache(spec, *tokens.shape))
        states, cache = models.prefill(spec, params, tokens, mask, cache)
    return Prefilled(tokens, mask, states[:, -1], cache)


def lengthened(cache: Cache, more: int) -> Cache:
    """With so many more slots, which are empty."""
    rows = [(0, 0), (0, more)]
    in_heads = [(0, 0), (0, 0), (0, 0), (0, more), (0, 0)]
    return constrained(
        dataclasses.replace(
            cache,
            keys=jnp.pad(cache.keys, in_heads),
            values=jnp.pad(cache.values, in_heads),
            positions=jnp.pad(cache.positions, rows),
            mask=jnp.pad(cache.mask, rows),
        )
    )


def rows_of(cache: Cache, index: Int[Array, " b"]) -> Cache:
    """Some rows of a cache, each once or several times; of as many runs as devices hold, each device its own."""
    return constrained(
        dataclasses.replace(
            cache,
            keys=take(cache.keys, index, axis=1),
            values=take(cache.values, index, axis=1),
            positions=take(cache.positions, index),
            mask=take(cache.mask, index),
        )
    )


def take(x: Array, index: Int[Array, " b"], *, axis: int = 0) -> Array:
    """Rows of an array by index, where every index lies in the same of the batch's shards as its place in `index`.

    Written shard by shard, so that no device reads what another holds.
    """
    shards = splits("batch")
    if shards == 1:
        return jnp.take(x, index, axis=axis)
    size = x.shape[axis] // shards
    own = index.reshape(shards, -1) % size
    apart = x.reshape(*x.shape[:axis], shards, size, *x.shape[axis + 1 :])
    taken = jax.vmap(lambda part, rows: jnp.take(part, rows, axis=axis), (axis, 0), axis)(apart, own)
    return taken.reshape(*x.shape[:axis], len(index), *x.shape[axis + 1 :])


def constrained(cache: Cache) -> Cache:
    """The cache as decoding lays it out."""
    return cache.replace(keys=constrain(cache.keys, *CACHE_AXES), values=constrain(cache.values, *CACHE_AXES))
