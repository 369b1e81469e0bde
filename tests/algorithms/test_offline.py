"""Offline learning: an update against plain NumPy, weights by hand, kills, meshes, what is written, bad rows."""

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import inference, models, run, sharding
from rlhf_jax.algorithms import loop, offline, offline_rows
from rlhf_jax.algorithms.context import Context
from rlhf_jax.algorithms.offline_ilql import Ilql
from rlhf_jax.algorithms.offline_methods import Filtered, Weighted
from rlhf_jax.algorithms.offline_rows import ScoredRow, batch_rows
from rlhf_jax.algorithms.sft import Openings
from rlhf_jax.checkpoint import save_params
from rlhf_jax.data import formats
from rlhf_jax.data.encoding import Learnt
from rlhf_jax.data.fields import Fields
from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.data.sources import Jsonl
from rlhf_jax.errors import Stopped, UserError
from rlhf_jax.metrics import read_jsonl
from rlhf_jax.models.perturbed import q_values, state_values
from rlhf_jax.optim import Optimizer
from rlhf_jax.sampling import Sampling
from rlhf_jax.sharding import MeshConfig
from tests.algorithms.conftest import SPEC

pytestmark = pytest.mark.usefixtures("compile_quickly")

ILQL = Ilql(beta=4.0, curve=(0.0, 4.0), target_share=0.25, gamma=0.9, tau=0.8, cql_coef=0.3, policy_beta=0.5)
CONFIG = offline.Config(
    method=ILQL,
    steps=8,
    batch_size=8,
    row_length=24,
    heldout_rows=8,
    evaluate_every=4,
    checkpoint_every=3,
    evaluation_openings=None,
    evaluation_prompts=16,
    completion_tokens=8,
    optimizer=Optimizer(learning_rate=1e-2),
)


def change(**fields):
    return dataclasses.replace(CONFIG, **fields)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Jsonl(path, heldout=0.25)


def rated(i):
    good = i % 3 == 0
    return {"prompt": f"The film of year {i} was", "completion": " good" if good else " bad", "score": 2.0 + good}


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "rated.jsonl", map(rated, range(48)))


@pytest.fixture
def begin(tmp_path, pretrained, some_reviews):
    """Contexts in which a policy has finished."""

    def make(name="run", mesh=None):
        mesh = sharding.single_device_mesh() if mesh is None else sharding.make_mesh(mesh)
        context = Context(tmp_path / name, 0, mesh, pretrained, some_reviews)
        save_params(context.stage_dir("sft") / "params", context.policy_params("base"))
        return context

    return make


def row(*tokens, prompt=2, score=0.0):
    return ScoredRow(Learnt(tokens, tuple(i >= prompt for i in range(len(tokens)))), score)


def a_batch():
    rng = np.random.default_rng(0)
    rows = [
        row(*rng.integers(4, 500, length).tolist(), prompt=prompt, score=score)
        for length, prompt, score in ((9, 2, 1.5), (4, 3, -0.5), (12, 5, 0.25), (6, 1, -1.0))
    ]
    return batch_rows(rows, pad_id=0, length=12)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def by_hand(states, logits, heads, target, batch, m):
    """Sums over the completions' tokens of every term of ILQL, in loops, and how many tokens there are."""
    q, target_q, values = q_values(heads["q"], states), q_values(target, states), state_values(heads["v"], states)
    q, target_q, values = (np.asarray(x, np.float64) for x in (q, target_q, values))
    logps, found = log_softmax(logits), dict.fromkeys(("loss", "q_loss", "v_loss", "cql_loss", "policy_loss"), 0.0)
    count = 0
    for b, (tokens, counted) in enumerate(zip(batch.tokens, batch.loss_mask, strict=True)):
        places = np.flatnonzero(counted)
        for at, t in enumerate(places):
            token, before = tokens[t], t - 1
            last = at == len(places) - 1
            goal = batch.numbers[b] if last else m.gamma * values[b, places[at + 1] - 1]
            u = target_q[b, before, :, token].min() - values[b, before]
            terms = {
                "q_loss": sum((q[b, before, h, token] - goal) ** 2 for h in range(2)),
                "v_loss": (m.tau if u > 0 else 1 - m.tau) * u**2,
                "cql_loss": sum(-log_softmax(q[b, before, h])[token] for h in range(2)),
                "policy_loss": -np.exp(m.policy_beta * u) * logps[b, before, token],
            }
            found["loss"] += terms["q_loss"] + terms["v_loss"] + m.cql_coef * terms["cql_loss"] + terms["policy_loss"]
            for name, term in terms.items():
                found[name] += term
            count += 1
    return found, count


