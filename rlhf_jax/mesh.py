"""The device mesh: its axes and their sizes, and what must divide over it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh

from rlhf_jax.errors import UserError

AXES = ("data", "pipeline", "fsdp", "expert", "sequence", "tensor")
"""The mesh's axes; the later one stands, the nearer are the devices that exchange along it."""

REPLICA = "replica"
"""The axis of the mesh of a sweep's runs, in front of the others."""

Decode = Literal["gathered", "split"]


@dataclass(frozen=True)
class MeshConfig:
    """Axes of the device mesh; the product of their sizes is the number of devices."""

    data: int = -1
    """Data parallelism: copies of the parameters; -1 fills with the devices that the other axes leave."""
    fsdp: int = 1
    """Fully sharded data parallelism: the batch and the parameters are split."""
    tensor: int = 1
    """Tensor parallelism: heads, hidden units and vocabulary are split."""
    sequence: int = 1
    """Sequence parallelism: the tokens of each row are split, for long rows; attention gathers keys and values. Rows
    are padded to a length that it divides."""
    expert: int = 1
    """Expert parallelism: the experts of a mixture are split."""
    pipeline: int = 1
    """Pipeline parallelism: the layers are split into stages, through which the parts of a batch pass."""
    pipeline_microbatches: int | None = None
    """Parts that pass through the stages one after another (GPipe): a multiple of `pipeline` that divides the rows of
    a (micro)batch on a device. None: the largest such one up to 4 × `pipeline`, which leaves a fifth of the time idle
    at most."""
    replica: int = 1
    """Of a sweep: the devices are split into so many groups, each with its share of the runs on a mesh of its own,
    which the other axes make. A single run has none."""
    decode: Decode = "gathered"
    """Where weights lie while a policy samples. gathered: once before the first token each device gets whole
    kernels, in the type that products take, split by tensor and expert alone. split: they stay as far apart as in
    training, and the activations of each token travel instead: no more memory, slower."""

    def __post_init__(self) -> None:
        for name, size in self._sizes().items():
            if size < 1 and size != -1:
                raise ValueError(f"mesh.{name} must be at least 1, or -1 to fill, got {size}")
        if sum(size == -1 for size in self._sizes().values()) > 1:
            raise ValueError("mesh: only one axis may be -1")
        if self.replica < 1:
            raise ValueError(f"mesh.replica must be at least 1, got {self.replica}")
        if self.pipeline_microbatches is not None and self.pipeline_microbatches < 1:
            raise ValueError(f"mesh.pipeline_microbatches must be at least 1, got {self.pipeline_microbatches}")

    @property
    def fixed_devices(self) -> int:
        """Devices asked for by the axes that are not -1."""
        return self.replica * math.prod(size for size in self._sizes().values() if size != -1)

    def resolve(self, devices: int) -> dict[str, int]:
        """Size of each axis on so many devices, of one run."""
        if self.replica > 1:
            raise UserError(f"mesh.replica={self.replica} splits the runs of a sweep; one run has none: leave it 1")
        sizes = self._sizes()
        if -1 not in sizes.values() and self.fixed_devices != devices:
            raise UserError(f"mesh asks for {self.fixed_devices} devices, {devices} found; set one axis to -1 to fill")
        if devices % self.fixed_devices:
            raise UserError(
                f"mesh asks for a multiple of {self.fixed_devices} devices, {devices} found; "
                f"the sizes given must multiply to {one_of(divisors(devices))}"
            )
        fill = devices // self.fixed_devices
        sizes = {name: fill if size == -1 else size for name, size in sizes.items()}
        if self.pipeline_microbatches is not None and self.pipeline_microbatches % sizes["pipeline"]:
            raise UserError(
                f"mesh.pipeline_microbatches={self.pipeline_microbatches} must be a multiple of "
                f"mesh.pipeline={sizes['pipeline']}"
            )
        return sizes

    def _sizes(self) -> dict[str, int]:
        return {name: vars(self)[name] for name in AXES}


