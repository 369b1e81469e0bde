"""Sampling equals scoring, for every family: what is recorded with a cache is what the training pass says."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.interop import load_pretrained
from rlhf_jax.interop.families import FAMILIES
from rlhf_jax.logprobs import next_token_logps
from rlhf_jax.sampling import Sampling, generate
from tests.interop.folders import write_case
from tests.oracles_hf.weights import read

CASES = read()
PICKED = {
    "gpt2-a": {},
    "gpt_neox-a": {},
    "llama-b": {"rope_scaling"},
    "mistral-a": {"window"},
    "qwen2-b": {"window", "local_layers"},
    "qwen3-c": {"window", "local_layers", "qk_norm"},
    "gemma-b": {"scale_embedding"},
    "gemma2-a": {"window", "local_layers", "attention_softcap", "logits_softcap"},
    "gemma3_text-b": {"window", "local_rope_theta", "logits_softcap", "rope_scaling"},
    "mixtral-a": {"window", "experts"},
    "qwen3_moe-b": {"experts"},
}
"""A case of each family, and what must be on in it for the test to be one."""

PROMPT, NEW = 6, 9  # every window is shorter than the row


def test_every_family_is_there():
    assert {CASES[case]["config"]["model_type"] for case in PICKED} == set(FAMILIES) - {"gemma3"}


@pytest.mark.usefixtures("compile_quickly")
@pytest.mark.parametrize("case", PICKED)
def test_recorded_logps_are_those_of_the_training_pass(case, tmp_path):
    loaded = load_pretrained(write_case(tmp_path / case, CASES[case]))
    spec, params = loaded.spec, loaded.params
    assert all(vars(spec)[name] for name in PICKED[case])
    assert spec.window is None or spec.window < PROMPT
    rng = np.random.RandomState(0)
    mask = np.arange(PROMPT) >= np.arange(PROMPT)[:, None]  # left padding of 0 to 5 tokens
    prompts = np.where(mask, rng.randint(2, spec.vocab_size, mask.shape), 0)
    sampling = Sampling(temperature=0.7)
    sample = partial(generate, spec, max_new_tokens=NEW, sampling=sampling, eos_id=1, pad_id=0)
    rollout = jax.jit(sample)(params, prompts, mask, jax.random.key(3))
    logits = jax.jit(partial(models.logits, spec))(params, rollout.tokens, rollout.mask)
    expected = next_token_logps(logits, rollout.tokens, temperature=sampling.temperature)
    assert np.asarray(rollout.completion_mask).sum() > 2 * len(prompts)
    deviation = jnp.abs(jnp.where(rollout.completion_mask, rollout.logps - expected, 0)).max()
    print(case, float(deviation))
    assert deviation < 1e-4