def test_ilqls_loss_and_its_slow_copy_are_the_formulas(begin):
    context, batch = begin(), a_batch()
    state, step = ILQL.start(CONFIG, context, "offline", context.policy_params("sft"))
    rng = np.random.default_rng(1)
    spread = jax.tree.map(lambda x: x + jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), state.target)
    head = {**state.learner.params["head"], "q": jax.tree.map(lambda x: 0.7 * x + 0.1, spread)}
    head["v"] = {**head["v"], "out": head["v"]["out"] + 0.05, "out_bias": head["v"]["out_bias"] + 0.1}
    learner = dataclasses.replace(state.learner, params={**state.learner.params, "head": head})
    state = dataclasses.replace(state, learner=learner, target=spread)

    trunk, old = jax.device_get((learner.params["trunk"], spread))
    states = models.hidden(SPEC, trunk, batch.tokens, batch.mask)
    expected, count = by_hand(states, models.unembed(SPEC, trunk, states), head, spread, batch, ILQL)
    assert count == batch.loss_mask.sum() == 7 + 1 + 7 + 5
    state, metrics = step(state, batch, {})
    for name, total in expected.items():
        assert float(metrics[name]) == pytest.approx(total / count, rel=2e-4), name
    new = state.learner.params["head"]["q"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.target):
        before, after = (dict(jax.tree_util.tree_leaves_with_path(tree))[path] for tree in (old, new))
        np.testing.assert_allclose(leaf, before + 0.25 * (after - before), atol=1e-6)
        assert float(np.abs(leaf - before).max()) > 0
    assert set(ILQL.whole(state, {})) == {"trunk", "head", "target"}


def test_a_stopped_run_of_ilql_ends_the_same_and_leaves_a_curve(begin, data, monkeypatch):
    whole, config = begin("whole"), change(data=data)
    figures = offline.train(config, whole, "offline")
    assert (figures["rows_train"], figures["rows_heldout"], figures["rows_learnt"]) == (36, 12, 36)
    assert figures["seq_kl_at_beta_4"] == figures["seq_kl"] != figures["seq_kl_at_beta_0"]
    folder = whole.stage_dir("offline")
    points = json.loads((folder / "evaluation.json").read_text())["betas"]
    assert [point["beta"] for point in points] == [0.0, 4.0]
    assert points[1]["seq_kl_low"] < points[1]["seq_kl"] == figures["seq_kl"] < points[1]["seq_kl_high"]
    samples = read_jsonl(folder / "samples.jsonl")
    assert len(samples) == 2 * 12 and {one["when"] for one in samples} == {"before", "after"}
    lines = read_jsonl(whole.workdir / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"] and "heldout_q_loss" in lines[3] and "heldout_q_loss" not in lines[4]

    broken, record = begin("broken"), loop.Loop.record

    def interrupt(self, state, metrics, *, tokens):
        if self._step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        record(self, state, metrics, tokens=tokens)

    monkeypatch.setattr(loop.Loop, "record", interrupt)
    with pytest.raises(Stopped, match="step 5 of 8"):
        offline.train(config, broken, "offline")
    monkeypatch.setattr(loop.Loop, "record", record)
    assert offline.train(config, broken, "offline") == figures
    same = [offline.policy(config, context, "offline") for context in (whole, broken)]
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, same), strict=True))

    heads_are_read(whole, config)


