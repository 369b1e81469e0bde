"""Keys and values in 8 bits: what they are, what they cost, how far log-probs are from those of a plain cache."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models, sharding
from rlhf_jax.interop import Bundled
from rlhf_jax.logprobs import next_token_logps
from rlhf_jax.models import ModelSpec, kv_cache
from rlhf_jax.models.layers import attend_cache
from rlhf_jax.sampling import Sampling, Turns, generate
from rlhf_jax.sharding import MeshConfig, make_mesh

pytestmark = pytest.mark.usefixtures("compile_quickly")

SPEC = ModelSpec(vocab_size=48, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48, max_len=32)
INT8 = Sampling(temperature=1.3, cache="int8")


def entries(*, dtype=jnp.float32, slots=6, layers=2):
    """Those of two tokens, in layer 1 from slot 3 on, and the tokens' own."""
    new = jax.random.normal(jax.random.key(0), (3, 2, 2, 8), dtype)
    spec = ModelSpec(**{**vars(SPEC), "n_layers": layers, "dtype": jnp.dtype(dtype).name})
    return kv_cache.written(kv_cache.init_cache(spec, 3, slots, "int8").keys, new.at[0, 0, 0].set(0), 1, 3), new


def test_an_entry_is_off_by_half_a_step_at_most():
    stored, new = entries()
    new = np.asarray(new).copy()
    new[0, 0, 0] = 0
    wide = np.asarray(stored.codes, np.float32) * np.asarray(stored.scale)[..., None]
    step = np.abs(new).max(-1, keepdims=True) / 127
    assert (np.abs(wide[1, :, :, 3:5] - new) <= 0.501 * step).all() and np.abs(wide[1, :, :, 3:5] - new).max() > 0
    assert not wide[0].any() and not wide[1, :, :, :3].any() and not wide[1, :, :, 5].any()
    assert np.isfinite(wide).all() and np.abs(np.asarray(stored.codes)).max() == 127


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_attention_reads_what_wide_entries_would_say(softcap):
    spec = ModelSpec(**{**vars(SPEC), "attention_softcap": softcap})
    stored, _ = entries()
    keys = kv_cache.of_layer(stored, 1)
    values = keys.replace(codes=keys.codes[::-1], scale=2 * keys.scale[::-1])
    queries = jax.random.normal(jax.random.key(1), (3, 2, 4, 8))
    seen = jnp.arange(6) < jnp.asarray([4, 5])[:, None]
    wide = [x.codes * x.scale[..., None] for x in (keys, values)]
    seen = jnp.broadcast_to(seen, (3, 2, 6))
    np.testing.assert_allclose(
        attend_cache(spec, queries, keys, values, seen), attend_cache(spec, queries, *wide, seen), atol=1e-6
    )


@pytest.mark.parametrize(("dtype", "share"), [("float32", 36 / 128), ("bfloat16", 36 / 64)])
def test_the_cache_has_a_byte_an_entry_and_four_a_head_and_slot(dtype, share):
    spec = ModelSpec(n_layers=3, n_kv_heads=4, head_dim=32, dtype=dtype)
    plain, small = (
        sum(x.nbytes for x in jax.tree.leaves((cache.keys, cache.values)))
        for cache in (models.init_cache(spec, 5, 7, kind) for kind in ("model", "int8"))
    )
    assert small == 2 * 3 * 5 * 4 * 7 * (32 + 4) == share * plain


def test_no_array_of_the_whole_cache_is_wide():
    """Of a step's program: in 8 bits there is every entry, and in more than that at most one layer's."""
    spec, rows = ModelSpec(**{**vars(SPEC), "n_layers": 4}), 24
    cache = models.init_cache(spec, rows, 16, "int8")
    params = sharding.unbox(models.init(spec, jax.random.key(0)))
    step = jax.jit(partial(models.extend, spec))
    one = jnp.zeros((rows, 1), jnp.int32), jnp.ones((rows, 1), bool)
    jaxpr = str(jax.make_jaxpr(step)(params, *one, cache))
    whole, layer = f"[4,{rows},2,16,8]", f"[{rows},2,16,8]"
    assert f"i8{whole}" in jaxpr and f"f32{whole}" not in jaxpr and f"f32{layer}" in jaxpr


