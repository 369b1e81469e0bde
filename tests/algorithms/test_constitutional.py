"""Answer, critique, revision: who is asked what, what becomes a row, and where a run goes on."""

import dataclasses
import json

import jax
import pytest

from rlhf_jax.algorithms import constitutional, made_rows
from rlhf_jax.algorithms.constitution import Principle, read_constitution
from rlhf_jax.algorithms.constitutional import Revised, Said, revise
from rlhf_jax.data.encoding import encode_example
from rlhf_jax.data.prompt_rows import PromptRow
from rlhf_jax.data.reading import read_examples
from rlhf_jax.data.sources import Jsonl
from rlhf_jax.errors import UserError
from tests.algorithms.conftest import put_stages

SHORT = [
    {"critique": "Bad?", "revision": "Fix it.", "preference": "Good?"},
    {"critique": "True?", "revision": "Be true.", "preference": "True?"},
]
CONFIG = {
    "prompt_tokens": (1, 20),
    "batch_size": 8,
    "prompts": 12,
    "answer_tokens": 6,
    "critique_tokens": 5,
    "length": 120,
    "policy": "sft",
}


@pytest.fixture
def config(tmp_path):
    (tmp_path / "constitution.json").write_text(json.dumps(SHORT))
    rows = [{"prompt": [{"role": "user", "content": f"Is {i} odd?"}]} for i in range(20)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return constitutional.Config(
        **CONFIG, data=Jsonl(tmp_path / "prompts.jsonl"), constitution=str(tmp_path / "constitution.json")
    )


@pytest.fixture
def context(make_context):
    return with_stages(make_context())


def with_stages(context):
    """With room for a conversation."""
    spec = dataclasses.replace(context.spec, max_len=160)
    context = dataclasses.replace(context, model=dataclasses.replace(context.model, spec=spec))
    put_stages(context)
    return context


def test_each_turn_is_asked_with_all_before_it():
    """Two rounds; whoever falls silent, or whose conversation is too long, is left out from there on."""
    asked = []

    def speaker(what, conversations, key):
        asked.append((what, [[message["content"] for message in one] for one in conversations]))
        turn = len(asked)
        silent = [(turn, one[0]["content"]) == (3, "drops out") for one in conversations]
        said = Said(f"{what} {turn}", [turn], [10 * turn])
        return [None if is_silent else said for is_silent in silent]

    principles = [Principle(f"c{i}", f"r{i}", f"p{i}") for i in range(2)]
    own = [Revised(PromptRow((1, 2), text, {}), principles, [], []) for text in ("stays", "drops out")]
    [left] = revise(own, speaker, 2, jax.random.key(0))
    first = ["stays", "answer 1"]
    assert asked == [
        ("answer", [["stays"], ["drops out"]]),
        ("critique", [[*first, "c0"], ["drops out", "answer 1", "c0"]]),
        ("answer", [[*first, "c0", "critique 2", "r0"], ["drops out", "answer 1", "c0", "critique 2", "r0"]]),
        ("critique", [["stays", "answer 3", "c1"]]),
        ("answer", [["stays", "answer 3", "c1", "critique 4", "r1"]]),
    ]
    assert left.to_row() == {
        "prompt": [{"role": "user", "content": "stays"}],
        "completion": [{"role": "assistant", "content": "answer 5"}],
        "prompt_tokens": [1],  # as the first answer's policy read it
        "completion_tokens": [50],  # as the last one's wrote it
        "answers": ["answer 1", "answer 3"],
        "critiques": ["critique 2", "critique 4"],
        "principles": ["c0", "c1"],
    }


def test_rows_to_learn_from_the_same_whenever_they_are_made(config, context, make_context, monkeypatch):
    config.check_inputs(context.data)
    figures = constitutional.train(config, context, "revisions")
    path = context.stage_dir("revisions") / "rows" / "rows.jsonl"
    train, heldout = read_examples(Jsonl(path, heldout=0.25))
    assert len(train) + len(heldout) == figures["rows"] == 12 - figures["left_out"] and figures["rows"] >= 6
    assert all(row.messages[-1]["role"] == "assistant" for row in (*train, *heldout))
    eos, learnt = context.tokenizer.eos_id, [encode_example(context.tokenizer)(row) for row in (*train, *heldout)]
    lengths = [sum(row.counted) for row in learnt]
    assert all(n == config.answer_tokens or row.tokens[-1] == eos for n, row in zip(lengths, learnt, strict=True))
    assert any(row.tokens[-1] != eos for row in learnt)  # a revision that was cut short
    assert not (context.stage_dir("revisions") / ".rows").exists()
    # Another run stops after its first batch, and goes on with the second alone.
    other, calls = with_stages(make_context("other")), []

    def stops(own, *rest):
        calls.append(len(own))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return revise(own, *rest)

    monkeypatch.setattr(constitutional, "revise", stops)
    with pytest.raises(KeyboardInterrupt):
        constitutional.train(config, other, "revisions")
    constitutional.train(config, other, "revisions")
    assert calls == [8, 4, 4]
    assert (other.stage_dir("revisions") / "rows" / "rows.jsonl").read_bytes() == path.read_bytes()
    assert made_rows.digest(path.parent) == made_rows.digest(other.stage_dir("revisions") / "rows")


def test_conversations_that_are_all_too_long_are_one_line(config, context):
    short = dataclasses.replace(config, length=24)
    with pytest.raises(UserError, match="revisions: length=24: every one of the 12 conversations is longer"):
        constitutional.train(short, context, "revisions")


def test_the_packages_own_constitution_has_all_three_requests():
    principles = read_constitution(None)
    assert len(principles) >= 4 and len({one.preference for one in principles}) == len(principles)
