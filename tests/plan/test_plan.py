"""Plans for pods that are not there, by the compiler itself where its package is installed."""

import dataclasses
import importlib.util
import json

import jax
import pytest

from rlhf_jax import sharding
from rlhf_jax.algorithms import sft
from rlhf_jax.cli import main
from rlhf_jax.config import Experiment, parse
from rlhf_jax.data.sources import Jsonl
from rlhf_jax.errors import UserError
from rlhf_jax.interop.load import FromPretrained
from rlhf_jax.models import ModelSpec
from rlhf_jax.plan import show, topology
from rlhf_jax.plan.chips import CHIPS
from rlhf_jax.plan.fit import fit
from rlhf_jax.plan.plan import plan
from rlhf_jax.sharding import MeshConfig

LIBTPU = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(not LIBTPU, reason='libtpu, the extra "plan", is not installed')
SPEC = ModelSpec(vocab_size=1024, d_model=256, n_layers=3, n_heads=2, n_kv_heads=2, head_dim=128, d_ff=512, max_len=128)

CONFIG = """
from tests.plan.test_plan import experiment
def get_config():
    return experiment()
"""


def experiment(spec=SPEC, mesh=None, **changes):
    """Of files that are not there: none is read."""
    stage = {"steps": 10, "batch_size": 8, "row_length": 128, "heldout_rows": 8, **changes}
    data = Jsonl("nowhere.jsonl", fields={"prompt": "p", "completion": "c"})
    model = FromPretrained("nowhere/at-all", compute="bfloat16", remat="full", architecture=spec)
    return Experiment(model=model, data=data, mesh=mesh or MeshConfig(), stages={"sft": sft.Config(**stage)})


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v9:4x4", "no TPU 'v9'; a topology is such as v5e:16x16, of v4, v5e, v5p, v6e, tpu7x"),
        ("4x4", "no TPU '4x4'"),
        ("", "no TPU ''"),
        ("v5e:3x3", "v5e comes as v5e:2x2, v5e:2x4, v5e:4x4"),
        ("v5p:4x4", "v5p comes as v5p:2x2x1"),
    ],
)
def test_a_topology_that_there_is_not(name, says):
    with pytest.raises(UserError, match=says) as caught:
        plan(experiment(), name)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(LIBTPU, reason="libtpu is installed")
def test_without_the_compiler():
    with pytest.raises(UserError, match=r"libtpu is not installed; pip install 'rlhf_jax\[plan\]'"):
        plan(experiment(), "v5e:4x4")


def test_published_figures_agree_with_one_another():
    for chip in CHIPS.values():
        assert 0.9e9 < chip.clock < 2.5e9, chip.name  # from the peak and the size of the matrix units
        assert 150 < chip.peak / chip.memory_bandwidth < 700, chip.name


@needs_libtpu
@pytest.mark.parametrize("name", [f"{chip.name}:{chip.topologies[0]}" for chip in CHIPS.values()])
def test_every_kind_of_chip_is_described(name):
    pod = topology.find(name)
    assert pod.chips == 4
    assert len(pod.devices) == 4 * pod.chip.devices_per_chip


@needs_libtpu
def test_two_slices_lie_along_the_data_axis():
    pod = topology.find("v5e:2x2", num_slices=2)
    mesh = sharding.make_mesh(MeshConfig(fsdp=4), pod.devices)
    assert dict(mesh.shape) == dict.fromkeys(sharding.AXES, 1) | {"data": 2, "fsdp": 4}
    assert [{device.slice_index for device in row.flat} for row in mesh.devices] == [{0}, {1}]
    with pytest.raises(UserError, match=r"mesh\.data=1 must be a multiple of the 2 slices"):
        sharding.make_mesh(MeshConfig(fsdp=8), pod.devices)


@needs_libtpu
def test_a_mesh_axis_takes_a_part_of_an_axis_of_the_torus():
    mesh = sharding.make_mesh(MeshConfig(fsdp=32, tensor=8), topology.find("v6e:16x16").devices)
    assert mesh.devices.shape == (1, 1, 32, 1, 1, 8)
    assert len({tuple(device.coords) for device in mesh.devices.flat}) == 256
    with pytest.raises(UserError, match="mesh asks for a multiple of 3 devices, 16 found"):
        plan(experiment(mesh=MeshConfig(fsdp=3)), "v5e:4x4")


@needs_libtpu
def test_slices_exchange_gradients_over_their_own_network():
    found = plan(experiment(mesh=MeshConfig(fsdp=4)), "v5e:2x2", num_slices=2)
    (one,) = found.estimates
    params = one.memory.arguments["parameters"]  # a device's share of the float32 weights
    between = [sent for sent in one.sent if sent.axes == ("data",) and sent.kind == "all-reduce"]
    total = sum(exchange.total for exchange in between)
    assert 0.45 * params < total < 1.1 * params  # gradients, in bfloat16 or wider; a sum over two sends each once
    assert one.phases["train"].network > total / found.topology.chip.slice_bandwidth


@pytest.fixture(scope="module")
def planned():
    return plan(experiment(mesh=MeshConfig(data=2, fsdp=2)), "v5e:2x2")


@needs_libtpu
def test_a_plan(planned):
    (one,) = planned.estimates
    assert one.name == "sft.train" and one.memory.fits
    assert one.memory.peak >= sum(one.memory.arguments.values())
    assert one.flops.total() == pytest.approx(one.useful * 4 / 3, rel=0.1)  # remat: the forward pass twice
    layers = 3 * (256 * 256 * 4 + 256 * 512 * 3)
    products = 3 * 2 * 8 * 128 * (layers + 256 * 1024) + 3 * 3 * 2 * 2 * 8 * 2 * 128 * 128 * 128
    assert one.useful == pytest.approx(products, rel=0.01)
    assert {axes for exchange in one.sent for axes in exchange.axes} == {"data", "fsdp"}
    assert 0 < one.mfu(4 * planned.topology.chip.peak) < 1
    assert one.expected >= one.least > 0
    assert planned.seconds == 10 * one.expected


