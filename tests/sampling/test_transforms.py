"""Temperature, top-k and top-p against plain NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.sampling import Sampling, transform_logits
from rlhf_jax.sampling.transforms import EXCLUDED

LOGITS = np.random.default_rng(0).normal(size=(5, 30)).astype(np.float32)


def probabilities(logits):
    exps = np.exp(logits - logits.max(-1, keepdims=True))
    return exps / exps.sum(-1, keepdims=True)


def kept(logits, sampling):
    return np.asarray(transform_logits(jnp.asarray(logits), sampling)) > EXCLUDED


@pytest.mark.parametrize("k", [1, 4, 30, 99])
def test_top_k_keeps_the_k_largest(k):
    mask = kept(LOGITS, Sampling(top_k=k))
    for row, logits in zip(mask, LOGITS, strict=True):
        assert set(np.flatnonzero(row)) == set(np.argsort(-logits)[:k])


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p, temperature):
    mask = kept(LOGITS, Sampling(top_p=p, temperature=temperature))
    for row, probs in zip(mask, probabilities(LOGITS / temperature), strict=True):
        order = np.argsort(-probs)
        count = int(np.searchsorted(np.cumsum(probs[order]), p)) + 1
        assert set(np.flatnonzero(row)) == set(order[:count])


def test_top_k_before_top_p():
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    # Among the two best, renormalised to 4/7 and 3/7, the first alone reaches 0.5.
    assert kept(logits, Sampling(top_k=2, top_p=0.5)).tolist() == [True, False, False, False]


def test_default_changes_nothing():
    np.testing.assert_array_equal(transform_logits(jnp.asarray(LOGITS), Sampling()), LOGITS)
    assert not Sampling(temperature=0.7).truncates
    assert Sampling(top_k=3).truncates and Sampling(top_p=0.9).truncates


@pytest.mark.parametrize(
    ("fields", "name"), [({"temperature": 0.0}, "temperature"), ({"top_k": -1}, "top_k"), ({"top_p": 0.0}, "top_p")]
)
def test_bad_fields_are_named(fields, name):
    with pytest.raises(ValueError, match=f"sampling.{name}"):
        Sampling(**fields)
