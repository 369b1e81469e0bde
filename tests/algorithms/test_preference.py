"""The preference stage: its losses against pairs read one by one, the reference's log-probs, resuming, bad input."""

import math
import os
import signal
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import losses, models
from rlhf_jax.algorithms import preference
from rlhf_jax.algorithms.comparisons import SampledPairs
from rlhf_jax.algorithms.preference_losses import LOSSES, Name, Term
from rlhf_jax.algorithms.reference import GroupLogps, Sync, with_reference
from rlhf_jax.data.preference_batches import batch_groups
from rlhf_jax.data.preferences import PreferenceGroup
from rlhf_jax.data.reading import Mixed
from rlhf_jax.errors import Stopped, UserError
from rlhf_jax.metrics import read_jsonl
from rlhf_jax.optim import Optimizer
from rlhf_jax.sharding import single_device_mesh, unbox
from tests.algorithms.conftest import SPEC, put_stages

PAIRS = SampledPairs(prompts=24, heldout_prompts=12, completions=3, completion_tokens=12, batch_size=48)
FIELDS = {
    "pairs": PAIRS,
    "length": 24,
    "steps": 8,
    "batch_size": 8,
    "evaluate_every": 4,
    "checkpoint_every": 3,
    "optimizer": Optimizer(learning_rate=3e-3),
}
LAYOUT = {"pad_id": 0, "completions": 3, "length": 12}


@pytest.fixture
def context(make_context):
    context = make_context()
    put_stages(context)
    return context


@pytest.fixture(scope="module")
def params():
    """A policy and a reference."""
    return [unbox(models.init(SPEC, jax.random.key(seed))) for seed in (0, 1)]


def group(rng, lengths, pairs):
    tokens = tuple(tuple(rng.integers(4, 500, size=n).tolist()) for n in lengths)
    return PreferenceGroup("", ("",) * len(lengths), (2, *rng.integers(4, 500, size=3).tolist()), tokens, (), pairs,
                           (0.0,) * len(pairs), "file")  # fmt: skip


@pytest.fixture(scope="module")
def groups():
    rng = np.random.default_rng(0)
    return [
        group(rng, (3, 8, 5), ((0, 1), (2, 1), (0, 2))),
        group(rng, (2, 4), ((1, 0),)),
        group(rng, (1, 1, 7), ((2, 0), (2, 1))),
    ]


def one_by_one(params, groups):
    """log π of each completion, its row alone and without padding."""
    found = []
    for one in groups:
        rows = [np.asarray(row)[None] for row in one.rows()]
        logps = [np.asarray(jax.nn.log_softmax(models.logits(SPEC, params, row)))[0] for row in rows]
        start = len(one.prompt_tokens)
        found.append(
            [sum(lp[t - 1, row[0, t]] for t in range(start, row.size)) for lp, row in zip(logps, rows, strict=True)]
        )
    return found


def test_log_probs_of_groups_are_those_of_their_rows(params, groups):
    read = GroupLogps(SPEC, single_device_mesh(), batch_size=2, **LAYOUT)
    for found, expected in zip(read(params[0], groups), one_by_one(params[0], groups), strict=True):
        np.testing.assert_allclose(found[: len(expected)], expected, rtol=1e-5)
        assert not found[len(expected) :].any()


READS = {
    "mean_logratio": {"dpo_norm": losses.dpo, "ipo_norm": losses.ipo},
    "mean_logps": {"simpo": losses.simpo, "alpha_po": losses.alpha_po, "orpo": losses.orpo},
    "logps": {"cpo": losses.cpo, "cpl": losses.cpl},
}


