"""The weights against the probabilities that they promise."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.bench import weights
from rlhf_jax.bench.work import EOS, PAD
from tests.toys import SPEC

SPEC = replace(SPEC, vocab_size=64, d_model=32, head_dim=16, n_layers=2, d_ff=32, scale_embedding=False)

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.mark.parametrize("tied", [True, False])
def test_eos_is_as_probable_as_asked_at_every_token(tied):
    spec = replace(SPEC, tied=tied)
    params = weights.ending(spec, jax.random.key(3), eos=0.1)
    tokens = jax.random.randint(jax.random.key(4), (8, 20), 3, spec.vocab_size)
    logits = models.logits(spec, jax.tree.map(np.asarray, params), tokens)
    probabilities = np.asarray(jax.nn.softmax(logits))
    np.testing.assert_allclose(probabilities[..., EOS].mean(), 0.1, rtol=0.05)
    np.testing.assert_allclose(probabilities[..., EOS], 0.1, rtol=0.5)
    assert probabilities[..., PAD].max() < 1e-9
    assert probabilities[..., 3:].std(axis=(0, 1)).min() > 0  # what was read matters to all others


@pytest.mark.parametrize(("limit", "mean"), [(48, 12), (64, 16), (10, 9.5), (5, 1.2)])
def test_lengths_have_the_mean_that_is_asked(limit, mean):
    p = weights.eos_probability(limit, mean)
    lengths = np.arange(1, limit + 1)
    ends = p * (1 - p) ** (lengths - 1)
    ends[-1] = (1 - p) ** (limit - 1)  # whatever the last token is
    np.testing.assert_allclose(ends.sum(), 1)
    np.testing.assert_allclose(ends @ lengths, mean, rtol=1e-6)
