"""Reward models of every loss: the loss against plain NumPy, learning beside the constant, rows of the wrong kind."""

import json
import math
from functools import partial

import jax
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.algorithms import reward_data, reward_model
from rlhf_jax.algorithms.comparisons import SampledPairs
from rlhf_jax.data.sources import Jsonl
from rlhf_jax.errors import UserError
from rlhf_jax.rewards.ensemble import Ensemble
from rlhf_jax.rewards.network import RewardNetwork
from rlhf_jax.sharding import Shard
from rlhf_jax.types import Mean
from tests.algorithms.conftest import SPEC, put_stages
from tests.algorithms.test_reward_model import CONFIG

GOOD, BAD = ("good", "great", "lovely", "fine"), ("bad", "awful", "poor", "dull")


def ranked(i, k=4):
    """Completions that name more good things the better they are."""
    words = [" ".join([GOOD[i % 4]] * j + [BAD[i % 4]] * (k - 1 - j)) for j in range(k)]
    order = np.random.default_rng(i).permutation(k)
    return {"prompt": f"It was {i}", "completions": [words[j] for j in order], "scores": order.tolist()}


def picked(i):
    row = ranked(i, 3 + i % 3)
    return {"prompt": row["prompt"], "completions": row["completions"], "best": int(np.argmax(row["scores"]))}


def rated(i, low=2):
    good = i % 3
    text = " ".join([GOOD[i % 4]] * good + [BAD[i % 4]] * (2 - good))
    return {"prompt": f"It was {i}", "completion": text, "rating": low + good, "annotator": i % 2}


def labelled(i):
    return {"prompt": f"It was {i}", "completion": (GOOD if i % 3 else BAD)[i % 4], "label": i % 3 > 0}


def stepped(i):
    """Steps of a solution, right where they are good; one that nobody judged, and one neither right nor wrong."""
    ratings = [1, None, (-1, 1, 0)[i % 3], 1 - 2 * (i % 2)]
    words = [(BAD if rating == -1 else GOOD)[(i + j) % 4] for j, rating in enumerate(ratings)]
    return {"prompt": f"It was {i}", "completions": words, "ratings": ratings}


ROWS = {
    "bradley_terry": ranked, "k_wise": ranked, "plackett_luce": ranked, "best_of_k": picked, "scalar_rating": rated,
    "ordinal_rating": rated, "outcome_bce": labelled, "process_bce": stepped,
}  # fmt: skip


SCORE = jax.jit(partial(models.score, SPEC))

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture
def context(make_context):
    context = make_context()
    put_stages(context)
    return context


