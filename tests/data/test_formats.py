"""TRL's row formats: what each means, and one line with file, line and field for whatever is wrong."""

import json
import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rlhf_jax.data import formats, reading
from rlhf_jax.data.fields import Fields
from rlhf_jax.data.formats import Example, Pair, Prompt, Ranked, Rated, Scored, Stepwise, Text, Thumb
from rlhf_jax.data.sources import Jsonl
from rlhf_jax.data.tables import JsonlTable
from rlhf_jax.errors import UserError

USER, ASSISTANT = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}
RUDE = {"role": "assistant", "content": "Go away."}
PAIR = {"prompt": "p", "chosen": "good", "rejected": "bad"}


def reader(parse, **fields):
    """A function that reads every row of a file."""

    def read(path):
        table = JsonlTable(Jsonl(path))
        return [parse(Fields(*row, fields)) for row in table.rows("all", 0, table.size("all"))]

    return read


read_pairs, read_examples = reader(formats.pair), reader(formats.example)


def read_judged(path):
    return reading.read_judged(Jsonl(path))


SAID = ("\n\nHuman: Hi.", "\n\nAssistant: Hello.", "\n\nAssistant: Go away.")
TALK = Pair(*SAID, chosen_messages=(USER, ASSISTANT), rejected_messages=(USER, RUDE), answered_from=1)
COLUMNS = {"role": ["user", "assistant"], "content": ["Hi.", "Hello."]}  # as TFDS and old Arrow files hold messages


@pytest.fixture
def write(tmp_path):
    """Rows (objects, or raw bytes of a line) to a file."""

    def to_file(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_bytes(
            b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)
        )
        return path

    return to_file


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (PAIR, Pair("p", "good", "bad")),
        ({**PAIR, "prompt": ""}, Pair("", "good", "bad")),
        ({**PAIR, "prompt": []}, Pair("", "good", "bad")),
        ({**PAIR, "margin": 2}, Pair("p", "good", "bad", 2.0)),
        ({**PAIR, "score_chosen": 4.5, "score_rejected": 3}, Pair("p", "good", "bad", 1.5)),
        ({**PAIR, "score_chosen": 2, "score_rejected": 3}, Pair("p", "good", "bad", 0.0)),  # the choice counts
        ({**PAIR, "probability": 0.75}, Pair("p", "good", "bad", probability=0.75)),
        ({**PAIR, "probability": 1}, Pair("p", "good", "bad")),
        (
            {"chosen": "It is now.", "rejected": "It is not.", "probability": 0.2},
            Pair("It is", " now.", " not.", probability=0.2),
        ),
        # Implicit prompt: what both begin with, up to a space, so that "not" is not cut into "no" and "t".
        ({"chosen": "It is now.", "rejected": "It is not."}, Pair("It is", " now.", " not.")),
        ({"chosen": "Yes it is", "rejected": "Yes it"}, Pair("Yes", " it is", " it")),
        ({"chosen": "good", "rejected": "bad"}, Pair("", "good", "bad")),
        # A raw transcript's ends where its last answer begins, though both begin with "I".
        (
            {"chosen": "\n\nHuman: Hi.\n\nAssistant: I see.", "rejected": "\n\nHuman: Hi.\n\nAssistant: I go."},
            Pair("\n\nHuman: Hi.\n\nAssistant:", " I see.", " I go."),
        ),
        # One that ends before its answer has nothing to compare, whichever of the two it is.
        (
            {"chosen": "\n\nHuman: Hi.\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi.\n\nAssistant:"},
            Pair("\n\nHuman: Hi.\n\nAssistant:", " Hello", ""),
        ),
        (
            {
                "chosen": "\n\nHuman: Hi.\n\nAssistant: A\n\nHuman: B\n\nAssistant: ",
                "rejected": "\n\nHuman: Hi.\n\nAssistant: A\n\nHuman: C\n\nAssistant: D",
            },
            Pair("\n\nHuman: Hi.\n\nAssistant:", "", " A\n\nHuman: C\n\nAssistant: D"),
        ),
        # A raw row of SHP.
        ({"history": "h", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 9}, Pair("h", "a", "b")),
        ({"history": "h", "human_ref_A": "a", "human_ref_B": "b", "labels": 0}, Pair("h", "b", "a")),
        # Conversations.
        ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [RUDE]}, TALK),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, RUDE]}, TALK),
        ({"chosen": COLUMNS, "rejected": [USER, RUDE]}, TALK),
        ({**PAIR, "prompt": [USER]}, Pair("\n\nHuman: Hi.", "good", "bad")),
    ],
)
def test_pairs(write, row, expected):
    assert read_pairs(write(row)) == read_judged(write(row)) == [expected]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "completion": "c"}, Example("p", "c")),
        ({"prompt": "", "completion": "c"}, Example("", "c")),
        ({"text": "a text"}, Example("", "a text")),
        ({"messages": [USER, ASSISTANT]}, Example("\n\nHuman: Hi.", "\n\nAssistant: Hello.", (USER, ASSISTANT))),
        (
            {"prompt": [USER], "completion": [ASSISTANT]},
            Example("\n\nHuman: Hi.", "\n\nAssistant: Hello.", (USER, ASSISTANT), learnt_from=1),
        ),
        (
            {"messages": [{"role": "human", "content": "Hi."}, ASSISTANT]},
            Example("\n\nHuman: Hi.", "\n\nAssistant: Hello.", (USER, ASSISTANT)),
        ),
    ],
)
def test_examples(write, row, expected):
    assert read_examples(write(row)) == [expected]


