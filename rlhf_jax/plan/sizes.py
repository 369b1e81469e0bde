"""Bytes of shapes in their shards."""

import math
from typing import Any

import jax
import jax.numpy as jnp


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of shapes in shards that lie on one device."""
    return sum(_leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _leaf_bytes(leaf: Any) -> int:
    size = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize  # two words of a key
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * size
