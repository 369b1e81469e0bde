"""Arrays keep their values from one layout to another, and no device holds more than the two layouts say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models, sharding, transfer
from rlhf_jax.models import ModelSpec
from rlhf_jax.sharding import MeshConfig, make_mesh

SPEC = ModelSpec(vocab_size=32, d_model=16, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=4, d_ff=32, max_len=16)
BOXED = jax.eval_shape(lambda: models.init(SPEC, jax.random.key(0)))
SPLITS = {
    "a column of a row": (4, MeshConfig(data=1, fsdp=4), MeshConfig(data=2, tensor=2)),
    "many to few": (6, MeshConfig(data=3, fsdp=2), MeshConfig(data=1, tensor=2)),
    "few to many": (2, MeshConfig(data=1, fsdp=2), MeshConfig(data=3, tensor=2)),
    "two axes": (4, MeshConfig(data=1, fsdp=2, tensor=2), MeshConfig(data=1, fsdp=4)),
    "alike": (4, MeshConfig(data=2, fsdp=2), MeshConfig(data=2, fsdp=2)),
}


def layouts(name):
    count, source, target = SPLITS[name]
    meshes = make_mesh(source, jax.devices()[:count]), make_mesh(target, jax.devices()[count:])
    return tuple(sharding.shardings(mesh, BOXED) for mesh in meshes)


@pytest.mark.parametrize("name", ["a column of a row", "alike"])
@pytest.mark.usefixtures("compile_quickly")
def test_a_model_moves_from_shards_to_shards(name):
    source, target = layouts(name)
    rng = np.random.default_rng(0)
    plain = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), sharding.unbox(BOXED))
    params = jax.device_put(plain, source)
    moved = transfer.move(params, target)
    for leaf in jax.tree.leaves(params):
        leaf.delete()  # as the update that follows does, which is given them
    for a, b, place in zip(*(jax.tree.leaves(tree) for tree in (plain, moved, target)), strict=True):
        assert b.sharding == place
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", SPLITS)
def test_each_target_is_sent_its_own_shard_once(name):
    source, target = layouts(name)
    for leaf, a, b in zip(*(jax.tree.leaves(tree) for tree in (sharding.unbox(BOXED), source, target)), strict=True):
        held, wanted = a.devices_indices_map(leaf.shape), b.devices_indices_map(leaf.shape)
        parts = transfer.parts(leaf.shape, a, b)
        for device, index in wanted.items():
            count = np.zeros(leaf.shape, int)
            for part in parts:
                if part.target == device:
                    box = tuple(slice(*ends) for ends in part.box)
                    count[box] += 1
                    inside = np.zeros(leaf.shape, bool)
                    inside[held[part.source]] = True
                    assert inside[box].all()  # the source has it
            expected = np.zeros(leaf.shape, int)
            expected[index] = 1
            np.testing.assert_array_equal(count, expected)


def test_copies_of_a_shard_serve_the_targets_in_turn():
    source, target = layouts("many to few")
    kernel, a, b = next(
        (leaf, a, b)
        for leaf, a, b in zip(*(jax.tree.leaves(x) for x in (sharding.unbox(BOXED), source, target)), strict=True)
        if leaf.ndim > 1 and len(transfer.parts(leaf.shape, a, b)) == 4
    )
    assert len({part.source for part in transfer.parts(kernel.shape, a, b)}) == 4  # two targets, of two halves each


@pytest.mark.parametrize(
    ("cells", "are"),
    [
        ([(0, 0), (0, 1)], True),
        ([(0, 0), (1, 0), (0, 0)], True),
        ([(0, 0), (1, 1)], False),
        ([(0, 0), (2, 0)], False),
        ([(0, 0), (0, 1), (1, 0)], False),
    ],
)
def test_boxes_that_are_one_block_together(cells, are):
    assert transfer.are_blocks({7: [((i, i + 1), (j, j + 1)) for i, j in cells]}) is are


def test_keys_and_scalars_move_too():
    a, b = make_mesh(MeshConfig(), jax.devices()[:4]), make_mesh(MeshConfig(), jax.devices()[4:])
    tree = jax.device_put((jax.random.key(3), jnp.float32(2)), sharding.replicated(a))
    key, number = transfer.move(tree, (sharding.replicated(b),) * 2)
    assert key.sharding == number.sharding == sharding.replicated(b)
    assert jax.random.normal(key) == jax.random.normal(jax.random.key(3)) and number == 2


def test_arrays_wait_in_the_hosts_memory_in_their_shards():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    x = jax.device_put(np.arange(16.0, dtype=np.float32), sharding.batch_sharding(mesh))
    kept = transfer.to_host({"x": x})["x"]
    assert kept.sharding.memory_kind == "pinned_host" and not x.is_deleted()
    assert kept.addressable_shards[0].data.shape == (2,)
    back = transfer.to_device({"x": kept})["x"]
    assert back.sharding == x.sharding
    np.testing.assert_array_equal(back, np.arange(16))
    transfer.to_host(x, donate=True)
    assert x.is_deleted()
