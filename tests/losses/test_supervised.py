"""Cross-entropy of known probabilities."""

import numpy as np

from rlhf_jax.logprobs import token_logps
from rlhf_jax.losses.supervised import cross_entropy
from tests.properties import Case, Properties, normal


class TestProperties(Properties):
    cases = (Case(cross_entropy, normal("logps")),)


def test_golden_values():
    loss, diagnostics = cross_entropy(np.log(np.float32([0.25, 1.0])))
    np.testing.assert_allclose(loss, [2 * np.log(2), 0], rtol=1e-6)
    assert diagnostics == {}


def test_uniform_logits_cost_log_v():
    logps = token_logps(np.zeros((3, 7), np.float32), np.array([0, 3, 6]))
    np.testing.assert_allclose(cross_entropy(logps)[0], np.log(7), rtol=1e-6)
