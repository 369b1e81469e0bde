"""The reviews: all there, disjoint splits that depend on content alone, no HTML."""

import pytest

from rlhf_jax.data.reviews import MovieReviews, clean


def test_splits_are_disjoint_and_whole(reviews):
    splits = [{review.text for review in split} for split in (reviews.train, reviews.validation, reviews.test)]
    assert not (splits[0] & splits[1] or splits[0] & splits[2] or splits[1] & splits[2])
    assert sum(map(len, splits)) > 33_000
    assert 0.06 < len(splits[2]) / 33_400 < 0.09
    assert {review.source for review in reviews.test} == {"imdb", "rotten_tomatoes"}
    assert 0.45 < sum(review.label for review in reviews.train) / len(reviews.train) < 0.55


def test_a_larger_test_split_keeps_its_members(reviews):
    larger = MovieReviews(test_share=0.1).load()
    assert {review.text for review in reviews.test} < {review.text for review in larger.test}


def test_clean():
    assert clean("One.<br /><br />Two  <br>three\n four ") == "One. Two three four"


@pytest.mark.parametrize("shares", [(0.0, 0.1), (0.6, 0.4)])
def test_bad_shares_are_refused(shares):
    with pytest.raises(ValueError, match=r"data\.validation_share"):
        MovieReviews(validation_share=shares[0], test_share=shares[1])