STEPS = {"prompt": "p", "completions": ["one", "two"]}


@pytest.mark.parametrize(
    ("parse", "row", "expected"),
    [
        (formats.prompt, {"prompt": "p", "answer": 7}, Prompt("p", (), {"answer": 7})),
        (formats.prompt, {"prompt": [USER]}, Prompt("\n\nHuman: Hi.", (USER,), {})),
        (formats.prompt, {"messages": [USER, ASSISTANT], "id": "a"}, Prompt("\n\nHuman: Hi.", (USER,), {"id": "a"})),
        (formats.thumb, {"prompt": "p", "completion": "c", "label": True}, Thumb("p", "c", True)),
        (formats.thumb, {"prompt": "p", "completion": "c", "label": 0}, Thumb("p", "c", False)),
        (
            formats.thumb,
            {"prompt": [USER], "completion": [RUDE], "label": False},
            Thumb("\n\nHuman: Hi.", "\n\nAssistant: Go away.", False, (USER, RUDE), 1),
        ),
        (formats.ranked, {**STEPS, "ranks": [5, 2]}, Ranked("p", ("one", "two"), (1, 0))),
        (formats.ranked, {**STEPS, "scores": [5, 2.5]}, Ranked("p", ("one", "two"), (0, 1))),
        (formats.ranked, {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [1, 1, 3]},
         Ranked("p", ("a", "b", "c"), (0, 0, 1))),
        (formats.rated, {"prompt": "p", "completion": "c", "rating": 4}, Rated("p", "c", 4.0)),
        (formats.stepwise, {**STEPS, "labels": [True, False]}, Stepwise("p", ("one", "two"), (True, False))),
        (formats.stepwise, {**STEPS, "labels": [1, None]}, Stepwise("p", ("one", "two"), (True, None))),
        (formats.text, {"text": "t"}, Text("t", None)),
        (formats.text, {"text": "t", "label": True}, Text("t", 1)),
        (formats.text, {"text": "t", "label": -1}, Text("t", None)),  # as of unlabelled reviews
    ],
)  # fmt: skip
def test_other_rows(write, parse, row, expected):
    assert reader(parse)(write(row)) == [expected]


def test_a_prompt_is_what_a_pair_begins_with(write):
    row = {"chosen": [USER, ASSISTANT], "rejected": [USER, RUDE]}
    assert reader(formats.prompt)(write(row)) == [Prompt("\n\nHuman: Hi.", (USER,), row)]
    (prompt,) = reader(formats.prompt)(write({"chosen": "Yes it is", "rejected": "Yes it"}))
    assert prompt.prompt == "Yes"


@pytest.mark.parametrize(
    ("parse", "bad", "message"),
    [
        (formats.prompt, {"prompt": " "}, "'prompt' is empty"),
        (formats.prompt, {"prompt": []}, "'prompt' is empty"),
        (
            formats.prompt,
            {"text": "t"},
            "expected 'prompt', 'messages', or 'chosen' and 'rejected'; the row",
        ),
        (formats.prompt, {"messages": [ASSISTANT]}, "nobody but the assistant speaks"),
        (formats.prompt, {"chosen": "a", "rejected": "b"}, "no beginning in common"),
        (formats.thumb, {"prompt": "p", "completion": "c"}, "no field 'label'"),
        (formats.thumb, {"prompt": "p", "completion": "c", "label": "yes"}, "'label' must be true or false"),
        (formats.thumb, {"prompt": "p", "completion": "c", "label": 1.0}, "'label' must be true or false"),
        (formats.ranked, {"prompt": "p", "completions": ["a"], "ranks": [1]}, "must hold at least 2 texts, found 1"),
        (formats.ranked, {**STEPS, "ranks": [1]}, "'ranks' must have one for each of the 2 'completions', found 1"),
        (formats.ranked, {**STEPS, "ranks": [1, 1]}, "'ranks': all 2 completions tie"),
        (formats.ranked, {**STEPS, "scores": [1, math.nan]}, "'scores', number 2 must be a finite number, found NaN"),
        (formats.ranked, STEPS, "no field 'scores'"),
        (formats.rated, {"prompt": "p", "completion": "c", "rating": "5"}, "'rating' must be a finite number"),
        (
            formats.stepwise,
            {**STEPS, "labels": [1, -1]},
            "'labels', number 2 must be true or false, or 1 or 0, found",
        ),
        (formats.stepwise, {**STEPS, "completions": ["a", ""], "labels": [1, 1]}, "'completions', number 2 is empty"),
        (formats.stepwise, {**STEPS, "labels": True}, "'labels' must be a list, found true"),
        (formats.labelled_text, {"text": "t"}, "no field 'label'; the row has 'text'"),
        (formats.labelled_text, {"text": "t", "label": -1}, "'label' must be true or false, or 1 or 0, found -1"),
    ],
)
def test_what_is_wrong_with_other_rows(write, parse, bad, message):
    with pytest.raises(UserError, match=rf"rows\.jsonl, line 2: .*{message}"):
        reader(parse)(write(b"", bad))


