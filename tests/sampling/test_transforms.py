"""Temperature, top-k and top-p against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.sampling import Sampling, transform_logits
from rlhf_jax.sampling.transforms import EXCLUDED, draw_token

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


@pytest.mark.parametrize("v", [2, 7, 64, 100, 4096])
def test_drawn_tokens_follow_the_softmax(v):
    logits = jnp.asarray(np.random.default_rng(v).normal(size=v) * 2, jnp.float32).at[v // 2].set(EXCLUDED)
    n = 40_000
    keys = jax.random.split(jax.random.key(0), n)
    drawn = np.asarray(jax.jit(jax.vmap(draw_token, in_axes=(0, None)))(keys, logits))
    observed, expected = np.bincount(drawn, minlength=v), n * np.asarray(jax.nn.softmax(logits), np.float64)
    assert len(observed) == v and observed[v // 2] == 0
    common = expected > 5
    chi_square = ((observed - expected)[common] ** 2 / expected[common]).sum()
    assert chi_square < common.sum() + 5 * np.sqrt(2 * common.sum())


def test_rounding_hardly_ever_changes_a_draw():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.standard_normal(4096) * 3, jnp.float32)
    keys = jax.random.split(jax.random.key(0), 20_000)
    draw = jax.jit(lambda logits: jax.lax.map(lambda key: draw_token(key, logits), keys, batch_size=64))
    rounded = logits + jnp.asarray(rng.standard_normal(4096) * 5e-6, jnp.float32)
    assert int((draw(logits) != draw(rounded)).sum()) <= 1  # by one uniform number for the whole vocabulary: 9


@pytest.mark.parametrize("v", [1, 3, 50])
def test_a_certain_token_is_always_drawn(v):
    for token in {0, v // 2, v - 1}:
        logits = jnp.full(v, EXCLUDED).at[token].set(-7.0)
        keys = jax.random.split(jax.random.key(1), 200)
        assert set(np.asarray(jax.vmap(draw_token, in_axes=(0, None))(keys, logits)).tolist()) == {token}
