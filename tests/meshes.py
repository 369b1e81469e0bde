"""The meshes on which everything is as on one device, and what a compiled program may hold of what they split."""

from collections import Counter

import jax
from jax.sharding import Mesh

from rlhf_jax.plan.hlo import Module
from rlhf_jax.sharding import MeshConfig, make_mesh

DENSE = {
    "data of 8": MeshConfig(data=8),
    "fsdp of 4": MeshConfig(data=1, fsdp=4),
    "tensor": MeshConfig(data=1, tensor=4),
    "sequence": MeshConfig(data=1, sequence=4),
    "pipeline": MeshConfig(data=1, pipeline=4),
    "data × fsdp × tensor": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp × sequence × tensor": MeshConfig(data=1, fsdp=2, sequence=2, tensor=2),
    "data × pipeline × tensor": MeshConfig(data=2, pipeline=2, tensor=2),
}
"""For any model: four key and value heads and four layers, or a multiple."""

STAGES_AND_LENGTHS = MeshConfig(data=1, fsdp=2, pipeline=2, sequence=2, pipeline_microbatches=4)
EXPERTS = {
    "expert": MeshConfig(data=2, expert=4),
    "data × expert × pipeline": MeshConfig(data=2, expert=2, pipeline=2),
}
"""For a mixture of four experts, or a multiple."""


def mesh_of(config: MeshConfig) -> Mesh:
    """Over the first devices, as many as it asks for."""
    return make_mesh(config, jax.devices()[: config.fixed_devices])


def shapes(module: Module) -> Counter[tuple[int, ...]]:
    """The dimensions, in any order, of all arrays that a device holds; axes of one entry do not count."""
    return Counter(
        tuple(sorted(size for size in array.dims if size > 1))
        for computation in module.computations.values()
        for instruction in computation.values()
        for array in instruction.arrays
    )
