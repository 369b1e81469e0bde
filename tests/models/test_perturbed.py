"""A policy that values perturb: what it samples is what it scores, by hand too, on every mesh."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models, sharding
from rlhf_jax.evals.policy import rollout_logps
from rlhf_jax.models import ModelSpec, Perturbed
from rlhf_jax.models.perturbed import init_heads, q_values, state_values
from rlhf_jax.sampling import Sampling, generate
from rlhf_jax.sharding import MeshConfig, make_mesh

pytestmark = pytest.mark.usefixtures("compile_quickly")

EOS, PAD = 3, 0
SPEC = ModelSpec(vocab_size=40, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48, max_len=32)


def random_like(tree, seed, size):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.asarray(size * rng.normal(size=x.shape), np.float32), tree)


@pytest.fixture(scope="module")
def plain():
    return sharding.unbox(models.init(SPEC, jax.random.key(0)))


@pytest.fixture(scope="module")
def heads():
    return random_like(sharding.unbox(init_heads(SPEC, jax.random.key(1), heads=2)), 1, 0.3)


def prompts(b=8, p=6):
    rng = np.random.default_rng(1)
    tokens = rng.integers(4, SPEC.vocab_size, (b, p)).astype(np.int32)
    mask = np.arange(p) >= rng.integers(0, p - 1, b)[:, None]
    return np.where(mask, tokens, PAD), mask


def sampler(temperature=1.0):
    fixed = {"max_new_tokens": 8, "sampling": Sampling(temperature), "eos_id": EOS, "pad_id": PAD}
    return jax.jit(partial(generate, SPEC, **fixed))


def at(plain, heads, beta):
    return Perturbed(plain, heads, jnp.float32(beta))


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def by_hand(plain, heads, tokens, mask, beta):
    """log π + β (min Q − V) in NumPy, of hidden states."""
    states = np.asarray(models.hidden(SPEC, plain, tokens, mask), np.float64)
    logits = states @ np.asarray(plain["embedding"], np.float64).T
    q, v = heads["q"], heads["v"]
    each = [
        np.maximum(states @ q["hidden"][h] + q["hidden_bias"][h], 0) @ q["out"][h] + q["out_bias"][h] for h in (0, 1)
    ]
    value = np.maximum(states @ v["hidden"] + v["hidden_bias"], 0) @ v["out"] + v["out_bias"]
    return log_softmax(logits) + beta * (np.minimum(*each) - value[..., None])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_logps_are_those_of_a_whole_forward_pass_and_of_the_formula(plain, heads, temperature):
    policy = at(plain, heads, 3.0)
    rollout = sampler(temperature)(policy, *prompts(), jax.random.key(7))
    scored = rollout_logps(SPEC, policy, rollout, temperature=temperature)
    np.testing.assert_allclose(rollout.logps, scored, atol=1e-4)
    logps = log_softmax(by_hand(plain, heads, rollout.tokens, rollout.mask, 3.0) / temperature)
    expected = np.take_along_axis(logps[:, :-1], np.asarray(rollout.tokens)[:, 1:, None], -1)[..., 0]
    mask = np.asarray(rollout.completion_mask)[:, 1:]
    np.testing.assert_allclose(np.asarray(rollout.logps)[:, 1:][mask], expected[mask], atol=1e-4)
    behaviour = rollout_logps(SPEC, plain, rollout, temperature=temperature)
    assert np.abs(behaviour - rollout.logps).max() > 0.5  # so that values do matter here


def test_without_values_or_at_beta_0_it_is_the_plain_policy(plain, heads):
    sample, inputs = sampler(), (*prompts(), jax.random.key(7))
    alone = sample(plain, *inputs)
    fresh = sharding.unbox(init_heads(SPEC, jax.random.key(1), heads=2))
    for policy in (at(plain, heads, 0.0), at(plain, fresh, 5.0)):
        same = sample(policy, *inputs)
        np.testing.assert_array_equal(alone.tokens, same.tokens)
        np.testing.assert_allclose(alone.logps, same.logps, atol=1e-5)
    assert not np.array_equal(alone.tokens, sample(at(plain, heads, 5.0), *inputs).tokens)


def test_values_are_of_every_token_and_every_state(plain, heads):
    states = np.random.default_rng(0).normal(size=(2, 3, SPEC.d_model)).astype(np.float32)
    q, v = q_values(heads["q"], states), state_values(heads["v"], states)
    assert q.shape == (2, 3, 2, SPEC.vocab_size) and v.shape == (2, 3) and q.dtype == v.dtype == jnp.float32
    low = q_values(heads["q"], jnp.asarray(states, jnp.bfloat16))
    assert low.dtype == jnp.float32 and float(jnp.abs(low - q).max()) < 0.1


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(data=1, fsdp=2, pipeline=2, tensor=2), MeshConfig(data=1, fsdp=4, tensor=2, decode="split")],
    ids=["gathered", "split"],
)
def test_a_mesh_samples_what_one_device_does(plain, heads, mesh):
    alone = sampler()(at(plain, heads, 3.0), *prompts(), jax.random.key(7))
    mesh = make_mesh(mesh)
    shapes = (partial(models.init, SPEC), partial(init_heads, SPEC, heads=2))
    layouts = [sharding.shardings(mesh, jax.eval_shape(init, jax.random.key(0))) for init in shapes]
    with sharding.scope(mesh):
        policy = at(jax.device_put(plain, layouts[0]), jax.device_put(heads, layouts[1]), 3.0)
        assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(policy.heads))
        spread = sampler()(policy, *sharding.shard_batch(mesh, prompts()), jax.random.key(7))
    np.testing.assert_array_equal(alone.tokens, spread.tokens)
    np.testing.assert_allclose(alone.logps, spread.logps, atol=1e-5)
