"""Softmax attention: over whole rows by the kernel that `ModelSpec.attention` names, over a cache by plain products.

Shapes: B batch, T query positions, S key positions, N query heads, K key/value heads, G query heads of one of these,
H head.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array, Bool, Int

from rlhf_jax import sharding
from rlhf_jax.errors import UserError
from rlhf_jax.models import kv_cache
from rlhf_jax.models.spec import ModelSpec

PLATFORMS = {"cudnn": "gpu", "splash": "tpu"}
"""Where each kernel runs; on a CPU all do, see `attend`."""
LANES = 128
"""Entries of a TPU's vector registers, of which splash's blocks are multiples."""
BLOCK = 512
"""The longest of these blocks, in tokens: 1,024 compile too, and which is faster no TPU has said."""


class Seen(flax.struct.PyTreeNode):
    """What a kernel has in place of a [B, T, S] mask: the queries of a row see no later token, nor another segment's.

    That is all, because a row's tokens come first and its pads last (`tokens_first`): no token sees a pad.
    """

    local_B: Bool[Array, " B"]
    """Whether the layer sees the window only; alike in all rows."""
    segment_ids_BT: Int[Array, "B T"] | None


def check(spec: ModelSpec, platform: str) -> None:
    """Raise UserError where the spec's kernel is not one of the platform's, "cpu", "gpu" or "tpu"."""
    if spec.attention == "xla" or platform in ("cpu", PLATFORMS[spec.attention]):
        return
    fit = next((name for name, home in PLATFORMS.items() if home == platform), None)
    raise UserError(
        f"model.spec.attention={spec.attention!r} is a kernel for {PLATFORMS[spec.attention]}s, the devices here are "
        f"{platform}s: {'' if fit is None else f'{fit!r} or '}'xla' would run"
    )


def tokens_first(tokens, mask, segment_ids=None):
    """Rows as a kernel wants them, their tokens first and their pads last; and the way back, as `placed` wants it."""
    there = jnp.argsort(~mask, axis=1, stable=True)

    def ordered(x):
        return jnp.take_along_axis(jnp.asarray(x), there, axis=1)

    segment_ids = None if segment_ids is None else ordered(segment_ids)
    return ordered(tokens), ordered(mask), segment_ids, (jnp.argsort(there, axis=1), there)


def placed(x_BTD, back):
    """What belongs to each token, put where `tokens_first` took that from."""
    return x_BTD if back is None else _permuted(x_BTD, *back)


@jax.custom_vjp
def _permuted(x_BTD, order_BT, inverse_BT):
    return jnp.take_along_axis(x_BTD, order_BT[:, :, None], axis=1)


def _permuted_forward(x, order, inverse):
    return _permuted(x, order, inverse), (order, inverse)


def _permuted_backward(saved, cotangent):
    order, inverse = saved
    return _permuted(cotangent, inverse, order), None, None  # a lookup: its own gradient would be a scatter


_permuted.defvjp(_permuted_forward, _permuted_backward)


def attend(spec: ModelSpec, q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, seen: Array | Seen) -> Array:
    """Softmax attention of whole rows: plain products where a [B, T, S] allows it, the spec's kernel where `Seen` does.

    On a mesh a kernel is called by each device for its rows and heads. On a CPU splash is interpreted, which is slow,
    and cuDNN's arguments go to XLA's implementation of the same function.
    """
    if isinstance(seen, Seen):
        return _by_kernel(spec, q_BTNH, k_BSKH, v_BSKH, seen)
    # As over a cache: with a head's tokens together the backward pass takes two thirds of the time on a CPU.
    return _attended(spec, q_BTNH, k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2), seen)


def attend_cache(spec, q_BTNH, k_BKSH, v_BKSH, attend_BTS):
    """The same over keys and values that lie as a cache has them (`kv_cache.Entries` of a layer)."""
    products = partial(_attended, spec)
    # In one function with them a cache of a single row is written twice a token, into a copy for these products.
    inputs = q_BTNH, k_BKSH, v_BKSH, attend_BTS
    return jax.lax.platform_dependent(*inputs, cpu=made_once(products), default=products)


def made_once(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which XLA's CPU compiler shall neither take into others nor make twice."""

    def call(*args: Any) -> Any:
        with set_xla_metadata(inlineable="false"):
            return jax.jit(fn)(*args)

    return call


