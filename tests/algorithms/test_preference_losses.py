"""Every loss by name: its value against rows read one by one, and steps of the stage's own program that lower it."""

import dataclasses
import typing

import jax
import numpy as np
import pytest

from rlhf_jax import losses, models, sharding
from rlhf_jax.algorithms import preference, preference_heldout
from rlhf_jax.algorithms.context import Context
from rlhf_jax.algorithms.preference_losses import LOSSES, THUMB_LOSSES, Name, Term
from rlhf_jax.algorithms.preference_objectives import pair_loss
from rlhf_jax.algorithms.reference import CompletionLogps, Sync
from rlhf_jax.data.preference_batches import batch_groups, batch_thumbs
from rlhf_jax.data.preferences import PreferenceGroup
from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.data.thumbs import Liked
from rlhf_jax.interop.pretrained import Pretrained
from rlhf_jax.models import ModelSpec
from rlhf_jax.optim import Optimizer

pytestmark = pytest.mark.usefixtures("compile_quickly")

SPEC = ModelSpec(vocab_size=64, d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=16, max_len=16)
LAYOUT = {"pad_id": 0, "completions": 3, "length": 12}
FIELDS = {"init": "base", "pairs": None, "length": 12, "batch_size": 3, "evaluation_prompts": 0, "steps": 9}


@pytest.fixture(scope="module")
def params():
    """A policy and a reference, each far enough from uniform to tell rows apart."""
    found = [sharding.unbox(models.init(SPEC, jax.random.key(seed))) for seed in (0, 1)]
    return [jax.tree.map(lambda x: x * 2, one) for one in found]


def group(rng, lengths, pairs):
    tokens = tuple(tuple(rng.integers(4, 60, size=n).tolist()) for n in lengths)
    return PreferenceGroup("", ("",) * len(lengths), (2, *rng.integers(4, 60, size=3).tolist()), tokens, (), pairs,
                           (0.0,) * len(pairs), "file")  # fmt: skip


@pytest.fixture(scope="module")
def groups():
    rng = np.random.default_rng(0)
    return [
        group(rng, (3, 8, 5), ((0, 1), (2, 1), (0, 2))),
        group(rng, (2, 4), ((1, 0),)),
        group(rng, (1, 1, 7), ((2, 0), (2, 1))),
    ]


@pytest.fixture(scope="module")
def one_pair_each():
    rng = np.random.default_rng(1)
    return [group(rng, (3, 5), ((0, 1),)), group(rng, (6, 2), ((1, 0),)), group(rng, (4, 4), ((0, 1),))]


@pytest.fixture(scope="module")
def logps_of():
    """log π of each completion, its row alone and without padding."""
    logits = jax.jit(lambda params, row: jax.nn.log_softmax(models.logits(SPEC, params, row))[0])

    def one_by_one(params, rows):
        found = []
        for one in rows:
            found.append([])
            for completion in one.completion_tokens:
                row, start = np.asarray([*one.prompt_tokens, *completion]), len(one.prompt_tokens)
                logps = np.asarray(logits(params, row[None]), np.float64)
                found[-1].append(sum(logps[t - 1, row[t]] for t in range(start, row.size)))
        return found

    return one_by_one


@pytest.fixture
def steps(params, tmp_path):
    """Metrics of three steps of the stage's program on one batch."""

    def taken(config, batch):
        mesh = sharding.single_device_mesh()
        context = Context(tmp_path, 0, mesh, Pretrained(SPEC, params[0], None), MovieReviews())
        state, step = preference.start(config, context, "x")
        found = []
        with sharding.scope(mesh):
            for _ in range(3):
                state, metrics = step(state, sharding.shard_batch(mesh, batch), {})
                found.append({name: float(value) for name, value in metrics.items()})
        return found

    return taken


def with_logps(batch, logps):
    """A batch with the reference's log-probs in it."""
    ref = np.zeros(batch.tokens.shape[:2], np.float32)
    for row, own in zip(ref, logps, strict=True):
        row[: len(own)] = own
    return batch.replace(ref_logps=ref)


