"""Sources by name: what each reads, how it is split, what is merged, and one line for whatever is wrong."""

import gzip
import json
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data import splits
from rlhf_jax.data.formats import Pair, Text
from rlhf_jax.data.reading import Mixed, read_examples, read_pairs, read_prompts, read_texts, read_thumbs
from rlhf_jax.data.sources import TFDS, Jsonl, Mixture
from rlhf_jax.data.texts import are_texts, check_texts, load_texts
from rlhf_jax.errors import UserError


def pairs(count, start=0):
    return [{"prompt": f"p{i}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(start, start + count)]


@pytest.fixture
def write(tmp_path):
    def to_file(rows, name="rows.jsonl"):
        path = tmp_path / name
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return to_file


def refused(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    return str(caught.value)


class TestSplits:
    ROWS, SHARES = st.none() | st.integers(-30, 30), st.none() | st.integers(-100, 100).map("{}%".format)

    @settings(deadline=None, derandomize=True, max_examples=300)
    @given(st.tuples(ROWS, ROWS) | st.tuples(SHARES, SHARES), st.integers(1, 25))
    def test_slices_are_those_of_tfds_or_refused(self, ends, rows):
        text = "train[{}:{}]".format(*("" if end is None else end for end in ends))
        info = tfds.core.splits.SplitInfo(
            name="train",
            shard_lengths=[rows],
            num_bytes=0,
            filename_template=tfds.core.ShardedFileTemplate(data_dir="/", dataset_name="d", filetype_suffix="x"),
        )
        try:
            (span,) = splits.resolve(text, {"train": rows}.__getitem__)
        except ValueError as error:
            assert "leaves the split" in str(error) or "holds no row" in str(error)
            return
        try:
            (expected,) = tfds.core.splits.SplitDict([info])[text].file_instructions
        except ValueError:  # TFDS has slices of nothing, and refuses some that we take
            return
        assert (span.start, len(span)) == (
            expected.skip,
            expected.examples_in_shard if expected.take == -1 else len(span),
        )
        assert expected.take in (-1, len(span))

    @pytest.mark.parametrize("text", ["", "train[", "train[:5.5%]", "train[1:2:3]", "train[:101%]", "a+", "train[a:]"])
    def test_what_is_no_split(self, text):
        with pytest.raises(ValueError, match=r"is no split|a percentage lies"):
            Jsonl("a", split=text)
        with pytest.raises(ValueError, match=r"is no split|a percentage lies"):
            TFDS("a", heldout=text)

    @settings(deadline=None, derandomize=True)
    @given(st.integers(2, 200), st.integers(1, 99))
    def test_two_sides_of_a_percentage_are_all_rows_once(self, rows, cut):
        try:
            spans = splits.resolve(f"t[:{cut}%]+t[{cut}%:]", {"t": rows}.__getitem__)
        except ValueError:
            assert round(cut * rows / 100) in (0, rows)
            return
        assert [i for span in spans for i in range(span.start, span.stop)] == list(range(rows))
        assert splits.overlap(spans[:1], spans[1:]) == 0


class TestJsonl:
    def test_a_share_is_held_out_or_a_slice(self, write):
        path = write(pairs(40))
        train, heldout = read_pairs(Jsonl(path))
        assert [row.prompt for row in [*train, *heldout]] == [f"p{i}" for i in range(40)] and len(heldout) == 2
        train, heldout = read_pairs(Jsonl(path, split="all[:25%]", heldout="all[-3:]"))
        assert train == [Pair(f"p{i}", f"a{i}", f"b{i}") for i in range(10)]
        assert [row.prompt for row in heldout] == ["p37", "p38", "p39"]

    def test_compressed(self, write):
        assert len(read_pairs(Jsonl(write(pairs(5), "rows.jsonl.gz"))).train) == 4
        broken = write(pairs(5), "broken.jsonl.gz")
        broken.write_bytes(broken.read_bytes()[:-9])
        assert "broken.jsonl.gz: not whole" in refused(read_pairs, Jsonl(broken))
        broken.write_bytes(b"{}")
        assert "broken.jsonl.gz: not whole, or not compressed by gzip" in refused(read_pairs, Jsonl(broken))

    def test_what_stands_twice_is_merged_and_nothing_held_out_is_trained_on(self, write):
        path = write([*pairs(10), *pairs(4), *pairs(6, 8)])  # p0 to p13, of which p0 to p3, p8 and p9 twice
        rows = read_pairs(Jsonl(path, heldout=0.5))
        assert (len(rows.train), len(rows.heldout), rows.merged) == (7, 7, 6)
        rows = read_pairs(Jsonl(path, split="all[:14]", heldout="all[14:]"))
        assert [row.prompt for row in rows.train] == [f"p{i}" for i in range(8)]
        assert (len(rows.heldout), rows.merged) == (6, 6)
        assert "all 6 rows to train on are held out" in refused(
            read_pairs, Jsonl(write([*pairs(6), *pairs(6)]), split="all[:6]", heldout="all[6:]")
        )

    def test_a_prompt_is_in_one_split_whatever_else_its_rows_say(self, write):
        said = [{"prompt": f"p{i % 5}", "id": i} for i in range(20)]
        rows = read_prompts(Jsonl(write(said), heldout=0.2))
        assert len(rows.train) == 16 and {row.prompt for row in rows.heldout} == {"p4"} and len(rows.heldout) == 4
        apart = read_prompts(Jsonl(write(said), split="all[:18]", heldout="all[18:]"))  # p3 and p4
        assert {row.prompt for row in apart.train} == {"p0", "p1", "p2"} and apart.merged == 6

    def test_all_that_is_said_of_a_prompt_is_in_one_split(self, write):
        said = [{"prompt": f"p{i // 2}", "completion": f"c{i}", "label": True} for i in range(20)]
        rows = read_thumbs(Jsonl(write(said), heldout=0.1))
        assert [row.prompt for row in rows.heldout] == ["p9", "p9"] and len(rows.train) == 18
        apart = read_thumbs(Jsonl(write(said), split="all[:15]", heldout="all[15:]"))  # a half of p7 in each
        assert [row.prompt for row in apart.train] == [f"p{i // 2}" for i in range(14)] and apart.merged == 1
        for prompt in ("", "Write a review."):  # nothing to part them by but what else they say
            alike = [row | {"prompt": prompt} for row in said]
            assert [len(rows) for rows in read_thumbs(Jsonl(write(alike), heldout=0.1))] == [18, 2]
            assert [len(rows) for rows in read_thumbs(Jsonl(write(alike), split="all[:15]", heldout="all[15:]"))] == [
                15,
                5,
            ]

    def test_what_is_wrong_is_one_line(self, write, tmp_path):
        path = write(pairs(10))
        assert "none.jsonl: No such file" in refused(read_pairs, Jsonl(tmp_path / "none.jsonl"))
        assert refused(read_pairs, Jsonl(path, split="train")).endswith(
            "no split 'train'; a file of JSON lines has 'all'"
        )
        assert refused(read_pairs, Jsonl(path, split="all[:11]")).endswith(
            "'all[:11]' leaves the split, which has 10 rows"
        )
        assert "heldout='all[8:]' and split='all[:9]' have 1 rows in common" in refused(
            read_pairs, Jsonl(path, split="all[:9]", heldout="all[8:]")
        )
        assert (
            "line 1: no field 'better', which is to be 'chosen'; the row has 'prompt', 'chosen', 'rejected'"
            in refused(read_pairs, Jsonl(path, fields={"chosen": "better"}))
        )
        assert "a single row, not counting repetitions; at least 2" in refused(read_pairs, Jsonl(write(pairs(1))))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"heldout": 1.0}, r"heldout must lie in \(0, 1\)"),
            ({"min_tokens": -1}, "min_tokens must lie in"),
            ({"max_tokens": 1}, "max_tokens must lie in"),
            ({"min_tokens": 9, "max_tokens": 8}, "max_tokens=8 must be at least min_tokens=9"),
        ],
    )
    def test_fields_that_cannot_be(self, fields, message):
        with pytest.raises(ValueError, match=message):
            Jsonl("a", **fields)