def test_fields_are_named_and_reached(write):
    row = {"question": "q", "meta": {"turns": [{"text": "a"}, {"text": "b"}]}, "a.b": "dotted", "score": 1}
    path = write(row)
    names = {"prompt": "question", "completion": "meta.turns.1.text", "rating": "score"}
    assert reader(formats.rated, **names)(path) == [Rated("q", "b", 1.0)]
    lists = {"prompt": "a.b", "completions": "meta.turns.*.text", "ranks": "meta.ranks"}
    with pytest.raises(UserError, match=r"no field 'meta.ranks', which is to be 'ranks'; the row has 'question'"):
        reader(formats.ranked, **lists)(path)
    row["meta"]["ranks"] = [1, 0]
    assert reader(formats.ranked, **lists)(write(row)) == [Ranked("dotted", ("a", "b"), (1, 0))]
    (prompt,) = reader(formats.prompt, prompt="question", answer="score")(path)
    assert (
        prompt.prompt == "q" and prompt.metadata.keys() == {"meta", "a.b", "answer"} and prompt.metadata["answer"] == 1
    )


def test_a_text_beside_whole_conversations_is_their_beginning(write):
    path = write({"prompt": "Hi.", "chosen": [USER, ASSISTANT], "rejected": [USER, RUDE]})
    assert read_pairs(path) == [TALK]
    (pair,) = read_pairs(write({"prompt": "Hi.", "chosen": [ASSISTANT], "rejected": [RUDE]}))
    assert pair.prompt == "Hi." and pair.chosen == "\n\nAssistant: Hello."


def test_scored_texts(write):
    path = write({"prompt": "p", "text": "t", "score": 1}, {"text": "u", "score": -0.5})
    assert read_judged(path) == [Scored("p", "t", 1.0), Scored("", "u", -0.5)]


def test_blank_lines_a_byte_order_mark_and_windows_line_ends_are_no_rows(write):
    line = json.dumps(PAIR).encode()
    assert len(read_pairs(write(b"\xef\xbb\xbf" + line + b"\r", b"", b"  ", line))) == 2