MEAN_LOGRATIO = {"dpo_norm": losses.dpo, "ipo_norm": losses.ipo}
MEAN_LOGPS, LOGPS = ("simpo", "alpha_po", "orpo"), ("cpo", "cpl")
OPTIONS = {"f_dpo": {"divergence": "js", "beta": 0.3}, "sft": {}}


def of_a_pair(name, logps, ref, lengths, options):
    """One pair's loss; winner and loser of each argument."""
    ratio = [np.float32(a - b) for a, b in zip(logps, ref, strict=True)]
    if name in MEAN_LOGRATIO:
        return MEAN_LOGRATIO[name](*(np.float32(r / n) for r, n in zip(ratio, lengths, strict=True)), **options)[0]
    if name in MEAN_LOGPS:
        means = (np.float32(x / n) for x, n in zip(logps, lengths, strict=True))
        return getattr(losses, name)(*means, **options)[0]
    if name in LOGPS:
        return getattr(losses, name)(*map(np.float32, logps), **options)[0]
    if name == "sft":
        return -logps[0] / lengths[0]
    return getattr(losses, name)(*ratio, **options)[0]


# One for each thing that losses read; the others take half a minute together.
QUICK = ("dpo", "ipo_norm", "simpo", "cpo", "f_dpo", "sft")
OTHERS = [name for name in LOSSES if not name.startswith("aot") and name not in QUICK]


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_a_loss_is_the_mean_over_pairs_and_falls(name, params, groups, logps_of, steps):
    options = OPTIONS.get(name, {"beta": 0.3})
    config = preference.Config(**FIELDS, losses=(Term(name, weight=2.0, **options),),
                               optimizer=Optimizer(learning_rate=1e-3))  # fmt: skip
    policy, reference = (logps_of(one, groups) for one in params)
    found = steps(config, with_logps(batch_groups(groups, **LAYOUT), reference))
    expected = []
    for one, own, ref in zip(groups, policy, reference, strict=True):
        for pair in one.pairs:
            lengths = [len(one.completion_tokens[i]) for i in pair]
            expected.append(of_a_pair(name, [own[i] for i in pair], [ref[i] for i in pair], lengths, options))
    assert found[0]["loss"] == pytest.approx(2 * float(np.mean(expected)), rel=1e-4, abs=1e-5)
    assert found[2]["loss"] < found[0]["loss"]
    assert all(np.isfinite(list(metrics.values())).all() and metrics["grad_norm"] > 0 for metrics in found)


def softplus(x):
    return np.logaddexp(0, x)


# In NumPy, of log-probs, those of the reference, and lengths; winner and loser of each.
IN_NUMPY = {
    "dpo": lambda w, x, rw, rx, n, m: softplus(-0.3 * (w - rw - x + rx)),
    "ipo": lambda w, x, rw, rx, n, m: ((w - rw - x + rx) - 1 / 0.6) ** 2,
    "hinge": lambda w, x, rw, rx, n, m: np.maximum(1 - 0.3 * (w - rw - x + rx), 0),
    "bco_pair": lambda w, x, rw, rx, n, m: softplus(-0.3 * (w - rw)) + softplus(0.3 * (x - rx)),
    "simpo": lambda w, x, rw, rx, n, m: softplus(1 - 0.3 * (w / n - x / m)),
    "cpo": lambda w, x, rw, rx, n, m: softplus(-0.3 * (w - x)),
    "sft": lambda w, x, rw, rx, n, m: -w / n,
}  # fmt: skip


