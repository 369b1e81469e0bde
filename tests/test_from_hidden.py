"""Log-probs, entropy and exact KL from hidden states equal those of the logits, in value and in gradient."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from rlhf_jax import kl, logprobs, models
from tests.properties import assert_close

pytestmark = pytest.mark.usefixtures("compile_quickly")

B, T, D, V = 3, 4, 6, 11
CAPPED = {"temperature": 0.7, "softcap": 3.0}


def example(lead=(B, T), d=D, v=V, dtype=np.float32):
    """(hidden, unembedding, ref_hidden, ref_unembedding), tokens; the reference is half as wide."""
    rng = np.random.default_rng(0)
    hidden, ref_hidden = (rng.normal(size=(*lead, width)).astype(dtype) for width in (d, d // 2))
    unembedding, ref_unembedding = (rng.normal(size=(width, v)).astype(dtype) for width in (d, d // 2))
    return (hidden, unembedding, ref_hidden, ref_unembedding), rng.integers(0, v, lead)


def plain_logits(hidden, unembedding, temperature=1.0, softcap=None):
    out = jnp.matmul(hidden, unembedding)
    return (out if softcap is None else softcap * jnp.tanh(out / softcap)) / temperature


def plain(name, arrays, tokens, **scalars):
    hidden, unembedding, ref_hidden, ref_unembedding = arrays
    logits = plain_logits(hidden, unembedding, **scalars)
    if name == "logps":
        return logprobs.token_logps(logits, tokens)
    if name == "entropy":
        return logprobs.entropy(logits)
    return kl.exact(logits, plain_logits(ref_hidden, ref_unembedding, **scalars))


def sliced(name, arrays, tokens, **options):
    hidden, unembedding, *reference = arrays
    if name == "logps":
        return logprobs.from_hidden(hidden, unembedding, tokens, **options)
    if name == "entropy":
        return logprobs.entropy_from_hidden(hidden, unembedding, **options)
    return kl.exact_from_hidden(hidden, unembedding, *reference, **options)


NAMES = ("logps", "entropy", "kl")
every = pytest.mark.parametrize("name", NAMES)


def value_and_grad(fn, name, tokens, **options):
    """Of (arrays, scalars), compiled: the values, and the gradients of their weighted sum."""

    def total(arrays, scalars):
        out = fn(name, arrays, tokens, **scalars, **options)
        return jnp.sum(weighted(out)), out

    def run(arrays, scalars):
        (_, out), gradients = jax.device_get(compiled(arrays, scalars))
        return out, gradients

    compiled = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    return run


@cache
def expected_of(name):
    """The plain path's answer to the example at temperature 0.7 under a softcap."""
    arrays, tokens = example()
    return value_and_grad(plain, name, tokens)(arrays, CAPPED)


def weighted(out):
    return out * jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)


@every
@pytest.mark.parametrize(("scalars", "chunk"), [({}, 4), (CAPPED, 1), (CAPPED, 4), (CAPPED, 11), (CAPPED, 4096)])
def test_equals_the_plain_path_in_value_and_every_gradient(name, scalars, chunk):
    arrays, tokens = example()
    actual = value_and_grad(sliced, name, tokens, chunk=chunk)(arrays, scalars)
    expected = expected_of(name) if scalars else value_and_grad(plain, name, tokens)(arrays, {})
    assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@every
@pytest.mark.parametrize("lead", [(), (0,), (2, 3, 2)], ids=str)
def test_any_leading_axes(name, lead):
    arrays, tokens = example(lead)
    actual = value_and_grad(sliced, name, tokens, chunk=4)(arrays, CAPPED)
    assert actual[0].shape == lead
    assert_close(actual, value_and_grad(plain, name, tokens)(arrays, CAPPED), rtol=1e-5, atol=1e-5)


@every
def test_a_tied_table_is_the_transpose(name):
    arrays, tokens = example()
    tables = [x.T if i % 2 else x for i, x in enumerate(arrays)]
    out, (gradients, scalars) = value_and_grad(sliced, name, tokens, chunk=4, tied=True)(tables, CAPPED)
    gradients = tuple(g.T if i % 2 else g for i, g in enumerate(gradients))
    assert_close((out, (gradients, scalars)), expected_of(name), rtol=1e-5, atol=1e-5)


@every
def test_gradients_equal_finite_differences(name, float64):
    arrays, tokens = example(dtype=np.float64)
    run = value_and_grad(sliced, name, tokens, chunk=4)
    point, rng, step = (arrays, CAPPED), np.random.default_rng(1), 1e-6
    out, gradients = run(*point)
    assert out.dtype == np.float64
    direction = jax.tree.map(lambda x: rng.normal(size=np.shape(x)), point)
    ahead, behind = (
        weighted(run(*jax.tree.map(lambda x, d, s=sign: x + s * step * d, point, direction))[0]).sum()
        for sign in (1, -1)
    )
    expected = sum(jax.tree.leaves(jax.tree.map(np.vdot, gradients, direction)))
    np.testing.assert_allclose((ahead - behind) / (2 * step), expected, rtol=1e-7)


def test_equals_the_models_own_logits():
    spec = models.ModelSpec(
        vocab_size=V, d_model=8, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=16, tied=True, logits_softcap=2.0
    )
    params = {"embedding": np.random.default_rng(0).normal(size=(V, 8)).astype(np.float32)}
    hidden = np.random.default_rng(1).normal(size=(B, T, 8)).astype(np.float32)
    tokens = np.random.default_rng(2).integers(0, V, (B, T))
    expected = logprobs.token_logps(models.unembed(spec, params, hidden), tokens, temperature=0.7)
    actual = logprobs.from_hidden(hidden, params["embedding"], tokens, chunk=4, tied=True, **CAPPED | {"softcap": 2.0})
    assert_close(actual, expected)