def expected_loss(name, policy, reference, groups, options):
    """Σ over pairs, each on its own, / pairs."""
    rows = []
    for one, logps, ref in zip(groups, policy, reference, strict=True):
        for w, x in one.pairs:
            lengths = [len(one.completion_tokens[i]) for i in (w, x)]
            ratio, own = [logps[i] - ref[i] for i in (w, x)], [logps[i] for i in (w, x)]
            if name in READS["mean_logratio"]:
                rows.append(
                    READS["mean_logratio"][name](
                        *(np.float32(r / n) for r, n in zip(ratio, lengths, strict=True)), **options
                    )[0]
                )
            elif name in READS["mean_logps"]:
                rows.append(
                    READS["mean_logps"][name](
                        *(np.float32(r / n) for r, n in zip(own, lengths, strict=True)), **options
                    )[0]
                )
            elif name in READS["logps"]:
                rows.append(READS["logps"][name](*map(np.float32, own), **options)[0])
            elif name == "sft":
                rows.append(-own[0] / lengths[0])
            else:
                rows.append(getattr(losses, name)(*map(np.float32, ratio), **options)[0])
    return float(np.mean(rows))


@pytest.mark.parametrize("name", [name for name in LOSSES if not name.startswith("aot")])
def test_every_loss_is_the_mean_over_pairs_read_one_by_one(name, params, groups):
    options = {"divergence": "js"} if name == "f_dpo" else {} if name == "sft" else {"beta": 0.3}
    config = preference.Config(**FIELDS, losses=(Term(name, weight=2.0, **options),))
    policy, reference = (one_by_one(one, groups) for one in params)
    batch = batch_groups(groups, **LAYOUT)
    ref = np.zeros((3, 3), np.float32)
    for row, own in zip(ref, reference, strict=True):
        row[: len(own)] = own
    hyper = {key: jnp.float32(value) for key, value in config.losses[0].hyper().items()}
    loss, metrics = preference.preference_loss(SPEC, config)(
        params[0], batch.replace(ref_logps=ref), hyper, jax.random.key(0)
    )
    assert loss.count == 6
    np.testing.assert_allclose(loss.value, 2 * expected_loss(name, policy, reference, groups, options), rtol=2e-5)
    assert {"chosen_logps", "rejected_logps"} <= metrics.keys()


def test_several_losses_are_added_pair_by_pair(params, groups):
    terms = (Term("dpo", beta=0.2), Term("sft", weight=0.5))
    batch = batch_groups(groups, **LAYOUT)
    values = []
    for some in (terms, terms[:1], terms[1:]):
        config = preference.Config(**FIELDS, losses=some)
        loss, _ = preference.preference_loss(SPEC, config)(params[0], batch, {}, jax.random.key(0))
        values.append(float(loss.value))
    assert values[0] == pytest.approx(values[1] + values[2], rel=1e-6)


def test_aot_sorts_the_whole_batch(params):
    rng = np.random.default_rng(1)
    pairs = [group(rng, (4, 6), ((0, 1),)) for _ in range(5)]
    policy, reference = (np.asarray(one_by_one(one, pairs), np.float32) for one in params)
    config = preference.Config(**FIELDS, losses=(Term("aot", beta=0.3),))
    batch = batch_groups(pairs, pad_id=0, completions=2, length=12).replace(ref_logps=reference)
    loss, _ = preference.preference_loss(SPEC, config)(params[0], batch, {}, jax.random.key(0))
    expected = losses.aot(policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1], beta=0.3)[0].mean()
    np.testing.assert_allclose(loss.value, expected, rtol=2e-5)


def test_the_names_are_all_losses_of_pairs():
    assert set(typing.get_args(Name)) == set(LOSSES)
    own = {name for name in dir(losses.preference) if callable(vars(losses.preference)[name])} & set(losses.__all__)
    assert own <= set(LOSSES)


def test_the_reference_is_read_once_and_again_where_its_file_is_damaged(tmp_path, params, groups):
    read = GroupLogps(SPEC, single_device_mesh(), batch_size=2, **LAYOUT)
    splits = (Mixed((groups[:1], groups[1:]), (0.5, 0.5)), groups[1:])
    path = tmp_path / "reference.npz"
    first = with_reference(path, read, params[1], splits, note="x")
    assert isinstance(first[0], Mixed) and [len(part) for part in first[0].parts] == [1, 2]
    for found, one in zip([*first[0], *first[1]], [*groups, *groups[1:]], strict=True):
        assert found.completion_tokens == one.completion_tokens
        np.testing.assert_allclose(found.ref_logps[: len(one.completions)], one_by_one(params[1], [one])[0], rtol=1e-5)
    again = with_reference(path, read, params[0], splits, note="x")  # other parameters: what is kept is taken
    assert [one.ref_logps for one in again[0]] == [one.ref_logps for one in first[0]]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    fresh = with_reference(path, read, params[1], splits, note="x")
    assert [one.ref_logps for one in fresh[0]] == [one.ref_logps for one in first[0]]


