"""The rules, which mesh axes carry which logical axis, and what follows from them; nothing else names PartitionSpec."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rlhf_jax.errors import UserError
from rlhf_jax.mesh import AXES as AXES
from rlhf_jax.mesh import REPLICA, Decode, batch_shards, check_rows, choices, divisors, one_of
from rlhf_jax.mesh import MeshConfig as MeshConfig
from rlhf_jax.mesh import make_mesh as make_mesh
from rlhf_jax.mesh import row_multiple as row_multiple
from rlhf_jax.mesh import single_device_mesh as single_device_mesh
from rlhf_jax.mesh import slice_index as slice_index
from rlhf_jax.types import Batch

Rules = Mapping[str, tuple[str, ...]]

RULES: Rules = {
    "batch": ("data", "fsdp"),
    "rows": ("data", "fsdp", "pipeline"),  # of a batch that has passed through the stages
    "lookup": ("data",),  # of a batch where parameters are split along "embed"
    "length": ("sequence",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv": ("tensor",),
    "kernel_heads": ("tensor", "sequence"),  # a kernel reads whole rows, of fewer heads where their length is split
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "expert": ("expert",),
    "layers": ("pipeline",),
}
"""Which mesh axes split which logical axis of parameters and activations."""

_DECODING: Rules = {
    **RULES,
    **dict.fromkeys(("batch", "rows", "lookup"), ("data", "fsdp", "pipeline", "sequence")),
    **dict.fromkeys(("length", "layers"), ()),
    "kernel_heads": ("tensor",),
}
DECODE_RULES: Mapping[Decode, Rules] = {
    "gathered": {**_DECODING, "embed": ()},
    "split": {
        **_DECODING,
        "embed": ("fsdp", "pipeline", "sequence"),
        **dict.fromkeys(("lookup", "product_rows"), ("data",)),
    },
}
"""The same while a policy samples: a token at a time has no length to split, and stages would wait for one another."""


@dataclass(frozen=True)
class _Scope:
    """What is known where a program is traced."""

    mesh: Mesh
    rules: Rules

    def spec(self, shape: Sequence[int], axes: Sequence[str | None]) -> PartitionSpec:
        """The mesh axes that split each axis: as many of the rule's as divide it."""
        return PartitionSpec(*(self._carriers(axis, size) for axis, size in zip(axes, shape, strict=True)))

    def _carriers(self, axis: str | None, size: int) -> tuple[str, ...] | None:
        kept, parts = [], 1
        for name in () if axis is None else self.rules[axis]:
            if self.mesh.shape[name] > 1 and size % (parts * self.mesh.shape[name]) == 0:
                kept.append(name)
                parts *= self.mesh.shape[name]
        return tuple(kept) or None


_SCOPE: ContextVar[_Scope | None] = ContextVar("scope", default=None)


@contextlib.contextmanager
def _entered(scope: _Scope) -> Iterator[None]:
    token = _SCOPE.set(scope)
    try:
        yield
    finally:
        _SCOPE.reset(token)


@contextlib.contextmanager
def scope(mesh: Mesh) -> Iterator[None]:
    """Where programs are traced: `constrain` finds the mesh and the rules here."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(RULES.items())), _entered(_Scope(mesh, RULES)):
        yield


@contextlib.contextmanager
def decoding(*, prompts: bool = False) -> Iterator[None]:
    """Inside `scope`: where a token a row is read, or, before them, `prompts` at once; by the mesh's `decode` rules.

    Whole prompts are many tokens: weights that are split are gathered for these, as in training.
    """
    outside = _SCOPE.get()
    if outside is None:
        yield
        return
    rules = DECODE_RULES[choices(outside.mesh).decode]
    if prompts:
        rules = {name: axes for name, axes in rules.items() if name != "product_rows"}
    with _entered(replace(outside, rules=rules)):
        yield


def decoding_layout(mesh: Mesh, shape: Sequence[int], axes: Sequence[str | None]) -> NamedSharding:
    """Where `constrain` puts an array inside `decoding`."""
    return NamedSharding(mesh, _Scope(mesh, DECODE_RULES[choices(mesh).decode]).spec(shape, axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Hold an array to the table's layout; outside `scope` it does nothing.

    A mesh axis that does not divide the array's does not split it.
    """
    here = _SCOPE.get()
    if here is None:
        return x
    return jax.lax.with_sharding_constraint(x, here.spec(x.shape, axes))


def to_weights(x: jax.Array, *axes: str | None) -> jax.Array:
    """Lay what goes into a product with weights, or comes out, as their `axes` lie, where the rules leave these so."""
    here = _SCOPE.get()
    if here is None or "product_rows" not in here.rules:
        return x
    return constrain(x, "product_rows", *(None,) * (x.ndim - 1 - len(axes)), *axes)


