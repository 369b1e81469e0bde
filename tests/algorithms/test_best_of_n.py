"""Best of n: which completions are taken, that rows are what was written, what SFT learns of them, refusals."""

import collections
import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from rlhf_jax import run, sharding
from rlhf_jax.algorithms import best_of_n, made_rows, sft
from rlhf_jax.algorithms.best_of_n import selected
from rlhf_jax.algorithms.context import Context
from rlhf_jax.algorithms.prompting import load_prompts
from rlhf_jax.data import formats
from rlhf_jax.data.encoding import encode_example
from rlhf_jax.data.fields import Fields
from rlhf_jax.data.reading import read
from rlhf_jax.data.sources import FromStage, Jsonl
from rlhf_jax.errors import NonFiniteError, UserError
from rlhf_jax.evals.best_of_n import best_of_n_kl
from rlhf_jax.evals.policy import PolicyEvaluation
from rlhf_jax.metrics import read_jsonl
from rlhf_jax.rewards.network import RewardNetwork
from rlhf_jax.rewards.verifiers import PatternMatch
from rlhf_jax.sharding import MeshConfig
from tests.algorithms.conftest import SPEC, put_stages

pytestmark = pytest.mark.usefixtures("compile_quickly")

CONFIG = best_of_n.Config(n=4, prompts=12, batch_size=16, completion_tokens=10, evaluation_prompts=10)


def change(**fields):
    return dataclasses.replace(CONFIG, **fields)


def rows_of(context, name="best"):
    return read_jsonl(context.stage_dir(name) / "rows" / "rows.jsonl")


def learnt(config, context, tokenizer):
    """The rows as SFT reads them, in tokens."""
    source = made_rows.resolved(config, context.workdir).data
    [part] = read(source, formats.example)
    return [encode_example(tokenizer)(example) for example in (*part.train, *part.heldout)]