def heads_are_read(context, config):
    """What a user samples is perturbed, what later stages read is not; heads that are damaged are made again."""
    plain, meant = context.policy("offline"), offline.policy(config, context, "offline")
    assert float(meant.beta) == 4.0 and jax.tree.structure(meant.transformer) == jax.tree.structure(plain)
    fields = {"stage": "offline", "n": 8, "max_tokens": 8, "sampling": Sampling(), "seed": 0}
    texts = []
    for method in (ILQL, dataclasses.replace(ILQL, beta=0.0), Weighted()):
        finished = inference.Run(context, {"offline": change(method=method)})
        texts.append([one["text"] for one in inference.sample(finished, "The film", **fields)["completions"]])
    assert texts[0] != texts[1] == texts[2]
    folder = context.stage_dir("offline")
    (folder / "summary.json").write_text("{}")
    assert run._is_finished(folder, config)
    next((folder / "heads").rglob("manifest.ocdbt")).write_bytes(b"")
    assert not run._is_finished(folder, config) and (folder / "heads.damaged").exists()
    with pytest.raises(UserError, match=r"heads.*is missing; `rlhf-jax run` with this workdir makes"):
        offline.policy(config, context, "offline")


@pytest.mark.slow
@pytest.mark.parametrize("method", [ILQL, Weighted()], ids=["ilql", "weighted"])
def test_a_mesh_and_microbatches_take_the_same_steps(begin, data, method, monkeypatch):
    monkeypatch.setattr(offline, "written", lambda *args: {})  # what is sampled tells no small differences apart
    optimizer = Optimizer(learning_rate=1e-2, eps=1e-3)  # or Adam makes whole steps of rounding where gradients are 0
    figures, lines = [], []
    for name, mesh, parts in (("one", None, 1), ("many", MeshConfig(data=2, fsdp=2, tensor=2), 2)):
        config = change(data=data, method=method, steps=3, num_microbatches=parts, optimizer=optimizer)
        context = begin(name, mesh)
        figures.append(offline.train(config, context, "offline"))
        clock = ("seconds", "tokens_per_second", "stage")
        lines += [[{k: v for k, v in line.items() if k not in clock}
                   for line in read_jsonl(context.workdir / "metrics.jsonl")]]  # fmt: skip
    assert figures[0] == pytest.approx(figures[1], rel=1e-3, abs=1e-5)
    assert all(one == pytest.approx(many, rel=1e-3, abs=1e-5) for one, many in zip(*lines, strict=True))


def test_filtered_cloning_learns_what_scores_high(begin, data, tmp_path):
    context, config = begin(), change(data=data, method=Filtered(top=0.3), steps=25)
    figures = offline.train(config, context, "offline")
    assert figures["rows_learnt"] == 12 and not (context.stage_dir("offline") / "evaluation.json").exists()
    samples = read_jsonl(context.stage_dir("offline") / "samples.jsonl")
    good, bad = (np.mean([word in one["completion"] for one in samples[12:]]) for word in ("good", "bad"))
    assert good > 0.5 > bad and figures["heldout_loss"] < 3
    thumbs = [{**rated(i), "label": i % 3 == 0} for i in range(48)]
    liked = write(tmp_path / "thumbs.jsonl", [{k: v for k, v in one.items() if k != "score"} for one in thumbs])
    selected = offline_rows.load(change(data=liked), context, "offline")
    kept, held = offline.numbered(Filtered(top=None, threshold=1.0), selected.train, selected.heldout, "offline")
    assert (len(kept), len(held)) == (12, 4) and {one.score for one in kept} == {1.0}