def _attended(spec, q_BTNH, k_BKSH, v_BKSH, attend_BTS):
    b, t, n, h = q_BTNH.shape
    (k_BKSH, k_scale), (v_BKSH, v_scale) = (kv_cache.opened(x, q_BTNH.dtype) for x in (k_BKSH, v_BKSH))
    groups = (b, spec.n_kv_heads, n // spec.n_kv_heads, t)  # G query heads read each head of keys
    q = q_BTNH.swapaxes(1, 2).reshape(b, spec.n_kv_heads, -1, h)
    scores = jnp.einsum("BKQH,BKSH->BKQS", q, k_BKSH, preferred_element_type=jnp.float32) * _scale(spec)
    scores = scores if k_scale is None else scores * k_scale
    if spec.attention_softcap is not None:
        scores = spec.attention_softcap * jnp.tanh(scores / spec.attention_softcap)
    scores = jnp.where(attend_BTS[:, None, None], scores.reshape(*groups, -1), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).reshape(*q.shape[:3], -1)
    weights = weights if v_scale is None else weights * v_scale
    out = jnp.einsum("BKQS,BKSH->BKQH", weights.astype(v_BKSH.dtype), v_BKSH)
    return out.reshape(b, n, t, h).swapaxes(1, 2)


def _scale(spec):
    return spec.head_dim**-0.5 if spec.query_scale is None else spec.query_scale


def _by_kernel(spec, q_BTNH, k_BTKH, v_BTKH, seen):
    """Each device's rows and heads by the kernel, which the compiler cannot divide."""
    platform = sharding.platform()
    check(spec, platform)
    kernel = partial({"cudnn": _cudnn, "splash": _splash}[spec.attention], spec, emulated=platform == "cpu")
    b, t, n, h = q_BTNH.shape
    # Layers that differ in a window as long as the row do not differ.
    windows = {kind: spec.window if kind and spec.window < t else None for kind in spec.kinds}

    def on_device(q_BTKGH, k, v, seen):
        q, ids = q_BTKGH.reshape(*q_BTKGH.shape[:2], -1, h), seen.segment_ids_BT
        if len(set(windows.values())) == 1:
            out = kernel(q, k, v, ids, windows[spec.kinds[0]])
        else:
            local, whole = (partial(kernel, window=windows[kind]) for kind in (True, False))
            out = jax.lax.cond(seen.local_B[0], local, whole, q, k, v, ids)
        return out.reshape(q_BTKGH.shape)

    # Query heads are split as those of keys are, so that each device has the ones that belong together.
    q_BTKGH = q_BTNH.reshape(b, t, k_BTKH.shape[2], -1, h)
    split = ("batch", None, "kernel_heads")
    out = sharding.on_shards(on_device, q_BTKGH, k_BTKH, v_BTKH, seen, axes=(split, split, split, ("batch",)))
    return out.reshape(b, t, n, h)


def _cudnn(spec, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, window, *, emulated):
    """Flash attention (Dao 2023) of cuDNN: causal and local by name; segments, for which it has no name, as a mask."""
    call = partial(jax.nn.dot_product_attention, scale=_scale(spec), implementation="xla" if emulated else "cudnn")
    t = q_BTNH.shape[1]
    if segment_ids_BT is None:
        return call(
            q_BTNH, k_BTKH, v_BTKH, is_causal=True, local_window_size=None if window is None else (window - 1, 0)
        )
    q, k, v, ids = (_lengthened(x, t + t % 2) for x in (q_BTNH, k_BTKH, v_BTKH, segment_ids_BT))  # its masks are even
    back = jnp.arange(q.shape[1])[:, None] - jnp.arange(q.shape[1])
    mask_BTS = (back >= 0) & (ids[:, :, None] == ids[:, None, :])
    if window is not None:
        mask_BTS &= back < window
    return call(q, k, v, mask=mask_BTS[:, None])[:, :t]


def _splash(spec, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, window, *, emulated):
    """Splash attention: blocks of keys that no query of a block sees are skipped, from the mask's description."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # all of Pallas

    t, n = q_BTNH.shape[1:3]
    length, block = splash_blocks(t)
    scaled = (q_BTNH.astype(jnp.float32) * _scale(spec)).astype(q_BTNH.dtype)  # it has no scale of its own
    q, k, v = (_lengthened(x, length).swapaxes(1, 2) for x in (scaled, k_BTKH, v_BTKH))
    ids = None
    if segment_ids_BT is not None:
        ids = splash.SegmentIds(*(_lengthened(segment_ids_BT.astype(jnp.int32), length),) * 2)
    shape = (length, length)
    mask = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * n),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        attn_logits_soft_cap=spec.attention_softcap,
        head_shards=1,
        q_seq_shards=1,
        interpret=emulated,
    )
    out: Any = jax.vmap(kernel)(q, k, v, ids)  # alone, without residuals
    return out.swapaxes(1, 2)[:, :t]


def splash_blocks(length: int) -> tuple[int, int]:
    """(the length that a row is padded to, the length of its blocks): as few as `BLOCK` allows, alike, of whole lanes.

    >>> splash_blocks(100), splash_blocks(640), splash_blocks(4096)
    ((128, 128), (768, 384), (4096, 512))
    """
    number = -(-length // BLOCK)
    block = LANES * -(-length // (LANES * number))
    return number * block, block


def _lengthened(x, length):
    """[B, T, …] with zeros behind, where no token sees them."""
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
