"""A state comes back bit for bit, on any mesh; a killed save and a full disk leave the last checkpoint as it was."""

import asyncio
import errno
import gc
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax import digests
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
def small_disk(tmp_path):
    """A disk of four megabytes."""
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path]).returncode:
        pytest.skip("needs the right to mount a disk")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


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


def test_the_last_two_are_kept_or_as_many_as_asked(tmp_path):
    two, one = Checkpoints(tmp_path / "two"), Checkpoints(tmp_path / "one", keep=1)
    for checkpoints in (one, two):
        for step in (1, 2, 3):
            checkpoints.save(step, {"x": jnp.full(2, step)}, {"step": step})
    assert one.latest_step() == two.latest_step() == 3
    assert folder_of(one) == ["3"] and folder_of(two) == ["2", "3"]
    assert two.restore({"x": jnp.zeros(2, jnp.int32)}, step=2)[1] == {"step": 2}


def test_a_step_that_is_there_is_not_written_again(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": jnp.zeros(2)}, {"first": True})
    checkpoints.save(1, {"x": jnp.ones(2)}, {"first": False})
    restored, cursor = checkpoints.restore({"x": jnp.zeros(2)})
    assert cursor == {"first": True} and not restored["x"].any()


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    """The steps that follow write into the same memory while the checkpoint is being written."""
    saved = np.random.default_rng(0).normal(size=(8, 500_000)).astype(np.float32)
    step = jax.jit(lambda x: jax.tree.map(lambda y: 2 * y + 1, x), donate_argnums=0)
    checkpoints, state = Checkpoints(tmp_path), {str(i): jnp.array(row) for i, row in enumerate(saved)}
    checkpoints.save(1, state, {})
    for _ in range(5):
        state = step(state)
    restored, _ = checkpoints.restore(state)
    np.testing.assert_array_equal(np.stack([restored[str(i)] for i in range(8)]), saved)


def test_a_checkpoint_of_another_model_is_one_line(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"w": {"b": jnp.ones(2)}}, {})
    wrong = {"shape": jnp.ones(3), "type": jnp.ones(2, jnp.int32)}
    for kind, there in (("shape", "float32[2] there and float32[3] here"), ("type", "float32[2] there and int32[2]")):
        with pytest.raises(UserError, match="of another model: w/b is") as caught:
            checkpoints.restore({"w": {"b": wrong[kind]}})
        assert there in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="a is nothing there and float32"):
        checkpoints.restore({"w": {"b": jnp.ones(2)}, "a": jnp.ones(1)})


FAULTS = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "flipped": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "lost": lambda path: path.unlink(),
}