@needs_libtpu
def test_splash_holds_no_scores_of_whole_rows_and_its_flops_are_counted():
    spec = dataclasses.replace(SPEC, max_len=2048)
    by = {}
    for kernel in ("xla", "splash"):
        whole = experiment(spec, row_length=2048)
        model = dataclasses.replace(whole.model, attention=kernel)
        (by[kernel],) = plan(dataclasses.replace(whole, model=model), "v5e:2x2").estimates
    scores = 2 * 2 * 2048**2 * 2  # of a device's rows and heads, in bfloat16
    assert by["xla"].memory.peak - by["splash"].memory.peak > scores
    assert by["splash"].useful == by["xla"].useful
    # A block's backward pass: its forward one again, and in the kernels seven products for four.
    products = 3 * 2 * 8 * 2 * 2048**2 * 128
    assert by["splash"].flops.total() - by["xla"].flops.total() == pytest.approx(3 * products, rel=0.02)


@needs_libtpu
def test_what_it_prints(planned):
    printed = "\n".join(show.lines(planned))
    for word in ("4 chips, 4 devices as data 2 × fsdp 2", "sft.train, 10 times", "counted", "compiler", "model", "MFU"):
        assert word in printed
    plain = json.loads(json.dumps(show.as_dict(planned)))
    assert plain["fits"] and set(plain["programs"]["sft.train"]) >= {"counted", "compiler", "model"}


@needs_libtpu
def test_the_command(tmp_path, capsys, monkeypatch):
    config = tmp_path / "tiny.py"
    config.write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    flags = ["--mesh.fsdp", "4", "--stages.sft.steps", "7"]
    assert main(["plan", str(config), "--topology", "v5e:2x2", "--json", *flags]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["programs"]["sft.train"]["calls"] == 7
    assert list(tmp_path.iterdir()) == [config] or not (tmp_path / "runs").exists()


@needs_libtpu
def test_what_does_not_fit_says_what_to_change(tmp_path, capsys):
    # 13 GB of parameters, moments twice that: no v5e holds them
    vast = ModelSpec(vocab_size=4096, d_model=4096, n_layers=16, n_heads=32, n_kv_heads=32, head_dim=128, d_ff=11008)
    found = plan(experiment(vast), "v5e:2x2")
    assert not found.fits
    message = show.problem(found)
    assert message.startswith("v5e:2x2: sft.train needs ") and "of 15.75 GiB" in message and "mesh.fsdp" in message
    assert "\n" not in message
    assert json.loads(json.dumps(show.as_dict(found)))["programs"]["sft.train"]["model"] is None


@needs_libtpu
def test_fit_goes_from_what_does_not_fit_to_what_does(tmp_path, capsys):
    wide = dataclasses.replace(SPEC, vocab_size=32_768)  # a million tokens' logits are too many for four devices
    begin = experiment(wide, mesh=MeshConfig(fsdp=4), batch_size=8192, heldout_rows=8192)
    tried = fit(begin, "v5e:2x2", tries=4)
    first, best = next(one for one in tried if one.setting.microbatches == (("sft", 1),)), tried[0]
    assert first.cost[0] and best.plan.fits and best.setting.microbatches[0][1] > 1
    assert [one.cost for one in tried] == sorted(one.cost for one in tried) and len(tried) <= 4
    assert parse(begin, best.setting.flags().split()) == best.setting.apply(begin)


@needs_libtpu
def test_fit_starts_from_a_mesh_that_can_be_where_the_experiments_own_cannot():
    said = []
    few = experiment(batch_size=2, heldout_rows=2)
    [one] = fit(few, "v5e:2x2", tries=1, say=said.append)
    assert (one.setting.data, one.setting.fsdp, one.setting.tensor) == (1, 2, 2) and one.plan.fits
    assert "2 rows do not divide over the 4 batch shards" in said[0]
    assert said[0].endswith("; the search starts from " + one.setting.flags())
    with pytest.raises(UserError, match="1 rows do not divide over the 4 batch shards"):  # nor over tensor=4: 2 heads
        fit(experiment(batch_size=1, heldout_rows=1), "v5e:2x2", tries=1)


@needs_libtpu
def test_fit_as_a_command(tmp_path, capsys):
    config = tmp_path / "tiny.py"
    config.write_text(CONFIG)
    assert main(["plan", str(config), "--topology", "v5e:2x2", "--fit", "--tries", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    fast, slow = found["tried"]
    assert fast["fits"] and fast["seconds"] == found["model"]["seconds"] <= slow["seconds"]
    assert main(["plan", str(config), "--topology", "v5e:2x2", "--fit", "--tries", "0"]) == 2
    assert capsys.readouterr().err == "error: --tries must be at least 1, got 0\n"


def test_a_stage_that_there_is_not():
    with pytest.raises(UserError, match="there is no such stage; there are sft"):
        plan(experiment(), "v5e:2x2", stage="ppo")


def test_commands_that_are_wrong(capsys):
    assert main(["plan", "--topology", "v5e:2x2"]) == 2
    assert "the config file comes first" in capsys.readouterr().err
    assert main(["plan", "configs/quickstart.py", "--topology", "v5e:2x2", "--num_slices", "two"]) == 2
    assert capsys.readouterr().err == "error: --num_slices: invalid int value: 'two'\n"
    assert main(["plan", "configs/quickstart.py"]) == 2
    assert "a topology is such as v5e:16x16" in capsys.readouterr().err
    assert jax.default_backend() == "cpu"
