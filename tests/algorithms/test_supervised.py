"""Pretraining and SFT: what is counted, what is learnt, what a kill costs, what a mesh changes."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest

from rlhf_jax import models, sharding
from rlhf_jax.algorithms import pretrain, sft, supervised
from rlhf_jax.data.pipeline import packed
from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.data.sources import Jsonl, Mixture
from rlhf_jax.errors import NonFiniteError, Stopped, UserError
from rlhf_jax.metrics import read_jsonl
from rlhf_jax.optim import Optimizer
from rlhf_jax.sharding import MeshConfig
from rlhf_jax.train_step import compiled, make_train_step, sharded_state
from tests.algorithms.conftest import SPEC
from tests.compiling import no_compiling

CONFIG = {
    "row_length": 50,
    "batch_size": 8,
    "heldout_rows": 16,
    "evaluate_every": 4,
    "checkpoint_every": 3,
    "optimizer": Optimizer(learning_rate=1e-2, schedule="linear"),
}
DATA = sft.Openings(completion_tokens=20)


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def batches(context, count):
    make_row = sft.opening_row(DATA, context.tokenizer)
    iterator = packed(context.reviews.train, make_row, pad_id=0, row_length=50, batch_size=8, seed=0)
    return [next(iterator) for _ in range(count)]


def test_packed_loss_is_the_mean_over_completion_tokens_of_single_rows(make_context):
    context = make_context()
    params, batch = context.policy_params("base"), batches(context, 1)[0]
    loss, _ = supervised.language_model_loss(SPEC)(params, batch, {}, jax.random.key(0))
    total = count = 0.0
    for tokens, segments, loss_mask in zip(batch.tokens, batch.segment_ids, batch.loss_mask, strict=True):
        for segment in range(1, segments.max() + 1):
            row, counted = tokens[segments == segment], loss_mask[segments == segment]
            logits = np.asarray(models.logits(SPEC, params, row[None]), np.float64)[0]
            logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            picked = logps[np.arange(len(row) - 1), row[1:]]
            total -= picked[counted[1:]].sum()
            count += counted.sum()
            assert not counted[:3].any() and counted[9:].all()  # BOS and 2 to 8 tokens of prompt
    assert float(loss.count) == count
    assert float(loss.value) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_learns(stage, make_context):
    context = make_context()
    if stage == "sft":
        figures = sft.train(sft.Config(steps=30, data=DATA, **CONFIG), context, "sft")
    else:
        figures = pretrain.train(pretrain.Config(steps=30, **CONFIG), context, "pretrain")
    lines = read_jsonl(context.workdir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 31))
    heldout = [line["heldout_loss"] for line in lines if "heldout_loss" in line]
    assert len(heldout) == 8 and heldout[-1] < heldout[0] - 0.2
    assert figures["heldout_loss"] == pytest.approx(heldout[-1], abs=1e-5)
    trained = context.policy_params(stage)
    assert not np.array_equal(trained["embedding"], context.policy_params("base")["embedding"])


@pytest.mark.parametrize("when", ["record", "__exit__"])
def test_a_signal_in_the_last_step_or_after_it_is_heard(when, make_context, monkeypatch):
    config, context = sft.Config(steps=2, data=DATA, **CONFIG), make_context()
    heard = getattr(supervised.Loop, when)

    def interrupt(self, *args, **kwargs):
        if self._step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return heard(self, *args, **kwargs)

    monkeypatch.setattr(supervised.Loop, when, interrupt)
    with pytest.raises(Stopped, match="stopped after step 2 of 2"):
        sft.train(config, context, "sft")
    monkeypatch.setattr(supervised.Loop, when, heard)
    assert sft.train(config, context, "sft")["steps"] == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_ends_where_an_unbroken_one_does(number, make_context, monkeypatch):
    config = sft.Config(steps=8, data=DATA, **CONFIG)
    whole = make_context("whole")
    expected = sft.train(config, whole, "sft")

    broken = make_context("broken")
    record = supervised.Loop.record

    def interrupt(self, state, metrics, *, tokens):
        if self._step == 5:
            os.kill(os.getpid(), number)
        record(self, state, metrics, tokens=tokens)

    monkeypatch.setattr(supervised.Loop, "record", interrupt)
    with pytest.raises(Stopped, match="step 5 of 8") as stopped:
        sft.train(config, broken, "sft")
    assert stopped.value.exit_code == 128 + number
    monkeypatch.setattr(supervised.Loop, "record", record)
    assert sft.train(config, broken, "sft") == expected
    for a, b in zip(leaves(whole.policy_params("sft")), leaves(broken.policy_params("sft")), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [line["step"] for line in read_jsonl(broken.workdir / "metrics.jsonl")] == list(range(1, 9))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(make_context):
    context = make_context()
    optimizer = Optimizer(learning_rate=1e30, clip_norm=1e30)
    with pytest.raises(NonFiniteError, match=r"sft: \w+ is (nan|inf) at step \d+; ") as error:
        sft.train(sft.Config(steps=9, data=DATA, **{**CONFIG, "optimizer": optimizer}), context, "sft")
    assert error.value.exit_code == 3
    assert not (context.stage_dir("sft") / "params").exists()


def test_microbatches_on_a_mesh_take_the_same_steps(make_context):
    optimizer = Optimizer(learning_rate=1e-2).make(3)
    loss_fn = supervised.language_model_loss(SPEC)

    def three_steps(context, num_microbatches=1):
        start = context.policy_params("base")
        boxes = jax.eval_shape(lambda: models.init(SPEC, jax.random.key(0)))
        boxed = lambda params: models.heads.box(params, boxes)  # noqa: E731
        state = sharded_state(context.mesh, boxed, start, optimizer, {"learning_rate": 1e-2}, jax.random.key(0))
        step = compiled(make_train_step(loss_fn, optimizer, num_microbatches=num_microbatches), state)
        losses = []
        with sharding.scope(context.mesh):
            for batch in batches(context, 3):
                state, metrics = step(state, sharding.shard_batch(context.mesh, batch))
                losses.append(float(metrics["loss"]))
            params = leaves(state.params)
            again = sharding.shard_batch(context.mesh, batch)
            with no_compiling():
                step(state, again)
        return losses, params

    losses, params = three_steps(make_context())
    other_losses, other_params = three_steps(make_context(mesh=MeshConfig(fsdp=2, pipeline=2, tensor=2)), 2)
    np.testing.assert_allclose(other_losses, losses, atol=1e-5)
    for a, b in zip(params, other_params, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_texts_that_cannot_be_cut_are_refused(make_context, tmp_path):
    path = tmp_path / "words.jsonl"
    path.write_text("".join(f'{{"text": "word{i}"}}\n' for i in range(80)))
    context = dataclasses.replace(make_context(), data=Jsonl(path))
    with pytest.raises(UserError, match=r"stages\.sft\.data\.prompt_tokens: none of 76 texts has a space after 2 to 8"):
        sft.train(sft.Config(steps=1, data=DATA, **CONFIG), context, "sft")


def test_examples_of_a_mixture_are_learnt_within_their_lengths(make_context, tmp_path):
    for name, word in (("yes", " yes indeed"), ("no", " no no no no no no no no no")):
        rows = [{"question": f"Was it {i}?", "completion": word} for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    names = {"prompt": "question"}
    parts = (Jsonl(tmp_path / "yes.jsonl", fields=names), Jsonl(tmp_path / "no.jsonl", fields=names, max_tokens=12,
                                                               too_long="cut"))  # fmt: skip
    config = sft.Config(steps=8, data=Mixture(parts, weights=(1, 1)), **CONFIG)
    config.check_inputs(MovieReviews())
    figures = sft.train(config, make_context(), "sft")
    counts = {name: figures[f"rows_{name}"] for name in ("train", "heldout", "merged", "dropped", "cut")}
    assert counts == {"train": 76, "heldout": 4, "merged": 2, "dropped": 0, "cut": 40}
    assert figures["heldout_loss"] < 5.5


def test_a_row_that_cannot_hold_its_example_is_refused():
    with pytest.raises(ValueError, match="row_length=40 must hold BOS, prompt and completion"):
        sft.Config(row_length=40)
    with pytest.raises(ValueError, match="batch_size=6 must divide by num_microbatches=4"):
        sft.Config(batch_size=6, num_microbatches=4)
