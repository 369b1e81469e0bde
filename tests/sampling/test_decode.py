"""Decoding: what it records is what a plain forward pass says, it ends where it should, rows are on their own."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models, sharding
from rlhf_jax.logprobs import next_token_logps
from rlhf_jax.models import ModelSpec
from rlhf_jax.plan import hlo
from rlhf_jax.plan.collectives import collectives
from rlhf_jax.sampling import Sampling, ended, generate
from rlhf_jax.sharding import MeshConfig, make_mesh

pytestmark = pytest.mark.usefixtures("compile_quickly")

EOS, PAD = 3, 0
SPEC = ModelSpec(vocab_size=40, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48, max_len=32)


@pytest.fixture(scope="module")
def params():
    return sharding.unbox(models.init(SPEC, jax.random.key(0)))


def prompts(b=8, p=6):
    rng = np.random.default_rng(1)
    tokens = rng.integers(4, SPEC.vocab_size, (b, p)).astype(np.int32)
    mask = np.arange(p) >= rng.integers(0, p - 1, b)[:, None]  # left padding of every length
    return np.where(mask, tokens, PAD), mask


def sampler(spec, sampling=None, new=12):
    fixed = {"max_new_tokens": new, "sampling": sampling or Sampling(), "eos_id": EOS, "pad_id": PAD}
    return jax.jit(partial(generate, spec, **fixed))


def sample(params, tokens, mask, key=7, *, spec=SPEC, sampling=None, new=12):
    return sampler(spec, sampling, new)(params, tokens, mask, jax.random.key(key))


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("window", [None, 4])
def test_recorded_logps_are_those_of_the_training_forward(params, temperature, window):
    spec = ModelSpec(**{**vars(SPEC), "window": window})
    rollout = sample(params, *prompts(), spec=spec, sampling=Sampling(temperature=temperature))
    logits = models.logits(spec, params, rollout.tokens, rollout.mask)
    expected = jnp.where(rollout.completion_mask, next_token_logps(logits, rollout.tokens, temperature=temperature), 0)
    np.testing.assert_allclose(rollout.logps, expected, atol=1e-5)
    assert float(jnp.abs(rollout.logps).sum()) > 1


def test_rows_end_with_eos_and_hold_pad_after_it(params):
    rollout = sample(params, *prompts(b=64), new=20)
    tokens, mask = np.asarray(rollout.tokens)[:, 6:], np.asarray(rollout.completion_mask)[:, 6:]
    has_ended = np.asarray(ended(rollout, EOS))
    assert 0 < has_ended.sum() < 64
    for row, kept, done in zip(tokens, mask, has_ended, strict=True):
        length = kept.sum()
        assert kept[:length].all() and (row[length:] == PAD).all()
        assert (row[length - 1] == EOS) == done and (row[: length - 1] != EOS).all()
        assert done or length == 20
    np.testing.assert_array_equal(np.asarray(rollout.tokens)[:, :6], prompts(b=64)[0])


def test_a_row_does_not_depend_on_the_rest_of_the_batch(params):
    tokens, mask = prompts(b=8)
    whole, part = sample(params, tokens, mask), sample(params, tokens[:3], mask[:3])
    np.testing.assert_array_equal(whole.tokens[:3], part.tokens)
    assert not np.array_equal(whole.tokens[0, 6:], sample(params, tokens, mask, key=8).tokens[0, 6:])


def test_first_token_follows_the_models_distribution(params):
    tokens, mask = (np.repeat(x[:1], 4096, axis=0) for x in prompts())
    rollout = sample(params, tokens, mask, sampling=Sampling(temperature=1.5), new=1)
    expected = jax.nn.softmax(models.logits(SPEC, params, tokens[:1], mask[:1])[0, -1] / 1.5)
    observed = np.bincount(np.asarray(rollout.tokens)[:, 6], minlength=SPEC.vocab_size) / 4096
    chi_square = 4096 * np.sum((observed - expected) ** 2 / expected)
    assert chi_square < SPEC.vocab_size - 1 + 5 * np.sqrt(2 * (SPEC.vocab_size - 1))


def test_stops_when_all_rows_have_ended(params, monkeypatch):
    """The steps that really ran are counted inside the compiled loop."""
    ran = []
    extend = models.extend

    def counting(spec, params, tokens, mask, cache):
        jax.debug.callback(lambda: ran.append(tokens.shape[1]))
        return extend(spec, params, tokens, mask, cache)

    monkeypatch.setattr(models, "extend", counting)
    rollout = sample(params, *prompts(b=1), key=11, sampling=Sampling(temperature=3.0), new=26)
    jax.effects_barrier()
    longest = int(rollout.completion_mask.sum(-1).max())
    assert ran == [1] * longest  # after the prompt, which `prefill` reads, as many tokens as the longest row has
    assert longest < 26  # so that it did stop early


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=1, fsdp=2, pipeline=2, tensor=2),
        MeshConfig(data=1, fsdp=2, pipeline=2, tensor=2, decode="split"),
        MeshConfig(data=2, fsdp=2, sequence=2, decode="split"),
    ],
    ids=["gathered", "split with stages", "split"],
)
def test_a_mesh_samples_what_one_device_does_and_moves_no_weights_at_a_token(params, mesh):
    config, mesh = mesh, make_mesh(mesh)
    layout = sharding.shardings(mesh, jax.eval_shape(partial(models.init, SPEC), jax.random.key(0)))
    alone = sample(params, *prompts())
    with sharding.scope(mesh):
        inputs = (jax.device_put(params, layout), *sharding.shard_batch(mesh, prompts()), jax.random.key(7))
        program = sampler(SPEC).lower(*inputs).compile()
        spread = program(*inputs)
    np.testing.assert_array_equal(alone.tokens, spread.tokens)
    np.testing.assert_allclose(alone.logps, spread.logps, atol=1e-5)
    assert len(spread.tokens.sharding.device_set) == 8
    each_token = [one for one in collectives(hlo.parse(program.as_text()), mesh) if one.times >= 12]
    # What a gather of the smallest kernel, of keys or values, over the four devices that split it would send.
    smallest = 3 / 4 * 4 * 32 * 2 * 8 / config.tensor
    assert all(one.bytes < smallest for one in each_token if one.kind == "all-gather")
    if config.decode == "gathered":
        assert {axis for one in each_token for axis in one.axes} == {"tensor"}