def test_weights_by_hand():
    rows = [row(1, 5, 7, score=s) for s in (0.0, 2.0)] + [row(1, 6, 7, score=s) for s in (10.0, 14.0)]
    scores = np.array([0.0, 2.0, 10.0, 14.0])
    expected = np.exp((scores - scores.mean()) / (0.5 * scores.std()))
    weigh = Weighted(temperature=0.5, most=100.0).fit(rows)
    np.testing.assert_allclose(weigh(rows), expected / expected.mean())
    np.testing.assert_allclose(weigh(rows[:1]), expected[:1] / expected.mean())  # of others by the same scale
    advantages = np.array([-1.0, 1.0, -2.0, 2.0])
    expected = np.exp(advantages / advantages.std())
    np.testing.assert_allclose(Weighted(baseline="prompt").fit(rows)(rows), expected / expected.mean())
    cut = np.minimum(np.exp((scores - scores.mean()) / scores.std()), 1.5)
    np.testing.assert_allclose(Weighted(most=1.5).fit(rows)(rows), cut / cut.mean())
    np.testing.assert_array_equal(Filtered(top=0.5).fit(rows)(rows), [np.nan, np.nan, 1, 1])
    np.testing.assert_array_equal(Filtered(top=None, threshold=2.0).fit(rows)(rows), [np.nan, 1, 1, 1])
    np.testing.assert_allclose(Ilql().fit(rows)(rows), (scores - scores.mean()) / scores.std())


def test_the_weighted_loss_is_the_weighted_mean_by_hand(begin):
    context, batch = begin(), a_batch()
    params = context.policy("sft")
    weighted = dataclasses.replace(batch, numbers=np.float32([0.5, 2.0, 1.0, 0.0]))
    loss, _ = Weighted().loss(SPEC)(params, weighted, {}, jax.random.key(0))
    logps = log_softmax(models.logits(SPEC, params, batch.tokens, batch.mask))
    taken = np.take_along_axis(logps[:, :-1], batch.tokens[:, 1:, None], -1)[..., 0] * batch.loss_mask[:, 1:]
    expected = -(taken * weighted.numbers[:, None]).sum() / batch.loss_mask.sum()
    assert float(loss.value) == pytest.approx(expected, rel=1e-5)


def test_rows_are_what_was_written_and_prompts_are_held_out_whole(begin, tmp_path):
    context = begin()
    ids = [context.tokenizer.bos_id, *context.tokenizer.encode("The film")], context.tokenizer.encode(" was good")
    same = [
        {"prompt": "The film", "completion": " was good", "score": i, "prompt_tokens": ids[0],
         "completion_tokens": ids[1]} for i in range(3)
    ]  # fmt: skip
    said = [{"messages": [{"role": "user", "content": f"No {i}?"}, {"role": "assistant", "content": "Yes."}],
             "rating": i} for i in range(5)]  # fmt: skip
    selected = offline_rows.load(change(data=write(tmp_path / "rows.jsonl", said + same)), context, "offline")
    assert [one.score for one in selected.heldout] == [4, 0, 1, 2] and len(selected.train) == 4  # two prompts of six
    for one in selected.heldout[1:]:
        assert list(one.learnt.tokens) == ids[0] + ids[1] and one.prompt == tuple(ids[0])  # and no EOS
    assert selected.train[0].learnt.tokens[-1] == context.tokenizer.eos_id
    batch = batch_rows(selected.train[:2], pad_id=context.tokenizer.pad_id, length=24)
    assert (batch.mask.sum(1) == [one.longest for one in selected.train[:2]]).all() and batch.loss_mask.any(1).all()
    assert not batch.loss_mask[:, 0].any() and batch.numbers.tolist() == [0, 1]


