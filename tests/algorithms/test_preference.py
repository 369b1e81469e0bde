"""The preference stage: that it learns, what it writes, resuming, meshes, the reference's file, bad rows."""

import json
import math
import os
import signal
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from rlhf_jax.algorithms import comparisons, preference
from rlhf_jax.algorithms.comparisons import SampledPairs
from rlhf_jax.algorithms.preference_losses import Term
from rlhf_jax.algorithms.reference import CompletionLogps, Sync, completion_logps, with_reference
from rlhf_jax.data.preference_batches import batch_groups, longest_completion
from rlhf_jax.data.preferences import PreferenceGroup
from rlhf_jax.data.reading import Mixed
from rlhf_jax.data.sources import Jsonl, Mixture
from rlhf_jax.errors import Stopped, UserError
from rlhf_jax.metrics import read_jsonl
from rlhf_jax.optim import Optimizer
from rlhf_jax.sharding import MeshConfig, single_device_mesh
from tests.algorithms.conftest import SPEC, put_stages

pytestmark = pytest.mark.usefixtures("compile_quickly")

FIELDS = {
    "length": 24,
    "steps": 6,
    "batch_size": 8,
    "evaluate_every": 4,
    "checkpoint_every": 2,
    "evaluation_prompts": 0,
    "optimizer": Optimizer(learning_rate=1e-3),
}
GOOD, BAD = "a fine and moving story", "a dull waste of time"


@pytest.fixture
def context(make_context):
    context = make_context()
    put_stages(context)
    return context


@pytest.fixture
def rows(tmp_path):
    """A source of 40 pairs, or of 80 thumbs."""

    def write(kind="pairs", path="rows.jsonl"):
        found = []
        for i in range(40):
            prompt, texts = f"Film number {i} is", (f" {GOOD} {i}", f" {BAD} {i}")
            if kind == "pairs":
                found.append({"prompt": prompt, "chosen": texts[0], "rejected": texts[1]})
            else:
                found += [{"prompt": prompt, "completion": text, "label": text == texts[0]} for text in texts]
        (tmp_path / path).write_text("".join(json.dumps(row) + "\n" for row in found))
        return Jsonl(str(tmp_path / path), heldout=0.2)

    return write


def lines(context):
    return read_jsonl(context.workdir / "metrics.jsonl")


