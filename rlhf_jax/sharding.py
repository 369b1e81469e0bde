"""The device mesh and the rules, which mesh axes carry which logical axis; nothing else names PartitionSpec."""

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import spmd
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rlhf_jax.errors import UserError
from rlhf_jax.types import Batch

# Parameters are split along "embed" by FSDP and along heads, hidden units and vocabulary by tensor parallelism.
RULES = (
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("expert", "expert"),
    ("layers", None),
)


@dataclass(frozen=True)
class MeshConfig:
    """Axes of the device mesh; the product of their sizes is the number of devices."""

    data: int = -1
    """Data parallelism: copies of the parameters; -1 fills with the devices that the other axes leave."""
    fsdp: int = 1
    """Fully sharded data parallelism: the batch and the parameters are split."""
    tensor: int = 1
    """Tensor parallelism: heads, hidden units and vocabulary are split."""
    expert: int = 1
    """Expert parallelism: the experts of a mixture are split."""

    def __post_init__(self) -> None:
        sizes = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"mesh.{name} must be at least 1, or -1 to fill, got {size}")
        if sum(size == -1 for size in sizes.values()) > 1:
            raise ValueError("mesh: only one axis may be -1")

    @property
    def fixed_devices(self) -> int:
        """Devices asked for by the axes that are not -1."""
        return math.prod(size for size in self._sizes() if size != -1)

    def resolve(self, devices: int) -> dict[str, int]:
        """Size of each axis on so many devices."""
        sizes = self._sizes()
        if -1 not in sizes and self.fixed_devices != devices:
            raise UserError(f"mesh asks for {self.fixed_devices} devices, {devices} found; set one axis to -1 to fill")
        if devices % self.fixed_devices:
            raise UserError(f"mesh asks for a multiple of {self.fixed_devices} devices, {devices} found")
        fill = devices // self.fixed_devices
        return {field.name: fill if size == -1 else size for field, size in zip(fields(self), sizes, strict=True)}

    def _sizes(self) -> tuple[int, ...]:
        return self.data, self.fsdp, self.tensor, self.expert


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over these devices, or all there are; its axes are Auto, as flax.linen wants them.

    Slices of TPUs lie along the data axis, so that parameters never cross the network between them; a mesh axis
    may take a part of an axis of the torus. Raises UserError where slices or torus do not divide so.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.resolve(len(devices))
    types, slices = (AxisType.Auto,) * len(sizes), len({slice_index(device) for device in devices})
    if sizes["data"] % slices:
        raise UserError(f"mesh.data={sizes['data']} must be a multiple of the {slices} slices, which it spans")
    within = (sizes["data"] // slices, *list(sizes.values())[1:])
    across = (slices,) + (1,) * (len(sizes) - 1)
    try:
        if slices == 1:
            grid = create_device_mesh(within, devices, allow_split_physical_axes=True)
        else:
            grid = create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    except NotImplementedError:
        raise UserError(f"mesh {sizes} does not lie on the torus of these {len(devices)} devices") from None
    return Mesh(grid, tuple(sizes), axis_types=types)


def slice_index(device: Any) -> int:
    """Which slice of TPUs a device belongs to; 0 where there is one."""
    try:
        return device.slice_index
    except AttributeError:  # libtpu numbers slices where there are several alone
        return 0


def single_device_mesh() -> Mesh:
    """A mesh of the first device alone."""
    sizes = {field.name: 1 for field in fields(MeshConfig)}
    device = jax.devices()[:1]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=device)


def batch_shards(sizes: dict[str, int]) -> int:
    """Into how many parts the rows of a batch are split."""
    return sizes["data"] * sizes["fsdp"]


@contextlib.contextmanager
def scope(mesh: Mesh) -> Iterator[None]:
    """Where programs are traced: `constrain` finds the mesh and the rules here."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Hold an activation to the table's layout; outside `scope` it does nothing."""
    return spmd.with_logical_constraint(x, axes)


def unbox(tree: Any) -> Any:
    """Take the boxes with logical axis names off a tree of parameters."""
    return nn.meta.unbox(tree)


def shardings(mesh: Mesh, boxed: Any) -> Any:
    """NamedShardings, without boxes, for a tree of (abstract) arrays, boxed with logical names where they have any.

    Raises UserError where an axis does not divide by its mesh axes.
    """

    def place(path: tuple, leaf: Any) -> Any:
        boxed = isinstance(leaf, nn.LogicallyPartitioned)
        value = leaf.unbox(apply_constraint=False) if boxed else leaf  # it may be a shape alone
        if not jax.tree.leaves(value):  # optax masks a parameter by an empty node inside its box
            return value
        spec = spmd.logical_to_mesh_axes(leaf.names if boxed else (), RULES) or PartitionSpec()
        sharding = NamedSharding(mesh, spec)
        try:
            sharding.shard_shape(value.shape)
        except ValueError:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(
                f"mesh {dict(mesh.shape)}: {name} of shape {value.shape} does not divide by {spec}"
            ) from None
        return sharding

    return jax.tree_util.tree_map_with_path(
        place, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    )


def in_shards(layout: Any, tree: Any) -> Any:
    """The shapes and types of a tree of (abstract) arrays, in a layout that `shardings` made, without arrays."""
    return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, layout)


def parts(mesh: Mesh, axis: str | None) -> int:
    """Into how many parts the mesh splits a logical axis."""
    carriers = dict(RULES)[axis] if axis is not None else None
    names = (carriers,) if isinstance(carriers, str) else carriers or ()
    return math.prod(mesh.shape[name] for name in names)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis is split over the batch axes of the mesh."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


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
