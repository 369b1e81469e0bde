"""Which devices hold and run which role of an on-policy stage: all of them every one, or some each.

The roles are the policy that trains, the critic, the optimisers' states of both, the policy that samples, the frozen
reference and the reward model.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jax.sharding import Mesh

from rlhf_jax.errors import UserError
from rlhf_jax.numerics import require
from rlhf_jax.sharding import MeshConfig, make_mesh, slice_index
from rlhf_jax.transfer import HOST, Box, are_blocks

Idle = Literal["reference", "reward", "critic", "optimizers"]
"""A role that does nothing for a while: reference and reward model but when they score, the critic and the optimisers'
states while completions are sampled and scored."""


class Meshes(NamedTuple):
    """The sub-meshes, by name; where roles are colocated, the same one twice."""

    training: Mesh
    """Of policy and critic."""
    sampling: Mesh
    """Of the policy that samples, the reference and the reward model."""


@dataclass(frozen=True)
class Colocated:
    """Every role on the experiment's whole mesh, one phase after the other."""

    offload: tuple[Idle, ...] = ()
    """Roles that wait in their host's memory while they are idle: reference, reward, critic, optimizers. Weights that
    several networks share (the base under adapters) stay where they are."""

    def __post_init__(self) -> None:
        if len(set(self.offload)) < len(self.offload):
            raise ValueError(f"offload: a role stands there twice: {', '.join(self.offload)}")

    def meshes(self, mesh: Mesh) -> Meshes:
        """The experiment's mesh; UserError where a role cannot wait."""
        if self.offload:
            device = mesh.devices.flat[0]
            check_memories(device.platform, [memory.kind for memory in device.addressable_memories()])
        return Meshes(mesh, mesh)

    @property
    def ahead(self) -> int:
        """Rollouts are made when they are learned from."""
        return 0

    def sizes(self, devices: int) -> dict[str, dict[str, int]]:
        """No sub-meshes."""
        del devices
        return {}


@dataclass(frozen=True)
class Disaggregated:
    """The devices in two: one part samples and scores, the other updates policy and critic, both at once; every
    host has its share of each.

    Let θ_k be the policy after k iterations. With `ahead=1` iteration k turns θ_{k−1} into θ_k by rollout k, while
    rollout k+1 is sampled, and scored, by a copy of θ_{k−1}, the newest that there is then: a rollout is one iteration
    old when it is learned from, the first alone is not. With `ahead=0` rollout k is θ_{k−1}'s own, one part waits while
    the other works, and the numbers are those of `Colocated`.

    A rollout's `logps` are those of the policy that wrote it, and so are its KL and rewards. The loss is decoupled
    PPO's (Hilton et al. 2022, "Batch size-invariance for policy optimization"; Fu et al. 2025, AReaL): the clip
    range is around π_prox, the policy that the iteration starts from, and each token's loss is weighed by
    π_prox/π_behaviour, cut to `max_weight` (`importance.token_weights`). PPO's own ratio π/π_behaviour would be right
    as a weight, but hold the policy to a stale one, and lose the tokens that have left its clip range already.
    """

    sampling: MeshConfig
    """Axes over the devices that hold the sampling policy, the reference and the reward model."""
    training: MeshConfig
    """Axes over the devices that hold policy and critic with their optimisers. -1, in one of the two, fills with the
    devices that the other leaves."""
    ahead: Literal[0, 1] = 1
    """Iterations that rollouts are made ahead."""
    max_weight: float = 2.0
    """Largest importance weight of a token of a rollout made ahead."""

    def __post_init__(self) -> None:
        if self.ahead not in (0, 1):
            raise ValueError(f"ahead must be 0 or 1, got {self.ahead}")
        require("max_weight", self.max_weight, "[1, inf)")
        if _fills(self.sampling) and _fills(self.training):
            raise ValueError("sampling, training: only one of the two may have an axis of -1, which fills")

    @property
    def offload(self) -> tuple[Idle, ...]:
        """Nobody waits: each part has its own work."""
        return ()

    def sizes(self, devices: int) -> dict[str, dict[str, int]]:
        """Size of each axis of both sub-meshes on so many devices; UserError where these do not make them."""
        configs = {"sampling": self.sampling, "training": self.training}
        taken = {name: config.fixed_devices for name, config in configs.items() if not _fills(config)}
        rest = devices - sum(taken.values())
        if len(taken) == 2 and rest:
            raise UserError(
                f"sampling and training: {taken['sampling']} and {taken['training']} devices do not add up to the "
                f"{devices} found; an axis of -1 fills"
            )
        found = {}
        for name, config in configs.items():
            if name not in taken and (rest < 1 or rest % config.fixed_devices):
                (other,) = taken
                raise UserError(
                    f"{name}: asks for a multiple of {config.fixed_devices} devices, and {other} leaves "
                    f"{max(rest, 0)} of the {devices} found"
                )
            found[name] = config.resolve(taken.get(name, rest))
        return found

    def meshes(self, mesh: Mesh) -> Meshes:
        """Of each process the first devices for training, the others for sampling, neighbours together.

        Weights and rollouts then go from one sub-mesh to the other inside a host. Raises UserError where the devices do
        not make both, or those of a process not the same part of each.
        """
        devices = _neighbours(list(mesh.devices.flat))
        sizes = {name: math.prod(axes.values()) for name, axes in self.sizes(len(devices)).items()}
        processes = sorted({device.process_index for device in devices})
        for name, size in sizes.items():
            if size % len(processes):
                raise UserError(
                    f"{name}: {size} devices are not the same number of each of the {len(processes)} processes; "
                    "every host has a part of both sub-meshes"
                )
        count = sizes["training"] // len(processes)
        own = [[device for device in devices if device.process_index == process] for process in processes]
        return Meshes(
            _mesh("training", self.training, [device for part in own for device in part[:count]]),
            _mesh("sampling", self.sampling, [device for part in own for device in part[count:]]),
        )


Placement = Colocated | Disaggregated


def check_memories(platform: str, kinds: Sequence[str]) -> None:
    """Raise UserError unless the host's memory is among those that a device reaches."""
    if HOST not in kinds:
        raise UserError(f"offload: {platform} devices reach no {HOST} memory, only {', '.join(kinds)}; leave it empty")


def _fills(config: MeshConfig) -> bool:
    return -1 in dataclasses.astuple(config)


def _neighbours(devices: list[Any]) -> list[Any]:
    """In an order whose runs lie together: of a torus, one slab along its longest side after the other."""
    if devices[0].platform != "tpu":
        return sorted(devices, key=lambda device: device.id)
    sides = [len({device.coords[axis] for device in devices}) for axis in range(3)]
    axes = sorted(range(3), key=lambda axis: -sides[axis])
    return sorted(devices, key=lambda device: (slice_index(device), *(device.coords[a] for a in axes), device.id))


def _mesh(name: str, config: MeshConfig, devices: Sequence[Any]) -> Mesh:
    try:
        mesh = make_mesh(config, devices)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except AssertionError:  # mesh_utils', of TPUs that are no box of the torus
        raise UserError(f"{name}: {len(devices)} devices are no box of the torus; take whole slabs of it") from None
    cells: dict[int, list[Box]] = defaultdict(list)
    for at, device in np.ndenumerate(mesh.devices):
        cells[device.process_index].append(tuple((i, i + 1) for i in at))
    if not are_blocks(cells):
        raise UserError(
            f"{name}: the {len(devices) // len(cells)} devices of a process are no block of the mesh "
            f"{dict(mesh.shape)}; axes that divide them, or that they divide, make one"
        )
    return mesh
