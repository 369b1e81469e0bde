"""One decoder-only transformer, used only through pure functions of (spec, params, tokens, ...).

Shapes: B batch, T query positions, S key positions, D model, N query heads, K key/value heads, H head, F feed-forward,
L layers, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.masking import positions as mask_positions
from rlhf_jax.models.spec import ModelSpec
from rlhf_jax.sharding import constrain
from rlhf_jax.types import ArrayLike, Key, Params

_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Cache(flax.struct.PyTreeNode):
    """Keys and values of the tokens read so far, in slots 0 … length-1 of every row."""

    keys: Float[Array, "L B S K H"]
    values: Float[Array, "L B S K H"]
    positions: Int[Array, "B S"]
    mask: Bool[Array, "B S"]  # True where a slot holds a real token
    length: Int[Array, ""]


class RMSNorm(nn.Module):
    """x / rms(x) · scale, in float32 (Zhang and Sennrich 2019)."""

    eps: float
    axis_name: str | None = "embed"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalise the last axis."""
        scale = self.param("scale", _named(nn.initializers.ones, self.axis_name), x.shape[-1:], jnp.float32)
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * inverse * scale).astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; reads and writes its layer of the cache when there is one."""

    spec: ModelSpec

    @nn.compact
    def __call__(self, x_BTD, rope, attend_BTS, layer, keys, values, start):
        """[B, T, D] -> [B, T, D], and the cache's keys and values with this layer's written from slot `start` on."""
        s = self.spec
        init = nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        dense = partial(_dense, self, dtype=x_BTD.dtype)
        q_BTNH = dense("query", x_BTD, (s.d_model, s.n_heads, s.head_dim), ("embed", "heads", None), init)
        k_BTKH = dense("key", x_BTD, (s.d_model, s.n_kv_heads, s.head_dim), ("embed", "kv", None), init)
        v_BTKH = dense("value", x_BTD, (s.d_model, s.n_kv_heads, s.head_dim), ("embed", "kv", None), init)
        if s.qk_norm:
            q_BTNH = RMSNorm(s.norm_eps, None, name="query_norm")(q_BTNH)
            k_BTKH = RMSNorm(s.norm_eps, None, name="key_norm")(k_BTKH)
        q_BTNH, k_BTKH = _rotate(q_BTNH, rope), _rotate(k_BTKH, rope)
        k_BSKH, v_BSKH = k_BTKH, v_BTKH
        if keys is not None:
            at = (layer, 0, start, 0, 0)
            keys = jax.lax.dynamic_update_slice(keys, k_BTKH[None].astype(keys.dtype), at)
            values = jax.lax.dynamic_update_slice(values, v_BTKH[None].astype(values.dtype), at)
            k_BSKH, v_BSKH = (jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in (keys, values))
        out_BTNH = _attend(s, q_BTNH, k_BSKH.astype(q_BTNH.dtype), v_BSKH.astype(q_BTNH.dtype), attend_BTS)
        shape, axes = (s.n_heads, s.head_dim, s.d_model), ("heads", None, "embed")
        out_init = nn.initializers.variance_scaling(
            1.0 / (2 * s.n_layers), "fan_in", "normal", in_axis=(0, 1), out_axis=2
        )
        return dense("out", out_BTNH, shape, axes, out_init, inputs=2), keys, values


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): (silu(x W_gate) * x W_up) W_down."""

    spec: ModelSpec

    @nn.compact
    def __call__(self, x_BTD):
        """[B, T, D] -> [B, T, D]."""
        s = self.spec
        init = nn.initializers.lecun_normal()
        dense = partial(_dense, self, dtype=x_BTD.dtype)
        gate = dense("gate", x_BTD, (s.d_model, s.d_ff), ("embed", "mlp"), init)
        up = dense("up", x_BTD, (s.d_model, s.d_ff), ("embed", "mlp"), init)
        down_init = nn.initializers.variance_scaling(1.0 / (2 * s.n_layers), "fan_in", "normal")
        return dense("down", nn.silu(gate) * up, (s.d_ff, s.d_model), ("mlp", "embed"), down_init)


