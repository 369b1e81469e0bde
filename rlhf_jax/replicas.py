"""The replicas of a sweep, split over groups of devices: a `lockstep.Spread`."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from rlhf_jax import sharding
from rlhf_jax.mesh import REPLICA, MeshConfig, replica_meshes

Rows = Sequence[Sequence[Any]]
"""Of each replica the leaves of its arguments."""


class Groups:
    """Groups of devices, each with a mesh of its own, on which its replicas' arrays lie between calls.

    A call of all is one program over the mesh of all groups, with the axis REPLICA in front. What goes in is stacked
    within each group, what comes out is parted there: no array of a replica is ever on another group's devices.
    """

    axis = REPLICA

    def __init__(self, config: MeshConfig, devices: Sequence[Any]) -> None:
        """`config.replica` groups; UserError where the devices do not make them."""
        self.whole, self.meshes = replica_meshes(config, devices)

    def holds(self, home: int, leaves: Sequence[Any], out_shardings: Any) -> bool:
        """Whether a program of these leaves, called here, is one of a group's own mesh: not of a part of it.

        With pipeline stages none is: jax 0.10 does not map a `shard_map` that is manual over some axes over another.
        """
        mesh = self.meshes[home]
        devices, arrays = set(mesh.devices.flat), [x for x in leaves if isinstance(x, jax.Array)]
        places = jax.tree.leaves(out_shardings)
        return (
            mesh.shape["pipeline"] == 1
            and sharding.in_scope_of(mesh)
            and all(isinstance(place, NamedSharding) and place.mesh == mesh for place in places)
            and all(not x.committed or x.sharding.device_set == devices for x in arrays)
        )

    def of_all(self, mapped: Callable[..., Any], out_shardings: Any) -> Callable[..., list[Any]]:
        """Compile a function of stacked leaves, (donated, kept, shared), for rows of leaves: one outcome a row."""
        compiled = self.compiled(mapped, out_shardings)

        def call(given: Rows, kept: Rows, shared: list[Any]) -> list[Any]:
            stacked = self.stacked(given), self.stacked(kept)
            for leaf in (leaf for row in given for leaf in row if isinstance(leaf, jax.Array)):
                leaf.delete()
            with sharding.scope_of_all(self.whole):
                outcome = compiled(*stacked, shared)
            leaves, tree = jax.tree.flatten(outcome)
            return [tree.unflatten(row) for row in self.parted(leaves, len(given))]

        return call

    def compiled(self, mapped: Callable[..., Any], out_shardings: Any) -> Any:
        """The program of stacked leaves, on the mesh of all groups; its outcome is stacked."""

        def of_groups(given: list[Any], kept: list[Any], shared: list[Any]) -> Any:
            outcome = mapped(given, kept, shared)
            return jax.tree.map(lambda x: sharding.by_replica(x, self.whole), outcome)

        layout = jax.tree.map(lambda place: sharding.of_replicas(self.whole, place), out_shardings)
        return jax.jit(of_groups, donate_argnums=0, out_shardings=layout)

    def stacked(self, rows: Rows) -> list[jax.Array]:
        """One array for each leaf of all replicas, its first axis split over the groups."""
        share, own = len(rows) // len(self.meshes), []
        for home, mesh in enumerate(self.meshes):
            mine = [[_laid(mesh, x) for x in row] for row in rows[home * share : (home + 1) * share]]
            with jax.set_mesh(mesh):
                own.append(_stack(tuple(sharding.stacked(_place(x)) for x in mine[0]))(mine))
        return [self._joined(xs, len(rows)) for xs in zip(*own, strict=True)]

    def parted(self, leaves: Sequence[jax.Array], n: int) -> list[list[jax.Array]]:
        """The leaves of each of n replicas, on the mesh of its group."""
        rows, share = list[list[jax.Array]](), n // len(self.meshes)
        for mesh in self.meshes:
            places = tuple(sharding.of_one_replica(mesh, _place(x)) for x in leaves)
            own = [
                _of_shards((share, *x.shape[1:]), sharding.stacked(place), [x])
                for x, place in zip(leaves, places, strict=True)
            ]
            with jax.set_mesh(mesh):
                rows += _part(places, share)(own)
        return rows

    def _joined(self, xs: Sequence[jax.Array], n: int) -> jax.Array:
        one = sharding.of_one_replica(self.meshes[0], _place(xs[0]))
        return _of_shards((n, *xs[0].shape[1:]), sharding.of_replicas(self.whole, one), xs)


def _place(x: jax.Array) -> NamedSharding:
    """That of an array on a mesh."""
    assert isinstance(x.sharding, NamedSharding)
    return x.sharding


def _laid(mesh: Mesh, x: Any) -> jax.Array:
    """An array as it lies on the mesh; what lies on no device in particular, on each."""
    if isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding) and x.sharding.mesh == mesh:
        return x
    return jax.device_put(x, sharding.replicated(mesh))


def _of_shards(shape: tuple[int, ...], place: NamedSharding, arrays: Sequence[jax.Array]) -> jax.Array:
    """An array of the shards that its devices have of some others: nothing is copied."""
    held = {shard.device: shard.data for x in arrays for shard in x.addressable_shards}
    return jax.make_array_from_single_device_arrays(
        shape, place, [held[device] for device in place.addressable_devices_indices_map(shape)]
    )


@functools.cache
def _stack(places: tuple[NamedSharding, ...]) -> Callable[[Rows], list[jax.Array]]:
    return jax.jit(lambda rows: [jnp.stack(xs) for xs in zip(*rows, strict=True)], out_shardings=list(places))


@functools.cache
def _part(places: tuple[NamedSharding, ...], n: int) -> Callable[[list[jax.Array]], list[list[jax.Array]]]:
    return jax.jit(lambda xs: [[x[i] for x in xs] for i in range(n)], out_shardings=[list(places)] * n)
