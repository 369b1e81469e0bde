"""A state comes back bit for bit, on any mesh; a killed save and a full disk leave the last checkpoint as it was."""

import errno
import os
import shutil
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax.checkpoint import Checkpoints, load_params, save_params
from rlhf_jax.errors import UserError
from rlhf_jax.optim import Optimizer
from rlhf_jax.sharding import MeshConfig
from rlhf_jax.train_step import create_state
from tests.meshes import mesh_of

CURSOR = {"iterator": {"position": 7, "shards": [1, 2]}, "epoch": 3, "rows": ["a", "ü"]}


def make(seed=0, layout=None):
    """A training state with moments, off zero; its parameters in a layout."""
    rng = np.random.default_rng(seed)
    w, b = rng.normal(size=(8, 4)), rng.normal(size=4)
    params = {"w": jnp.asarray(w, jnp.float32), "b": jnp.asarray(b, jnp.bfloat16)}
    state = create_state(params, Optimizer().make(1), {"learning_rate": 0.1}, jax.random.key(seed + 5))
    state = jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x + x.dtype.type(3), state)
    return state if layout is None else jax.device_put(state, layout(state))


def bits(tree):
    plain = jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tree)
    return [(x.dtype, x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(plain)]


def split_over(mesh, axis):
    """Matrices split along their rows over one axis of the mesh, all else whole on every device."""
    return lambda tree: jax.tree.map(lambda x: NamedSharding(mesh, P(axis) if x.shape == (8, 4) else P()), tree)


def folder_of(checkpoints):
    return sorted(path.name for path in checkpoints.folder.iterdir())


@pytest.fixture
def full_disk(monkeypatch):
    usage = namedtuple("usage", "total used free")
    return lambda free: monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - free, free))


def test_a_state_comes_back_bit_for_bit_with_its_key_and_cursor(tmp_path):
    checkpoints, state = Checkpoints(tmp_path / "made" / "here"), make()
    assert checkpoints.latest_step() is None
    checkpoints.save(12, state, CURSOR)
    checkpoints.close()
    again = Checkpoints(tmp_path / "made" / "here")  # another process, as it were
    assert again.latest_step() == 12
    restored, cursor = again.restore(make(seed=1))
    assert bits(restored) == bits(state) and cursor == CURSOR
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert jax.random.normal(restored.key) == jax.random.normal(state.key)


def test_a_key_of_another_kind_stays_of_that_kind(tmp_path):
    checkpoints, state = Checkpoints(tmp_path), {"key": jax.random.key(1, impl="rbg")}
    checkpoints.save(1, state, {})
    restored, _ = checkpoints.restore({"key": jax.random.key(0, impl="rbg")})
    assert restored["key"].dtype == state["key"].dtype and bits(restored) == bits(state)


def test_a_state_saved_on_one_mesh_is_restored_onto_another(tmp_path):
    four, eight = split_over(mesh_of(MeshConfig(1, 4, 1)), "fsdp"), split_over(mesh_of(MeshConfig(4, 1, 2)), "tensor")
    checkpoints, state = Checkpoints(tmp_path), make(layout=four)
    checkpoints.save(1, state, CURSOR)
    for layout, rows in ((eight, 4), (split_over(mesh_of(MeshConfig(1, 1, 1)), None), 8), (four, 2)):
        target = make(seed=1, layout=layout)
        restored, _ = checkpoints.restore(target)
        assert bits(restored) == bits(state)
        plain = (restored.step, restored.params, restored.opt_state, restored.hyper)
        wanted = (target.step, target.params, target.opt_state, target.hyper)
        assert jax.tree.map(lambda x: x.sharding, plain) == jax.tree.map(lambda x: x.sharding, wanted)
        assert restored.params["w"].addressable_shards[0].data.shape == (rows, 4)


def test_the_last_is_kept_or_as_many_as_asked(tmp_path):
    one, two = Checkpoints(tmp_path / "one"), Checkpoints(tmp_path / "two", keep=2)
    for checkpoints in (one, two):
        for step in (1, 2, 3):
            checkpoints.save(step, {"x": jnp.full(2, step)}, {"step": step})
    assert folder_of(one) == ["3"] and folder_of(two) == ["2", "3"]
    assert two.restore({"x": jnp.zeros(2, jnp.int32)}, step=2)[1] == {"step": 2}


