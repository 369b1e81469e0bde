"""The parts of a decoder block, as linen modules; `transformer` stacks the blocks.

Shapes: B batch, T query positions, S key positions, D model, N query heads, K key/value heads, H head, F feed-forward,
L layers, E experts.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from rlhf_jax.models import kv_cache
from rlhf_jax.models.attention import Seen, attend, attend_cache
from rlhf_jax.models.experts import Routing, mix_experts
from rlhf_jax.models.quantized import Quantized, cast, multiply
from rlhf_jax.models.rope import rotate
from rlhf_jax.models.spec import ModelSpec
from rlhf_jax.sharding import constrain, splits, to_weights
from rlhf_jax.types import ArrayLike

ACTIVATIONS = {"silu": nn.silu, "gelu": partial(nn.gelu, approximate=False), "gelu_tanh": nn.gelu}
ROUTER = "router"
"""The collection in which each block leaves what the router did."""


class Norm(nn.Module):
    """x / rms(x) · scale, in float32 (Zhang and Sennrich 2019); or LayerNorm with a bias (Ba et al. 2016)."""

    eps: float
    kind: str = "rms"
    axis_name: str | None = "embed"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalise the last axis."""
        scale = self.param("scale", named(nn.initializers.ones, self.axis_name), x.shape[-1:], jnp.float32)
        wide = x.astype(jnp.float32)
        if self.kind == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        out = wide * inverse * scale
        if self.kind == "layer":
            out += self.param("bias", named(nn.initializers.zeros, self.axis_name), x.shape[-1:], jnp.float32)
        return out.astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention; reads and writes its layer of the cache when there is one."""

    spec: ModelSpec

    @nn.compact
    def __call__(self, x_BTD, rope, attend_BTS, layer, keys, values, start, read=None):
        """[B, T, D] -> [B, T, D], and the cache's keys and values with this layer's written from slot `start` on.

        With `read` it is what the positions `picked` by that have read.
        """
        s = self.spec
        init = nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        project = partial(dense, self, init=init, bias=s.qkv_bias)
        asked = None if isinstance(read, Among) else read  # of these a row may have any number: all of it asks
        query, attend_BTS = picked(x_BTD, asked), picked(attend_BTS, asked)
        q_BTNH = project("query", x=query, shape=(s.d_model, s.n_heads, s.head_dim), axes=("embed", "heads", None))
        k_BTKH = project("key", x=x_BTD, shape=(s.d_model, s.n_kv_heads, s.head_dim), axes=("embed", "kv", None))
        v_BTKH = project("value", x=x_BTD, shape=(s.d_model, s.n_kv_heads, s.head_dim), axes=("embed", "kv", None))
        if s.qk_norm:
            q_BTNH = Norm(s.norm_eps, axis_name=None, name="query_norm")(q_BTNH)
            k_BTKH = Norm(s.norm_eps, axis_name=None, name="key_norm")(k_BTKH)
        if rope is not None:
            q_BTNH, k_BTKH = rotate(q_BTNH, tuple(picked(x, asked) for x in rope)), rotate(k_BTKH, rope)
        q_BTNH = constrain(q_BTNH, "batch", "length", "heads", None)
        # Where rows are split along their length, this is what gathers the keys and values of the whole row.
        k_BTKH, v_BTKH = (constrain(x, "batch", None, "kv", None) for x in (k_BTKH, v_BTKH))
        if keys is None:
            out_BTNH = attend(s, q_BTNH, k_BTKH, v_BTKH, attend_BTS)
        else:
            keys, values = (
                kv_cache.written(cached, new.swapaxes(1, 2), layer, start)
                for cached, new in ((keys, k_BTKH), (values, v_BTKH))
            )
            if isinstance(attend_BTS, Seen):  # these tokens are the cache's first
                out_BTNH = attend(s, q_BTNH, k_BTKH, v_BTKH, attend_BTS)
            else:
                k_BKSH, v_BKSH = (kv_cache.of_layer(cached, layer) for cached in (keys, values))
                out_BTNH = attend_cache(s, q_BTNH, k_BKSH, v_BKSH, attend_BTS)
        out_BTNH = out_BTNH if asked is read else picked(out_BTNH, read)
        shape, axes = (s.n_heads, s.head_dim, s.d_model), ("heads", None, "embed")
        out_init = nn.initializers.variance_scaling(
            1.0 / (2 * s.n_layers), "fan_in", "normal", in_axis=(0, 1), out_axis=2
        )
        out = dense(self, "out", x=out_BTNH, shape=shape, axes=axes, init=out_init, bias=s.out_bias, inputs=2)
        return out, keys, values


class FeedForward(nn.Module):
    """act(x W_gate) * x W_up, times W_down (Shazeer 2020); without a gate act(x W_up) W_down."""

    spec: ModelSpec

    @nn.compact
    def __call__(self, x_BTD):
        """[B, T, D] -> [B, T, D]."""
        s, act = self.spec, ACTIVATIONS[self.spec.activation]
        into = partial(
            dense,
            self,
            x=x_BTD,
            shape=(s.d_model, s.d_ff),
            axes=("embed", "mlp"),
            init=nn.initializers.lecun_normal(),
            bias=s.mlp_bias,
        )
        inner = act(into("gate")) * into("up") if s.gated else act(into("up"))
        down_init = nn.initializers.variance_scaling(1.0 / (2 * s.n_layers), "fan_in", "normal")
        shape, axes = (s.d_ff, s.d_model), ("mlp", "embed")
        return dense(self, "down", x=inner, shape=shape, axes=axes, init=down_init, bias=s.mlp_bias)


class ExpertsFeedForward(nn.Module):
    """A router picks experts for each token; their gated outputs are summed by the router's weights."""

    spec: ModelSpec

    @nn.compact
    def __call__(self, x_BTD):
        """[B, T, D] -> [B, T, D]; leaves the router's logits and picks in the ROUTER collection."""
        s, experts = self.spec, self.spec.experts
        assert experts is not None
        e, d, f = experts.number, s.d_model, s.d_ff
        init = nn.initializers.lecun_normal(in_axis=1, out_axis=2, batch_axis=0)
        out_init = nn.initializers.variance_scaling(
            1.0 / (2 * s.n_layers), "fan_in", "normal", in_axis=1, out_axis=2, batch_axis=0
        )
        router = self.param("router", named(nn.initializers.lecun_normal(), "embed", None), (d, e), jnp.float32)
        into, back = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
        gate, up = (kernel(self, name, init, into, (e, d, f)) for name in ("gate", "up"))
        down = kernel(self, "down", out_init, back, (e, f, d))
        # The tokens of rows that are split along their length meet here: experts take any of them.
        flat = to_weights(constrain(x_BTD, "batch", None, None), "embed").reshape(-1, d)
        logits = jnp.matmul(flat.astype(jnp.float32), router, precision="highest")

        def mix(x, logits, kernels):
            gate, up, down = (cast(one, x.dtype) for one in kernels)
            return mix_experts(x, logits, (gate, up, down), experts, ACTIVATIONS[s.activation])

        if isinstance(gate, Quantized):  # the backward pass makes the wide kernels again, as in `multiply`
            mix = jax.checkpoint(mix)
        out, picked = mix(flat, logits, (gate, up, down))
        routing = Routing(*(x.reshape(*x_BTD.shape[:-1], -1) for x in (logits, picked)))
        self.sow(ROUTER, "routing", routing)
        return out.reshape(x_BTD.shape)


