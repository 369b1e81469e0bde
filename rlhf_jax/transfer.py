"""Arrays from the devices of one mesh to those of another, and between a device's memory and its host's.

Never is an array whole on a device for it, unless one of the two layouts has it so.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from rlhf_jax.sharding import on_grid

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

    Devices cut the parts of their shards that each target overlaps, these are copied, and the target puts its shard
    together: what crosses is the target's shards, once. (`jax.device_put` alone gathers such an array on the host, and
    waits for it, and knows no way to devices of several processes.) Each process copies between its own devices, of
    which both layouts must have some, the same number in every process; what a process does not have of its targets'
    shards, these fetch from one another afterwards (`landing`).
    Nothing here waits: cuts and copies are queued after what still computes the arrays, and before what may donate
    them. Call it outside `sharding.scope`.
    """
    leaves, structure = jax.tree.flatten(tree)
    kinds = [jax.random.key_impl(leaf) if _is_key(leaf) else None for leaf in leaves]
    plain = [leaf if kind is None else jax.random.key_data(leaf) for leaf, kind in zip(leaves, kinds, strict=True)]
    places: list[Sharding] = structure.flatten_up_to(layout)
    landed = _landed(plain, [landing(x.shape, x.sharding, place) for x, place in zip(plain, places, strict=True)])
    moved = jax.device_put(landed, places)
    return structure.unflatten(
        [x if kind is None else jax.random.wrap_key_data(x, impl=kind) for x, kind in zip(moved, kinds, strict=True)]
    )