def test_a_step_that_is_there_is_not_written_again(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": jnp.zeros(2)}, {"first": True})
    checkpoints.save(1, {"x": jnp.ones(2)}, {"first": False})
    restored, cursor = checkpoints.restore({"x": jnp.zeros(2)})
    assert cursor == {"first": True} and not restored["x"].any()


def test_what_a_killed_save_left_behind_is_removed_and_not_read(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": jnp.ones(2)}, CURSOR)
    checkpoints.close()
    half = tmp_path / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "1", half)
    (half / "cursor" / "metadata").unlink()
    again = Checkpoints(tmp_path)
    assert again.latest_step() == 1 and again.restore({"x": jnp.zeros(2)})[1] == CURSOR
    again.save(3, {"x": jnp.ones(2)}, CURSOR)  # orbax cleans in the background, and at the latest before it writes
    assert folder_of(again) == ["3"]


def test_a_save_that_dies_while_writing_leaves_the_last_one(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": jnp.ones(2)}, CURSOR)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    for method in ("save", "async_save"):
        monkeypatch.setattr(ocp.JsonCheckpointHandler, method, interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(2, {"x": jnp.zeros(2)}, {})
    monkeypatch.undo()
    again = Checkpoints(tmp_path)
    restored, cursor = again.restore({"x": jnp.zeros(2)})
    assert again.latest_step() == 1 and cursor == CURSOR and restored["x"].all()


def test_a_disk_without_room_is_one_line_and_the_last_checkpoint_survives(tmp_path, full_disk):
    checkpoints, state = Checkpoints(tmp_path), {"x": jnp.ones(1000)}
    checkpoints.save(1, state, CURSOR)
    full_disk(7999)  # twice four bytes a number, and a byte less
    with pytest.raises(UserError, match="no disk space for the checkpoint of step 2") as caught:
        checkpoints.save(2, state, {})
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert folder_of(checkpoints) == ["1"]
    assert checkpoints.restore({"x": jnp.zeros(1000)})[1] == CURSOR
    full_disk(8000)
    checkpoints.save(2, state, {})
    assert folder_of(checkpoints) == ["2"]


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), ValueError(f"UNAVAILABLE: {os.strerror(errno.ENOSPC)}")],
    ids=["os", "tensorstore"],
)
def test_a_disk_that_fills_while_writing_is_the_same_line(tmp_path, monkeypatch, error):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": jnp.ones(2)}, CURSOR)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(checkpoints._manager, "save", fail)
    with pytest.raises(UserError, match="no disk space"):
        checkpoints.save(2, {"x": jnp.zeros(2)}, {})
    assert Checkpoints(tmp_path).restore({"x": jnp.zeros(2)})[1] == CURSOR
    error = OSError(errno.EACCES, "Permission denied")
    with pytest.raises(OSError, match="Permission denied"):
        checkpoints.save(2, {"x": jnp.zeros(2)}, {})


def test_parameters_are_replaced_and_read_onto_any_mesh(tmp_path, full_disk):
    folder = tmp_path / "stage" / "params"
    save_params(folder, make(seed=1).params)
    params = make(layout=split_over(mesh_of(MeshConfig(1, 4, 1)), "fsdp")).params
    save_params(folder, params)
    target = make(seed=2, layout=split_over(mesh_of(MeshConfig(4, 1, 2)), "tensor")).params
    loaded = load_params(folder, jax.tree.map(ocp.utils.to_shape_dtype_struct, target))
    assert bits(loaded) == bits(params)
    assert jax.tree.map(lambda x: x.sharding, loaded) == jax.tree.map(lambda x: x.sharding, target)
    full_disk(10)
    with pytest.raises(UserError, match="no disk space for the parameters"):
        save_params(folder, params)
    assert bits(load_params(folder, target)) == bits(params)