@every
def test_half_precision_adds_up_in_float32(name):
    arrays, tokens = example(d=256)
    half = [x.astype(jnp.bfloat16) for x in arrays]
    wide = [x.astype(np.float32) for x in half]
    out, (gradients, _) = value_and_grad(sliced, name, tokens, chunk=4)(half, {})
    expected, (wide_gradients, _) = value_and_grad(plain, name, tokens)(wide, {})
    assert out.dtype == np.float32 and all(g.dtype == jnp.bfloat16 for g in gradients)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
    for g, w in zip(gradients, wide_gradients, strict=True):
        np.testing.assert_allclose(g.astype(np.float32), w, atol=0.02 * np.abs(w).max() + 1e-6)


@every
@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_extreme_logits_are_finite_and_as_in_float64(name, scale):
    arrays, tokens = example()
    arrays = [np.sign(x) * np.float32(scale if i % 2 else 1) for i, x in enumerate(arrays)]
    out, (gradients, _) = value_and_grad(sliced, name, tokens, chunk=4)(arrays, {})
    with jax.enable_x64(True):
        doubles = [x.astype(np.float64) for x in arrays]
        expected, (true_gradients, _) = value_and_grad(plain, name, tokens)(doubles, {})
    for actual, true in zip((out, *gradients), (expected, *true_gradients), strict=True):
        assert np.isfinite(actual).all()
        np.testing.assert_allclose(actual, true, rtol=1e-5, atol=1e-6 * max(1, np.abs(true).max()))
    assert (out <= 0).all() if name == "logps" else (out >= 0).all()


def test_entropy_and_kl_are_never_negative():
    (hidden, unembedding, *_), tokens = example((500,))
    entropy = jax.jit(lambda h: sliced("entropy", (h, unembedding), tokens, chunk=4))
    divergence = jax.jit(lambda h, r: sliced("kl", (h, unembedding, r, unembedding), tokens, chunk=4))
    for scale in (0, 1e-6, 1e-3, 1, 30, 1e4):
        h = hidden * np.float32(scale)
        assert entropy(h).min() >= 0 and divergence(h, h * np.float32(1 + 1e-6)).min() >= 0
        assert not divergence(h, h).any()


def test_a_token_out_of_range_gives_nan_and_spoils_no_other():
    arrays, tokens = example((5,))
    tokens[:] = (-1, V, 3, V - 1, 2**31 - 1)
    out = sliced("logps", arrays, tokens, chunk=4)
    assert np.isnan(out).tolist() == [True, True, False, False, True]

    @jax.jit
    @jax.grad
    def gradient_of_the_others(hidden):
        logps = logprobs.from_hidden(hidden, arrays[1], tokens, chunk=4)
        return jnp.where(np.isnan(out), 0, logps).sum()

    gradient = gradient_of_the_others(arrays[0])
    assert np.isfinite(gradient).all() and not gradient[np.isnan(out)].any()


@every
def test_under_vmap_scan_and_remat(name):
    arrays, tokens = example()

    def mapped(name, arrays, tokens, **options):
        one = lambda h, r, t: sliced(name, (h, arrays[1], r, arrays[3]), t, **options)  # noqa: E731
        return jax.vmap(one)(arrays[0], arrays[2], tokens)

    def scanned(name, arrays, tokens, **options):
        @jax.checkpoint
        def step(carry, row):
            return carry, sliced(name, (row[0], arrays[1], row[1], arrays[3]), row[2], **options)

        return jax.lax.scan(step, 0, (arrays[0], arrays[2], tokens))[1]

    for fn in (mapped, scanned):
        assert_close(value_and_grad(fn, name, tokens, chunk=4)(arrays, CAPPED), expected_of(name), rtol=1e-5, atol=1e-5)


@every
def test_what_lies_outside_its_domain_is_refused_with_its_value(name):
    arrays, tokens = example()
    for option, bad in (("chunk", 0), ("chunk", -3), ("temperature", 0.0), ("temperature", -1.5), ("softcap", 0.0)):
        with pytest.raises(ValueError, match=rf"{option} must lie in .*, got {bad:g}"):
            sliced(name, arrays, tokens, **{"chunk": 4, option: bad})
    with pytest.raises(TypeCheckError, match="chunk"):
        sliced(name, arrays, tokens, chunk=4.0)


@every
def test_shapes_that_do_not_fit_are_refused(name):
    (hidden, unembedding, *reference), tokens = example()
    with pytest.raises(TypeCheckError, match="unembedding"):
        sliced(name, (hidden, unembedding[1:], *reference), tokens)
    with pytest.raises(ValueError, match=r"unembedding must be \[d, v\] unless tied: got \(11, 6\) for hidden"):
        sliced(name, (hidden, unembedding.T, *reference), tokens)
    with pytest.raises(ValueError, match=r"unembedding must be \[v, d\] where tied: got \(6, 11\) for hidden"):
        sliced(name, (hidden, unembedding, *reference), tokens, tied=True)
    if name != "entropy":
        with pytest.raises(TypeCheckError, match=r"tokens|ref_hidden"):
            sliced(name, (hidden, unembedding, reference[0][:1], reference[1]), tokens[:1])
