"""Every family against transformers: logits and gradients that `tests/oracles_hf/make_families.py` kept as numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.interop import load_pretrained
from rlhf_jax.interop.families import FAMILIES
from rlhf_jax.interop.hf_export import folder_tensors
from rlhf_jax.logprobs import next_token_logps
from tests.interop.folders import write_case
from tests.oracles_hf.weights import projection, read, tokens

CASES = read()
TOLERANCE = 2e-5  # transformers itself, in float32 and eager, is no closer to float64

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture(params=CASES)
def case(request):
    return request.param


@pytest.fixture
def folder(case, tmp_path):
    return write_case(tmp_path / case, CASES[case])


def mean_logp(spec, params, ids, mask):
    """The mean log-likelihood, and the logits: one program for both."""
    logits = models.logits(spec, params, ids, mask)
    kept = jnp.asarray(mask[:, 1:] & mask[:, :-1])
    logps = next_token_logps(logits, jnp.asarray(ids))[:, 1:]
    return jnp.where(kept, logps, 0).sum() / kept.sum(), logits


def test_logits_and_gradients_are_those_of_transformers(case, folder):
    loaded, want = load_pretrained(folder), CASES[case]
    spec, (ids, mask) = loaded.spec, tokens(case, loaded.spec.vocab_size)
    assert loaded.tokenizer is None
    step = jax.jit(jax.value_and_grad(lambda params: mean_logp(spec, params, ids, mask), has_aux=True))
    (_, logits), gradients = step(loaded.params)
    np.testing.assert_allclose(np.asarray(logits)[mask], want["logits"], atol=TOLERANCE)
    found = dict(folder_tensors(spec, gradients, FAMILIES[want["config"]["model_type"]], with_offset=False))
    for name, gradient in want["gradients"].items():
        np.testing.assert_allclose(found[name], gradient, atol=TOLERANCE, err_msg=name)
    assert set(found) == set(want["projections"])
    for name, two in want["projections"].items():
        np.testing.assert_allclose(projection(case, name, found[name].shape, found[name]), two, atol=TOLERANCE)