def test_it_learns_and_writes_of_held_out_prompts(context, rows):
    fields = FIELDS | {"steps": 12, "evaluation_prompts": 6, "length": 48}  # no prompt is cut
    config = preference.Config(**fields, completion_tokens=6, pairs=rows())
    summary = preference.train(config, context, "dpo")
    first, last = lines(context)[0], lines(context)[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and first["margin"] == pytest.approx(0, abs=1e-4)
    assert last["loss"] < 0.6 and last["accuracy"] > 0.9
    assert summary["heldout_accuracy_low"] <= summary["heldout_accuracy"] <= summary["heldout_accuracy_high"]
    assert summary["heldout_accuracy"] > 0.9 and summary["heldout_margin_low"] > 0
    assert summary["heldout_loss"] == pytest.approx(last["heldout_loss"], rel=1e-6)
    assert 0.5 <= summary["heldout_accuracy_by_length"] <= 1
    assert summary["rows_train"] == 32 and summary["rows_heldout"] == 8
    assert summary["seq_kl"] > 0 and {"distinct2_before", "distinct2_after", "length_after"} <= summary.keys()
    written = read_jsonl(context.stage_dir("dpo") / "samples.jsonl")
    assert [row["when"] for row in written] == ["before"] * 6 + ["after"] * 6
    assert all("Film number 3" in row["prompt"] for row in written)  # the last rows are held out
    assert (context.stage_dir("dpo") / "params").is_dir()


def test_sampled_pairs_are_judged_and_the_policies_read_by_the_judges(context):
    pairs = SampledPairs(prompts=24, heldout_prompts=12, completions=3, completion_tokens=12, batch_size=48)
    config = preference.Config(**FIELDS | {"evaluation_prompts": 24, "steps": 2}, pairs=pairs)
    summary = preference.train(config, context, "dpo")
    wanted = {f"{name}_{when}" for name in ("gold", "vader", "distinct2", "length") for when in ("before", "after")}
    assert wanted | {"seq_kl", "heldout_accuracy", "heldout_accuracy_low"} <= summary.keys()
    assert 0 < summary["gold_before"] < 1 and summary["rows_train"] == 24
    written = read_jsonl(context.stage_dir("dpo") / "samples.jsonl")
    assert np.mean([row["gold"] for row in written[24:]]) == pytest.approx(summary["gold_after"])
    assert max(abs(row["kl"]) for row in written[:24]) < 1e-4


def test_a_file_of_soft_labels_is_learnt_by_them(context, rows):
    source = rows()
    path = Path(source.path)
    soft = [
        json.loads(line) | ({"probability": 0.7} if i % 2 else {})
        for i, line in enumerate(path.read_text().splitlines())
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in soft))
    config = preference.Config(**FIELDS | {"batch_size": 32, "steps": 1}, losses=(Term("cpo"),), pairs=source)
    config.check_inputs(context.data)
    summary = preference.train(config, context, "cpo")
    layout = {"pad_id": context.tokenizer.pad_id, "completions": 2, "length": 24}
    make = partial(batch_groups, **layout)
    read = CompletionLogps(SPEC, single_device_mesh(), make=make, batch_size=8)
    data = comparisons.load(source, context.tokenizer, length=24)
    assert data.soft and sum(bool(group.probabilities) for group in data.train) == 16
    for stage, groups, found in (
        ("sft", data.train, lines(context)[0]["loss"]),  # of the first step, before it
        ("cpo", data.heldout, summary["heldout_loss"]),
    ):
        logps = np.float64(read(context.policy(stage), groups))
        gap = 0.1 * (logps[:, 0] - logps[:, 1])
        p = np.asarray([0.7 if group.probabilities else 1.0 for group in groups])
        assert found == pytest.approx(np.mean(p * np.logaddexp(0, -gap) + (1 - p) * np.logaddexp(0, gap)), rel=1e-4)


def test_losses_that_take_no_soft_labels_say_so(context, rows):
    source = rows()
    path = Path(source.path)
    path.write_text(
        path.read_text().replace('"prompt": "Film number 7', '"probability": 0.7, "prompt": "Film number 7')
    )
    for loss in ("aot", "aot_unpaired", "exo_pair", "kto", "bco"):
        config = preference.Config(**FIELDS, losses=(Term(loss),), pairs=source)
        with pytest.raises(
            UserError, match=rf"^pairs: .*line 8: 'probability' is 0.7, but losses={loss} takes no soft"
        ):
            config.check_inputs(context.data)
        with pytest.raises(UserError, match="takes no soft labels"):
            preference.train(config, context, loss)


def test_kto_learns_from_thumbs_and_from_pairs(make_context, rows):
    found = []
    for kind in ("thumbs", "pairs"):
        context = make_context(kind)
        put_stages(context)
        config = preference.Config(**FIELDS | {"steps": 12}, losses=(Term("kto"),), pairs=rows(kind, f"{kind}.jsonl"))
        found.append(preference.train(config, context, "kto"))
        first, last = lines(context)[0], lines(context)[-1]
        assert first["loss"] == pytest.approx(0.5, abs=1e-5) and first["kl_baseline"] == pytest.approx(0, abs=1e-4)
        assert last["loss"] < 0.47 and last["desirable_reward"] > last["undesirable_reward"]
    for summary, held_out in zip(found, (16, 8), strict=True):
        assert summary["heldout_auc"] > 0.9 and summary["heldout_auc_low"] > 0.5 and summary["heldout_loss"] < 0.5
        assert summary["rows_heldout"] == held_out