class Block(nn.Module):
    """One layer; the carry is the residual stream and the whole cache, so that the cache is updated in place."""

    spec: ModelSpec

    @nn.compact
    def __call__(self, carry, layer, local, ropes, attends, start, read=None):
        """(carry, layer, whether it is local) -> (carry, None), as a scan wants it; `read` as `Attention` has it."""
        s = self.spec
        x_BTD, keys, values = carry
        norm = partial(Norm, s.norm_eps, s.norm)
        rope, attend_BTS = _of_kind(ropes, local), _of_kind(attends, local)
        attended, keys, values = Attention(s, name="attention")(
            norm(name="attention_norm")(x_BTD), rope, attend_BTS, layer, keys, values, start, read
        )
        x_BTD = picked(x_BTD, read)
        if s.post_norms:
            attended = norm(name="attention_post_norm")(attended)
        into_mlp = x_BTD if s.parallel else x_BTD + attended
        mlp = FeedForward if s.experts is None else ExpertsFeedForward
        fed = mlp(s, name="mlp")(norm(name="mlp_norm")(into_mlp))
        if s.post_norms:
            fed = norm(name="mlp_post_norm")(fed)
        x_BTD = x_BTD + attended + fed
        x_BTD = constrain(x_BTD, "batch", "length", None)
        return (x_BTD, keys, values), None


class Among(NamedTuple):
    """Positions of a batch that are counted through all rows of each of its shards, one after another."""

    index: Int[Array, "d c"]