@pytest.fixture
def write(tmp_path):
    def to_file(rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Jsonl(path, heldout=0.2)

    return to_file


def config_of(loss, source, **fields):
    return reward_model.Config(loss=loss, pairs=source, completion_tokens=12, **{**CONFIG, **fields})


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def expected(loss, scores, batch, trained):
    """The terms whose mean the loss is, from scores [b, k] (of a place each), row by row."""
    terms = []
    for b, own in enumerate(scores):
        if loss in ("scalar_rating", "ordinal_rating", "outcome_bce", "process_bce"):
            for r, y in zip(own[batch.where[b]], batch.targets[b][batch.where[b]], strict=True):
                if loss == "scalar_rating":
                    terms.append((r - y) ** 2 / 2)
                elif loss == "ordinal_rating":
                    raw = np.asarray(trained["head"]["thresholds"])
                    theta = np.concatenate([raw[:1], raw[0] + np.cumsum(np.exp(raw[1:]))])
                    below = [0, *(1 / (1 + np.exp(r - theta))), 1]
                    terms.append(-math.log(below[int(y) + 1] - below[int(y)]))
                else:
                    terms.append(-(y * log_sigmoid(r) + (1 - y) * log_sigmoid(-r)))
            continue
        k = int(batch.mask[b].any(-1).sum())
        pairs = [tuple(pair) for pair, weight in zip(batch.pairs[b], batch.weights[b], strict=True) if weight]
        order = sorted(range(k), key=lambda i: sum(loser == i for _, loser in pairs))
        if loss == "k_wise":
            terms.append(-sum(log_sigmoid(own[w] - own[x]) for w, x in pairs) / math.comb(k, 2))
        elif loss == "best_of_k":
            terms.append(np.log(np.exp(own[:k]).sum()) - own[order[0]])
        elif loss == "plackett_luce":
            terms.append(sum(np.log(np.exp(own[order[i:]]).sum()) - own[order[i]] for i in range(k)))
        else:
            terms += [-log_sigmoid(own[w] - own[x]) for w, x in pairs]
    return terms


@pytest.mark.parametrize("loss", ROWS)
def test_the_loss_is_the_mean_of_terms_made_one_by_one(loss, context, write):
    config = config_of(loss, write([ROWS[loss](i) for i in range(20)]))
    config.check_inputs(context.data)
    data = reward_data.load(config, context, "rm")
    batch = next(data.batches(data.train, seed=0, shard=Shard()))
    state, _ = reward_model.start(config, context, "rm", data.shares)
    loss_fn = jax.jit(reward_model.LOSSES[loss](SPEC, config))
    loss_value, metrics = loss_fn(state.params, batch, {}, jax.random.key(0))
    if loss in reward_data.ORDERS:
        tokens, mask = batch.tokens, batch.mask
    else:  # each place by itself, at the end of a row that stops there
        mask = (np.arange(batch.mask.shape[1]) <= batch.ends[..., None]) & batch.mask[:, None]
        tokens = np.broadcast_to(batch.tokens[:, None], mask.shape)
    scores = SCORE(state.params, tokens.reshape(-1, 24), mask.reshape(-1, 24))
    scores = np.asarray(scores).reshape(tokens.shape[:2])
    terms = expected(loss, np.float64(scores), batch, state.params)
    assert isinstance(loss_value, Mean) and float(loss_value.count) == len(terms)
    assert float(loss_value.value) == pytest.approx(np.mean(terms), rel=1e-4)
    assert all(0 <= float(mean.value) <= 1 for name, mean in metrics.items() if name == "accuracy")


HEADLINE = {"k_wise": "best_accuracy", "scalar_rating": "rmse", "ordinal_rating": "log_loss", "process_bce": "auc"}


@pytest.mark.parametrize("loss", HEADLINE)
def test_what_it_learns_is_more_than_the_constant(loss, context, write):
    config = config_of(loss, write([ROWS[loss](i) for i in range(60)]), steps=50, evaluate_every=25)
    figures = reward_model.train(config, context, "rm")
    name = HEADLINE[loss]
    value, baseline = figures[name], figures[f"{name}_baseline"]
    is_error = loss in ("scalar_rating", "ordinal_rating")
    assert value < 0.7 * baseline if is_error else value > 0.25 + baseline
    assert figures[f"{name}_low"] <= value <= figures[f"{name}_high"] and figures["rows_heldout"] == 12
    evaluation = json.loads((context.stage_dir("rm") / "evaluation.json").read_text())
    assert evaluation[name] == value and evaluation[f"{name}_baseline"] == baseline
    # What is saved scores as what was trained, in the rows' own unit.
    data = reward_data.load(config, context, "rm")
    network = RewardNetwork(SPEC, context.mesh, length=24, pad_id=0)
    scores = network(context.head_params("rm"), data.heldout_rows)
    if loss == "scalar_rating":
        assert np.sqrt(np.mean((scores - evaluation["targets"]) ** 2)) == pytest.approx(value, rel=1e-4)
    elif loss != "k_wise":
        last = np.cumsum([len(row.judged) for row in data.heldout]) - 1
        np.testing.assert_allclose(scores, np.asarray(evaluation["scores"])[last], atol=1e-4)
    if loss == "process_bce":
        assert {"solution_auc_min", "solution_auc_product", "accuracy_baseline"} <= figures.keys()


def test_annotators_vote_and_are_kept(context, tmp_path, write):
    rows = [{"prompt": "It was", "response_1": f"good {i}", "response_2": f"bad {i}", "annotators": votes}
            for i, votes in enumerate([[1, 1, 2], [1, 0, 1], [2, 2, 2], [1, 2, 0], [1, 1, 1]] * 4)]  # fmt: skip
    config = config_of("bradley_terry", write([{**rows[0], "annotators": [0, 0, 0]}, *rows]), ties="drop")
    data = reward_data.load(config, context, "rm")
    assert data.counts.dropped == 1 and data.data.pairs == 3
    first = data.train[0]
    assert first.pairs == ((0, 1), (0, 1), (1, 0)) and first.annotators == ("0", "1", "2")
    assert first.settled == ((0, 1),) and data.train[3].settled == ()
    batch = next(data.batches(data.train, seed=0, shard=Shard()))
    assert batch.pairs.shape == (8, 3, 2) and set(batch.weights.sum(1)) <= {2.0, 3.0}
    network = RewardNetwork(SPEC, context.mesh, length=24, pad_id=0)
    final = data.final(network, context.head_params("reward_model"))
    assert final.evaluation["n"] == len(final.evaluation["margins"]) == 3  # of the held-out four one is undecided
    assert {who: own["n"] for who, own in final.evaluation["annotators"].items()} == {"0": 4, "1": 3, "2": 3}


KINDS = {
    "k_wise": ({"prompt": "a", "completion": "b", "rating": 1},
               r"line 1: loss='k_wise' reads 'prompt', 'completions', 'ranks', or .*; the row has 'prompt', 'compl"),
    "scalar_rating": ({"prompt": "a", "chosen": "b", "rejected": "c"},
                      r"line 1: loss='scalar_rating' reads 'prompt', 'completion', 'rating'; the row has 'prompt', 'c"),
    "process_bce": ({"prompt": "a", "completion": "b", "label": True}, r"reads 'prompt', 'completions', 'labels', or"),
    "outcome_bce": (rated(1), r"reads 'prompt', 'completion', 'label'; the row has"),
    "ordinal_rating": ({**rated(1), "rating": 1.5}, "'rating' must be a whole number, found 1.5"),
    "plackett_luce": ({**ranked(1), "scores": [1, 2, 2, 0]}, "'scores': some of 4 completions tie; an order of all"),
    "best_of_k": ({**ranked(1), "scores": [0, 2, 2, 1]}, "'scores': 2 completions tie for the best; one is needed"),
}  # fmt: skip


@pytest.mark.parametrize("loss", KINDS)
def test_rows_of_the_wrong_kind_are_named_with_the_fields_wanted(loss, write):
    row, said = KINDS[loss]
    config = config_of(loss, write([row] * 3))
    with pytest.raises(UserError, match=f"^pairs: .*rows.jsonl, line 1: .*{said.removeprefix('line 1: ')}"):
        config.check_inputs(config.pairs)


@pytest.mark.parametrize(
    ("loss", "rows", "said"),
    [
        ("k_wise", [{**ranked(1), "scores": [1] * 4}], "'scores': all 4 completions tie, so there is nothing to com"),
        ("k_wise", [{"prompt": "a", "completions": ["b"], "ranks": [0]}], "at least 2 texts, found 1"),
        ("best_of_k", [{"prompt": "a", "response_1": "b", "response_2": "c", "annotators": [1]}], "votes .* no order"),
        ("bradley_terry", [{"prompt": "a", "response_1": "b", "response_2": "c", "annotators": [0, 0]}],
         "'annotators': all 2 say that it is a tie"),
        ("bradley_terry", [{"prompt": "a", "response_1": "b", "response_2": "c", "annotators": [1, 3]}],
         "'annotators', number 2 must be 1, 2, or 0 for a tie, found 3"),
        ("best_of_k", [{**picked(1), "best": 7}], "'best' must be a number from 0 to 3, found 7"),
        ("process_bce", [{**stepped(1), "ratings": [1, 2, 1, 1]}], "'ratings', number 2 must be 1, 0, −1 or null"),
        ("process_bce", [{**stepped(1), "ratings": [1]}], "'ratings' must have one for each of the 4 'completions'"),
        ("scalar_rating", [{**rated(1), "annotator": 1.5}], "'annotator' must be a string or a whole number"),
    ],
)  # fmt: skip
def test_ties_groups_of_one_and_odd_values_are_one_line(loss, rows, said, write):
    with pytest.raises(UserError, match=rf"^pairs: .*rows.jsonl, line 1: .*{said}"):
        config = config_of(loss, write(rows))
        config.check_inputs(config.pairs)


def test_ties_are_dropped_and_counted_where_the_config_says_so(context, write):
    rows = [{**ranked(i), "scores": scores} for i, scores in enumerate([[3, 1, 2, 0], [2, 2, 1, 1], [1] * 4] * 5)]
    for loss, dropped in (("k_wise", 5), ("plackett_luce", 10), ("best_of_k", 10)):
        config = config_of(loss, write(rows), ties="drop")
        config.check_inputs(context.data)
        assert reward_data.load(config, context, "rm").counts.dropped == dropped
    with pytest.raises(UserError, match="no row to train on is left"):
        reward_data.load(config_of("k_wise", write(rows[2::3]), ties="drop"), context, "rm")


def test_transcripts_that_end_before_their_answer_are_dropped_and_counted(context, write):
    talk = "\n\nHuman: It was\n\nAssistant:"
    rows = [{"chosen": f"{talk} good {i}", "rejected": talk if i % 4 == 1 else f"{talk} bad {i}"} for i in range(20)]
    config = config_of("bradley_terry", write([{"chosen": talk, "rejected": f"{talk} bad"}, *rows]))
    config.check_inputs(context.data)
    data = reward_data.load(config, context, "rm")
    assert data.counts.dropped == 6
    assert all(group.prompt == talk and all(group.completions) for group in [*data.train, *data.heldout])


def test_judgements_that_tell_nothing_apart_are_refused(context, write):
    for loss, rows, said in (
        ("outcome_bce", [labelled(1 + 3 * i) for i in range(10)], "rows to train on are all judged 1, so there is"),
        ("outcome_bce", [labelled(i) for i in range(9)] + [labelled(i) for i in (1, 4)], "held out are all judged 1"),
        ("scalar_rating", [rated(3 * i) for i in range(10)], "rows to train on are all judged 2"),
        ("ordinal_rating", [rated(i, 2 * (i % 2)) for i in range(0, 40, 3)], "must have each rating that is held out"),
    ):
        with pytest.raises(UserError, match=said):
            reward_data.load(config_of(loss, write(rows)), context, "rm")


def test_neutral_steps_are_what_the_config_says(context, write):
    source = write([stepped(i) for i in range(20)])
    right, wrong = (
        reward_data.load(config_of("process_bce", source, neutral=neutral), context, "rm").train
        for neutral in ("right", "wrong")
    )
    assert [row.targets[2] for row in right[:3]] == [0.0, 1.0, 1.0]
    assert [row.targets[2] for row in wrong[:3]] == [0.0, 1.0, 0.0]
    assert all(row.targets[1] is None for row in right)


def test_fields_of_one_loss_are_not_set_for_another():
    with pytest.raises(ValueError, match=r"margin_scale=0\.5 is for loss='bradley_terry', not 'k_wise'"):
        reward_model.Config(loss="k_wise", margin_scale=0.5)
    with pytest.raises(ValueError, match="SampledPairs makes comparisons; loss='outcome_bce' needs rows of a source"):
        reward_model.Config(loss="outcome_bce")
    with pytest.raises(ValueError, match="pairs make no order, which 'k_wise' needs"):
        reward_model.Config(loss="k_wise", pairs=SampledPairs(label_noise=0.1))
    with pytest.raises(ValueError, match=r"ensemble.members must lie in \[2, inf\)"):
        Ensemble(members=1)
