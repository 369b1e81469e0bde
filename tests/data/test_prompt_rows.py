"""Prompts of rows: what stays of those that are too long, chat templates, mixtures, and the cursor."""

import json
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax.data.prompt_rows import PromptRow, Prompts, cut_paragraph, select_prompts
from rlhf_jax.data.reading import Mixed
from rlhf_jax.data.sources import Jsonl
from rlhf_jax.errors import UserError
from rlhf_jax.interop.pretrained import Bundled
from rlhf_jax.interop.tokenizers import load_tokenizer

CHAT = Path(__file__).parents[1] / "oracles_hf" / "tokenizers" / "byte_level"
POST = "SUBREDDIT: r/x\n\nTITLE: t\n\nPOST: " + "It was a dark night.\n" * 20 + "The end came late.\n\nTL;DR:"


@pytest.fixture(scope="module")
def tokenizer():
    return Bundled().tokenizer(Path())


@pytest.fixture(scope="module")
def chat():
    pytest.importorskip("tokenizers")
    pytest.importorskip("jinja2")
    return load_tokenizer(CHAT)


@pytest.fixture
def fit(tmp_path):
    """`select_prompts` of rows; a last one, alone, is held out."""

    def fit(tokenizer, *prompts, most, **options):
        path = tmp_path / "rows.jsonl"
        lines = [{"prompt": prompt, "number": i} for i, prompt in enumerate([*prompts, "Held out."])]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        selected = select_prompts(Jsonl(path, heldout=0.01), tokenizer, length=1 + most, **options)
        assert [row.text for row in selected.heldout] == ["Held out."]
        return selected.train, selected.counts

    return fit


def test_what_fits_stays_as_it_is(tokenizer, fit):
    rows, counts = fit(tokenizer, POST, "Short.", most=1000, too_long="drop")
    assert (counts.train, counts.cut, counts.dropped) == (2, 0, 0)
    assert [list(row.tokens) for row in rows] == [
        [tokenizer.bos_id, *tokenizer.encode(text)] for text in (POST, "Short.")
    ]
    assert [(row.text, row.metadata) for row in rows] == [(POST, {"number": 0}), ("Short.", {"number": 1})]


def test_a_long_post_is_cut_at_a_line_and_still_asks_for_its_summary(tokenizer, fit):
    most = 100
    (_, row), counts = fit(tokenizer, "Short.", POST, most=most, too_long="paragraph")
    assert (counts.cut, counts.dropped) == (1, 0)
    assert row.metadata == {"number": 1} and most - 15 < len(row.tokens) <= 1 + most
    text = tokenizer.decode(row.tokens)
    assert text == row.text and text.endswith("a dark night.\n\nTL;DR:") and text.startswith(POST[:60])
    lines = POST.split("\n")
    kept = text.removesuffix("\n\nTL;DR:").split("\n")
    assert kept == lines[: len(kept)]
    longer = "\n".join(lines[: len(kept) + 1]) + "\n\nTL;DR:"
    assert len(tokenizer.encode(longer)) > most  # the next line would not have fitted


def test_a_single_long_paragraph_is_cut_where_it_fits(tokenizer, fit):
    (row, *others), counts = fit(tokenizer, "word " * 500, "a\n\n" + "word " * 500, most=50, too_long="paragraph")
    assert 45 < len(row.tokens) <= 51 and set(row.text.split()) <= {"word", "wor", "wo", "w"}
    assert not others and (counts.cut, counts.dropped) == (1, 1)  # a last paragraph that is too long alone goes


def test_a_prompt_loses_its_start_or_is_dropped(tokenizer, fit):
    (_, row), counts = fit(tokenizer, "Short.", POST, most=30, too_long="start")
    tokens = tokenizer.encode(POST)
    assert list(row.tokens) == [tokenizer.bos_id, *tokens[-30:]] and (counts.cut, counts.dropped) == (1, 0)
    assert row.text == tokenizer.decode(tokens[-30:])
    rows, counts = fit(tokenizer, "Short.", POST, most=30, too_long="drop")
    assert [row.metadata["number"] for row in rows] == [0] and (counts.cut, counts.dropped) == (0, 1)


def test_conversations_go_by_the_chat_template(chat, fit):
    ask = {"role": "user", "content": "How many?"}
    talk = [ask, {"role": "assistant", "content": "Of what?"}, {"role": "user", "content": "5 a day"}]
    given = {"most": 500, "too_long": "drop"}
    (as_it_is, text), _ = fit(chat, talk, "How many?", **given)
    assert list(as_it_is.tokens) == chat.encode(chat.chat.render(talk, add_generation_prompt=True))
    assert list(text.tokens) == [chat.bos_id, *chat.encode("How many?")]
    (_, said), _ = fit(chat, talk, "How many?", as_chat=True, **given)
    assert list(said.tokens) == chat.encode(chat.chat.render([ask], add_generation_prompt=True))
    assert said.text == "How many?"
    long = {**ask, "content": "line one\n" * 100}
    (row,), _ = fit(chat, [long], most=120, too_long="paragraph")
    content = cut_paragraph(
        long["content"], lambda part: len(chat.encode_chat_prompt([{**ask, "content": part}])) <= 121
    )
    assert content.count("line one") > 3 and set(content.split("\n")) == {"line one"}
    assert list(row.tokens) == chat.encode_chat_prompt([{**ask, "content": content}])


def test_as_chat_needs_a_template(tokenizer, fit):
    with pytest.raises(UserError, match="as_chat: the model's tokenizer has no chat template"):
        fit(tokenizer, "a", most=5, too_long="drop", as_chat=True)


def batches(rows, seed=0):
    return Prompts(rows, length=4, pad_id=0, batch_size=8, seed=seed)


def rows(first, count):
    return [PromptRow((1, 2, first + i), f"row {first + i}", {"number": first + i}) for i in range(count)]


def test_batches_carry_their_rows_and_go_on_where_they_stood():
    ours, again = batches(rows(10, 16)), batches(rows(10, 16))
    seen = [next(ours) for _ in range(5)]
    for batch, of in seen:
        np.testing.assert_array_equal(batch.tokens, [[0, *row.tokens] for row in of])
        np.testing.assert_array_equal(batch.mask, [[False, True, True, True]] * 8)
    epochs = [row.metadata["number"] for _, of in seen[:4] for row in of]
    assert sorted(epochs[:16]) == sorted(epochs[16:]) == list(range(10, 26)) and epochs[:16] != epochs[16:]
    next(again)
    state = again.get_state()
    fresh = batches(rows(10, 16))
    fresh.set_state(state)
    assert [row.text for row in next(fresh)[1]] == [row.text for row in seen[1][1]]


def test_parts_are_drawn_by_weight():
    mixed = batches(Mixed((rows(0, 7), rows(100, 50)), (0.75, 0.25)))
    numbers = [row.metadata["number"] for _ in range(50) for row in next(mixed)[1]]
    assert np.mean([number < 100 for number in numbers]) == pytest.approx(0.75, abs=0.02)
    assert set(range(7)) <= set(numbers)


def test_a_batch_may_be_one_prompt_as_often_as_its_group_is_large():
    alone = Prompts(rows(10, 5), length=4, pad_id=0, batch_size=4, seed=0, copies=4)
    drawn = [next(alone) for _ in range(5)]
    assert sorted(of[0].metadata["number"] for _, of in drawn) == [10, 11, 12, 13, 14]
    for batch, of in drawn:
        np.testing.assert_array_equal(batch.tokens, [[0, *of[0].tokens]] * 4)