def moves(axes: Sequence[str | None]) -> bool:
    """Whether the rules here lay an array of these axes out otherwise than training does."""
    here = _SCOPE.get()
    if here is None:
        return False
    wide = {name for name, size in here.mesh.shape.items() if size > 1}
    return any(wide & set(here.rules[axis]) != wide & set(RULES[axis]) for axis in axes if axis is not None)


def splits(axis: str) -> int:
    """Into how many parts the rules split a logical axis here; 1 outside `scope`."""
    here = _SCOPE.get()
    return 1 if here is None else math.prod(here.mesh.shape[name] for name in here.rules[axis])


def passing(rows: int) -> tuple[int, int]:
    """(batch shards, microbatches) of so many rows that pass through the stages.

    Raises UserError where they do not divide so.
    """
    here = _SCOPE.get()
    assert here is not None
    shards, stages = batch_shards(here.mesh.shape), here.mesh.shape["pipeline"]
    chosen = choices(here.mesh).pipeline_microbatches
    check_rows(rows, here.mesh.shape, chosen)
    return shards, chosen or max(n for n in range(stages, 4 * stages + 1, stages) if rows // shards % n == 0)


def over_stages(f: Callable[..., Any], split: tuple[bool, ...], *, opaque: bool = False) -> Callable[..., Any]:
    """`f` run by each stage of the pipeline on its part; the other mesh axes are the compiler's as they were.

    Of arguments that are `split` a stage has its run of the leading axis, of others the whole; all that comes out is
    put together along the leading axis. Whether stages differ in a value is checked, but where `f` is `opaque`: what
    `on_shards` calls does not say so.
    """
    specs = tuple(PartitionSpec("pipeline") if one else PartitionSpec() for one in split)
    out = PartitionSpec("pipeline")
    return jax.shard_map(f, in_specs=specs, out_specs=out, axis_names={"pipeline"}, check_vma=not opaque)


def on_shards(f: Callable[..., jax.Array], *args: Any, axes: Sequence[tuple[str | None, ...]]) -> jax.Array:
    """`f` called by each device on its parts of the arguments, for what the compiler cannot divide.

    `axes` has for each argument the names of the leading axes of its arrays. The result is laid out as the first
    argument is. Outside `scope` it is `f` itself.
    """
    here = _SCOPE.get()
    if here is None:
        return f(*args)

    def spec(x: jax.Array, names: tuple[str | None, ...]) -> PartitionSpec:
        return here.spec(x.shape, (*names, *(None,) * (x.ndim - len(names))))

    specs = tuple(jax.tree.map(lambda x, n=names: spec(x, n), arg) for arg, names in zip(args, axes, strict=True))
    free = set(here.mesh.axis_names) - set(jax.sharding.get_abstract_mesh().manual_axes)  # inside a stage not its axis
    return jax.shard_map(f, in_specs=specs, out_specs=specs[0], axis_names=free, check_vma=False)(*args)


def platform() -> str:
    """Of the devices that a program is traced for: "cpu", "gpu" or "tpu"."""
    here = _SCOPE.get()
    return jax.default_backend() if here is None else here.mesh.devices.flat[0].platform


def unbox(tree: Any) -> Any:
    """Take the boxes with logical axis names off a tree of parameters."""
    return nn.meta.unbox(tree)


def with_axis(boxed: Any) -> Any:
    """The boxes of a tree whose arrays have got one more axis in front, as under `jax.vmap`: no mesh axis splits it."""

    def one(leaf: Any) -> Any:
        return leaf.replace(names=(None, *leaf.names)) if isinstance(leaf, nn.LogicallyPartitioned) else leaf

    return jax.tree.map(one, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def shardings(mesh: Mesh, boxed: Any) -> Any:
    """NamedShardings, without boxes, for a tree of (abstract) arrays, boxed with logical names where they have any.

    Raises UserError where an axis does not divide by its mesh axes.
    """

    def place(path: tuple, leaf: Any) -> Any:
        boxed = isinstance(leaf, nn.LogicallyPartitioned)
        value = leaf.unbox(apply_constraint=False) if boxed else leaf  # it may be a shape alone
        if not jax.tree.leaves(value):  # optax masks a parameter by an empty node inside its box
            return value
        names = leaf.names if boxed else ()
        for axis, size in zip(names, value.shape, strict=False):
            if axis is not None and size % parts(mesh, axis):
                where = jax.tree_util.keystr(path, simple=True, separator="/")
                asked = " × ".join(f"mesh.{name}={mesh.shape[name]}" for name in RULES[axis] if mesh.shape[name] > 1)
                raise UserError(
                    f"{asked} does not divide {size}, the axis {axis!r} of {where} {value.shape}; "
                    f"{one_of(divisors(size))} would"
                )
        return NamedSharding(mesh, PartitionSpec(*(RULES[axis] if axis else None for axis in names)))

    return jax.tree_util.tree_map_with_path(
        place, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    )


def in_shards(layout: Any, tree: Any) -> Any:
    """The shapes and types of a tree of (abstract) arrays, in a layout that `shardings` made, without arrays."""
    return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, layout)


def parts(mesh: Mesh, axis: str | None) -> int:
    """Into how many parts the mesh splits a logical axis of parameters."""
    return 1 if axis is None else math.prod(mesh.shape[name] for name in RULES[axis])


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis is split over the batch axes of the mesh."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


@contextlib.contextmanager
def scope_of_all(whole: Mesh) -> Iterator[None]:
    """Where a program of all replicas, on their mesh, is traced: a `scope` where that of one would be in one."""
    with contextlib.nullcontext() if _SCOPE.get() is None else scope(whole):
        yield


def in_scope_of(mesh: Mesh) -> bool:
    """Whether `scope` is this mesh's, or nobody's."""
    here = _SCOPE.get()
    return here is None or here.mesh == mesh


def stacked(place: NamedSharding) -> NamedSharding:
    """The layout of arrays that lie so, stacked: no mesh axis splits the axis in front."""
    return NamedSharding(place.mesh, PartitionSpec(None, *place.spec))


def of_replicas(whole: Mesh, place: NamedSharding) -> NamedSharding:
    """The layout of arrays of all replicas, stacked, each of which lies so on the mesh of its group."""
    return NamedSharding(whole, PartitionSpec(REPLICA, *place.spec))


def of_one_replica(mesh: Mesh, place: NamedSharding) -> NamedSharding:
    """The layout of one of the stacked arrays on the mesh of its group."""
    return NamedSharding(mesh, PartitionSpec(*place.spec[1:]))


def by_replica(x: jax.Array, whole: Mesh) -> jax.Array:
    """Hold the axis in front of a stacked array to the groups; how they split the others is the compiler's choice."""
    rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, NamedSharding(whole, PartitionSpec(REPLICA, *rest)))


