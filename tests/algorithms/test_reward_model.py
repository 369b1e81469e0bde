"""Reward models: the loss against pairs scored one by one, what is sampled and judged, files, normalisation."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from rlhf_jax import models, sharding
from rlhf_jax.algorithms import comparisons, reward_model
from rlhf_jax.algorithms.comparisons import SampledPairs
from rlhf_jax.data.preference_batches import batch_groups, preference_batches
from rlhf_jax.data.preferences import PreferenceGroup
from rlhf_jax.data.prompts import review_prompts
from rlhf_jax.data.sources import Jsonl
from rlhf_jax.errors import NonFiniteError, UserError
from rlhf_jax.evals.reward import evaluate_groups
from rlhf_jax.metrics import read_jsonl
from rlhf_jax.optim import Optimizer
from rlhf_jax.rewards.ensemble import Ensemble
from rlhf_jax.rewards.sentiment import GoldClassifier
from rlhf_jax.sharding import MeshConfig
from rlhf_jax.train_step import compiled, make_train_step, sharded_state
from tests.algorithms.conftest import SPEC, put_stages

PAIRS = SampledPairs(prompts=24, heldout_prompts=12, completions=3, completion_tokens=12, snippets=10, batch_size=48)
CONFIG = {
    "length": 24,
    "steps": 12,
    "batch_size": 8,
    "evaluate_every": 6,
    "checkpoint_every": 5,
    "optimizer": Optimizer(learning_rate=3e-3),
}


@pytest.fixture
def context(make_context):
    context = make_context()
    put_stages(context)
    return context


def test_comparisons_are_judged_by_the_gold_classifier(context):
    data = comparisons.sample(PAIRS, context, "rm")
    assert (len(data.train), len(data.heldout)) == (34, 12)
    gold, tokenizer = GoldClassifier.fit(context.reviews.train), context.tokenizer
    validation, train = (
        " ".join(r.text for r in split) for split in (context.reviews.validation, context.reviews.train)
    )
    for group in [*data.train, *data.heldout]:
        assert len(group.completions) == 3 and group.prompt_tokens[0] == tokenizer.bos_id
        assert tuple(map(tokenizer.decode, group.completion_tokens)) == group.completions
        np.testing.assert_allclose(gold([group.prompt + text for text in group.completions]), group.scores, atol=1e-6)
        assert all(group.scores[winner] > group.scores[loser] for winner, loser in group.pairs)
        assert len(group.pairs) == sum(a != b for a, b in [group.scores[:2], group.scores[1:], group.scores[::2]])
        logit = [math.log(p / (1 - p)) for p in np.float64(group.scores)]
        np.testing.assert_allclose(group.margins, [logit[w] - logit[x] for w, x in group.pairs], rtol=1e-3, atol=1e-5)
        if group.source == "reviews":
            assert group.prompt == "" and all(text in train for text in group.completions)
        else:
            assert group.prompt in validation
    heldout_prompts = {group.prompt for group in data.heldout}
    assert len(heldout_prompts & {group.prompt for group in data.train}) <= 2  # short prefixes may coincide
    again = comparisons.sample(PAIRS, context, "rm")  # read back, not sampled again
    assert list(again.train) == list(data.train)


def test_noise_flips_and_annotators_disagree(context):
    def winners(**fields):
        pairs = SampledPairs(**{**vars(PAIRS), **fields})
        data = comparisons.sample(pairs, context, "_".join(["rm", *fields]))
        right = [group.scores[w] > group.scores[x] for group in data.train for w, x in group.pairs]
        clean = [group.scores[w] > group.scores[x] for group in data.heldout for w, x in group.pairs]
        assert all(clean)
        return np.mean(right)

    assert winners() == 1
    assert 0.55 < winners(label_noise=0.3) < 0.85
    assert 0.5 < winners(annotators=3, disagreement=2.0) < 0.95


def test_loss_is_the_mean_over_pairs_scored_one_by_one(context):
    data = comparisons.sample(PAIRS, context, "rm")
    groups = list(data.train)[:6]
    params = context.head_params("reward_model")
    config = reward_model.Config(pairs=PAIRS, **CONFIG, margin_scale=0.5, label_smoothing=0.1, centering=0.2)
    batch = batch_groups(groups, pad_id=0, completions=3, length=24)
    loss, metrics = reward_model.pair_loss(SPEC, config)(params, batch, config.hyper, jax.random.key(0))
    terms, right = [], []
    for group in groups:
        rows = group.rows()
        scores = [float(models.score(SPEC, params, np.asarray([row]), np.ones((1, len(row)), bool))[0]) for row in rows]
        for (winner, loser), margin in zip(group.pairs, group.margins, strict=True):
            h = scores[winner] - scores[loser] - 0.5 * margin
            bradley_terry = 0.9 * math.log1p(math.exp(-h)) + 0.1 * math.log1p(math.exp(h))
            terms.append(bradley_terry + 0.2 * (scores[winner] + scores[loser]) ** 2)
            right.append(scores[winner] > scores[loser])
    assert float(loss.count) == len(terms)
    assert float(loss.value) == pytest.approx(np.mean(terms), rel=1e-4)
    assert float(metrics["accuracy"].value) == pytest.approx(np.mean(right), abs=1e-6)


def test_a_soft_label_is_both_labels_by_their_probabilities(context):
    rng, params = np.random.default_rng(0), context.head_params("reward_model")
    groups = []
    for p in (0.9, 0.6, 0.2):
        tokens = tuple(tuple(rng.integers(4, 500, size=n).tolist()) for n in (4, 7))
        soft = {"probabilities": (p,)}
        groups.append(PreferenceGroup("", ("", ""), (2, 9), tokens, (), ((0, 1),), (1.5,), "file", **soft))
    groups.append(dataclasses.replace(groups[0], prompt_tokens=(2, 8), probabilities=()))
    config = reward_model.Config(pairs=PAIRS, **CONFIG, margin_scale=0.5, label_smoothing=0.1, centering=0.2)
    batch = batch_groups(groups, pad_id=0, completions=2, length=24, soft=True)
    loss, metrics = reward_model.pair_loss(SPEC, config)(params, batch, config.hyper, jax.random.key(0))
    terms, right = [], []
    for group in groups:
        p = 0.9 * (group.probabilities or (1.0,))[0]
        p += 0.1 * (1 - (group.probabilities or (1.0,))[0])  # a label that is drawn by p, then wrong at a rate of 0.1
        won, lost = (
            float(models.score(SPEC, params, np.asarray([row]), np.ones((1, len(row)), bool))[0])
            for row in group.rows()
        )
        h = won - lost - 0.5 * 1.5
        terms.append(p * math.log1p(math.exp(-h)) + (1 - p) * math.log1p(math.exp(h)) + 0.2 * (won + lost) ** 2)
        right.append(won > lost)
    assert float(loss.value) == pytest.approx(np.mean(terms), rel=1e-4)
    assert float(metrics["accuracy"].value) == pytest.approx(np.mean(right), abs=1e-6)  # of the chosen one, whatever p


@pytest.mark.parametrize("ensemble", [None, Ensemble(members=2, bootstrap=True)])
def test_a_file_of_soft_labels_teaches_their_odds(ensemble, context, tmp_path):
    """Scores end as far apart as the odds of 0.8 are, where labels that are certain would part them on and on."""
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": "It was", "chosen": f" good {i}", "rejected": f" bad {i}", "probability": 0.8} for i in range(30)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {**CONFIG, "steps": 60, "normalize": False, "evaluate_every": 60, "checkpoint_every": 60}
    config = reward_model.Config(pairs=Jsonl(path, heldout=0.2), completion_tokens=12, ensemble=ensemble, **fields)
    config.check_inputs(context.data)
    context = dataclasses.replace(context, ensembles={} if ensemble is None else {"rm": ensemble})
    assert reward_model.train(config, context, "rm")["accuracy"] == 1.0
    margins = json.loads((context.stage_dir("rm") / "evaluation.json").read_text())["margins"]
    assert margins == pytest.approx([math.log(0.8 / 0.2)] * 6, abs=0.3)
    loss = read_jsonl(context.workdir / "metrics.jsonl")[-1]["loss"]
    assert loss == pytest.approx(-0.8 * math.log(0.8) - 0.2 * math.log(0.2), abs=0.01)


def test_a_loss_of_orders_takes_no_soft_labels(context, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{i}", "chosen": "a", "rejected": "b", "probability": 1 if i < 5 else 0.7} for i in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for loss in ("k_wise", "plackett_luce", "best_of_k"):
        config = reward_model.Config(pairs=Jsonl(path), loss=loss, completion_tokens=12, **CONFIG)
        with pytest.raises(UserError, match=rf"^pairs: .*line 6: 'probability' is 0.7, but loss={loss} takes no soft"):
            config.check_inputs(context.data)


def test_learns_normalises_and_reports(context):
    figures = reward_model.train(reward_model.Config(pairs=PAIRS, **{**CONFIG, "steps": 60}), context, "rm")
    data = comparisons.sample(PAIRS, context, "rm")
    network = reward_model.RewardNetwork(SPEC, context.mesh, length=24, pad_id=0)
    params = context.head_params("rm")
    scores = network(params, [row for group in data.heldout for row in group.rows()])
    assert scores.mean() == pytest.approx(0, abs=1e-4) and scores.std() == pytest.approx(1, abs=1e-4)
    report = evaluate_groups(lambda rows: network(params, rows), data.train)
    assert report.pairs.accuracy > 0.8  # of what it was trained on
    evaluation = json.loads((context.stage_dir("rm") / "evaluation.json").read_text())
    assert evaluation["accuracy"] == figures["accuracy"] and evaluation["n"] == len(evaluation["margins"])
    assert evaluation["interval"] == [figures["accuracy_low"], figures["accuracy_high"]]
    assert figures["accuracy_low"] < figures["accuracy"] < figures["accuracy_high"]
    assert len(evaluation["scores"]) == len(evaluation["lengths"]) == 36
    assert 0 <= evaluation["external"]["accuracy"] <= 1 and evaluation["external"]["n"] > 100
    assert {"accuracy", "log_loss", "ece", "length_correlation", "external_accuracy"} <= figures.keys()


def test_a_file_of_pairs_trains_the_same_stage(context, tmp_path):
    rows = [{"prompt": f"It was {i}", "chosen": f" good {i}", "rejected": f" bad {i}"} for i in range(30)]
    rows += [{"prompt": "", "chosen": [{"role": "assistant", "content": f"good {i}"}],
              "rejected": [{"role": "assistant", "content": f"bad {i}"}]} for i in range(10)]  # fmt: skip
    rows.append(rows[0])
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = reward_model.Config(pairs=Jsonl(path, heldout=0.1), completion_tokens=12, **{**CONFIG, "steps": 40})
    config.check_inputs(context.data)
    figures = reward_model.train(config, context, "rm")
    assert figures["accuracy"] == 1.0
    assert {name: n for name, n in figures.items() if name.startswith("rows_")} == {
        "rows_train": 36, "rows_heldout": 4, "rows_merged": 1, "rows_dropped": 0, "rows_cut": 0
    }  # fmt: skip
    data = comparisons.load(config.pairs, context.tokenizer, length=24)
    options = {"policy": "sft", "count": 256, "completion_tokens": 12, "length": 24, "batch_size": 8}
    sampled = comparisons.policy_samples(data, context, "rm", **options)
    assert len(sampled) == 40 and all(row[0] == context.tokenizer.bos_id and len(row) <= 24 for row in sampled)
    scores = reward_model.RewardNetwork(SPEC, context.mesh, length=24, pad_id=0)(context.head_params("rm"), sampled)
    assert scores.mean() == pytest.approx(0, abs=1e-4) and scores.std() == pytest.approx(1, abs=1e-4)
    path.write_text('{"prompt": "a", "chosen": "b"}\n')
    with pytest.raises(UserError, match=r"^pairs: .*pairs.jsonl, line 1: no field 'rejected'"):
        config.check_inputs(context.data)


def test_rows_in_order_train_on_all_their_pairs(context, tmp_path):
    path = tmp_path / "ranked.jsonl"
    rows = [{"prompt": f"It was {i}", "completions": [" bad", " fine", " good"], "ranks": [2, 1, 0]} for i in range(30)]
    rows[5]["completions"].append(" good indeed")
    rows[5]["ranks"] = [2, 1, 0, 0]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = comparisons.load(Jsonl(path), context.tokenizer, length=24)
    assert data.completions == 4 and set(data.train[0].pairs) == {(2, 1), (2, 0), (1, 0)}
    assert set(data.train[5].pairs) == {(1, 0), (2, 0), (3, 0), (2, 1), (3, 1)}  # a tie is no pair
    config = reward_model.Config(pairs=Jsonl(path), completion_tokens=12, **{**CONFIG, "steps": 30})
    config.check_inputs(context.data)
    assert reward_model.train(config, context, "rm")["accuracy"] == 1.0


def test_without_rows_of_its_own_it_takes_the_experiments(context, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}", "chosen": "a", "rejected": "b"}) + "\n" for i in range(12)))
    config = reward_model.Config(pairs=None, completion_tokens=12, **{**CONFIG, "steps": 2, "normalize": "none"})
    config.check_inputs(Jsonl(path))
    own = dataclasses.replace(context, data=Jsonl(path))
    figures = reward_model.train(config, own, "rm")
    assert figures["rows_train"] == 11 and "external_accuracy" not in figures  # its texts have no labels
    assert json.loads((own.stage_dir("rm") / "evaluation.json").read_text())["external"] is None
    with pytest.raises(UserError, match=r"^pairs: None stands for the experiment's rows, which are movie reviews"):
        config.check_inputs(context.data)
    with pytest.raises(UserError, match=r"^pairs=SampledPairs: .*line 1: no field 'text'; the row has 'prompt', 'chos"):
        reward_model.Config(pairs=PAIRS, **CONFIG).check_inputs(Jsonl(path))


def test_heldout_prompts_are_of_other_reviews_even_when_they_run_out(context):
    numbered = [dataclasses.replace(r, text=f"{i} {r.text}") for i, r in enumerate(context.reviews.validation[:30])]
    options = {"tokens": (3, 5), "count": 80, "rng": np.random.default_rng(0)}
    prompts = review_prompts(numbered, context.tokenizer, **options, apart=10)
    sources = [int(context.tokenizer.decode(prompt).split()[0]) for prompt in prompts]
    assert len(sources) == 80 and len(set(sources[:10])) == 10
    assert not set(sources[:10]) & set(sources[10:]) and len(set(sources[10:])) > 3  # so these came again
    with pytest.raises(UserError, match="of 30 reviews, 80 of them apart, none has a space after 3 to 5 tokens"):
        review_prompts(numbered, context.tokenizer, **options, apart=80)


def test_what_one_stage_holds_out_is_trained_on_in_no_round(context):
    numbered = [dataclasses.replace(r, text=f"{i} {r.text}") for i, r in enumerate(context.reviews.validation[:30])]

    def draw(seed, apart, shared):
        prompts = review_prompts(
            *(numbered, context.tokenizer),
            tokens=(3, 5),
            count=60,
            rng=np.random.default_rng(seed),
            apart=apart,
            apart_rng=None if shared is None else np.random.default_rng(shared),
        )
        sources = [int(context.tokenizer.decode(prompt).split()[0]) for prompt in prompts]
        return sources[:apart], sources[apart:]

    first, *rounds = draw(1, 10, None), draw(2, 6, 1), draw(3, 6, 1)
    assert all(held == first[0][:6] for held, _ in rounds)
    trained = {source for _, sources in (first, *rounds) for source in sources}
    assert not trained & set(first[0][:6]) and len(trained) > 10
    assert rounds[0][1] != rounds[1][1]


def test_scores_that_are_all_the_same_are_not_normalised(context, monkeypatch):
    monkeypatch.setattr(
        reward_model.RewardNetwork, "members", lambda self, params, rows: np.ones((1, len(rows)), np.float32)
    )
    with pytest.raises(NonFiniteError, match=r"rm: all 36 scores are 1 and cannot be normalised"):
        reward_model.train(reward_model.Config(pairs=PAIRS, **CONFIG), context, "rm")
    assert not (context.stage_dir("rm") / "params").exists()


def test_any_mesh_scores_any_number_of_rows(context):
    mesh = sharding.make_mesh(MeshConfig(data=3), jax.devices()[:3])
    rows = [[2, 5, 9][: 1 + i % 3] for i in range(7)]
    params = jax.device_get(context.head_params("reward_model"))
    one, three = (
        reward_model.RewardNetwork(SPEC, where, length=24, pad_id=0, batch_size=4)(params, rows)
        for where in (context.mesh, mesh)
    )
    np.testing.assert_allclose(three, one, atol=1e-5)


def test_microbatches_on_a_mesh_take_the_same_steps(make_context):
    config = reward_model.Config(pairs=PAIRS, **CONFIG)
    loss_fn, optimizer = reward_model.pair_loss(SPEC, config), config.optimizer.make(3)

    def three_steps(data, context, num_microbatches=1):
        state = sharded_state(
            context.mesh,
            lambda source: models.init_with_head(SPEC, jax.random.key(5), source),
            context.policy_params("base"),
            optimizer,
            {"learning_rate": 3e-3},
            jax.random.key(0),
        )
        step = compiled(make_train_step(loss_fn, optimizer, num_microbatches=num_microbatches), state)
        batches = preference_batches(data.train, pad_id=0, batch_size=8, completions=3, length=24, seed=0)
        with sharding.scope(context.mesh):
            for _ in range(3):
                state, metrics = step(state, sharding.shard_batch(context.mesh, next(batches)))
        return float(metrics["loss"]), jax.device_get(jax.tree.leaves(state.params))

    context = make_context()
    put_stages(context)
    data = comparisons.sample(PAIRS, context, "rm")
    loss, params = three_steps(data, context)
    other_loss, other_params = three_steps(data, make_context(mesh=MeshConfig(data=2, fsdp=2, sequence=2)), 2)
    assert other_loss == pytest.approx(loss, abs=1e-5)
    for a, b in zip(params, other_params, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_row_that_cannot_hold_its_pair_is_refused():
    with pytest.raises(ValueError, match="length=20 must hold BOS, prompt and completion of pairs: 21"):
        reward_model.Config(pairs=PAIRS, **{**CONFIG, "length": 20})
    with pytest.raises(ValueError, match=r"pairs.label_noise must lie in \[0, 0.5\)"):
        SampledPairs(label_noise=0.5)
