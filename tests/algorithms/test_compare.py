"""Two policies side by side: what stands in the figures is what a reader of the samples would compute."""

import dataclasses

import jax
import numpy as np
import pytest

from rlhf_jax import models, run, sharding
from rlhf_jax.algorithms import compare
from rlhf_jax.checkpoint import save_params
from rlhf_jax.errors import NonFiniteError
from rlhf_jax.metrics import read_jsonl
from rlhf_jax.rewards.verifiers import PatternMatch
from rlhf_jax.sharding import MeshConfig
from tests.algorithms.conftest import SPEC, put_stages

pytestmark = pytest.mark.usefixtures("compile_quickly")

CONFIG = compare.Config(policy="other", batch_size=8, completion_tokens=10, evaluation_prompts=12)


@pytest.fixture
def context(make_context):
    def make(mesh=None):
        made = make_context(mesh=mesh, name="run" if mesh is None else "split")
        put_stages(made)
        other = sharding.unbox(models.init(SPEC, jax.random.key(5)))
        save_params(made.stage_dir("other") / "params", other)
        return made

    return make


def test_the_figures_are_those_of_the_samples(context):
    context = context()
    figures = compare.train(CONFIG, context, "beside")
    rows = read_jsonl(context.stage_dir("beside") / "samples.jsonl")
    before, after = rows[:12], rows[12:]
    assert [row["when"] for row in rows] == ["before"] * 12 + ["after"] * 12
    assert [row["prompt"] for row in before] == [row["prompt"] for row in after]
    assert all(abs(row["kl"]) < 1e-4 for row in before) and figures["seq_kl"] > 0.5
    for name in ("score", "gold", "vader", "length"):
        assert figures[f"{name}_after"] == pytest.approx(np.mean([row[name] for row in after]))
        assert figures[f"{name}_before"] == pytest.approx(np.mean([row[name] for row in before]))
    made = read_jsonl(context.stage_dir("beside") / "rows" / "rows.jsonl")
    assert [(row["completion"], row["score"]) for row in made] == [(row["completion"], row["score"]) for row in after]
    assert compare.train(CONFIG, context, "beside") == figures  # as after a kill


@pytest.mark.slow
def test_a_function_scores_and_a_mesh_changes_nothing(context):
    config = dataclasses.replace(CONFIG, reward=PatternMatch("e"))
    one, other = context(), context(MeshConfig(data=4, fsdp=2))
    figures = compare.train(config, one, "beside")
    rows = read_jsonl(one.stage_dir("beside") / "samples.jsonl")
    assert {row["score"] for row in rows} <= {0.0, 1.0}
    assert compare.train(config, other, "beside") == pytest.approx(figures, abs=1e-4)


def test_scores_that_are_not_finite_stop_it(context, monkeypatch):
    context = context()
    broken = jax.tree.map(lambda x: x * np.nan, context.network("reward_model"))
    monkeypatch.setattr(type(context), "network", lambda self, source: broken)
    with pytest.raises(NonFiniteError, match="beside: a score is nan: "):
        compare.train(CONFIG, context, "beside")
    assert not (context.stage_dir("beside") / "rows").exists()


def test_it_is_a_stage_of_two_policies():
    assert run.STAGES[compare.Config] is compare.train and CONFIG.produces == "rows"
    assert set(CONFIG.requires()) == {"policy", "reference", "reward"}
    with pytest.raises(ValueError, match="reference='sft' is the policy too; name another stage"):
        compare.Config(policy="sft")