@pytest.fixture(scope="module")
def begin(tmp_path_factory, pretrained, some_reviews):
    """Contexts in which a policy and a reward model have finished; the gold classifier is fitted once for all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        reviews = some_reviews.load()

        def make(mesh=None):
            mesh = sharding.single_device_mesh() if mesh is None else sharding.make_mesh(mesh)
            context = Context(tmp_path_factory.mktemp("run"), 0, mesh, pretrained, some_reviews)
            context.__dict__["reviews"] = reviews  # read once
            put_stages(context)
            return context

        yield make


@pytest.fixture(scope="module")
def done(begin):
    context = begin()
    return context, best_of_n.train(CONFIG, context, "best")


def test_the_best_of_each_prompt_is_kept_as_it_was_written(done):
    context, figures = done
    rows, tokenizer = rows_of(context), context.tokenizer
    assert figures["rows_kept"] == len(rows) == 12
    [train] = [load_prompts(CONFIG, context, "best").train]
    prompts = {tuple(prompt.tokens) for prompt in train}
    assert {tuple(row["prompt_tokens"]) for row in rows} <= prompts and len({row["prompt"] for row in rows}) > 6
    network = RewardNetwork(SPEC, context.mesh, length=19, pad_id=tokenizer.pad_id)
    whole = [row["prompt_tokens"] + row["completion_tokens"] for row in rows]
    scores = network(context.network("reward_model"), whole)  # of just these tokens
    np.testing.assert_allclose([row["score"] for row in rows], scores, atol=1e-4)
    for row in rows:
        assert tokenizer.decode(row["completion_tokens"]) == row["completion"]
    assert figures["score_kept"] == pytest.approx(np.mean([row["score"] for row in rows]))
    assert figures["score_kept"] > figures["score_before"] + 0.1


def test_sft_learns_the_tokens_that_were_written_and_eos_only_where_it_was(done):
    context, _ = done
    config = sft.Config(init="sft", data=FromStage("best", heldout=0.25))
    eos, ends = context.tokenizer.eos_id, set()
    for row, encoded in zip(rows_of(context), learnt(config, context, context.tokenizer), strict=True):
        assert list(encoded.tokens) == row["prompt_tokens"] + row["completion_tokens"]
        assert encoded.counted.index(True) == len(row["prompt_tokens"]) and encoded.counted[-1]
        ends.add((len(row["completion_tokens"]) == CONFIG.completion_tokens, encoded.tokens[-1] == eos))
    assert (True, False) in ends  # cut at the limit: no EOS is learnt there
    steps = {"steps": 2, "batch_size": 4, "heldout_rows": 4, "row_length": 40}
    resolved = made_rows.resolved(dataclasses.replace(config, **steps), context.workdir)
    assert sft.train(resolved, context, "again")["rows_train"] == 9


def test_figures_samples_and_evaluation_say_the_same(done):
    context, figures = done
    points = json.loads((context.stage_dir("best") / "evaluation.json").read_text())["best_of_n"]
    assert [point["n"] for point in points] == [1, 2, 4]
    assert [point["kl"] for point in points] == [best_of_n_kl(n) for n in (1, 2, 4)]
    assert figures["seq_kl"] == best_of_n_kl(4)
    samples = read_jsonl(context.stage_dir("best") / "samples.jsonl")
    before, after = samples[:10], samples[10:]
    assert [row["prompt"] for row in before] == [row["prompt"] for row in after]
    assert all(one["score"] <= other["score"] for one, other in zip(before, after, strict=True))
    for name in ("score", "gold", "vader"):  # the best of all is what the samples hold
        assert figures[f"{name}_after"] == points[-1][name] == pytest.approx(np.mean([row[name] for row in after]))
        assert figures[f"{name}_before"] == points[0][name]
        assert points[-1][f"{name}_low"] <= points[-1][name] <= points[-1][f"{name}_high"]
    assert points[0]["score"] < points[1]["score"] < points[2]["score"]


def test_a_killed_stage_goes_on_after_the_last_whole_batch(done, begin, monkeypatch):
    (_, figures), context, read, calls = done, begin(), PolicyEvaluation.read, []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(self, *args)

    monkeypatch.setattr(PolicyEvaluation, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        best_of_n.train(CONFIG, context, "best")
    assert best_of_n.train(CONFIG, context, "best") == figures
    assert len(calls) == 1 + math.ceil(22 / 4)  # of 22 prompts, 4 at once: one batch was begun twice
    assert made_rows.digest(context.stage_dir("best") / "rows") == made_rows.digest(done[0].stage_dir("best") / "rows")


@pytest.mark.slow
def test_on_a_mesh_it_writes_the_same(done, begin):
    context, split = done[0], begin(MeshConfig(data=4, fsdp=2))
    best_of_n.train(CONFIG, split, "best")
    for row, other in zip(rows_of(context), rows_of(split), strict=True):
        assert other["completion_tokens"] == row["completion_tokens"]
        assert other["score"] == pytest.approx(row["score"], abs=1e-4)


def test_a_threshold_and_a_function_of_texts(begin):
    context = begin()
    config = change(reward=PatternMatch(r"e"), keep=3, threshold=0.5)
    figures = best_of_n.train(config, context, "best")
    rows = rows_of(context)
    assert rows and all("e" in row["completion"] and row["score"] == 1 for row in rows)
    assert figures["rows_kept"] == len(rows) < 12 * 4 and figures["score_kept"] == 1
    assert max(collections.Counter(tuple(row["prompt_tokens"]) for row in rows).values()) <= 3
    with pytest.raises(UserError, match=r"stages.best.threshold=2.0: no completion scores so high; the best has 1"):
        best_of_n.train(change(reward=PatternMatch(r"e"), threshold=2.0), context, "best")


def test_scores_that_are_not_finite_stop_it(begin, monkeypatch):
    context = begin()
    broken = jax.tree.map(lambda x: x * np.nan, context.network("reward_model"))
    monkeypatch.setattr(type(context), "network", lambda self, source: broken)
    with pytest.raises(NonFiniteError, match="best: a score is nan: "):
        best_of_n.train(CONFIG, context, "best")
    assert not (context.stage_dir("best") / "rows").exists()


def test_selection_by_hand():
    scores = np.array([[0.1, 0.7, 0.7, 0.9], [0.0, 0.2, 0.1, 0.2]])
    assert selected(scores, keep=2, threshold=None).tolist() == [[False, True, False, True], [False, True, False, True]]
    assert selected(scores, keep=4, threshold=0.7).tolist() == [[False, True, True, True], [False] * 4]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"keep": 5}, "keep=5 must be at most n=4"),
        ({"threshold": float("nan")}, "threshold must lie in"),
        ({"completion_tokens": 0}, "completion_tokens must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        change(**fields)


def test_ids_of_another_tokenizer_are_told(done, tmp_path):
    context, _ = done
    row = rows_of(context)[0]
    for wrong, said in (
        (
            {"completion": "Something else."},
            "'completion_tokens' are not this model's tokens of 'completion': 'Something",
        ),
        ({"prompt_tokens": [100_000]}, "'prompt_tokens' has 100000, and this model 512 tokens; leave ids out"),
    ):
        with pytest.raises(UserError, match=said):
            encode_example(context.tokenizer)(formats.example(fields_of({**row, **wrong}, tmp_path)))
    with pytest.raises(UserError, match=r"row 1: 'completion_tokens' must be token ids, found \"a\""):
        formats.example(fields_of({**row, "completion_tokens": ["a"]}, tmp_path))


def fields_of(row, folder):
    """A row as it is read of a file."""
    return Fields(f"{folder}/rows.jsonl, row 1", row)


def test_it_is_a_stage_that_makes_rows():
    assert run.STAGES[best_of_n.Config] is best_of_n.train and CONFIG.produces == "rows"
    assert CONFIG.requires() == {"policy": ("sft", "policy"), "reward": ("reward_model", "scorer")}
    assert change(reward=PatternMatch("e")).requires() == {"policy": ("sft", "policy")}
    assert isinstance(made_rows.resolved(sft.Config(data=FromStage("best")), Path()).data, Jsonl)