_CONFIGS: dict[Mesh, MeshConfig] = {}  # JAX has one object for equal meshes, which can hold no fields of ours


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over these devices, or all there are; its axes are Auto, as flax.linen wants them.

    Slices of TPUs lie along the data axis, so that parameters never cross the network between them; a mesh axis
    may take a part of an axis of the torus. Raises UserError where slices or torus do not divide so. Of several
    configs that give the same mesh, the last one's choices hold.
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
    mesh = Mesh(grid, tuple(sizes), axis_types=types)
    _CONFIGS[mesh] = config
    return mesh


def replica_meshes(config: MeshConfig, devices: Sequence[Any]) -> tuple[Mesh, list[Mesh]]:
    """The mesh of all replicas, with the axis REPLICA in front, and each group's, a run of the devices.

    Raises UserError where the devices do not make such groups.
    """
    if len(devices) % config.replica:
        raise UserError(
            f"mesh.replica={config.replica} does not divide the {len(devices)} devices found; "
            f"{one_of(divisors(len(devices)))} would"
        )
    size, own = len(devices) // config.replica, replace(config, replica=1)
    try:
        groups = [make_mesh(own, devices[start : start + size]) for start in range(0, len(devices), size)]
    except UserError as error:
        raise UserError(f"{error} (in each of the {config.replica} groups of mesh.replica)") from None
    grid = np.stack([mesh.devices for mesh in groups])
    whole = Mesh(grid, (REPLICA, *groups[0].axis_names), axis_types=(AxisType.Auto,) * grid.ndim)
    _CONFIGS[whole] = own
    return whole, groups


def slice_index(device: Any) -> int:
    """Which slice of TPUs a device belongs to; 0 where there is one."""
    try:
        return device.slice_index
    except AttributeError:  # libtpu numbers slices where there are several alone
        return 0


def single_device_mesh() -> Mesh:
    """A mesh of the first device alone."""
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def batch_shards(sizes: Mapping[str, int]) -> int:
    """Into how many parts the rows of a batch are split."""
    return sizes["data"] * sizes["fsdp"]


def row_multiple(mesh: Mesh) -> int:
    """What the rows of every (micro)batch must be a multiple of: its shards times the parts that pass the stages."""
    return batch_shards(mesh.shape) * _passing(mesh.shape, choices(mesh).pipeline_microbatches)


def check_rows(rows: int, sizes: Mapping[str, int], microbatches: int | None, *, whose: str = "mesh") -> None:
    """Raise UserError where rows do not divide over the mesh of a field, with its `pipeline_microbatches`."""
    shards, passing = batch_shards(sizes), _passing(sizes, microbatches)
    if rows % (shards * passing) == 0:
        return
    stages = f" × {passing} parts that pass {sizes['pipeline']} pipeline stages" if passing > 1 else ""
    below = rows // (shards * passing) * shards * passing
    would = one_of([multiple for multiple in (below, below + shards * passing) if multiple])
    raise UserError(
        f"{rows} rows do not divide over the {shards} batch shards of the {whose}, "
        f"data {sizes['data']} × fsdp {sizes['fsdp']}{stages}; {would} would"
    )


def _passing(sizes: Mapping[str, int], microbatches: int | None) -> int:
    """The fewest parts of a device's rows that pass the stages one after another; 1 without stages."""
    return 1 if sizes["pipeline"] == 1 else microbatches or sizes["pipeline"]


def divisors(number: int) -> list[int]:
    """All of a positive number, smallest first."""
    return [size for size in range(1, number + 1) if number % size == 0]


def choices(mesh: Mesh) -> MeshConfig:
    """The choices that a mesh was made with; the defaults for one that was not made here."""
    return _CONFIGS.get(mesh, MeshConfig())


def one_of(numbers: Sequence[int]) -> str:
    """`1, 2 or 4`, the middle left out of long lists."""
    words = [str(number) for number in numbers]
    if len(words) > 6:
        words = [*words[:3], "…", *words[-2:]]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
