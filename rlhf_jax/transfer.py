"""Arrays from the devices of one mesh to those of another, and between a device's memory and its host's.

Never is an array whole on a device for it, unless one of the two layouts has it so.
"""

import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

Box = tuple[tuple[int, int], ...]
"""A block of an array: where it starts and stops on each axis."""

HOST = "pinned_host"
"""The memory of the host that devices read and write by themselves."""


class Part(NamedTuple):
    """What of an array goes from one device to another."""

    source: Any
    target: Any
    box: Box


def move(tree: Any, layout: Any) -> Any:
    """A tree of arrays copied into a layout (a tree of shardings, as `sharding.shardings` makes it) on other devices.

    Where both layouts split an array alike, its shards are copied as they are. Elsewhere the devices cut the parts of
    their shards that each target overlaps, these are copied, and the target puts its shard together: what crosses is
    the target's shards, once. (`jax.device_put` alone gathers such an array on the host, and waits for it.)
    Nothing here waits: cuts and copies are queued after what still computes the arrays, and before what may donate
    them. Call it outside `sharding.scope`. All devices must be of this process.
    """
    leaves, structure = jax.tree.flatten(tree)
    places: list[Sharding] = structure.flatten_up_to(layout)
    plans = [parts(leaf.shape, leaf.sharding, place) for leaf, place in zip(leaves, places, strict=True)]
    out = [
        leaf if plan else jax.device_put(leaf, place) for leaf, plan, place in zip(leaves, plans, places, strict=True)
    ]
    wanted = [(index, part) for index, plan in enumerate(plans) for part in plan]
    arrived = _copied(leaves, wanted)
    by_target: dict[Any, list[int]] = defaultdict(list)
    for number, (_, part) in enumerate(wanted):
        by_target[part.target].append(number)
    shards: dict[int, dict[Any, jax.Array]] = defaultdict(dict)
    for device, numbers in by_target.items():
        boxes = tuple((wanted[number][0], wanted[number][1].box) for number in numbers)
        for index, shard in _joined(tuple(arrived[number] for number in numbers), boxes).items():
            shards[index][device] = shard
    for index, by_device in shards.items():
        place = places[index]
        arrays = [by_device[device] for device in place.addressable_devices_indices_map(leaves[index].shape)]
        out[index] = jax.make_array_from_single_device_arrays(leaves[index].shape, place, arrays)
    return structure.unflatten(out)


@functools.lru_cache(maxsize=4096)
def parts(shape: tuple[int, ...], source: Sharding, target: Sharding) -> tuple[Part, ...]:
    """What must cross for an array to change its layout, each part once a target; nothing where shards go as they are.

    Copies of a shard on several devices serve the targets in turn.
    """
    holders: dict[Box, list[Any]] = defaultdict(list)
    for device, index in source.devices_indices_map(shape).items():
        holders[_box(index, shape)].append(device)
    targets = {device: _box(index, shape) for device, index in target.devices_indices_map(shape).items()}
    if set(targets.values()) <= set(holders):
        return ()
    found = []
    for turn, (device, box) in enumerate(targets.items()):
        for held, devices in holders.items():
            common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, held, strict=True))
            if all(start < stop for start, stop in common):
                found.append(Part(devices[turn % len(devices)], device, common))
    return tuple(found)


def _copied(leaves: Sequence[jax.Array], wanted: Sequence[tuple[int, Part]]) -> list[jax.Array]:
    """Each part of each leaf, cut where it lies and copied to where it goes."""
    by_source: dict[Any, list[int]] = defaultdict(list)
    for number, (_, part) in enumerate(wanted):
        by_source[part.source].append(number)
    cut: dict[int, jax.Array] = {}
    for device, numbers in by_source.items():
        used = sorted({wanted[number][0] for number in numbers})
        held = {index: next(s for s in leaves[index].addressable_shards if s.device == device) for index in used}
        boxes = tuple((wanted[number][0], wanted[number][1].box) for number in numbers)
        starts = tuple((i, tuple(a for a, _ in _box(shard.index, leaves[i].shape))) for i, shard in held.items())
        pieces = _cut({index: shard.data for index, shard in held.items()}, starts, boxes)
        cut.update(zip(numbers, pieces, strict=True))
    return jax.device_put([cut[n] for n in range(len(wanted))], [part.target for _, part in wanted])


@functools.partial(jax.jit, static_argnums=(1, 2))
def _cut(
    shards: dict[int, jax.Array], starts: tuple[tuple[int, tuple[int, ...]], ...], boxes: tuple[tuple[int, Box], ...]
) -> list[jax.Array]:
    """Of one device's shards, which begin at `starts` in their arrays, the boxes of the arrays."""
    begins = dict(starts)
    return [
        shards[index][tuple(slice(a - s, b - s) for (a, b), s in zip(box, begins[index], strict=True))]
        for index, box in boxes
    ]


@functools.partial(jax.jit, static_argnums=1)
def _joined(pieces: tuple[jax.Array, ...], boxes: tuple[tuple[int, Box], ...]) -> dict[int, jax.Array]:
    """One device's shards, each of its pieces."""
    by_leaf: dict[int, list[tuple[Box, jax.Array]]] = defaultdict(list)
    for (index, box), piece in zip(boxes, pieces, strict=True):
        by_leaf[index].append((box, piece))
    return {index: _block(found, 0) for index, found in by_leaf.items()}


def _block(pieces: list[tuple[Box, jax.Array]], axis: int) -> jax.Array:
    """The block that pieces tile, from `axis` on."""
    if axis == pieces[0][1].ndim:
        return pieces[0][1]
    rows: dict[int, list[tuple[Box, jax.Array]]] = defaultdict(list)
    for box, piece in pieces:
        rows[box[axis][0]].append((box, piece))
    blocks = [_block(rows[start], axis + 1) for start in sorted(rows)]
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis)


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    return tuple(one.indices(size)[:2] for one, size in zip(index, shape, strict=True))


def to_host(tree: Any, *, donate: bool = False) -> Any:
    """Copies of arrays, in the same shards, in the host's memory; `donate`: the devices let go of the arrays."""
    kept = jax.device_put(tree, _in_memory(tree, HOST))
    if donate:  # not device_put's own: it cannot, from one memory to another
        for leaf in jax.tree.leaves(tree):
            leaf.delete()
    return kept


def to_device(tree: Any) -> Any:
    """Copies of arrays that are in the host's memory, in the same shards, in the device's."""
    return jax.device_put(tree, _in_memory(tree, "device"))


def _in_memory(tree: Any, kind: str) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind(kind), tree)