def on_grid(devices: np.ndarray, axes: Sequence[tuple[int, ...]]) -> NamedSharding:
    """A layout over a grid of devices: the grid's dimensions that split each axis of an array, the outermost first."""
    mesh = Mesh(devices, tuple(f"grid{i}" for i in range(devices.ndim)), axis_types=(AxisType.Auto,) * devices.ndim)
    return NamedSharding(mesh, PartitionSpec(*(tuple(f"grid{i}" for i in dims) for dims in axes)))


@dataclass(frozen=True)
class Shard:
    """The rows of each batch that one process reads: the `index`-th of `count` equal runs."""

    index: int = 0
    count: int = 1

    def rows(self, batch_size: int) -> slice:
        """Where the process's rows stand in a whole batch."""
        size = batch_size // self.count
        return slice(self.index * size, (self.index + 1) * size)


def process_shard(mesh: Mesh) -> Shard:
    """The run of rows that this process's devices hold; processes that only share rows' tensors read the same.

    Raises UserError for a mesh on which these rows are no run of their own.
    """
    shards = batch_shards(dict(mesh.shape))
    places = batch_sharding(mesh).addressable_devices_indices_map((shards,)).values()
    held = sorted({row for place in places if place for row in range(shards)[place[0]]})
    first, size = held[0], len(held)
    if held != list(range(first, first + size)) or shards % size or first % size:
        raise UserError(f"mesh {dict(mesh.shape)}: process {jax.process_index()} holds rows that are apart: {held}")
    return Shard(first // size, shards // size)


def local_batch(mesh: Mesh, batch: Batch) -> Batch:
    """Put the rows that `process_shard` says on this process's devices; all processes' together are the batch."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def shard_batch(mesh: Mesh, batch: Batch) -> Batch:
    """Put a host batch, which every process has whole, on the devices, its rows split over them."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: put(np.asarray(x), sharding), batch)


def put(tree: Any, layout: Any) -> Any:
    """Put arrays, of which every process has the whole, into shards: a sharding for all, or a tree of them."""

    def one(leaf: Any, place: jax.sharding.Sharding) -> jax.Array:
        whole = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
        if whole and not place.is_fully_addressable:  # device_put would send it to all processes, to compare
            host = np.asarray(leaf)
            return jax.make_array_from_callback(host.shape, place, lambda index: host[index])
        return jax.device_put(leaf, place)

    if isinstance(layout, jax.sharding.Sharding):
        return jax.tree.map(lambda leaf: one(leaf, layout), tree)
    return jax.tree.map(one, tree, layout)


def largest_of_processes(value: int) -> jax.Array:
    """The largest of the processes' numbers, on its way: every process calls this in the same order."""
    own = np.full(jax.local_device_count(), value, np.int32)
    return _largest(jax.make_array_from_process_local_data(_one_a_device(), own))


@functools.cache
def _one_a_device() -> NamedSharding:
    mesh = jax.make_mesh((jax.device_count(),), ("devices",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("devices"))


_largest = jax.jit(jnp.max)