def lines(context):
    return read_jsonl(context.workdir / "metrics.jsonl")


def test_it_learns_from_the_reference_on(context):
    summary = preference.train(preference.Config(**FIELDS | {"steps": 24}), context, "dpo")
    first, last = lines(context)[0], lines(context)[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and first["margin"] == pytest.approx(0, abs=1e-4)
    assert last["loss"] < 0.5 and last["accuracy"] > 0.7
    assert summary["heldout_accuracy_low"] <= summary["heldout_accuracy"] <= summary["heldout_accuracy_high"]
    assert summary["steps"] == 24 and summary["rows_train"] == 24
    assert (context.stage_dir("dpo") / "params").is_dir()


def test_a_reference_that_follows_at_once_keeps_the_loss_at_its_start(context):
    fields = FIELDS | {"optimizer": Optimizer(learning_rate=1e-3)}
    preference.train(preference.Config(**fields, reference=Sync(every=1, share=1.0)), context, "tr")
    for line in lines(context):
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-4) and abs(line["margin"]) < 1e-3


def test_microbatches_take_the_same_steps(make_context):
    found = []
    for parts in (1, 4):
        context = make_context(f"run{parts}")
        put_stages(context)
        config = preference.Config(**FIELDS, num_microbatches=parts, reference=Sync(every=2))
        preference.train(config, context, "tr")
        found.append(lines(context))
    for a, b in zip(*found, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-5) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-3
        )


def test_a_run_that_was_stopped_ends_as_an_unbroken_one(make_context, monkeypatch):
    config = preference.Config(**FIELDS, reference=Sync(every=2))
    whole, broken = make_context("whole"), make_context("broken")
    for context in (whole, broken):
        put_stages(context)
    expected = preference.train(config, whole, "tr")
    record = preference.Loop.record

    def interrupt(self, state, metrics, *, tokens):
        if self._step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        record(self, state, metrics, tokens=tokens)

    monkeypatch.setattr(preference.Loop, "record", interrupt)
    with pytest.raises(Stopped):
        preference.train(config, broken, "tr")
    monkeypatch.setattr(preference.Loop, "record", record)
    assert preference.train(config, broken, "tr") == expected
    for a, b in zip(*(jax.tree.leaves(context.policy_params("tr")) for context in (whole, broken)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"losses": ()}, "losses: at least one, and each once, got none"),
        ({"losses": (Term(), Term(beta=0.2))}, "each once, got dpo, dpo"),
        ({"losses": (Term("simpo"),), "reference": Sync()}, "reference: simpo read none"),
        ({"losses": (Term("aot"),), "num_microbatches": 2}, "num_microbatches must be 1"),
        ({"length": 20}, "length=20 must hold BOS, prompt and completion of pairs: 21"),
    ],
)
def test_fields_that_do_not_go_together(fields, says):
    with pytest.raises(ValueError, match=says):
        preference.Config(**FIELDS | fields)


@pytest.mark.parametrize(
    ("term", "says"),
    [
        ({"loss": "dpo", "beta": -0.1}, r"dpo: beta must lie in \(0, inf\)"),
        ({"loss": "hinge", "label_smoothing": 0.1}, "hinge has no label_smoothing"),
        ({"loss": "dpo", "weight": 0.0}, "weight must lie"),
    ],
)
def test_terms_that_are_wrong(term, says):
    with pytest.raises(ValueError, match=says):
        Term(**term)


def test_aot_wants_one_pair_a_prompt(context):
    with pytest.raises(UserError, match=r"stages\.x\.losses: aot sorts pairs across prompts"):
        preference.train(preference.Config(**FIELDS, losses=(Term("aot"),)), context, "x")
