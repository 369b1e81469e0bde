"""What stages keep on the disk, by their own word, against the arrays of their states; a disk that is too small."""

import math
import shutil
from collections import namedtuple

import jax
import pytest

from rlhf_jax import checkpoint, models
from rlhf_jax.algorithms import compare, distill, offline, policy, ppo, preference, reward_model, sft
from rlhf_jax.algorithms.consolidation import Consolidation
from rlhf_jax.algorithms.offline_methods import Weighted
from rlhf_jax.algorithms.onpolicy import SharedTrunk
from rlhf_jax.algorithms.reference import Sync
from rlhf_jax.config import Experiment
from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.errors import UserError
from rlhf_jax.interop.pretrained import Scratch
from rlhf_jax.models import ModelSpec
from rlhf_jax.optim import Optimizer
from rlhf_jax.plan.programs import programs
from rlhf_jax.rewards.ensemble import Ensemble
from rlhf_jax.rewards.verifiers import PatternMatch
from rlhf_jax.sharding import MeshConfig, make_mesh

SPEC = ModelSpec(vocab_size=32, d_model=64, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=32, d_ff=128, max_len=64)
COPY = 4 * sum(
    math.prod(x.shape) for x in jax.tree.leaves(jax.eval_shape(lambda: models.init(SPEC, jax.random.key(0))))
)
Usage = namedtuple("Usage", "total used free")

ON_POLICY = {"policy": "base", "reward": PatternMatch("e"), "steps": 20, "checkpoint_every": 10}
CRITIC = {**ON_POLICY, "reward": PatternMatch("e"), "critic": "reward"}
STAGES = {
    "supervised": (sft.Config(), 1),
    "in bfloat16": (sft.Config(optimizer=Optimizer(master="bfloat16")), 0.5),
    "one checkpoint": (sft.Config(steps=5), 1),
    "reward": (reward_model.Config(init="base"), 1),
    "ensemble": (reward_model.Config(init="base", ensemble=Ensemble(members=3)), 3),
    "heads": (reward_model.Config(init="base", ensemble=Ensemble(members=3, of="heads")), 1),
    "preference": (preference.Config(init="base"), 1),
    "following": (preference.Config(init="base", reference=Sync()), 1),
    "distilled": (distill.Config(student="supervised", teacher="base"), 1),
    "cloned": (offline.Config(init="base", method=Weighted()), 1),
    "group": (policy.Config(**ON_POLICY), 1),
    "averaged": (policy.Config(**ON_POLICY, average=0.9), 1),
    "consolidated": (policy.Config(**ON_POLICY, ewc=Consolidation(row_length=64)), 2),
    "ppo": (ppo.Config(**CRITIC), 1),
    "on one trunk": (ppo.Config(**ON_POLICY, critic=SharedTrunk()), 1),
}
"""A stage, and the copies that its finished parameters and what it reads beside them are."""


@pytest.fixture(scope="module")
def states():
    """The bytes of the state that each stage's step takes, by the plan."""
    stages = {name: stage for name, (stage, _) in STAGES.items()}
    found = programs(Experiment(Scratch(SPEC), MovieReviews(), stages), make_mesh(MeshConfig()))
    first = {one.stage: one for one in reversed(found) if one.name != "reference"}
    return {name: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(one.args[0])) for name, one in first.items()}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_knows_what_it_keeps(name, states):
    stage, finished = STAGES[name]
    kept = 1 if name == "one checkpoint" else checkpoint.KEPT
    assert stage.stored() == pytest.approx(finished + kept * states[name] / COPY, rel=0.06)


def test_a_stage_of_rows_keeps_no_parameters():
    assert compare.Config(policy="one", reference="two", reward=PatternMatch("e")).stored() == 0


def test_a_run_counts_what_it_has_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, 3_000_000))
    workdir = tmp_path / "run"
    checkpoint.check_room(workdir, 3_000_000)
    with pytest.raises(UserError) as caught:
        checkpoint.check_room(workdir, 8_000_000)
    assert str(caught.value) == (f"--workdir {workdir}: no disk space: the run needs at least 8 MB, 3 MB are free")
    (workdir / "sft").mkdir(parents=True)
    (workdir / "sft" / "params").write_bytes(bytes(6_000_000))
    checkpoint.check_room(workdir, 8_000_000)