def test_a_reference_that_follows_at_once_keeps_the_loss_at_its_start(context, rows):
    preference.train(preference.Config(**FIELDS, pairs=rows(), reference=Sync(every=1, share=1.0)), context, "tr")
    for line in lines(context):
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-4) and abs(line["margin"]) < 1e-3


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_microbatches_on_a_mesh_take_the_same_steps(loss, make_context, rows):
    found = []
    for name, mesh, parts in (("one", None, 1), ("many", MeshConfig(data=2, fsdp=2, tensor=2), 2)):
        context = make_context(name, mesh=mesh)
        put_stages(context)
        fields = FIELDS | {"steps": 4, "num_microbatches": parts, "init": "base"}
        config = preference.Config(**fields, losses=(Term(loss),), pairs=rows(), reference=Sync(every=2))
        preference.train(config, context, "x")
        found.append(lines(context))
    for a, b in zip(*found, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    "fields",
    [{"losses": (Term("bco"),), "reference": Sync(every=2)}, {"losses": (Term("kto"),)}],
    ids=["bco, its shift and a reference that follows", "kto, the reference read once"],
)
def test_a_run_that_was_stopped_ends_as_an_unbroken_one(fields, make_context, rows, monkeypatch):
    config = preference.Config(**FIELDS, **fields, pairs=rows("thumbs"))
    whole, broken = make_context("whole"), make_context("broken")
    for context in (whole, broken):
        put_stages(context)
    expected = preference.train(config, whole, "x")
    record = preference.Loop.record

    def interrupt(self, state, metrics, *, tokens):
        if self._step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        record(self, state, metrics, tokens=tokens)

    monkeypatch.setattr(preference.Loop, "record", interrupt)
    with pytest.raises(Stopped):
        preference.train(config, broken, "x")
    monkeypatch.setattr(preference.Loop, "record", record)
    assert preference.train(config, broken, "x") == expected
    for a, b in zip(*(jax.tree.leaves(context.policy_params("x")) for context in (whole, broken)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_reference_is_read_once_and_again_where_its_file_is_not_right(tmp_path, pretrained):
    def group(*tokens):
        return PreferenceGroup("", ("", ""), (2, 7), tokens, (), ((0, 1),), (0.0,), "file")

    groups = [group((5, 9), (4,)), group((8,), (6, 6, 6)), group((7, 7), (9,))]
    layout = {"pad_id": 0, "completions": 2, "length": 8}
    read = CompletionLogps(SPEC, single_device_mesh(), make=lambda rows: batch_groups(rows, **layout), batch_size=2)
    own, other = pretrained.params, jax.tree.map(lambda x: x * 1.5, pretrained.params)
    path, splits = tmp_path / "reference.npz", (Mixed((groups[:1], groups[1:]), (0.5, 0.5)), groups[1:])
    train, heldout = with_reference(path, read, own, splits, note="x")
    assert isinstance(train, Mixed) and [len(part) for part in train.parts] == [1, 2]
    np.testing.assert_array_equal([one.ref_logps for one in train], read(own, groups))
    np.testing.assert_array_equal([one.ref_logps for one in heldout], read(own, groups[1:]))
    assert [one.completion_tokens for one in train] == [one.completion_tokens for one in groups]
    kept = with_reference(path, read, other, splits, note="x")[0]  # other parameters: what is kept is taken
    assert [one.ref_logps for one in kept] == [one.ref_logps for one in train]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    anew = with_reference(path, read, other, splits, note="x")[0]
    np.testing.assert_array_equal([one.ref_logps for one in anew], read(other, groups))
    swapped = with_reference(path, read, own, (groups[::-1], groups[1:]), note="x")[0]  # other rows, as many
    np.testing.assert_array_equal([one.ref_logps for one in swapped], read(own, groups[::-1]))


def test_columns_of_completions_alone_reach_the_vocabulary(pretrained):
    def group(prompt, *tokens):
        return PreferenceGroup("", ("", ""), prompt, tokens, (), ((0, 1),), (0.0,), "file")

    groups = [group((2, 7), (5, 9), (4,)), group((2,), (8,), (6, 6, 6)), group((2, 9, 9, 9, 5, 5), (9,), (7, 1, 3))]
    layout = {"pad_id": 0, "completions": 3, "length": 9}  # a third completion that none of them has
    plain, narrow = batch_groups(groups, **layout), batch_groups(groups, **layout, longest=3)
    assert longest_completion(groups, length=9) == 3 and longest_completion(groups, length=3) is None

    def read(batch):
        logps = partial(completion_logps, SPEC)
        return jax.jit(lambda params: (logps(params, batch)[0] ** 2).sum()), logps(pretrained.params, batch)[0]

    (one, before), (other, after) = read(plain), read(narrow)
    np.testing.assert_allclose(after, before, atol=1e-5)
    assert (before[:, 2] == 0).all() and (after[:, 2] == 0).all()
    for a, b in zip(*(jax.tree.leaves(jax.grad(fn)(pretrained.params)) for fn in (one, other)), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5)
    whole = f"9,9,{SPEC.vocab_size}]"
    assert whole in str(one.trace(pretrained.params).jaxpr) and whole not in str(other.trace(pretrained.params).jaxpr)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Jsonl(str(path), heldout=0.5)


THUMB = {"prompt": "p", "completion": "c", "label": True}


@pytest.mark.parametrize(
    ("loss", "row", "says"),
    [
        ("dpo", THUMB, r"pairs: .*rows.jsonl, line 1: no field 'chosen'; the row has 'prompt', 'completion', 'label'"),
        ("kto", {"prompt": "p", "completion": "c"}, "pairs: .*line 1: no field 'label'"),
        ("kto", {**THUMB, "label": 0.5}, "pairs: .*line 1: 'label' must be true or false, or 1 or 0, found 0.5"),
        ("bco", {"prompt": "p", "text": "t"}, "pairs: .*line 1: expected 'prompt', 'completion' and 'label', or "
                                              "'chosen' and 'rejected'"),
    ],
)  # fmt: skip
def test_rows_of_the_wrong_kind_name_the_fields(loss, row, says, tmp_path, some_reviews):
    source = write(tmp_path / "rows.jsonl", row, row)
    for pairs in (source, Mixture((source,), (1.0,))):
        with pytest.raises(UserError, match=says):
            preference.Config(**FIELDS, losses=(Term(loss),), pairs=pairs).check_inputs(some_reviews)


@pytest.mark.parametrize(
    ("loss", "rows", "says"),
    [
        ("bco", [THUMB, {**THUMB, "completion": "d"}], "the 1 rows to train on must hold both labels, true and false"),
        (
            "kto",
            [{**THUMB, "completion": c, "label": c in "ac"} for c in "abcd"],
            "all 2 rows have the same prompt; kto",
        ),
    ],
)
def test_thumbs_that_tell_nothing(loss, rows, says, tmp_path, context):
    config = preference.Config(**FIELDS, losses=(Term(loss),), pairs=write(tmp_path / "rows.jsonl", *rows))
    with pytest.raises(UserError, match=rf"stages\.x\.pairs: {says}"):
        preference.train(config, context, "x")


def test_aot_wants_one_pair_a_prompt(context, tmp_path):
    row = {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [0, 1, 2]}
    pairs = write(tmp_path / "rows.jsonl", row, {**row, "prompt": "q"})
    with pytest.raises(UserError, match=r"stages\.x\.losses: aot sorts pairs across prompts"):
        preference.train(preference.Config(**FIELDS, losses=(Term("aot"),), pairs=pairs), context, "x")
