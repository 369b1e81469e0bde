"""Sub-meshes are made of all devices, and what does not make them is told by its field."""

import dataclasses
import math

import jax
import pytest

from rlhf_jax.algorithms import ppo
from rlhf_jax.algorithms.onpolicy import ValueHead
from rlhf_jax.config import from_dict, parse, to_dict, validate
from rlhf_jax.data.sources import Jsonl
from rlhf_jax.errors import UserError
from rlhf_jax.placement import Colocated, Disaggregated, check_memories
from rlhf_jax.rewards.verifiers import PatternMatch
from rlhf_jax.run import run
from rlhf_jax.sharding import MeshConfig, make_mesh
from tests.toys import ToyModel, ToyReward, ToyStage, experiment

SPLIT = Disaggregated(sampling=MeshConfig(data=2), training=MeshConfig(fsdp=3))


def test_the_sub_meshes_share_all_devices():
    training, sampling = SPLIT.meshes(make_mesh(MeshConfig()))
    assert [device.id for device in [*training.devices.flat, *sampling.devices.flat]] == list(range(8))
    assert dict(training.shape) == MeshConfig(data=2, fsdp=3).resolve(6)
    assert dict(sampling.shape) == MeshConfig(data=2).resolve(2)
    whole = make_mesh(MeshConfig())
    assert all(mesh is whole for mesh in Colocated(("reference",)).meshes(whole))


def with_ppo(placement, **fields):
    stages = {"sft": ToyStage(), "reward_model": ToyReward()}
    fields = {"batch_size": 48, "exact_kl_rows": 8, "minibatches": 4, "completion_tokens": 8, **fields}
    return experiment(stages={**stages, "ppo": ppo.Config(placement=placement, **fields)}, mesh=MeshConfig())


def test_a_split_that_the_devices_make_is_taken():
    validate(with_ppo(SPLIT), 8)
    devices = {name: math.prod(axes.values()) for name, axes in SPLIT.sizes(8).items()}
    assert sum(devices.values()) == 8 and devices["sampling"] == SPLIT.sampling.fixed_devices
    validate(with_ppo(Colocated(("reference", "reward", "critic", "optimizers")), batch_size=64), 8)


def test_flags_and_config_json_carry_a_placement():
    flags = ["--stages.ppo.placement.ahead", "0", "--stages.ppo.placement.training.fsdp", "6"]
    parsed = parse(with_ppo(SPLIT), flags)
    wanted = dataclasses.replace(SPLIT, ahead=0, training=MeshConfig(fsdp=6))
    assert parsed.stages["ppo"].placement == wanted
    waiting = parse(with_ppo(Colocated()), ["--stages.ppo.placement.offload", "reward", "critic"])
    assert waiting.stages["ppo"].placement == Colocated(("reward", "critic"))
    for one in (parsed, waiting):
        assert from_dict(to_dict(one), [ToyModel, ToyStage, ToyReward, ppo.Config]) == one


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (
            Disaggregated(sampling=MeshConfig(data=2), training=MeshConfig(data=1, fsdp=4)),
            "sampling and training: 2 and 4 devices do not add up to the 8 found; an axis of -1 fills",
        ),
        (
            Disaggregated(sampling=MeshConfig(data=1), training=MeshConfig(fsdp=4)),
            "training: asks for a multiple of 4 devices, and sampling leaves 7 of the 8 found",
        ),
        (
            Disaggregated(sampling=MeshConfig(), training=MeshConfig(data=2, fsdp=4)),
            "sampling: asks for a multiple of 1 devices, and training leaves 0 of the 8 found",
        ),
        (
            Disaggregated(sampling=MeshConfig(data=8), training=MeshConfig(data=8)),
            "sampling and training: 8 and 8 devices do not add up to the 8 found; an axis of -1 fills",
        ),
    ],
)
def test_devices_that_do_not_add_up_are_told(placement, message):
    with pytest.raises(UserError) as raised:
        validate(with_ppo(placement), 8)
    assert str(raised.value) == f"stages.ppo.placement.{message}"


def test_rows_must_divide_over_each_sub_mesh():
    split = Disaggregated(sampling=MeshConfig(data=5), training=MeshConfig())
    with pytest.raises(
        UserError, match=r"12 rows do not divide over the 5 batch shards of the placement.sampling, data 5"
    ):
        validate(with_ppo(split), 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Disaggregated(sampling=MeshConfig(), training=MeshConfig()),
            "only one of the two may have an axis of -1",
        ),
        (
            lambda: Disaggregated(sampling=MeshConfig(data=1), training=MeshConfig(), ahead=2),
            "ahead must be 0 or 1, got 2",
        ),
        (
            lambda: Disaggregated(sampling=MeshConfig(data=1), training=MeshConfig(), max_weight=0.5),
            r"max_weight must lie in \[1, inf\), got 0.5",
        ),
        (lambda: Colocated(("reward", "reward")), "offload: a role stands there twice: reward, reward"),
        (
            lambda: ppo.Config(reward=PatternMatch("a"), critic=ValueHead(), placement=Colocated(("reward",))),
            "placement.offload: 'reward' has nothing on the devices here; these have: reference, optimizers, critic",
        ),
    ],
)
def test_bad_fields_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_role_that_there_is_not_is_told():
    placement = Colocated(("judge",))
    with pytest.raises(ValueError, match=r"placement\.offload: 'judge' has nothing on the devices here"):
        ppo.Config(placement=placement)


def test_devices_without_memory_of_the_host_are_told():
    check_memories("cpu", [memory.kind for memory in jax.devices()[0].addressable_memories()])
    with pytest.raises(UserError, match=r"^offload: metal devices reach no pinned_host memory, only device; leave it"):
        check_memories("metal", ["device"])


def test_a_model_that_does_not_divide_over_a_sub_mesh_is_told_before_anything_runs(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "row {i}"}}\n' for i in range(20)))
    config = ppo.Config(
        policy="base",
        critic=ValueHead("base"),
        reward=PatternMatch("a"),
        data=Jsonl(rows, heldout=0.2),
        placement=Disaggregated(sampling=MeshConfig(data=1, tensor=4), training=MeshConfig()),
    )
    says = r"^stages\.ppo\.placement\.sampling: mesh\.tensor=4 does not divide 2, .*attention/key"
    with pytest.raises(UserError, match=says):
        run(experiment(stages={"ppo": config}), tmp_path / "run", [])
    assert not (tmp_path / "run").exists()
