"""Attention by a kernel is that by plain products, in its numbers and gradients; and is the kernel, where lowered."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models, sharding
from rlhf_jax.errors import UserError
from rlhf_jax.models import ModelSpec, attention
from rlhf_jax.models.attention import Seen, attend, check
from rlhf_jax.models.spec import Experts
from rlhf_jax.sampling import Sampling, generate
from rlhf_jax.sharding import MeshConfig
from tests.meshes import mesh_of

pytestmark = pytest.mark.usefixtures("compile_quickly")

LENGTH = 150  # in blocks of 128 two, the second padded
PACKED = np.stack([np.repeat([1, 2, 3, 0], [70, 50, 20, 10]), np.repeat([4, 1], [9, 141])])
SPLASH = {
    "heads of 64, grouped": {"n_heads": 2, "n_kv_heads": 1, "head_dim": 64},
    "heads of 128, packed": {"n_heads": 1, "n_kv_heads": 1, "head_dim": 128, "packed": True},
    "window, packed": {"n_heads": 2, "n_kv_heads": 2, "head_dim": 16, "window": 40, "packed": True},
    "soft cap, window, own scale": {
        "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "window": 20, "attention_softcap": 1.5, "query_scale": 0.7
    },
}  # fmt: skip
CUDNN = {
    "grouped": {"n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "query_scale": 0.7},
    "window": {"n_heads": 2, "n_kv_heads": 2, "head_dim": 8, "window": 20},
    "packed": {"n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "packed": True},
    "window, packed, odd": {"n_heads": 2, "n_kv_heads": 2, "head_dim": 8, "window": 20, "packed": True, "length": 149},
}
CASES = {f"splash: {name}": ("splash", case) for name, case in SPLASH.items()} | {
    f"cudnn: {name}": ("cudnn", case) for name, case in CUDNN.items()
}
SMALL = ModelSpec(
    vocab_size=64, d_model=32, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=8, d_ff=48, max_len=16, rope_theta=100.0
)
TINY = {
    "plain": {},
    "window in one layer": {"n_kv_heads": 2, "window": 3, "local_layers": (True, False)},
    "window in all, learned positions": {"window": 3, "positions": "learned"},
    "experts": {"experts": Experts(4, 2)},
}
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 64, (4, 9))
MASK = np.stack([np.arange(9) >= 4, np.arange(9) < 6, np.isin(np.arange(9), (1, 2, 5, 6, 8)), np.zeros(9, bool)])
"""Padded on the left, on the right, with holes, a row of pads alone."""
SEGMENTS = np.array([[0, 1, 1, 1, 2, 2, 2, 2, 3], [1, 1, 1, 1, 1, 1, 2, 0, 0], [1] * 9, [2, 2, 3, 3, 3, 1, 0, 0, 0]])


@pytest.fixture
def blocks_of_128(monkeypatch):
    """So that short rows have several."""
    monkeypatch.setattr(attention, "BLOCK", 128)


def by(spec: ModelSpec, kernel: str) -> ModelSpec:
    """cuDNN's arguments are compared in float32, which cuDNN itself does not take."""
    spec = dataclasses.replace(spec)
    object.__setattr__(spec, "attention", kernel)
    return spec


@pytest.mark.parametrize(("kernel", "case"), CASES.values(), ids=CASES)
def test_outputs_and_gradients_are_those_of_plain_products(kernel, case, blocks_of_128):
    case = {"packed": False, "length": LENGTH} | case
    packed, t = case.pop("packed"), case.pop("length")
    spec = ModelSpec(**case)
    heads = (spec.n_heads, spec.n_kv_heads, spec.n_kv_heads, spec.n_heads)
    *qkv, weight = (RNG.normal(size=(2, t, n, spec.head_dim)).astype(np.float32) for n in heads)
    back = np.arange(t)[:, None] - np.arange(t)
    mask = (back >= 0) & (back < (spec.window or t))
    ids = PACKED[:, :t] if packed else np.ones((2, t), int)
    mask = jnp.asarray(mask & (ids[:, :, None] == ids[:, None, :]))
    seen = Seen(jnp.full(2, spec.window is not None), jnp.asarray(ids) if packed else None)

    def both(spec, seen):
        def f(*qkv):
            out = attend(spec, *qkv, seen)
            return (out * weight).sum(), out

        gradients, out = jax.jit(jax.grad(f, argnums=(0, 1, 2), has_aux=True))(*qkv)
        return out, *gradients

    found, expected = both(by(spec, kernel), seen), both(spec, mask)
    for name, one, other in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-4, err_msg=name)
        assert np.abs(other).max() > 0.1


def make(**changes):
    """A spec, and parameters of a trained model's size."""
    spec = dataclasses.replace(SMALL, **changes)
    shapes = sharding.unbox(jax.eval_shape(lambda: models.init(spec, jax.random.key(0))))
    rng = np.random.default_rng(1)
    return spec, jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape) * spec.d_model**-0.5), shapes)


def of_rows(spec, params, mask, segment_ids):
    """States of real tokens, what the routers did with them, and the gradient of a loss that reads them."""

    def f(params):
        states, routing = models.hidden_and_routing(spec, params, TOKENS, mask, segment_ids=segment_ids)
        kept = jnp.where(mask[:, :, None], states, 0)
        logits = () if routing is None else jnp.where(mask[:, :, None], routing.logits, 0)
        return jnp.square(kept[:, :, :5]).sum(), (kept, logits)

    return jax.jit(jax.grad(f, has_aux=True))(params)


