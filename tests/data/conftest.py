"""A small tokenizer trained on real reviews."""

import pytest

from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.interop.tokenizers import train_sentencepiece


@pytest.fixture(scope="session")
def reviews():
    return MovieReviews().load()


@pytest.fixture(scope="session")
def tokenizer(reviews):
    return train_sentencepiece((review.text for review in reviews.train[::40]), vocab_size=600)
