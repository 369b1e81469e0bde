"""The gold classifier: judges unseen sentences, is fitted once, and a damaged cache is no more than a lost one."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from rlhf_jax.data.reviews import MovieReviews, Review, Reviews
from rlhf_jax.errors import UserError
from rlhf_jax.rewards import sentiment
from rlhf_jax.rewards.lexical import Sentiment
from rlhf_jax.rewards.sentiment import GoldClassifier, vader


@pytest.fixture(scope="module")
def sentences():
    """Rotten Tomatoes sentences: 2,400 to fit on, the held-out ones to judge."""
    reviews = MovieReviews().load()
    train, test = (
        [review for review in split if review.source == "rotten_tomatoes"] for split in (reviews.train, reviews.test)
    )
    return train[::3], test  # every third: the file has all positive ones first


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "rlhf_jax" / "gold"


@pytest.fixture
def fits(monkeypatch):
    """Counts the fits."""
    made, fit = [], sentiment._fit

    def counted(*arguments):
        made.append(1)
        return fit(*arguments)

    monkeypatch.setattr(sentiment, "_fit", counted)
    return made


def toy(copies=4):
    texts = [("a good fine film", 1), ("good and fine", 1), ("a bad dull film", 0), ("bad and dull", 0)]
    return [Review(f"{text} {name}", label, "imdb") for text, label in texts for name in "xyz" for _ in range(copies)]


def test_unseen_sentences_are_told_apart(cache, sentences):
    train, test = sentences
    scores = GoldClassifier.fit(train)([review.text for review in test])
    labels = np.asarray([review.label for review in test])
    assert scores.dtype == np.float32 and scores.shape == (len(test),)
    assert scores.min() >= 0 and scores.max() <= 1
    # Of two sentences of opposite label; 0.77 from 2,400 sentences alone, 0.86 and more from all reviews.
    assert (scores[labels == 1][:, None] > scores[labels == 0][None]).mean() > 0.74
    assert abs(scores.mean() - labels.mean()) < 0.06  # neither kind sight


def test_good_words_raise_and_bad_words_lower(cache):
    gold = GoldClassifier.fit(toy())
    good, neutral, bad, unknown, empty = gold(["good fine", "a film", "bad dull", "zebra", ""])
    assert good > 0.7 > neutral > 0.3 > bad
    assert unknown == empty == pytest.approx(0.5, abs=0.05)  # nothing but the prior
    assert gold([]).shape == (0,)


def test_a_text_is_judged_the_same_in_any_company(cache, sentences):
    train, test = sentences
    gold, texts = GoldClassifier.fit(train), [review.text for review in test[:64]]
    together = gold(texts)
    np.testing.assert_array_equal(gold(texts[::-1])[::-1], together)
    np.testing.assert_array_equal(np.concatenate([gold([text]) for text in texts]), together)


def test_fitted_once_and_read_back_bit_for_bit(cache, fits, sentences):
    train, test = sentences
    texts = [review.text for review in test]
    first, again = GoldClassifier.fit(train), GoldClassifier.fit(tuple(train))
    assert len(fits) == 1 and [path.suffix for path in cache.iterdir()] == [".gold"]
    np.testing.assert_array_equal(first(texts), again(texts))


def test_other_texts_or_labels_are_another_fit(cache, fits):
    reviews = toy()
    GoldClassifier.fit(reviews)
    relabelled = [Review(r.text, 1 - r.label, r.source) for r in reviews]
    assert GoldClassifier.fit(relabelled)(["good fine"]) < 0.5
    GoldClassifier.fit([*reviews, Review("one more", 1, "imdb")])
    assert len(fits) == 3 and len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "other"])
def test_a_damaged_file_is_fitted_again(cache, fits, damage):
    expected = GoldClassifier.fit(toy())(["a good film"])
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    places = range(0, len(whole), len(whole) // 20)
    for at in places:
        flipped = whole[:at] + bytes([whole[at] ^ 0x5A]) + whole[at + 1 :]
        path.write_bytes({"empty": b"", "cut": whole[:at], "flipped": flipped, "other": b"no archive"}[damage])
        np.testing.assert_array_equal(GoldClassifier.fit(toy())(["a good film"]), expected)
    assert len(fits) == 1 + len(places)
    np.testing.assert_array_equal(GoldClassifier.fit(toy())(["a good film"]), expected)
    assert len(fits) == 1 + len(places)  # what was written in its place is whole


def test_fits_at_once_agree(cache):
    with ThreadPoolExecutor(4) as pool:
        fitted = list(pool.map(lambda _: GoldClassifier.fit(toy()), range(8)))
    assert len({float(gold(["a good film"])[0]) for gold in fitted}) == 1
    assert [path.suffix for path in cache.iterdir()] == [".gold"]


@pytest.mark.parametrize("reviews", [[], [review for review in toy() if review.label]])
def test_one_kind_of_review_is_refused(cache, reviews):
    with pytest.raises(UserError, match="the gold classifier needs positive and negative reviews"):
        GoldClassifier.fit(reviews)


def test_vader_reads_its_papers_examples():
    scores = vader(["VADER is smart, handsome, and funny.", "The book was good.", "Today SUX!", ""])
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, [0.8316, 0.4404, -0.5461, 0], atol=1e-4)


@dataclasses.dataclass(frozen=True)
class FewReviews(MovieReviews):
    """Those of `toy`."""

    def load(self):
        return Reviews(tuple(toy()), (), ())


def test_as_a_reward_it_reads_prompt_and_completion(cache, fits):
    reward = Sentiment(FewReviews())
    reward.check_inputs()
    reward.prepare()
    scores = reward(["a good", "a bad", "a"], [" fine film", " dull film", " film"], [{}] * 3)
    wanted = GoldClassifier.fit(toy())(["a good fine film", "a bad dull film", "a film"])
    assert scores == wanted.tolist() and scores[0] > 0.7 > scores[2] > 0.3 > scores[1]
    assert len(fits) == 1
    with pytest.raises(ValueError, match="seconds"):
        Sentiment(seconds=0)
