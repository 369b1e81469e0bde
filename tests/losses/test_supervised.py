"""Cross-entropy of known probabilities."""

import numpy as np

from rlhf_jax.logprobs import token_logps
from rlhf_jax.losses.supervised import cross_entropy, weighted_cross_entropy
from rlhf_jax.masking import token_mean
from tests.properties import Case, Properties, normal


class TestProperties(Properties):
    cases = (
        Case(cross_entropy, normal("logps")),
        Case(weighted_cross_entropy, normal("logps", "weights")),
    )


def test_golden_values():
    loss, diagnostics = cross_entropy(np.log(np.float32([0.25, 1.0])))
    np.testing.assert_allclose(loss, [2 * np.log(2), 0], rtol=1e-6)
    assert diagnostics == {}


def test_uniform_logits_cost_log_v():
    logps = token_logps(np.zeros((3, 7), np.float32), np.array([0, 3, 6]))
    np.testing.assert_allclose(cross_entropy(logps)[0], np.log(7), rtol=1e-6)


def test_weights_multiply_and_ones_change_nothing():
    logps, weights = np.log(np.float32([0.25, 0.5, 0.1])), np.float32([2, 0.5, 0])
    loss, diagnostics = weighted_cross_entropy(logps, weights)
    np.testing.assert_allclose(loss, [4 * np.log(2), 0.5 * np.log(2), 0], rtol=1e-6)
    np.testing.assert_array_equal(weighted_cross_entropy(logps, np.ones(3, np.float32))[0], cross_entropy(logps)[0])
    mask = np.ones(3, bool)
    average = token_mean(loss, mask).value / token_mean(diagnostics["weight"], mask).value
    np.testing.assert_allclose(average, np.average(-logps, weights=weights), rtol=1e-6)