@pytest.mark.parametrize("name", IN_NUMPY)
def test_a_soft_label_is_both_labels_by_their_probabilities(name, params, groups, logps_of):
    term = Term(name, **({} if name == "sft" else {"beta": 0.3}))
    soft = [dataclasses.replace(groups[0], probabilities=(0.9, 0.2, 0.6)), groups[1],
            dataclasses.replace(groups[2], probabilities=(0.75, 0.5))]  # fmt: skip
    policy, reference = (logps_of(one, soft) for one in params)
    batch = with_logps(batch_groups(soft, **LAYOUT, soft=True), reference)
    loss, found = pair_loss(SPEC, (term,))(params[0], batch, {}, jax.random.key(0))
    expected, ahead = [], []
    for one, own, ref in zip(soft, policy, reference, strict=True):
        for (w, x), p in zip(one.pairs, one.probabilities or (1.0,), strict=True):
            n, m = (len(one.completion_tokens[i]) for i in (w, x))
            as_said = IN_NUMPY[name](own[w], own[x], ref[w], ref[x], n, m)
            expected.append(p * as_said + (1 - p) * IN_NUMPY[name](own[x], own[w], ref[x], ref[w], m, n))
            ahead.append(own[w] - ref[w] > own[x] - ref[x])
    assert float(loss.value) == pytest.approx(np.mean(expected), rel=1e-4)
    if name == "dpo":  # how often the chosen one is ahead, whatever its probability
        assert float(found["accuracy"].value) == pytest.approx(np.mean(ahead))
        logps = np.asarray([[*own, 0][:3] for own in policy], np.float32)
        attached = [dataclasses.replace(one, ref_logps=tuple(ref)) for one, ref in zip(soft, reference, strict=True)]
        heldout = preference_heldout.of_pairs((term,), attached, logps, {}).means()
        assert heldout["heldout_loss"] == pytest.approx(np.mean(expected), rel=1e-4)
        assert heldout["heldout_accuracy"] == pytest.approx(np.mean(ahead))


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_sorts_the_whole_batch_and_falls(name, params, one_pair_each, logps_of, steps):
    config = preference.Config(**FIELDS, losses=(Term(name, beta=0.3),), optimizer=Optimizer(learning_rate=1e-3))
    policy, reference = (np.asarray(logps_of(one, one_pair_each), np.float32) for one in params)
    winner = [one.pairs[0][0] for one in one_pair_each]
    rows = np.arange(3)
    sides = [x[rows, i] for x in (policy, reference) for i in (winner, [1 - i for i in winner])]
    batch = batch_groups(one_pair_each, pad_id=0, completions=2, length=12)
    found = steps(config, with_logps(batch, reference))
    expected = getattr(losses, name)(*sides, beta=0.3)[0].mean()
    assert found[0]["loss"] == pytest.approx(float(expected), rel=1e-4)
    assert found[2]["loss"] < found[0]["loss"]


@pytest.fixture(scope="module")
def liked(one_pair_each):
    """Completions with one of another prompt beside each."""
    tokens = [one.completion_tokens[0] for one in one_pair_each]
    return [Liked(one.prompt_tokens, (tokens[i], tokens[(i + 1) % 3]), i != 1) for i, one in enumerate(one_pair_each)]