Read = slice | ArrayLike | Among
"""Which positions are wanted: a slice or indices [B, R] of each row, or some among all rows'."""


def picked(x: Any, read: Read | None) -> Any:
    """Some positions of each row, [B, T, …] -> [B, R, …], or among all rows, -> [d, c, …]; without `read` all."""
    if read is None:
        return x
    if isinstance(read, slice):
        return x[:, read]
    index = read.index if isinstance(read, Among) else jnp.asarray(read)
    x = x.reshape(len(index), -1, *x.shape[2:])
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)


def _of_kind(options: tuple[Any, ...], local: Any) -> Any:
    """The layer's own of (for layers that see all, for local ones), or the only one there is."""
    if len(options) == 1:
        return options[0]
    return jax.tree.map(lambda a, b: jnp.where(local, b, a), *options)


def named(init: Any, *axes: str | None) -> Callable[..., Any]:
    """An initialiser whose parameter knows the logical names of its axes."""
    return nn.with_logical_partitioning(init, axes)


def kernel(module, name, init, axes, shape):
    """The parameter, or the quantized kernel that stands in its place in a frozen base."""
    stored = module.get_variable("params", name)
    return stored if isinstance(stored, Quantized) else module.param(name, named(init, *axes), shape, jnp.float32)


def dense(module, name, *, x, shape, axes, init, bias, inputs=1):
    """The last `inputs` axes of x times a kernel."""
    x = to_weights(x, *axes[:inputs])
    rows = flat(x.reshape(*x.shape[: x.ndim - inputs], math.prod(shape[:inputs])))
    out = multiply(rows, kernel(module, name, init, axes, shape))
    if _has_adapter(module, name):
        out += _adapter(module, name, rows, shape, axes, inputs)
    out = to_weights(out.reshape(*x.shape[: x.ndim - inputs], *shape[inputs:]), *axes[inputs:])
    if not bias:
        return out
    zeros = named(nn.initializers.zeros, *axes[inputs:])
    shift = module.param(f"{name}_bias", zeros, shape[inputs:], jnp.float32).astype(jnp.float32)
    return (out.astype(jnp.float32) + shift).astype(x.dtype)  # so that its gradient, a sum, is one of float32


def flat(x: Array) -> Array:
    """[*b, d] -> [n, d], of one matrix product: batched ones take twice as long on CPU.

    Where rows are split along their length the axes stay: no layout over devices is that of the split axes as one.
    """
    return x if splits("length") > 1 else x.reshape(-1, x.shape[-1])


def _has_adapter(module, name):
    """Where the spec asks for one; where the parameters hold none, the model is the frozen one."""
    lora = module.spec.lora
    wanted = lora is not None and name in lora.targets
    return wanted and (module.is_initializing() or module.has_variable("params", f"{name}_lora_a"))


def _adapter(module, name, rows, shape, axes, inputs):
    """(alpha / rank) x A B; A is uniform in ±1/√width as in PEFT, B is 0."""
    lora, width = module.spec.lora, rows.shape[-1]
    uniform = nn.initializers.variance_scaling(
        1 / 3, "fan_in", "uniform", in_axis=tuple(range(inputs)), out_axis=inputs
    )
    a = module.param(f"{name}_lora_a", named(uniform, *axes[:inputs], None), (*shape[:inputs], lora.rank), jnp.float32)
    b_init = named(nn.initializers.zeros, None, *axes[inputs:])
    b = module.param(f"{name}_lora_b", b_init, (lora.rank, *shape[inputs:]), jnp.float32)
    inner = rows @ a.astype(rows.dtype).reshape(width, lora.rank)
    return (lora.alpha / lora.rank) * (inner @ b.astype(rows.dtype).reshape(lora.rank, -1))


def look_up(table: Array, rows: Array) -> Array:
    """Rows of a table, float32; their gradients add up in float32 whatever the table's type."""
    return table[rows] if table.dtype == jnp.float32 else _look_up(table, rows)


@jax.custom_vjp
def _look_up(table, rows):
    return table[rows].astype(jnp.float32)


def _look_up_forward(table, rows):
    return _look_up(table, rows), (table, rows)


def _look_up_backward(saved, cotangent):
    table, rows = saved
    # In the table's own type a sum of many would stop growing: bfloat16 has 8 bits.
    return jnp.zeros(table.shape, jnp.float32).at[rows].add(cotangent).astype(table.dtype), None


_look_up.defvjp(_look_up_forward, _look_up_backward)