def assert_close(found, expected, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **({"atol": 2e-5, "rtol": 1e-4} | tolerance)), found, expected
    )


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("changes", TINY.values(), ids=TINY)
def test_a_model_says_the_same_of_real_tokens_wherever_padding_is(changes, packed):
    """cuDNN's arguments for all, splash below: the rows are put in order before either."""
    spec, params = make(**changes)
    segments = SEGMENTS if packed else None
    mask = jnp.asarray(SEGMENTS > 0 if packed else MASK)
    expected = of_rows(spec, params, mask, segments)
    assert_close(of_rows(by(spec, "cudnn"), params, mask, segments), expected)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(expected))


def test_splash_in_a_loop_over_layers_of_both_kinds():
    spec, params = make(window=3, local_layers=(True, False), remat="full", n_kv_heads=2)
    mask = jnp.asarray(MASK & (SEGMENTS > 0))
    assert_close(of_rows(by(spec, "splash"), params, mask, SEGMENTS), of_rows(spec, params, mask, SEGMENTS))


@pytest.mark.parametrize("kernel", ["cudnn", "splash"])
def test_a_policy_samples_the_same_after_prompts_read_by_a_kernel(kernel):
    spec, params = make(window=4, local_layers=(False, True))

    def sample(spec):
        return jax.jit(partial(generate, spec, max_new_tokens=4, sampling=Sampling(), eos_id=1, pad_id=0))(
            params,
            TOKENS[[0, 2]],
            MASK[[0, 2]],
            jax.random.key(0),  # a prompt's last column is a token
        )

    found, expected = sample(by(spec, kernel)), sample(spec)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    assert_close(found.logps, expected.logps)


MESHES = {
    "data × tensor": MeshConfig(data=4, tensor=2),
    "fsdp × sequence × tensor": MeshConfig(data=1, fsdp=2, sequence=2, tensor=2),
    "pipeline × tensor": MeshConfig(data=2, pipeline=2, tensor=2),
}


@pytest.mark.parametrize("kernel", ["cudnn", "splash"])
@pytest.mark.parametrize("config", MESHES.values(), ids=MESHES)
def test_on_a_mesh_it_is_as_on_one_device(config, kernel):
    spec, params = make(window=3, local_layers=(True, False))
    spec, mesh, mask = by(spec, kernel), mesh_of(config), jnp.asarray(MASK)
    expected = of_rows(spec, params, mask, None)
    with sharding.scope(mesh):
        boxed = jax.eval_shape(partial(models.init, spec), jax.random.key(0))
        found = of_rows(spec, sharding.put(params, sharding.shardings(mesh, boxed)), mask, None)
    assert_close(found, expected)


SCORES = re.compile(r"tensor<[\dx]*256x256x")


def lowered(spec, kernel, platform, dtype=jnp.bfloat16, window=None, segment_ids=None):
    """The text of a step forwards and backwards, for a platform that is not here."""
    q, k = (jnp.ones((2, 256, n, spec.head_dim), dtype) for n in (spec.n_heads, spec.n_kv_heads))

    def f(q, k, v):
        return kernel(spec, q, k, v, segment_ids, window, emulated=False).astype(jnp.float32).sum()

    return jax.jit(jax.grad(f, argnums=(0, 1, 2))).trace(q, k, k).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("segments", [None, np.ones((2, 256), np.int32)], ids=["whole", "packed"])
def test_for_a_tpu_splash_is_three_kernels(window, head_dim, segments):
    text = lowered(
        ModelSpec(n_kv_heads=2, head_dim=head_dim), attention._splash, "tpu", window=window, segment_ids=segments
    )
    assert text.count("custom_call @tpu_custom_call") == 3  # forwards, dq, dk and dv
    assert not SCORES.search(text)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("segments", [None, np.ones((2, 256), np.int32)], ids=["whole", "packed"])
def test_for_cuda_it_is_cudnns_flash_attention(window, segments, monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo

    # The one thing that is asked of a GPU's libraries before there is a program.
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    text = lowered(ModelSpec(n_kv_heads=2), attention._cudnn, "cuda", window=window, segment_ids=segments)
    name, mask = ("ScaleBiasSoftmax", "NO_MASK") if segments is not None else ("Softmax", "CAUSAL")
    assert (
        text.count(f"custom_call @__cudnn$fmha{name}(") == text.count(f"custom_call @__cudnn$fmha{name}Backward(") == 1
    )
    fields = text.replace("\\22", "")
    assert f"mask_type: {mask}" in fields
    assert ("sliding_window_length: 40" in fields) == (window is not None and segments is None)
    assert bool(SCORES.search(text)) == (segments is not None)  # the mask


def test_what_a_kernel_cannot_serve_is_one_line_at_the_start():
    fine = ModelSpec(attention="cudnn", dtype="bfloat16")
    for change in ({"attention_softcap": 5.0}, {"dtype": "float32"}, {"head_dim": 12}, {"head_dim": 264}):
        (name,) = change
        with pytest.raises(ValueError, match=rf"^model\.spec\.attention='cudnn' .*{name}.*'xla'") as error:
            dataclasses.replace(fine, **change)
        assert "\n" not in str(error.value)
    for kernel, home, elsewhere, other in (("cudnn", "gpu", "tpu", "splash"), ("splash", "tpu", "gpu", "cudnn")):
        spec = dataclasses.replace(fine, attention=kernel)
        check(spec, home)
        check(spec, "cpu")
        with pytest.raises(UserError, match=rf"^model\.spec\.attention='{kernel}' .* {elsewhere}s: '{other}' or 'xla'"):
            check(spec, elsewhere)
    check(ModelSpec(), "tpu")


def test_blocks_hold_a_row_with_as_little_padding_as_their_number_allows():
    for length in range(1, 3000, 7):
        padded, block = attention.splash_blocks(length)
        assert padded >= length and padded % block == 0 and block % 128 == 0 and block <= 512
        assert padded // block == -(-length // 512) and padded - length < 128 * (padded // block)