@pytest.mark.parametrize("parts", [1, 3])
def test_kto_sees_gains_from_the_baseline_of_the_whole_batch(parts, params, liked, logps_of, steps):
    term = Term("kto", weight=2.0, beta=0.3, desirable_weight=1.5)
    config = preference.Config(**FIELDS, losses=(term,), num_microbatches=parts,
                               optimizer=Optimizer(learning_rate=1e-3))  # fmt: skip
    policy, reference = (np.asarray(logps_of(one, liked)) for one in (params[0], params[1]))
    # The policy is to be above the reference beside other prompts, so that the baseline is not clamped at 0.
    reference[:, 1] = policy[:, 1] - np.asarray([1.0, 2.0, 0.5])
    found = steps(config, with_logps(batch_thumbs(liked, pad_id=0, completions=2, length=12), reference))
    assert found[0]["kl_baseline"] == pytest.approx(3.5 / 3, rel=1e-4)
    gain = 0.3 * ((policy - reference)[:, 0] - 3.5 / 3) * np.asarray([1, -1, 1])
    expected = 2 * np.mean(np.asarray([1.5, 1.0, 1.5]) / (1 + np.exp(gain)))
    assert found[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert found[0]["desirable_reward"] == pytest.approx(0.3 * (policy - reference)[[0, 2], 0].mean(), rel=1e-3)
    assert found[2]["loss"] < found[0]["loss"]


def test_bco_shifts_rewards_by_what_it_has_seen(params, liked, logps_of, steps):
    config = preference.Config(**FIELDS, losses=(Term("bco", beta=0.3),), optimizer=Optimizer(learning_rate=1e-3))
    policy, reference = (np.asarray(logps_of(one, liked)) for one in (params[0], params[1]))
    alone = [Liked(row.prompt_tokens, row.completion_tokens[:1], row.desirable) for row in liked]
    found = steps(config, with_logps(batch_thumbs(alone, pad_id=0, completions=1, length=12), reference[:, :1]))
    rewards = 0.3 * (policy - reference)[:, 0]
    expected = np.mean(np.log1p(np.exp(-rewards * np.asarray([1, -1, 1]))))
    assert found[0]["delta"] == 0 and found[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert found[1]["delta"] == pytest.approx((rewards[[0, 2]].mean() + rewards[1]) / 2, rel=1e-3)
    seen = [np.mean([metrics[name] for metrics in found[:2]]) for name in ("desirable_reward", "undesirable_reward")]
    assert found[2]["delta"] == pytest.approx(np.mean(seen), rel=1e-4)


def test_several_losses_are_added_pair_by_pair(params, groups, logps_of, steps):
    batch = with_logps(batch_groups(groups, **LAYOUT), logps_of(params[1], groups))
    terms = (Term("dpo", beta=0.2), Term("sft", weight=0.5))
    both, *each = (steps(preference.Config(**FIELDS, losses=some), batch)[0]
                   for some in (terms, terms[:1], terms[1:]))  # fmt: skip
    assert both["loss"] == pytest.approx(each[0]["loss"] + each[1]["loss"], rel=1e-5)
    assert both["dpo"] == pytest.approx(each[0]["loss"], rel=1e-5)
    assert both["sft"] == pytest.approx(2 * each[1]["loss"], rel=1e-5)
    assert both["accuracy"] == each[0]["accuracy"]


def test_the_names_are_all_losses_of_pairs_and_of_single_completions():
    assert set(typing.get_args(Name)) == set(LOSSES) | set(THUMB_LOSSES)
    assert set(losses.preference.__all__) <= set(LOSSES) and {"kto", "bco"} == set(THUMB_LOSSES)


def test_log_probs_of_any_number_of_rows_are_those_of_each(params, groups, logps_of):
    def make(rows):
        return batch_groups(rows, **LAYOUT)

    read = CompletionLogps(SPEC, sharding.single_device_mesh(), make=make, batch_size=2)
    for found, expected in zip(read(params[0], groups), logps_of(params[0], groups), strict=True):
        np.testing.assert_allclose(found[: len(expected)], expected, rtol=1e-5)
        assert not found[len(expected) :].any()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"losses": ()}, "losses: at least one, and each once, got none"),
        ({"losses": (Term(), Term(beta=0.2))}, "each once, got dpo, dpo"),
        ({"losses": (Term("kto"), Term("sft"))}, "kto and bco read single completions and stand alone, got kto, sft"),
        ({"losses": (Term("simpo"),), "reference": Sync()}, "reference: simpo read none"),
        ({"losses": (Term("aot"),), "num_microbatches": 3}, "num_microbatches must be 1"),
        ({"pairs": preference.SampledPairs()}, "length=12 must hold BOS, prompt and completion of pairs: 49"),
        ({"evaluation_prompts": 8}, "length=12 must exceed completion_tokens=40"),
    ],
)
def test_fields_that_do_not_go_together(fields, says):
    with pytest.raises(ValueError, match=says):
        preference.Config(**FIELDS | fields)


@pytest.mark.parametrize(
    ("term", "says"),
    [
        ({"loss": "dpo", "beta": -0.1}, r"losses: dpo: beta must lie in \(0, inf\)"),
        ({"loss": "hinge", "label_smoothing": 0.1}, "hinge has no label_smoothing"),
        ({"loss": "exo_pair", "label_smoothing": 0.0}, r"exo_pair: label_smoothing must lie in \(0, 0.5\)"),
        ({"loss": "f_dpo", "alpha": 1.5}, r"f_dpo: alpha must lie in \(0, 1\)"),
        ({"loss": "bco", "desirable_weight": 2.0}, "bco has no desirable_weight"),
        ({"loss": "dpo", "weight": 0.0}, "weight must lie"),
    ],
)
def test_terms_that_are_wrong(term, says):
    with pytest.raises(ValueError, match=says):
        Term(**term)