def _is_key(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _landed(leaves: Sequence[jax.Array], places: Sequence[Sharding]) -> list[jax.Array]:
    """The arrays in layouts of which each process has all that its devices shall have."""
    plans = [parts(leaf.shape, leaf.sharding, place) for leaf, place in zip(leaves, places, strict=True)]
    wanted = [(index, part) for index, plan in enumerate(plans) for part in plan]
    arrived = _copied(leaves, wanted)
    by_target: dict[Any, list[int]] = defaultdict(list)
    for number, (_, part) in enumerate(wanted):
        by_target[part.target].append(number)
    shards: list[dict[Any, jax.Array]] = [{} for _ in leaves]
    for device, numbers in by_target.items():
        whole = {index: [n for n in numbers if wanted[n][0] == index] for index in {wanted[n][0] for n in numbers}}
        for index, found in whole.items():
            if len(found) == 1:
                shards[index][device] = arrived[found[0]]
        several = [number for number in numbers if len(whole[wanted[number][0]]) > 1]
        boxes = tuple((wanted[number][0], wanted[number][1].box) for number in several)
        for index, shard in _joined(tuple(arrived[number] for number in several), boxes).items():
            shards[index][device] = shard
    return [
        jax.make_array_from_single_device_arrays(
            leaf.shape, place, [held[device] for device in place.addressable_devices_indices_map(leaf.shape)]
        )
        for leaf, place, held in zip(leaves, places, shards, strict=True)
    ]


@functools.lru_cache(maxsize=4096)
def parts(shape: tuple[int, ...], source: Sharding, target: Sharding) -> tuple[Part, ...]:
    """What must cross within this process for an array to change its layout, each part once a target.

    Copies of a shard on several devices serve the targets in turn.
    """
    holders = _holders(source.addressable_devices_indices_map(shape), shape)
    found = []
    for turn, (device, index) in enumerate(target.addressable_devices_indices_map(shape).items()):
        for held, devices in holders.items():
            common = _common(_box(index, shape), held)
            if _volume(common) or not math.prod(shape):
                found.append(Part(devices[turn % len(devices)], device, common))
    return tuple(found)


@functools.lru_cache(maxsize=4096)
def landing(shape: tuple[int, ...], source: Sharding, target: Sharding) -> Sharding:
    """Where each process can put an array on devices of its own: `target`, where it has all that its devices shall
    hold; else each process's block of the source, split over its target devices.

    It is split as the target splits it within a process, and along the axis of the processes' blocks: so that what is
    left is one exchange, and no device need have the whole. Blocks tile the array as a grid does:
    `placement.Disaggregated` refuses meshes of which they do not.
    """
    held, asked = _by_process(source, shape), _by_process(target, shape)
    whole = {process: _hull(boxes.values()) for process, boxes in held.items()}
    if all(_inside(box, whole[process]) for process, boxes in asked.items() for box in boxes.values()):
        return target
    rank = len(shape)
    runs = [sorted(set(ends)) for ends in zip(*whole.values(), strict=True)]  # on each axis, of the processes' blocks
    blocks: dict[Box, list[np.ndarray]] = defaultdict(list)
    for process in sorted(held):
        blocks[whole[process]].append(_local_grid(asked[process], whole[process]))
    (copies,), ((*within, rest),) = (
        {len(found) for found in blocks.values()},
        {x.shape for y in blocks.values() for x in y},
    )
    grid = np.empty((*map(len, runs), copies, *within, rest), object)
    for block, locals_ in blocks.items():
        grid[tuple(run.index(ends) for run, ends in zip(runs, block, strict=True))] = np.stack(locals_)
    parted = [len(run) * size for run, size in zip(runs, within, strict=True)]
    by_blocks = sorted(range(rank), key=lambda axis: len(runs[axis]) == 1)
    split = next((axis for axis in by_blocks if shape[axis] // parted[axis] % rest == 0), None)
    last = (2 * rank + 1,)
    return on_grid(grid, [(axis, rank + 1 + axis, *(last if axis == split else ())) for axis in range(rank)])


def _local_grid(asked: Mapping[Any, Box], held: Box) -> np.ndarray:
    """A process's target devices: along each axis on which they shall have the block that it holds by their parts of
    it, and those of the same parts along one axis more.
    """
    runs = [sorted(set(ends)) for ends in zip(*asked.values(), strict=True)]
    hull = _hull(asked.values())
    sizes = [len(run) if a == b else 1 for run, a, b in zip(runs, hull, held, strict=True)]
    cells: dict[tuple[int, ...], list[Any]] = defaultdict(list)
    for device, box in asked.items():
        at = (run.index(ends) if size > 1 else 0 for run, ends, size in zip(runs, box, sizes, strict=True))
        cells[tuple(at)].append(device)
    grid = np.empty((*sizes, len(asked) // len(cells)), object)
    for at, devices in cells.items():
        grid[at] = devices
    return grid


def are_blocks(held: Mapping[Any, Iterable[Box]]) -> bool:
    """Whether each holder's boxes, which overlap nowhere but where they are the same, are one block together."""
    return all(
        sum(_volume(box) for box in set(boxes)) == _volume(_hull(boxes))
        for boxes in (tuple(found) for found in held.values())
    )


def _by_process(layout: Sharding, shape: tuple[int, ...]) -> dict[int, dict[Any, Box]]:
    held: dict[int, dict[Any, Box]] = defaultdict(dict)
    for device, index in layout.devices_indices_map(shape).items():
        held[device.process_index][device] = _box(index, shape)
    return held


def _holders(indices: Mapping[Any, Any], shape: tuple[int, ...]) -> dict[Box, list[Any]]:
    holders: dict[Box, list[Any]] = defaultdict(list)
    for device, index in indices.items():
        holders[_box(index, shape)].append(device)
    return holders


def _hull(boxes: Iterable[Box]) -> Box:
    return tuple((min(a for a, _ in ends), max(b for _, b in ends)) for ends in zip(*boxes, strict=True))


def _common(one: Box, other: Box) -> Box:
    return tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))


def _inside(box: Box, other: Box) -> bool:
    return _common(box, other) == box


def _volume(box: Box) -> int:
    return math.prod(max(stop - start, 0) for start, stop in box)


def _copied(leaves: Sequence[jax.Array], wanted: Sequence[tuple[int, Part]]) -> list[jax.Array]:
    """Each part of each leaf, cut where it lies, unless it is the whole shard, and copied to where it goes."""
    by_source: dict[Any, list[int]] = defaultdict(list)
    for number, (_, part) in enumerate(wanted):
        by_source[part.source].append(number)
    ready: dict[int, jax.Array] = {}
    for device, numbers in by_source.items():
        used = sorted({wanted[number][0] for number in numbers})
        held = {index: next(s for s in leaves[index].addressable_shards if s.device == device) for index in used}
        lies = {index: _box(shard.index, leaves[index].shape) for index, shard in held.items()}
        ready |= {n: held[wanted[n][0]].data for n in numbers if wanted[n][1].box == lies[wanted[n][0]]}
        cut = [number for number in numbers if number not in ready]
        boxes = tuple((wanted[number][0], wanted[number][1].box) for number in cut)
        starts = tuple((i, tuple(a for a, _ in lies[i])) for i in sorted({index for index, _ in boxes}))
        pieces = _cut({index: held[index].data for index, _ in starts}, starts, boxes)
        ready.update(zip(cut, pieces, strict=True))
    return jax.device_put([ready[n] for n in range(len(wanted))], [part.target for _, part in wanted])


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


def _box(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Box:
    assert index is not None  # as it is for a device that holds nothing of an array: of no layout that is here
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