class Block(nn.Module):
    """One layer; the carry is the residual stream and the whole cache, so that the cache is updated in place."""

    spec: ModelSpec

    @nn.compact
    def __call__(self, carry, layer, rope, attend_BTS, start):
        """(carry, layer) -> (carry, None), as a scan wants it."""
        x_BTD, keys, values = carry
        normed = RMSNorm(self.spec.norm_eps, name="attention_norm")(x_BTD)
        attended, keys, values = Attention(self.spec, name="attention")(
            normed, rope, attend_BTS, layer, keys, values, start
        )
        x_BTD = x_BTD + attended
        x_BTD = x_BTD + FeedForward(self.spec, name="mlp")(RMSNorm(self.spec.norm_eps, name="mlp_norm")(x_BTD))
        x_BTD = constrain(x_BTD, "batch", None, None)
        return (x_BTD, keys, values), None


class Transformer(nn.Module):
    """Tokens to the final hidden state; `__call__` also returns the cache, `None` where there was none."""

    spec: ModelSpec

    @nn.compact
    def __call__(self, tokens_BT, positions_BT, attend_BTS, cache: Cache | None = None):
        """[B, T] tokens -> ([B, T, D] final hidden states, cache)."""
        s = self.spec
        embedding = self.param(
            "embedding",
            _named(nn.initializers.normal(s.d_model**-0.5), "vocab", "embed"),
            (s.vocab_size, s.d_model),
            jnp.float32,
        )
        if not s.tied:  # made here, so that `init` of the trunk makes the whole model; used by `unembed`
            self.param(
                "unembedding",
                _named(nn.initializers.lecun_normal(), "embed", "vocab"),
                (s.d_model, s.vocab_size),
                jnp.float32,
            )
        # A tied row has length about 1; a table times sqrt(d) starts the residual stream at unit size.
        x_BTD = constrain((embedding[tokens_BT] * s.d_model**0.5).astype(s.dtype), "batch", None, None)
        block = Block
        if s.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=_REMAT_POLICIES[s.remat])
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=s.n_layers,
            unroll=min(s.unroll, s.n_layers),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(s, name="layers")
        keys, values = (None, None) if cache is None else (cache.keys, cache.values)
        start = None if cache is None else cache.length
        (x_BTD, keys, values), _ = layers(
            (x_BTD, keys, values), jnp.arange(s.n_layers), _rope(positions_BT, s), attend_BTS, start
        )
        x_BTD = RMSNorm(s.norm_eps, name="final_norm")(x_BTD)
        if cache is not None:
            cache = dataclasses.replace(cache, keys=keys, values=values, length=cache.length + tokens_BT.shape[1])
        return x_BTD, cache


def _named(init, *axes) -> Callable[..., Any]:
    return init if axes == (None,) else nn.with_logical_partitioning(init, axes)


def _dense(module, name, x, shape, axes, init, *, dtype, inputs=1):
    """The last `inputs` axes of x times a kernel, as one matrix product: batched ones take twice as long on CPU."""
    kernel = module.param(name, _named(init, *axes), shape, jnp.float32).astype(dtype)
    width = math.prod(shape[:inputs])
    out = x.reshape(-1, width) @ kernel.reshape(width, -1)
    return out.reshape(*x.shape[: x.ndim - inputs], *shape[inputs:])


def _rope(positions_BT, spec):
    frequencies = spec.rope_theta ** (-jnp.arange(0, spec.head_dim, 2, dtype=jnp.float32) / spec.head_dim)
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]


def _rotate(x, rope):
    """Rotary positions (Su et al. 2021) over the two halves of a head, as Llama lays them out."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _attend(spec, q_BTNH, k_BSKH, v_BSKH, attend_BTS):
    mask = attend_BTS[:, None]  # one mask for all heads
    if spec.attention_softcap is None:
        return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask)
    # dot_product_attention has no hook between scores and softmax.
    b, t, n, h = q_BTNH.shape
    q = q_BTNH.reshape(b, t, spec.n_kv_heads, n // spec.n_kv_heads, h)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k_BSKH, preferred_element_type=jnp.float32) * h**-0.5
    scores = spec.attention_softcap * jnp.tanh(scores / spec.attention_softcap)
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH).reshape(b, t, n, h)


def init(spec: ModelSpec, key: Key) -> Params:
    """Random parameters, float32, boxed with the logical names of their axes; `sharding.unbox` takes these off."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return Transformer(spec).init(key, tokens, tokens, jnp.ones((1, 1, 1), bool))["params"]