@pytest.mark.parametrize(
    ("reader", "bad", "message"),
    [
        (read_pairs, {"prompt": "p", "chosen": "a"}, "no field 'rejected'; the row has 'prompt', 'chosen'"),
        (read_pairs, {**PAIR, "chosen": ""}, "'chosen' is empty"),
        (read_pairs, {**PAIR, "rejected": " \n"}, "'rejected' is empty"),
        (read_pairs, {**PAIR, "chosen": 3}, "'chosen' must be a string, found 3"),
        (read_pairs, {**PAIR, "prompt": None}, "'prompt' must be a string, found null"),
        (read_pairs, {**PAIR, "margin": "big"}, "'margin' must be a finite number"),
        (read_pairs, {**PAIR, "margin": math.nan}, "'margin' must be a finite number, found NaN"),
        (read_pairs, {**PAIR, "margin": 10**400}, "'margin' must be a finite number, found 1000"),
        (read_pairs, {**PAIR, "margin": True}, "'margin' must be a finite number, found true"),
        (read_pairs, {**PAIR, "probability": 0}, r"'probability' must lie in \(0, 1\], found 0"),
        (read_pairs, {**PAIR, "probability": 1.5}, r"'probability' must lie in \(0, 1\], found 1.5"),
        (read_pairs, {**PAIR, "probability": "high"}, "'probability' must be a finite number, found \"high\""),
        (read_pairs, {**PAIR, "probability": None}, "'probability' must be a finite number, found null"),
        (read_pairs, {**PAIR, "chosen": [ASSISTANT]}, "'rejected' must be a list of messages"),
        (read_pairs, {**PAIR, "chosen": "\ud800"}, r"'chosen': \\ud800 is half a character"),
        (read_pairs, {"chosen": [{"role": ["user"], "content": "x"}], "rejected": [RUDE]}, "a message has a role"),
        (read_pairs, {"chosen": [{"role": "bot", "content": "x"}], "rejected": [RUDE]}, "a message has a role"),
        (read_pairs, {"chosen": [{**ASSISTANT, "content": ""}], "rejected": [RUDE]}, "the last message is empty"),
        (read_pairs, b'{"prompt": "p", "chosen"', "not JSON"),
        (read_pairs, b"[1, 2]", r"expected a JSON object, found \[1, 2\]"),
        (read_pairs, b'{"prompt": "\xff\xfe"}', "not UTF-8"),
        (read_pairs, b"[" * 100_000, "not JSON"),
        (read_examples, {"text": ""}, "'text' is empty"),
        (read_examples, {"prompt": "p", "response": "r"}, "expected 'prompt' and 'completion', 'messages', or 'text'"),
        (read_examples, {"messages": []}, "'messages' must be a list of messages"),
        (read_examples, {"messages": [ASSISTANT, USER]}, "the last message must be the assistant's, found 'user'"),
        (read_pairs, {"chosen": [USER], "rejected": [RUDE]}, "the last message must be the assistant's, found 'user'"),
    ],
)
def test_what_is_wrong_is_one_line_with_file_and_line(write, reader, bad, message):
    good = {**PAIR, "text": "t"}
    with pytest.raises(UserError, match=rf"rows\.jsonl, line 3: .*{message}") as caught:
        reader(write(good, b"", bad))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"text": "", "score": 1}, "'text' is empty"),
        ({"text": "t"}, "no field 'score'"),
        ({"text": "t", "score": None}, "'score' must be a finite number, found null"),
        ({"text": "t", "score": math.inf}, "'score' must be a finite number, found Infinity"),
    ],
)
def test_a_wrong_scored_row(write, bad, message):
    with pytest.raises(UserError, match=f"line 2: .*{message}"):
        read_judged(write({"text": "t", "score": 0}, bad))


def test_the_first_row_decides_what_is_judged(write):
    with pytest.raises(UserError, match=r"line 1: expected 'prompt', 'chosen' and 'rejected', or 'text' and 'score'"):
        read_judged(write({"question": "q"}))
    with pytest.raises(UserError, match="line 2: no field 'chosen'"):
        read_judged(write(PAIR, {"text": "t", "score": 1}))


@pytest.mark.parametrize("reader", [read_pairs, read_examples, read_judged])
def test_no_file_a_folder_and_no_rows(reader, tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: No such file"):
        reader(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="is a folder"):
        reader(tmp_path)
    (tmp_path / "empty.jsonl").write_bytes(b"\n \n")
    with pytest.raises(UserError, match=r"empty\.jsonl: no rows"):
        reader(tmp_path / "empty.jsonl")


NAMES = ("prompt", "chosen", "rejected", "margin", "score_chosen", "score_rejected", "text", "score", "messages")
TEXTS = st.sampled_from(["", " ", "a", "a b", "a c", "a b c", "\ud800", "é\n"])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
MESSAGES = st.lists(
    st.fixed_dictionaries({}, optional={"role": st.sampled_from(["user", "assistant"]) | LEAVES, "content": LEAVES}),
    max_size=2,
)
ROWS = st.dictionaries(st.sampled_from([*NAMES, "completion"]), TEXTS | LEAVES | MESSAGES, max_size=5)


@settings(deadline=None, derandomize=True)
@given(st.lists(ROWS, min_size=1, max_size=2))
def test_any_json_is_read_whole_or_refused_in_one_line(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for reader in (read_pairs, read_examples, read_judged):
        try:
            parsed = reader(path)
        except UserError as error:
            assert "\n" not in str(error).encode().decode()  # can be printed
            continue
        assert len(parsed) == len(rows)
        for fields in map(vars, parsed):
            assert all(fields[name].strip() for name in fields.keys() & {"chosen", "rejected", "completion", "text"})
            assert all(math.isfinite(value) for value in fields.values() if isinstance(value, float))


@settings(deadline=None, derandomize=True)
@given(st.text("ab \n", max_size=8), st.text("ab \n", max_size=6), st.text("ab \n", max_size=6))
def test_an_implicit_prompt_loses_nothing_and_splits_no_word(tmp_path_factory, start, chosen, rejected):
    assume(all((start + end).strip() for end in (chosen, rejected)))
    path = tmp_path_factory.getbasetemp() / "implicit.jsonl"
    path.write_text(json.dumps({"chosen": start + chosen, "rejected": start + rejected}))
    (pair,) = read_pairs(path)
    assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (start + chosen, start + rejected)
    assert pair.chosen.strip() and pair.rejected.strip()
    assert not pair.prompt or (pair.chosen[0].isspace() and pair.rejected[0].isspace())
