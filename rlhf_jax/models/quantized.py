"""Frozen kernels in 8 or 4 bits (QLoRA, Dettmers et al. 2023): small integers and one float32 scale a block.

A kernel is seen as the matrix that activations are multiplied with, inputs by outputs. A block is 64 entries of one
column (of a narrower matrix the largest power of two that divides its inputs); its scale is its largest magnitude over
that of the largest level. int8 has the levels -127 … 127; nf4 the 16 of the paper's Appendix E, quantiles of a normal
distribution, two codes a byte. Scales are not quantized again, as the paper's are.

What is stored so: the blocks' projections (spec.PROJECTIONS), those of experts too, 1.06 bytes an entry for int8 and
0.56 for nf4. Embeddings, positions, output head, router, norms and biases stay as they were loaded.

Shapes: *l leading axes (layers, experts), i inputs, o outputs, g blocks of a column, c codes of a block (bytes).
"""

import math
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int8, UInt8

from rlhf_jax import sharding
from rlhf_jax.models.spec import PROJECTIONS, ModelSpec
from rlhf_jax.types import Params

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The levels of nf4, by code."""

BLOCK = 64
"""Most entries that share a scale."""

Bits = Literal["int8", "nf4"]


class Quantized(flax.struct.PyTreeNode):
    """A kernel in blocks; int8 codes are levels, uint8 ones hold two codes of nf4, the second half's rows above."""

    codes: Int8[Array, "*l g c o"] | UInt8[Array, "*l g c o"]
    scale: Float[Array, "*l g 1 o"]
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)  # of the kernel, leading axes left out

    @property
    def dtype(self) -> Any:
        """Of what is stored."""
        return self.codes.dtype

    def wide(self, dtype: Any = jnp.float32) -> Float[Array, "..."]:
        """The kernel in its own shape, made in float32 and rounded once."""
        if self.dtype == jnp.int8:
            levels = self.codes.astype(jnp.float32)
        else:
            levels = _level(jnp.concatenate([self.codes & 15, self.codes >> 4], axis=-2))
        return (levels * self.scale).astype(dtype).reshape(*self.codes.shape[:-3], *self.shape)