def test_labels_of_texts_are_scores(begin):
    context, openings = begin(), Openings(completion_tokens=15)
    selected = offline_rows.load(change(data=openings), context, "offline")
    assert {one.score for one in selected.train} == {0.0, 1.0} and len(selected.train) > 1000
    decoded = context.tokenizer.decode([*selected.train[5].learnt.tokens])
    assert any(review.text.startswith(decoded[:30]) for review in context.reviews.train)
    again = offline_rows.load(change(data=openings), context, "offline")
    assert again.train == selected.train and all(one.longest <= openings.length for one in again.train)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"text": "a"}, "expected 'prompt' and 'completion', or 'messages', with a score; the row has 'text'"),
        ({"prompt": "a", "completion": "b"}, "expected 'score', 'rating' or 'label' beside the completion"),
        ({"prompt": "a", "completion": "b", "score": "5"}, "'score' must be a finite number, found \"5\""),
        ({"prompt": "a", "completion": "b", "label": 3}, "'label' must be true or false"),
        ({"prompt": "a", "completion": "", "score": 1}, "'completion' is empty"),
    ],
)
def test_a_bad_row_is_told(fields, said, tmp_path):
    with pytest.raises(UserError, match="line 3: ") as told:
        change(data=write(tmp_path / "rows.jsonl", [rated(0), rated(1), fields])).check_inputs(None)
    assert said in str(told.value) and str(told.value).startswith("data: ") and "\n" not in str(told.value)
    assert formats.valued(Fields("x", {**rated(0), "rating": 7})).score == 3.0


@pytest.mark.parametrize(
    ("method", "scores", "said"),
    [
        (Ilql(), [1.0] * 4, "all 4 rows to train on score 1, so there is nothing to tell apart"),
        (Weighted(), [1.0] * 4, "of 4 rows to train on all score the same"),
        (Weighted(baseline="prompt"), [1.0, 1.0, 2.0, 2.0], "a prompt's completions all score the same"),
        (Filtered(top=0.5), [0.0, 0.0, 0.0, 1.0], "top=0.5: the last of the best of 4 rows scores 0, as the worst"),
        (
            Filtered(top=None, threshold=3.0),
            [0.0, 2.0],
            "threshold=3: no row to train on scores so high; the best has 2",
        ),
    ],
)
def test_scores_that_tell_nothing_apart_are_told(method, scores, said):
    rows = [row(1, 5 + i // 2, 7, score=score) for i, score in enumerate(scores)]
    with pytest.raises(UserError, match=r"stages\.offline\.method: ") as told:
        offline.numbered(method, rows, rows, "offline")
    assert said in str(told.value)
    alike = [
        row(1, 5 + i // 4, 7, score=(0.1, 0.7, 1.1)[i // 12]) for i in range(36)
    ]  # their means are off by rounding
    for one, rows in ((Ilql(), alike[:12]), (Weighted(), alike[:12]), (Weighted(baseline="prompt"), alike)):
        with pytest.raises(UserError, match="so there is nothing to tell apart"):
            offline.numbered(one, rows, rows, "offline")
    with pytest.raises(UserError, match="none of 1 rows held out is left that scores high enough"):
        offline.numbered(Filtered(top=0.5), [row(1, 5, score=0.0), row(1, 5, score=1.0)], [row(1, 5)], "offline")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Ilql(tau=1.0), "method.tau must lie in"),
        (lambda: Ilql(curve=(1.0, -1.0)), "method.curve must lie in"),
        (lambda: Ilql(heads=0), "heads must be at least 1"),
        (lambda: Weighted(temperature=0.0), "method.temperature must lie in"),
        (lambda: Filtered(threshold=1.0), "one of top and threshold is a number, got 0.25 and 1.0"),
        (lambda: change(data=Openings(completion_tokens=30)), "row_length=24 must hold BOS, prompt and completion"),
        (lambda: change(completion_tokens=24), "row_length=24 must exceed completion_tokens=24"),
        (lambda: change(evaluation_openings=(3, 2)), "prompt_tokens must be"),
        (lambda: change(evaluation_prompts=0), "evaluation_prompts must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_it_is_a_stage_that_makes_a_policy():
    assert run.STAGES[offline.Config] is offline.train and CONFIG.produces == "policy"
    assert CONFIG.requires() == {"init": ("sft", "policy")} and change(init="base").requires() == {}
    assert CONFIG.lengths() == {"row_length": 24, "evaluation_openings + completion_tokens (with BOS)": 24}
    with pytest.raises(UserError, match=r"data: None stands for the experiment's rows, which are movie reviews"):
        CONFIG.check_inputs(MovieReviews())
