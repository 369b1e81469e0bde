"""Keys and values of the tokens that a row has read: as the model computes them, or in 8 bits.

int8: each head's key and value of a slot has a float32 scale, its largest magnitude over 127, and is stored as the
nearest multiples of that: H + 4 bytes in place of 2 H in bfloat16. What reads them never makes a wide cache: the keys'
scales multiply scores, the values' scales the weights of the softmax.

Shapes: L layers, B batch, K key/value heads, S slots, T new tokens, H head.
"""

from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int8

from rlhf_jax.models.spec import ModelSpec

CacheType = Literal["model", "int8"]


class Quantized8(flax.struct.PyTreeNode):
    """Entries of a cache in 8 bits."""

    codes: Int8[Array, "*L B K S H"]
    scale: Float[Array, "*L B K S"]


Stored = Array | Quantized8
"""Keys or values, [L B K S H], or, of one layer, [B K S H]."""
Entries = Stored | tuple[Stored, ...]
"""Where there is no loop over layers, each layer's own: out of a stack XLA's CPU compiler copies a layer's for each
product with it, and a step of decoding takes twice as long."""


class Cache(flax.struct.PyTreeNode):
    """Keys and values of the tokens read so far, in slots 0 … length-1 of every row.

    A head's slots lie together: a new token is a product of matrices as they lie, and nothing is transposed.
    """

    keys: Entries
    values: Entries
    positions: Int[Array, "B S"]
    mask: Bool[Array, "B S"]  # True where a slot holds a real token
    length: Int[Array, ""]


def init_cache(spec: ModelSpec, batch: int, length: int, kind: CacheType = "model") -> Cache:
    """An empty cache for rows of up to `length` tokens; "model": of the type of the model's products."""
    shape = (batch, spec.n_kv_heads, length, spec.head_dim)

    def stored(*shape: int) -> Stored:
        if kind == "model":
            return jnp.zeros(shape, spec.dtype)
        return Quantized8(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1], jnp.float32))

    def empty() -> Entries:
        return tuple(stored(*shape) for _ in range(spec.n_layers)) if spec.unrolled else stored(spec.n_layers, *shape)

    return Cache(
        keys=empty(),
        values=empty(),
        positions=jnp.zeros((batch, length), jnp.int32),
        mask=jnp.zeros((batch, length), bool),
        length=jnp.zeros((), jnp.int32),
    )


def written(entries: Entries, new_BKTH: Float[Array, "B K T H"], layer: Any, start: Any) -> Entries:
    """With those of new tokens in a layer's slots from `start` on."""
    if isinstance(entries, tuple):
        return (*entries[:layer], _put(entries[layer], new_BKTH, (0, 0, start, 0)), *entries[layer + 1 :])
    return _put(entries, new_BKTH[None], (layer, 0, 0, start, 0))


def _put(entries: Stored, new: Float[Array, "*L B K T H"], at: tuple[Any, ...]) -> Stored:
    def put(stored: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice(stored, new, at[: stored.ndim])

    if not isinstance(entries, Quantized8):
        return put(entries, new.astype(entries.dtype))
    wide = new.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=-1)
    shares = wide / jnp.where(largest > 0, largest, 1)[..., None]
    return Quantized8(put(entries.codes, jnp.round(127 * shares).astype(jnp.int8)), put(entries.scale, largest / 127))


def rows_axis(entries: Entries) -> int:
    """Which axis of every array is that of the rows; the slots' is the second after it."""
    return 0 if isinstance(entries, tuple) else 1


def of_layer(entries: Entries, layer: Any) -> Stored:
    """One layer's."""
    if isinstance(entries, tuple):
        return entries[layer]
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), entries)


def opened(entries: Stored, dtype: Any) -> tuple[Float[Array, "B K S H"], Float[Array, "B K 1 S"] | None]:
    """A layer's entries as they go into a product, and what the products with them are multiplied by."""
    if isinstance(entries, Quantized8):
        return entries.codes.astype(dtype), entries.scale[:, :, None]
    return entries.astype(dtype), None