class TestMixture:
    def test_parts_keep_their_rows_and_hold_out_together(self, write):
        one, other = write(pairs(20), "one.jsonl"), write(pairs(40, 100), "other.jsonl")
        rows = read_pairs(Mixture((Jsonl(one, heldout=0.1), Jsonl(other, heldout=0.1)), weights=(3, 1)))
        assert isinstance(rows.train, Mixed) and rows.train.weights == (3, 1)
        assert [len(part) for part in rows.train.parts] == [18, 36] and len(rows.train) == 54
        assert [row.prompt for row in rows.heldout] == ["p18", "p19", "p136", "p137", "p138", "p139"]
        assert list(rows.train) == [*rows.train.parts[0], *rows.train.parts[1]]
        assert rows.train[-1] == rows.train[53] == rows.train.parts[1][-1] and rows.train[17:19] == [
            rows.train.parts[0][-1],
            rows.train.parts[1][0],
        ]
        with pytest.raises(IndexError):
            rows.train[54]

    def test_what_one_part_holds_out_no_part_trains_on(self, write):
        one, other = write(pairs(20), "one.jsonl"), write(pairs(20)[::-1], "other.jsonl")
        rows = read_pairs(Mixture((Jsonl(one, heldout=0.2), Jsonl(other, heldout=0.2)), weights=(1, 1)))
        assert {row.prompt for row in rows.heldout} == {f"p{i}" for i in (0, 1, 2, 3, 16, 17, 18, 19)}
        assert not {row.prompt for row in rows.train} & {row.prompt for row in rows.heldout}
        assert len(rows.train) == 24 and rows.merged == 8

    @pytest.mark.parametrize("weights", [(1.0,), (1.0, 1.0, 1.0), (1.0, 0.0), (1.0, -1.0), (1.0, float("nan"))])
    def test_weights_must_fit(self, weights):
        with pytest.raises(ValueError, match=r"weights must"):
            Mixture((Jsonl("a"), Jsonl("b")), weights=weights)

    def test_a_wrong_part_is_named(self, write):
        good = Jsonl(write(pairs(5)))
        assert "none.jsonl" in refused(read_pairs, Mixture((good, Jsonl("none.jsonl")), weights=(1, 1)))