def written(params, *, mesh=None, spec=SPEC, sampling=INT8, **options):
    rng = np.random.default_rng(0)
    prompts = np.repeat(rng.integers(3, 48, (8, 6)), 2, axis=0)
    mask = np.arange(6) >= np.repeat(rng.integers(0, 5, (8, 1)), 2, axis=0)
    fixed = {"max_new_tokens": 10, "sampling": sampling, "eos_id": 1, "pad_id": 0}
    program = jax.jit(partial(generate, spec, **fixed, **options))
    if mesh is None:
        return jax.device_get(program(params, prompts, mask, jax.random.key(5)))
    with sharding.scope(mesh):
        return jax.device_get(program(params, *sharding.shard_batch(mesh, (prompts, mask)), jax.random.key(5)))


@pytest.fixture(scope="module")
def params():
    return sharding.unbox(models.init(SPEC, jax.random.key(0)))


LEARNED = ModelSpec(**{**vars(SPEC), "positions": "learned"})
CASES = {
    "turns and groups": {"turns": Turns(8, 1), "copies": 2, "greedy": np.arange(16) % 2 == 0},
    "data × fsdp × tensor": {"mesh": MeshConfig(data=2, fsdp=2, tensor=2), "turns": Turns(8, 1), "copies": 2},
    "fsdp × sequence × tensor": {"mesh": MeshConfig(data=1, fsdp=2, sequence=2, tensor=2)},
    "fsdp × pipeline × tensor, split": {"mesh": MeshConfig(data=1, fsdp=2, pipeline=2, tensor=2, decode="split")},
    "learned positions": {"spec": LEARNED, "turns": Turns(8, 0)},
}


@pytest.mark.parametrize("case", CASES)
def test_however_it_is_laid_out_a_completion_is_the_same(case, params):
    options = dict(CASES[case])
    mesh, spec = options.pop("mesh", None), options.get("spec", SPEC)
    if spec is LEARNED:
        params = sharding.unbox(models.init(LEARNED, jax.random.key(0)))
    alone = written(params, spec=spec, greedy=options.get("greedy"))
    other = written(params, mesh=mesh and make_mesh(mesh), **options)
    np.testing.assert_array_equal(other.tokens, alone.tokens)
    np.testing.assert_allclose(other.logps, alone.logps, atol=1e-4)


def test_log_probs_of_the_bundled_model_are_near_the_plain_ones(tmp_path):
    """Its weights are real ones: 64 completions of 40 tokens, beside the pass without a cache."""
    loaded = Bundled().load(data=None, workdir=Path(), seed=0)
    spec, params, tokenizer = loaded.spec, loaded.params, loaded.tokenizer
    prompts = np.full((64, 2), tokenizer.bos_id, np.int32)
    prompts[:, 1] = np.arange(300, 364)
    mask = np.ones_like(prompts, bool)
    for kind, bounds in (("model", (1e-4, 1e-5)), ("int8", (0.4, 0.015))):
        sample = partial(generate, spec, max_new_tokens=40, sampling=Sampling(cache=kind), eos_id=3, pad_id=0)
        rollout = jax.jit(sample)(params, prompts, mask, jax.random.key(0))
        logits = jax.jit(partial(models.logits, spec))(params, rollout.tokens, rollout.mask)
        off = np.abs(rollout.logps - next_token_logps(logits, rollout.tokens))[np.asarray(rollout.completion_mask)]
        print(kind, off.max(), off.mean())
        assert off.max() < bounds[0] and off.mean() < bounds[1]
        assert kind == "model" or off.mean() > 1e-4  # so that it is another reader
