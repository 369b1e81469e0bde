"""Log-probs of tokens, the one shift between logits and tokens, and an entropy that is never negative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.logprobs import (
    entropy,
    entropy_from_hidden,
    from_hidden,
    next_token_logps,
    ratio_deviation,
    sequence_logps,
    token_logps,
)
from tests.properties import Case, Properties, mask_of, normal


def tokens(rng, lead):
    return rng.integers(0, 6, (*lead, 5))


# Shared by all rows, and exact in half precision. Its own gradients are in test_from_hidden.py.
UNEMBEDDING = np.random.default_rng(0).integers(-4, 5, (3, 6)).astype(np.float32) / 4
HEAD = {"scalars": {"temperature": 0.7, "softcap": 3.0}, "static": {"unembedding": UNEMBEDDING, "chunk": 4}}


class TestProperties(Properties):
    cases = (
        Case(token_logps, normal("logits", shape=(5, 6), tokens=tokens), scalars={"temperature": 0.7}),
        Case(next_token_logps, normal("logits", shape=(5, 6), tokens=tokens), {"temperature": 0.7}, aligned=False),
        Case(entropy, normal("logits", shape=(5, 6)), scalars={"temperature": 0.7}),
        Case(from_hidden, normal("hidden", shape=(5, 3), tokens=tokens), **HEAD),
        Case(entropy_from_hidden, normal("hidden", shape=(5, 3)), **HEAD),
        Case(sequence_logps, normal("logps", mask=mask_of())),
        Case(ratio_deviation, normal("logps", "old_logps"), rowwise=False, aligned=False),
    )


def test_token_logps_of_known_probabilities():
    logits = np.log(np.float32([[0.25, 0.75], [0.5, 0.5]])) + 3  # a constant changes nothing
    np.testing.assert_allclose(token_logps(logits, np.array([1, 0])), np.log([0.75, 0.5]), rtol=1e-6)
    # Temperature ½ squares the odds: 0.75² / (0.75² + 0.25²) = 0.9.
    np.testing.assert_allclose(token_logps(logits[0], np.array(1), temperature=0.5), np.log(0.9), rtol=1e-6)


def test_the_log_probs_of_all_tokens_are_a_distribution():
    logits = np.random.default_rng(0).normal(size=6).astype(np.float32) * 5
    every = token_logps(np.tile(logits, (6, 1)), np.arange(6))
    np.testing.assert_allclose(np.exp(every).sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(every, jax.nn.log_softmax(logits), rtol=1e-5)


def test_logits_predict_the_next_token_and_the_first_is_predicted_by_nothing():
    p = np.float32([[0.1, 0.2, 0.7], [0.3, 0.3, 0.4], [0.8, 0.1, 0.1]])
    logps = next_token_logps(np.log(p), np.array([1, 2, 0]))
    np.testing.assert_allclose(logps, [0, np.log(0.7), np.log(0.3)], rtol=1e-5)


def test_the_last_logits_and_the_first_token_are_not_read():
    rng = np.random.default_rng(0)
    logits, ids = rng.normal(size=(2, 4, 6)).astype(np.float32), rng.integers(0, 6, (2, 4))
    spoilt, other = logits.copy(), ids.copy()
    spoilt[:, -1], other[:, 0] = np.nan, (other[:, 0] + 1) % 6
    np.testing.assert_array_equal(next_token_logps(spoilt, other), next_token_logps(logits, ids))


def test_garbage_logits_reach_no_other_token():
    rng = np.random.default_rng(0)
    logits, ids = rng.normal(size=(2, 5, 6)).astype(np.float32), rng.integers(0, 6, (2, 5))
    mask = np.array([[False, False, True, True, True], [False, True, True, False, False]])
    predicts_a_kept_token = np.pad(mask[:, 1:], ((0, 0), (0, 1)))

    @jax.jit
    @jax.value_and_grad
    def total(x):
        return jnp.where(mask, next_token_logps(x, ids), 0).sum()

    spoilt = np.where(predicts_a_kept_token[..., None], logits, np.float32(3e4))
    value, gradient = jax.device_get(total(spoilt))
    expected = jax.device_get(total(logits))
    assert value == expected[0]
    np.testing.assert_array_equal(gradient, expected[1])
    assert not gradient[~predicts_a_kept_token].any()


def test_a_row_of_one_token_has_nothing_to_score():
    assert next_token_logps(np.zeros((2, 1, 6), np.float32), np.zeros((2, 1), int)).tolist() == [[0], [0]]


def test_entropy_of_known_distributions():
    logits = np.log(np.float32([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 1e-30, 1e-30]]))
    np.testing.assert_allclose(entropy(logits), np.log([4, 2]), rtol=1e-6)
    # At temperature 2 the odds 9 : 1 become 3 : 1.
    h = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    np.testing.assert_allclose(entropy(np.log(np.float32([0.9, 0.1])), temperature=2.0), h, rtol=1e-6)


def test_entropy_is_never_negative_nor_above_log_v():
    rng = np.random.default_rng(0)
    for scale in (0, 1e-6, 1, 30, 1e4):
        h = entropy((rng.normal(size=(500, 7)) * scale).astype(np.float32))
        assert h.min() >= 0 and h.max() <= np.log(7) * (1 + 1e-6)
    assert entropy(np.float32([1e4, 0, 0])) == 0


def test_tokens_of_probability_zero_add_nothing_to_entropy_or_its_gradient():
    logits = jnp.array([0.3, -0.2, -jnp.inf])
    np.testing.assert_allclose(entropy(logits), entropy(logits[:2]), rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda x: entropy(x).sum()))
    np.testing.assert_allclose(gradient(logits), [*gradient(logits[:2]), 0], rtol=1e-5, atol=1e-7)


def test_entropy_is_minus_the_expected_log_prob():
    logits = np.random.default_rng(0).normal(size=6).astype(np.float32)
    logps = token_logps(np.tile(logits, (6, 1)), np.arange(6))
    np.testing.assert_allclose(entropy(logits), -np.sum(np.exp(logps) * logps), rtol=1e-6)


def test_ids_outside_the_vocabulary_give_nan_and_no_other_number():
    logps = token_logps(np.zeros((5, 3), np.float32), np.array([-1, -3, 3, 99, 2]))
    assert np.isnan(logps[:4]).all() and logps[4] == pytest.approx(-np.log(3))


def test_sequence_logps_sum_the_kept_tokens():
    logps = np.float32([[-1, -2, -4], [-8, -16, -32]])
    mask = np.array([[False, True, True], [False, False, False]])
    assert sequence_logps(logps, mask).tolist() == [-6, 0]


def test_ratio_deviation_is_the_largest_either_way():
    old = np.log(np.float32([[0.5, 0.2], [0.4, 1.0]]))
    np.testing.assert_allclose(ratio_deviation(old + np.log(np.float32([[1.1, 0.7], [1, 1]])), old), 0.3, rtol=1e-5)
    assert ratio_deviation(old, old) == 0 and ratio_deviation(old[:0], old[:0]) == 0
    np.testing.assert_allclose(ratio_deviation(old + np.float32(1e-6), old), 1e-6, rtol=0.1)


@pytest.mark.parametrize("fn", [token_logps, next_token_logps])
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_must_be_positive(fn, temperature):
    with pytest.raises(ValueError, match="temperature"):
        fn(np.zeros((2, 6), np.float32), np.zeros(2, int), temperature=temperature)
    with pytest.raises(ValueError, match="temperature"):
        entropy(np.zeros((2, 6), np.float32), temperature=temperature)