def test_no_file_of_a_checkpoint_can_be_damaged_without_being_named(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save(1, make(), CURSOR)
    checkpoints.close()
    whole = tmp_path / "run" / "1"
    files = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    assert digests.damage(whole) is None and len(files) > 5
    for name in files:
        for fault, damage in FAULTS.items():
            copy = tmp_path / fault / str(name).replace("/", "_")
            shutil.copytree(whole, copy)
            damage(copy / name)
            found = digests.damage(copy)
            assert found is not None and found.startswith(str(copy / name)), (fault, name)
            assert "\n" not in found


@pytest.mark.parametrize("fault", FAULTS)
def test_the_newest_good_checkpoint_is_taken_and_a_bad_one_set_aside(tmp_path, fault):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {"x": jnp.full(1000, step)}, {"step": step})
    checkpoints.close()
    largest = max((tmp_path / "2").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    FAULTS[fault](largest)
    again = Checkpoints(tmp_path)
    assert again.latest_step() == 1 and again.restore({"x": jnp.zeros(1000, jnp.int32)})[1] == {"step": 1}
    [line] = again.damaged
    assert "checkpoint of step 2" in line and "2.damaged" in line and largest.name in line and "\n" not in line
    assert folder_of(again) == ["1", "2.damaged"]
    again.save(2, {"x": jnp.full(1000, 2)}, {})
    again.close()
    FAULTS[fault](tmp_path / "1" / "digests.json")
    FAULTS[fault](tmp_path / "2" / "digests.json")
    none = Checkpoints(tmp_path)
    assert none.latest_step() is None and len(none.damaged) == 2
    assert folder_of(none) == ["1.damaged", "2.damaged", "2.damaged.2"]


def test_what_a_killed_save_left_behind_is_removed_and_not_read(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": jnp.ones(2)}, CURSOR)
    checkpoints.close()
    for remains in (".2.part", ".0.old.part"):
        shutil.copytree(tmp_path / "1", tmp_path / remains)
        (tmp_path / remains / "cursor.json").unlink()
    again = Checkpoints(tmp_path)
    assert folder_of(again) == ["1"] and not again.damaged
    assert again.latest_step() == 1 and again.restore({"x": jnp.zeros(2)})[1] == CURSOR


SAVES = """
    import os, resource, signal, sys
    from pathlib import Path
    import jax.numpy as jnp
    from rlhf_jax import checkpoint, digests
    from rlhf_jax.errors import UserError
    checkpoints = checkpoint.Checkpoints(Path(sys.argv[1]))
    checkpoints.save(1, {"x": jnp.ones(100_000)}, {"step": 1})
    checkpoints.wait()
"""
KILLED = """
    digests.seal = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
    checkpoints.save(2, {"x": jnp.zeros(100_000)}, {"step": 2})
    checkpoints.wait()
"""
FULL = """
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    checkpoints.save(2, {"x": jnp.arange(100_000) * 0.7}, {"step": 2})
    try:
        checkpoints.wait()
    except UserError as error:
        print(error)
"""


@pytest.mark.parametrize("program", [KILLED, FULL], ids=["killed", "full"])
def test_a_save_that_does_not_end_leaves_the_one_before(tmp_path, program):
    """A real process, killed before the last file is written; and one that may write no file so large."""
    code = textwrap.dedent(SAVES) + textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=120)
    if program == KILLED:
        assert done.returncode == -signal.SIGKILL
    else:
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""  # nor does Orbax's thread print what it met
        [line] = done.stdout.splitlines()
        assert line.startswith(f"no disk space for the checkpoint of step 2 in {tmp_path}: {os.strerror(errno.EFBIG)}")
    again = Checkpoints(tmp_path)
    assert folder_of(again) == ["1"] and not again.damaged
    restored, cursor = again.restore({"x": jnp.zeros(100_000)})
    assert cursor == {"step": 1} and restored["x"].all()


def test_of_many_writes_that_fail_at_once_asyncio_prints_none(caplog):
    """As its loop ends after the first, which Orbax hands on; what else nobody asked for is still told."""

    async def fails(error):
        raise error

    def forgotten(error):
        loop = asyncio.new_event_loop()
        inner = loop.create_task(fails(error))
        loop.run_until_complete(asyncio.wait([inner]))
        loop.close()

    text = 'Error writing "params/0.0" in OCDBT database at local file "/x/": No space left on device'
    forgotten(ValueError(text))
    forgotten(OSError(errno.ENOSPC, "No space left on device"))
    gc.collect()
    assert not caplog.records
    forgotten(ValueError("another's mistake"))
    forgotten(OSError(errno.EIO, "another's disk"))
    gc.collect()
    assert {record.name for record in caplog.records} == {"asyncio"} and len(caplog.records) == 2
    assert "another's mistake" in caplog.text and "another's disk" in caplog.text


def test_a_full_disk_is_one_line_and_what_was_there_survives(small_disk):
    """A real one: of four megabytes, too small for the arrays as one sees before, or for the cursor as it turns out."""
    checkpoints, state = Checkpoints(small_disk), {"x": jnp.ones(1000)}
    checkpoints.save(1, state, CURSOR)
    with pytest.raises(UserError, match="no disk space for the checkpoint of step 2") as caught:
        checkpoints.save(2, {"x": jnp.ones(600_000)}, {})
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value) and str(small_disk) in str(caught.value)
    checkpoints.save(2, state, {"rows": "x" * 5_000_000})
    with pytest.raises(UserError, match=f"step 2 in .*: {os.strerror(errno.ENOSPC)}; what was saved before is kept"):
        checkpoints.wait()
    assert folder_of(checkpoints) == ["1"] and checkpoints.restore(state)[1] == CURSOR
    checkpoints.save(3, state, {})
    assert checkpoints.latest_step() == 3 and folder_of(checkpoints) == ["1", "3"]
    with pytest.raises(UserError, match="no disk space for the parameters"):
        save_params(small_disk / "params", {"x": jnp.ones(600_000)})
    assert not (small_disk / "params").exists()


def test_parameters_are_replaced_and_read_onto_any_mesh(tmp_path):
    folder = tmp_path / "stage" / "params"
    save_params(folder, make(seed=1).params)
    params = make(layout=split_over(mesh_of(MeshConfig(1, 4, 1)), "fsdp")).params
    save_params(folder, params)
    target = make(seed=2, layout=split_over(mesh_of(MeshConfig(4, 1, 2)), "tensor")).params
    loaded = load_params(folder, jax.tree.map(ocp.utils.to_shape_dtype_struct, target))
    assert bits(loaded) == bits(params)
    assert jax.tree.map(lambda x: x.sharding, loaded) == jax.tree.map(lambda x: x.sharding, target)
    assert [path.name for path in folder.parent.iterdir()] == ["params"]


def test_parameters_of_another_model_are_one_line(tmp_path):
    save_params(tmp_path / "params", {"w": {"b": jnp.ones(2, jnp.bfloat16)}})
    assert load_params(tmp_path / "params", {"w": {"b": jnp.zeros(2)}})["w"]["b"].dtype == jnp.float32
    with pytest.raises(UserError, match=r"params is of another model: w/b is \[2\] there and \[3\] here"):
        load_params(tmp_path / "params", {"w": {"b": jnp.zeros(3)}})


def test_damaged_parameters_are_not_read(tmp_path):
    folder = tmp_path / "params"
    for name, damage in FAULTS.items():
        save_params(folder, {"x": jnp.ones(3)})
        damage(folder / "_METADATA")
        with pytest.raises(UserError, match=r"_METADATA .*makes these parameters again") as caught:
            load_params(folder, {"x": jnp.zeros(3)})
        assert "\n" not in str(caught.value), name


def test_a_sealed_file_is_whole_until_it_is_touched(tmp_path):
    path = tmp_path / "model"
    for name, damage in FAULTS.items():
        digests.write_sealed(path, b"some bytes")
        assert digests.is_whole(path), name
        damage(path)
        assert not digests.is_whole(path), name
    digests.write_sealed(path, b"some bytes")
    (tmp_path / "model.sha256").unlink()
    assert not digests.is_whole(path)