class Chats(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Rows of every kind that TFDS stores: texts, labels, numbers, messages."""

    VERSION = tfds.core.Version("1.0.0")
    name = "chats"

    def _info(self):
        message = {"role": tfds.features.Text(), "content": tfds.features.Text()}
        features = {
            "text": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["bad", "good"]),
            "messages": tfds.features.Sequence(message),
            "meta": {"answer": tfds.features.Scalar(dtype=np.int64)},
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(50), "test": self._generate_examples(10, 500)}

    def _generate_examples(self, count, start=0):
        for i in range(start, start + count):
            talk = [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i} ¾"}]
            yield i, {"text": f"t{i}", "label": i % 2, "messages": talk, "meta": {"answer": i}}


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    Chats(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


class TestTFDS:
    def test_texts_with_labels_by_split(self, tfds_dir):
        train, heldout = read_texts(TFDS("chats", split="train[:90%]", heldout="test[:3]", data_dir=tfds_dir))
        assert train == [Text(f"t{i}", i % 2) for i in range(45)]
        assert heldout == [Text(f"t{i}", i % 2) for i in range(500, 503)]

    def test_messages_and_numbers(self, tfds_dir):
        rows = read_examples(TFDS("chats", data_dir=tfds_dir))
        assert rows.train[7].messages[1] == {"role": "assistant", "content": "a7 ¾"}
        prompts = read_prompts(TFDS("chats", data_dir=tfds_dir, fields={"prompt": "text", "answer": "meta.answer"}))
        assert prompts.train[7].prompt == "t7" and prompts.train[7].metadata["answer"] == 7

    def test_without_tensorflow(self):
        assert "tensorflow" not in sys.modules

    def test_a_name_that_tfds_knows_by_mock_data(self):
        with tfds.testing.mock_data(num_examples=60):
            reviews = load_texts(TFDS("imdb_reviews", split="train[:90%]", heldout=0.2))
        assert len(reviews.train) == 43 and len(reviews.validation) == 6 and len(reviews.test) == 5
        assert {review.label for review in reviews.train} == {0, 1} and reviews.train[0].source == "imdb_reviews"

    def test_what_is_wrong_is_one_line(self, tfds_dir, tmp_path):
        message = refused(read_texts, TFDS("chatz", data_dir=tfds_dir))
        assert message == f"TFDS has no data set 'chatz'; {tfds_dir} holds chats"
        message = refused(read_texts, TFDS("chats", split="valid", data_dir=tfds_dir))
        assert message == "chats: no split 'valid'; there are 'train', 'test'"
        message = refused(read_texts, TFDS("imdb_reviews", data_dir=tmp_path))
        assert message.startswith(f"imdb_reviews is not prepared as array_record in {tmp_path}: tfds.builder(")
        assert "chats, split 'train', row 0: no field 'chosen'; the row has" in refused(
            read_pairs, TFDS("chats", data_dir=tfds_dir)
        )


class TestTexts:
    def rows(self, labels):
        return [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)]

    def test_held_out_rows_serve_in_halves_and_mixtures_stay(self, write):
        one, other = write(self.rows([0, 1] * 10), "one.jsonl"), write(self.rows([1, 0] * 20), "other.jsonl")
        source = Mixture((Jsonl(one, heldout=0.2), Jsonl(other, heldout="all[30:]", split="all[:30]")), (1, 2))
        reviews = load_texts(source)
        assert isinstance(reviews.train, Mixed) and [len(part) for part in reviews.train.parts] == [16, 30]
        assert [review.text for review in reviews.validation] == ["t16", "t17", *(f"t{i}" for i in range(30, 35))]
        assert [review.text for review in reviews.test] == ["t18", "t19", *(f"t{i}" for i in range(35, 40))]
        assert reviews.counts.train == 46 and reviews.counts.heldout == 14

    def test_lengths_drop_or_cut(self, write, tokenizer):
        rows = [{"text": "one " * n, "label": n % 2} for n in range(1, 41)]
        size = [len(tokenizer.encode(row["text"])) + 2 for row in rows]
        dropped = load_texts(Jsonl(write(rows), min_tokens=9, max_tokens=30, heldout=0.5), tokenizer)
        kept = [row["text"] for row, n in zip(rows, size, strict=True) if 9 <= n <= 30]
        assert [r.text for r in (*dropped.train, *dropped.validation, *dropped.test)] == kept
        assert dropped.counts.dropped == 40 - len(kept) and dropped.counts.cut == 0
        cut = load_texts(Jsonl(write(rows), max_tokens=30, too_long="cut", heldout=0.5), tokenizer)
        assert cut.counts.dropped == 0 and cut.counts.cut == sum(n > 30 for n in size)
        for review, row, n in zip([*cut.train, *cut.validation, *cut.test], rows, size, strict=True):
            assert row["text"].startswith(review.text) and (review.text == row["text"]) == (n <= 30)
            assert len(tokenizer.encode(review.text)) + 2 <= 30
        assert "no row held out is left that has 1000 to" in refused(
            load_texts, Jsonl(write(rows), min_tokens=1_000), tokenizer
        ).replace("to train on", "held out")

    def test_labels_are_asked_for_where_they_are_needed(self, write):
        plain = Jsonl(write([{"text": f"t{i}"} for i in range(60)]))
        check_texts(plain, labelled=False)
        assert are_texts(plain) and load_texts(plain).train[0].label is None
        assert "line 1: no field 'label'; the row has 'text'" in refused(lambda: check_texts(plain, labelled=True))
        one_sided = Jsonl(write(self.rows([1] * 60), "one.jsonl"))
        assert not are_texts(Jsonl(write(pairs(3), "pairs.jsonl")))
        assert "train rows have one label only" in refused(lambda: check_texts(one_sided, labelled=True))
        check_texts(Jsonl(write(self.rows([0, 1] * 40), "two.jsonl")), labelled=True)
        assert "a single row is held out" in refused(load_texts, Jsonl(write(self.rows([0, 1]), "few.jsonl")))


def test_rows_below_the_least_number_of_a_field_are_left_out(tmp_path):
    path = tmp_path / "scored.jsonl"
    rows = [{"prompt": f"p{i}", "completion": "c", "score": i / 10} for i in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = read_examples(Jsonl(path, least={"score": 0.6}, heldout=0.25))
    assert [row.prompt for row in (*kept.train, *kept.heldout)] == ["p6", "p7", "p8", "p9"]
    with pytest.raises(UserError, match=r"scored.jsonl: least={'score': 2.0}: the largest 'score' is 0.9"):
        read_examples(Jsonl(path, least={"score": 2.0}))
    with pytest.raises(UserError, match="line 1: no field 'grade'"):
        read_examples(Jsonl(path, least={"grade": 2.0}))