def hidden(
    spec: ModelSpec,
    params: Params,
    tokens: Int[ArrayLike, "B T"],
    mask: Bool[ArrayLike, "B T"] | None = None,
    *,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
) -> Float[Array, "B T D"]:
    """Final hidden states of whole rows; the state at t has read tokens 0 … t.

    `mask` is False on padding, wherever that is: positions count kept tokens only, so left padding, right padding and
    packing give the same states. `segment_ids` (0 is padding) packs several texts into a row; none sees another.
    """
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    positions = mask_positions(mask)
    attend = _causal(mask, positions, mask, positions, spec.window, offset=0)
    if segment_ids is not None:
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        attend &= same
        positions = _positions_in_segments(segment_ids, positions)
    return _apply(spec, params, tokens, positions, attend)[0]


def unembed(spec: ModelSpec, params: Params, hidden_states: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Logits, float32, of hidden states."""
    table = params["embedding"].T if spec.tied else params["unembedding"]
    flat = hidden_states.reshape(-1, spec.d_model)
    out = jnp.matmul(flat, table.astype(flat.dtype), preferred_element_type=jnp.float32)
    out = out.reshape(*hidden_states.shape[:-1], spec.vocab_size)
    return out if spec.logits_softcap is None else spec.logits_softcap * jnp.tanh(out / spec.logits_softcap)


def logits(
    spec: ModelSpec, params: Params, tokens: Int[ArrayLike, "B T"], mask: Bool[ArrayLike, "B T"] | None = None
) -> Float[Array, "B T V"]:
    """Next-token logits, float32, for any padding; `logits[:, t]` predicts `tokens[:, t + 1]`."""
    return unembed(spec, params, hidden(spec, params, tokens, mask))


def init_cache(spec: ModelSpec, batch: int, length: int) -> Cache:
    """An empty cache for rows of up to `length` tokens."""
    shape = (spec.n_layers, batch, length, spec.n_kv_heads, spec.head_dim)
    return Cache(
        keys=jnp.zeros(shape, spec.dtype),
        values=jnp.zeros(shape, spec.dtype),
        positions=jnp.zeros((batch, length), jnp.int32),
        mask=jnp.zeros((batch, length), bool),
        length=jnp.zeros((), jnp.int32),
    )


def extend(
    spec: ModelSpec, params: Params, tokens: Int[ArrayLike, "B T"], mask: Bool[ArrayLike, "B T"], cache: Cache
) -> tuple[Float[Array, "B T D"], Cache]:
    """Read T more tokens of each row after those in the cache: a prompt at once, or a token at a time.

    The caller counts: past the last slot of the cache a new token takes the place of the last one.
    """
    before = jnp.sum(cache.mask, axis=1, keepdims=True)
    positions = jnp.maximum(before + jnp.cumsum(mask, axis=1) - 1, 0)
    at = (0, cache.length)
    cache = dataclasses.replace(
        cache,
        positions=jax.lax.dynamic_update_slice(cache.positions, positions.astype(jnp.int32), at),
        mask=jax.lax.dynamic_update_slice(cache.mask, mask, at),
    )
    attend = _causal(mask, positions, cache.mask, cache.positions, spec.window, offset=cache.length)
    return _apply(spec, params, tokens, positions, attend, cache)


def _apply(spec, params, *inputs) -> Any:
    return Transformer(spec).apply({"params": params}, *inputs)


def _causal(query_mask, query_positions, key_mask, key_positions, window, *, offset):
    """[B, T, S]: keys that are real, not later than the query, in its window. A pad sees itself, to stay finite."""
    query_slots = offset + jnp.arange(query_mask.shape[1])
    key_slots = jnp.arange(key_mask.shape[1])
    attend = key_mask[:, None, :] & (query_slots[:, None] >= key_slots[None, :])
    if window is not None:
        attend &= query_positions[:, :, None] - key_positions[:, None, :] < window
    own = query_slots[:, None] == key_slots[None, :]
    return attend | (own & ~query_mask[:, :, None])


def _positions_in_segments(segment_ids, positions):
    """Positions in a row, counted from where each segment starts."""
    starts = jnp.concatenate(
        [jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    return positions - jax.lax.cummax(jnp.where(starts, positions, 0), axis=1)
