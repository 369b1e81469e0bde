"""Distillation: the loss against plain NumPy, a student that comes nearer, kills, meshes, refusals."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest

from rlhf_jax import models, sharding
from rlhf_jax.algorithms import distill
from rlhf_jax.algorithms.context import Context
from rlhf_jax.checkpoint import save_params
from rlhf_jax.data.sources import Jsonl
from rlhf_jax.errors import Stopped, UserError
from rlhf_jax.metrics import read_jsonl
from rlhf_jax.optim import Optimizer
from rlhf_jax.sharding import MeshConfig
from rlhf_jax.types import Rollout
from tests.algorithms.conftest import SPEC

pytestmark = pytest.mark.usefixtures("compile_quickly")

CONFIG = distill.Config(
    steps=10,
    batch_size=16,
    completion_tokens=8,
    evaluation_prompts=32,
    divergence="jensen_shannon",
    student_share=0.5,
    checkpoint_every=3,
    optimizer=Optimizer(learning_rate=1e-2),
)


def change(**fields):
    return dataclasses.replace(CONFIG, **fields)


def perturbed(params, size):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + size * rng.normal(size=x.shape).astype(np.float32), params)


@pytest.fixture
def rows(tmp_path):
    """Prompts of a file."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"The film of the year {i} was"}) + "\n" for i in range(80)))
    return Jsonl(path, heldout=0.4)


@pytest.fixture
def begin(tmp_path, pretrained, some_reviews):
    """Contexts in which a teacher has finished that is not the model itself."""

    def make(name="run", mesh=None):
        mesh = sharding.single_device_mesh() if mesh is None else sharding.make_mesh(mesh)
        context = Context(tmp_path / name, 0, mesh, pretrained, some_reviews)
        save_params(context.stage_dir("sft") / "params", perturbed(context.policy_params("base"), 0.1))
        return context

    return make


def softmax(logits):
    logits = np.asarray(logits, np.float64)
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def test_the_loss_is_the_divergence_at_the_completions_tokens(begin):
    context, config = begin(), change(beta=0.3)
    rng, p = np.random.default_rng(1), config.prompt_length
    tokens = rng.integers(4, 500, size=(4, p + 8)).astype(np.int32)
    prompt_mask = np.arange(p + 8)[None] >= np.array([0, 3, 5, 1])[:, None]
    prompt_mask[:, p:] = False
    completion_mask = (np.arange(p + 8)[None] >= p) & (np.arange(p + 8)[None] < p + np.array([8, 2, 5, 1])[:, None])
    batch = Rollout(tokens=tokens, prompt_mask=prompt_mask, completion_mask=completion_mask)
    student, teacher = context.policy("base"), context.policy("sft")
    by_token = {}
    q, t = (softmax(models.logits(SPEC, x, tokens, prompt_mask | completion_mask))[:, :-1] for x in (student, teacher))
    mixture = 0.3 * t + 0.7 * q
    by_token["forward_kl"] = (t * np.log(t / q)).sum(-1)
    by_token["reverse_kl"] = (q * np.log(q / t)).sum(-1)
    by_token["jensen_shannon"] = 0.3 * (t * np.log(t / mixture)).sum(-1) + 0.7 * (q * np.log(q / mixture)).sum(-1)
    assert by_token.keys() == distill.DIVERGENCES.keys()
    counted = completion_mask[:, 1:]
    for name, expected in by_token.items():
        named = dataclasses.replace(config, divergence=name)
        loss, metrics = jax.jit(
            lambda s, t, b, c=named: distill.distillation_loss(SPEC, c, t, s, b, {"beta": c.beta}, None)
        )(student, teacher, batch)
        assert float(loss.count) == counted.sum() == 16
        assert float(loss.value) == pytest.approx(expected[counted].mean(), rel=1e-4)
        agree = (q.argmax(-1) == t.argmax(-1))[counted].mean()
        assert float(metrics["same_choice"].value) == pytest.approx(agree)


def test_the_student_comes_nearer_and_a_stopped_run_ends_the_same(begin, rows, monkeypatch):
    whole, config = begin("whole"), change(data=rows)
    figures = distill.train(config, whole, "distill")
    assert figures["teacher_kl_after"] < 0.7 * figures["teacher_kl_before"] and "seq_kl" not in figures
    assert (figures["rows_train"], figures["rows_heldout"], figures["steps"]) == (48, 32, 10)
    lines = read_jsonl(whole.workdir / "metrics.jsonl")
    assert {line["student_writes"] for line in lines} == {0.0, 1.0}
    assert np.mean([line["loss"] for line in lines[-3:]]) < np.mean([line["loss"] for line in lines[:3]])
    samples = read_jsonl(whole.stage_dir("distill") / "samples.jsonl")
    assert len(samples) == 64 and {row["when"] for row in samples} == {"before", "after"}

    broken, record = begin("broken"), distill.Loop.record

    def interrupt(self, state, metrics, *, tokens):
        if self._step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        record(self, state, metrics, tokens=tokens)

    monkeypatch.setattr(distill.Loop, "record", interrupt)
    with pytest.raises(Stopped, match="step 5 of 10"):
        distill.train(config, broken, "distill")
    monkeypatch.setattr(distill.Loop, "record", record)
    assert distill.train(config, broken, "distill") == figures
    pair = zip(*(jax.tree.leaves(one.policy_params("distill")) for one in (whole, broken)), strict=True)
    assert all(np.array_equal(a, b) for a, b in pair)


@pytest.mark.slow
def test_a_mesh_and_microbatches_take_the_same_steps(begin, rows):
    losses = []
    for name, mesh, parts in (("one", None, 1), ("many", MeshConfig(data=2, fsdp=2, tensor=2), 2)):
        context = begin(name, mesh)
        config = change(data=rows, steps=3, num_microbatches=parts)
        state = distill.fit(config, context, "distill", distill.load_prompts(config, context, "distill").train,
                            context.policy("sft"), note=name)  # fmt: skip
        losses.append([line["loss"] for line in read_jsonl(context.workdir / "metrics.jsonl")])
        assert int(state.step) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_who_writes_is_drawn_by_the_share(begin):
    context = begin()
    drawn = [distill.student_writes(change(student_share=0.3), context, "distill", step) for step in range(1000)]
    assert np.mean(drawn) == pytest.approx(0.3, abs=0.06)
    again = [distill.student_writes(change(student_share=0.3), context, "distill", step) for step in range(1000)]
    assert drawn == again
    for share, wanted in ((0.0, False), (1.0, True)):
        steps = [distill.student_writes(change(student_share=share), context, "distill", step) for step in range(50)]
        assert set(steps) == {wanted}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"teacher": "base"}, "teacher='base' is the student too; name another stage"),
        ({"beta": 1.0}, "beta must lie in"),
        ({"student_share": 1.5}, "student_share must lie in"),
        ({"num_microbatches": 3}, "batch_size=16 must divide by num_microbatches=3"),
        ({"steps": 0}, "steps must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        change(**fields)


def test_rows_without_prompts_are_told(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "no prompt"}\n' * 3)
    with pytest.raises(UserError, match=r"data: .*texts.jsonl.* expected 'prompt'"):
        change(data=Jsonl(path)).check_inputs(None)