def quantize(kernel: Float[Array, "..."], bits: Bits, *, lead: int = 0, inputs: int = 1) -> Quantized:
    """Each entry as the nearest level of its block, off by half a step there at most.

    The axes after the first `lead` are the kernel's own: `inputs` of them are summed over, the others are outputs.
    """
    before, shape = kernel.shape[:lead], kernel.shape[lead:]
    width = math.prod(shape[:inputs])
    rows = math.gcd(BLOCK, width)
    blocks = kernel.astype(jnp.float32).reshape(*before, width // rows, rows, -1)
    largest = jnp.max(jnp.abs(blocks), axis=-2, keepdims=True)
    shares = blocks / jnp.where(largest > 0, largest, 1)
    if bits == "int8":
        return Quantized(jnp.round(127 * shares).astype(jnp.int8), largest / 127, shape)
    codes = sum((shares > (low + high) / 2).astype(jnp.uint8) for low, high in pairwise(NF4))
    first, second = jnp.split(codes, 2, axis=-2)
    return Quantized(first | second << 4, largest, shape)


Kernel = Array | Quantized


def multiply(x: Float[Array, "*n i"], kernel: Kernel) -> Float[Array, "*n o"]:
    """X times a kernel, in x's type; a kernel that is stored otherwise is cast for the product alone.

    The backward pass casts it again: it would else be handed every layer's kernel in x's type.
    """
    if isinstance(kernel, Quantized):
        return _multiply(x, kernel)
    return x @ kernel.astype(x.dtype).reshape(x.shape[-1], -1)


@jax.custom_vjp
def _multiply(x: Array, kernel: Quantized) -> Array:
    return x @ kernel.wide(x.dtype).reshape(x.shape[-1], -1)


def _multiply_forward(x: Array, kernel: Quantized) -> tuple[Array, Quantized]:
    return _multiply(x, kernel), kernel


def _multiply_backward(kernel: Quantized, cotangent: Array) -> tuple[Array, None]:
    wide = jax.lax.optimization_barrier(kernel).wide(cotangent.dtype)  # not the forward pass's, kept until here
    return cotangent @ wide.reshape(-1, cotangent.shape[-1]).T, None


_multiply.defvjp(_multiply_forward, _multiply_backward)


def cast(kernel: Kernel, dtype: Any) -> Array:
    """The kernel as an array of a type."""
    return kernel.wide(dtype) if isinstance(kernel, Quantized) else kernel.astype(dtype)


def store(spec: ModelSpec, params: Params, boxed: Params, mesh: Mesh) -> Params:
    """`store_leaf` for a whole frozen base; `boxed` are `init`'s shapes of it, with the names of their axes."""
    return jax.tree_util.tree_map_with_path(partial(store_leaf, spec, mesh), boxed, params, is_leaf=_is_box)


def stored_shapes(spec: ModelSpec, params: Params, boxed: Params, mesh: Mesh) -> Params:
    """The shapes, in their shards, of what `store` makes of parameters of such shapes."""

    def one(path: tuple, box: Any, leaf: Any) -> Any:
        if not _changes(spec, path):
            return sharding.in_shards(sharding.shardings(mesh, box), leaf)
        return sharding.in_shards(_place(spec, mesh, path, box), jax.eval_shape(partial(_stored, spec, path), leaf))

    return jax.tree_util.tree_map_with_path(one, boxed, params, is_leaf=_is_box)


def store_leaf(spec: ModelSpec, mesh: Mesh, path: tuple, box: Any, leaf: Any) -> Any:
    """A parameter of the frozen base on the mesh, as `spec.lora.base` says where it is a kernel.

    A mesh axis that would cut blocks in two does not split that kernel.
    """
    if isinstance(leaf, Quantized):
        return sharding.put(leaf, _place(spec, mesh, path, box))
    leaf = sharding.put(leaf, sharding.shardings(mesh, box))
    if not _changes(spec, path):
        return leaf
    return jax.jit(partial(_stored, spec, path), out_shardings=_place(spec, mesh, path, box))(leaf)


def _place(spec: ModelSpec, mesh: Mesh, path: tuple, box: Any) -> Any:
    """The shardings of what is stored in a kernel's place."""
    stored = jax.eval_shape(partial(_stored, spec, path), box.value)
    if not isinstance(stored, Quantized):
        return sharding.shardings(mesh, box)
    lead, _ = _axes(spec, path)
    names = list(block_axes(spec, path, box.names))
    if stored.codes.shape[lead] % sharding.parts(mesh, names[lead]):
        names[lead] = None
    return sharding.shardings(mesh, jax.tree.map(lambda part: nn.LogicallyPartitioned(part, tuple(names)), stored))


def block_axes(spec: ModelSpec, path: tuple, names: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """The logical axes of codes and scales, from those of the kernel in whose place they stand."""
    lead, inputs = _axes(spec, path)
    return (*names[: lead + 1], None, names[lead + inputs])


def _stored(spec: ModelSpec, path: tuple, leaf: Array) -> Array | Quantized:
    if not _changes(spec, path):
        return leaf
    assert spec.lora is not None and spec.lora.base is not None
    if spec.lora.base in ("float32", "bfloat16"):
        return leaf.astype(spec.lora.base)
    lead, inputs = _axes(spec, path)
    return quantize(leaf, spec.lora.base, lead=lead, inputs=inputs)


def _changes(spec: ModelSpec, path: tuple) -> bool:
    """Whether it is a kernel, and the spec says how these are stored."""
    return spec.lora is not None and spec.lora.base is not None and path[-1].key in PROJECTIONS


def _axes(spec: ModelSpec, path: tuple) -> tuple[int, int]:
    """How many leading axes a kernel has, and how many axes of inputs after them."""
    in_experts = spec.experts is not None and path[-2].key == "mlp"
    return 1 + in_experts, 2 if path[-1].key == "out" else 1


def _is_box(x: object) -> bool:
    return isinstance(x, nn.LogicallyPartitioned)


def _level(codes: Array) -> Array:
    return jnp.asarray(NF4, jnp.float32).at[codes].get(mode="promise_in_bounds")
