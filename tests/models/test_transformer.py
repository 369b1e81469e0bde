"""One set of numbers, whatever the padding, the packing, the cache, the recomputation: those of a NumPy reference."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models, sharding
from rlhf_jax.models import ModelSpec
from rlhf_jax.models.spec import Experts, LinearRope
from rlhf_jax.plan.flops import count
from tests.models import reference

pytestmark = pytest.mark.usefixtures("compile_quickly")

PLAIN = ModelSpec(
    vocab_size=64, d_model=32, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=8, d_ff=48, max_len=16, rope_theta=100.0
)
FRESH = dataclasses.replace(PLAIN, vocab_size=512, d_model=64)
EVERYTHING = {
    "n_kv_heads": 2,
    "window": 3,
    "qk_norm": True,
    "attention_softcap": 1.5,
    "logits_softcap": 3.0,
    "tied": False,
}
BIASES = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
VARIANTS = {
    "plain": {},
    "grouped-window": {"n_kv_heads": 2, "window": 3},
    "qk_norm-untied": {"qk_norm": True, "tied": False},
    "everything": EVERYTHING,
    "gpt2-like": {"positions": "learned", "norm": "layer", "activation": "gelu_tanh", "gated": False, **BIASES},
    "neox-like": {"rotary_dim": 4, "norm": "layer", "activation": "gelu", "gated": False, "parallel": True,
                  "scale_embedding": False, "tied": False, **BIASES},
    "gemma-like": {"activation": "gelu_tanh", "post_norms": True, "qk_norm": True, "query_scale": 0.2, "window": 3,
                   "local_layers": (True, False), "local_rope_theta": 10.0, "rope_scaling": LinearRope(4.0),
                   "attention_softcap": 2.0, "logits_softcap": 3.0},
    "experts": {"n_kv_heads": 2, "experts": Experts(number=5, per_token=2)},
    "experts-raw": {"experts": Experts(number=3, per_token=2, normalize=False), "local_layers": (False, True),
                    "window": 2},
}  # fmt: skip
LENGTHS, WIDTH = (7, 4, 1), 9
RNG = np.random.default_rng(0)
INIT, HIDDEN, LOGITS, EXTEND = (  # the spec is part of the program
    jax.jit(fn, static_argnums=0) for fn in (models.init, models.hidden, models.logits, models.extend)
)
TEXTS = [RNG.integers(0, 64, length) for length in LENGTHS]


def make(**changes) -> tuple[ModelSpec, dict]:
    """A spec and parameters of a trained model's size, scales off 1."""
    spec = dataclasses.replace(PLAIN, **changes)
    shapes = sharding.unbox(jax.eval_shape(lambda: models.init(spec, jax.random.key(0))))
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        x = rng.normal(size=leaf.shape)
        return np.float32(1 + 0.1 * x if path[-1].key == "scale" else x * spec.d_model**-0.5)

    return spec, jax.tree_util.tree_map_with_path(fill, shapes)


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS)
def variant(request):
    """(spec, params, the reference's log-probs of each text)."""
    spec, params = make(**request.param)
    wide = jax.tree.map(lambda x: x.astype(np.float64), params)
    return spec, params, [log_softmax(reference.logits(spec, wide, text)) for text in TEXTS]


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def batch(*masks):
    """The texts at the kept places, garbage elsewhere."""
    mask = np.array(masks)
    tokens = RNG.integers(0, 64, mask.shape)
    for row, kept, text in zip(tokens, mask, TEXTS, strict=True):
        row[kept] = text
    return tokens, mask


def left():
    return batch(*(np.arange(WIDTH) >= WIDTH - n for n in LENGTHS))


def right():
    return batch(*(np.arange(WIDTH) < n for n in LENGTHS))


def with_holes():
    return batch(*(np.isin(np.arange(WIDTH), RNG.choice(WIDTH, n, replace=False)) for n in LENGTHS))


def check(logps, mask, expected):
    for row, kept, text in zip(log_softmax(logps), mask, expected, strict=True):
        np.testing.assert_allclose(row[kept], text, atol=1e-5)


def test_any_padding_gives_the_numbers_of_the_text_alone(variant):
    spec, params, expected = variant
    tokens, mask = (np.concatenate(x) for x in zip(left(), right(), with_holes(), strict=True))
    out = LOGITS(spec, params, tokens, mask)
    assert out.dtype == jnp.float32
    check(out, mask, expected * 3)


def test_packed_texts_do_not_see_each_other(variant):
    spec, params, expected = variant
    segments = np.concatenate([[0], *(np.full(n, i + 1) for i, n in enumerate(LENGTHS)), [0, 0]])
    tokens = np.concatenate([[5], *TEXTS, [9, 9]])
    hidden = HIDDEN(spec, params, tokens[None], segment_ids=segments[None])
    out = log_softmax(models.unembed(spec, params, hidden))[0]
    for i, text in enumerate(expected, start=1):
        np.testing.assert_allclose(out[segments == i], text, atol=1e-5)


AMONG = models.Among(np.array([[7, 9, 2, 20, 1]]))  # of all rows together


@pytest.mark.parametrize("read", [slice(2, -1), np.array([[7, 1, 1], [3, 8, 0], [2, 2, 2]]), AMONG])
def test_states_that_are_wanted_alone_are_those_of_whole_rows_and_so_are_gradients(variant, read):
    spec, params, _ = variant
    tokens, mask = left()
    apart = dataclasses.replace(spec, unroll=spec.n_layers)

    def states(spec, params, **which):
        return models.hidden_and_routing(spec, params, tokens, mask, segment_ids=1 + (tokens > 40), **which)[0]

    def whole(params):
        found = states(spec, params)
        if isinstance(read, models.Among):
            return found.reshape(-1, spec.d_model)[read.index]
        return found[:, read] if isinstance(read, slice) else jnp.take_along_axis(found, read[..., None], axis=1)

    def some(params):
        return states(apart, params, read=read)

    weights = RNG.normal(size=jax.eval_shape(whole, params).shape)
    (expected, slopes), (found, own) = (
        jax.jit(lambda p, f=f: (f(p), jax.grad(lambda p: jnp.sum(jnp.sin(f(p)) * weights))(p)))(params)
        for f in (whole, some)
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    chex.assert_trees_all_close(own, slopes, atol=2e-5, rtol=1e-4)


def test_of_the_last_layer_what_is_not_read_is_not_computed():
    spec, params = make(unroll=2)
    tokens, mask = left()
    work, part, among = (
        count(jax.make_jaxpr(lambda p, read=read: models.hidden(spec, p, tokens, mask, read=read))(params)).total()
        for read in (None, np.full((3, 1), WIDTH - 1), AMONG)
    )
    d, a, f = spec.d_model, spec.n_heads * spec.head_dim, spec.d_ff
    attention, products = 4 * WIDTH * a, 2 * (2 * d * a + 3 * d * f)  # of a query: scores and sums; q, out, and the MLP
    assert work - part == 3 * (WIDTH - 1) * (attention + products)
    # Of places among all rows attention is whole, and so are its queries.
    assert work - among == (3 * WIDTH - AMONG.index.size) * 2 * (d * a + 3 * d * f)


def test_the_cache_gives_the_numbers_of_whole_rows(variant):
    """A left-padded prompt at once, then a token at a time, some rows ending earlier, in a cache with room to spare."""
    spec, params, expected = variant
    prompt, width = 4, 9
    starts, lengths = (1, 0, 3), np.array(LENGTHS)  # pads before each text; the last has one token of prompt and ends
    place = np.arange(width) - np.array(starts)[:, None]
    tokens, mask = batch(*((place >= 0) & (place < lengths[:, None])))
    cache = models.init_cache(spec, 3, width + 3)
    states, cache = EXTEND(spec, params, tokens[:, :prompt], mask[:, :prompt], cache)
    parts = [states]
    for t in range(prompt, width):
        states, cache = EXTEND(spec, params, tokens[:, t : t + 1], mask[:, t : t + 1], cache)
        parts.append(states)
    assert int(cache.length) == width
    check(models.unembed(spec, params, jnp.concatenate(parts, axis=1)), mask, expected)


def test_holes_inside_a_packed_text_shift_nothing():
    spec, params = make()
    mask = np.array([[True, True, False, True, True, False, True]])
    segments = np.array([[1, 1, 1, 1, 2, 2, 2]])
    tokens = RNG.integers(0, 64, (1, 7))
    out = HIDDEN(spec, params, tokens, mask, segment_ids=segments)[0]
    for i in (1, 2):
        kept = mask[0] & (segments[0] == i)
        alone = HIDDEN(spec, params, tokens[:, kept])[0]
        np.testing.assert_allclose(out[kept], alone, atol=1e-5)


@partial(jax.jit, static_argnums=0)
def loss_and_gradients(spec, params, tokens, mask):
    def loss(params):
        out = jax.nn.log_softmax(models.logits(spec, params, tokens, mask))
        return -jnp.where(mask[..., None], out, 0).mean()

    return jax.value_and_grad(loss)(params)


def test_recomputing_and_unrolling_change_no_number():
    spec, params = make(**EVERYTHING)
    tokens, mask = left()
    expected = loss_and_gradients(spec, params, tokens, mask)
    for changes in ({"remat": "full"}, {"remat": "dots", "unroll": 2}):
        changed = loss_and_gradients(dataclasses.replace(spec, **changes), params, tokens, mask)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), changed, expected)


@pytest.mark.parametrize("changes", [{}, EVERYTHING], ids=["plain", "everything"])
def test_rows_of_padding_alone_are_finite_and_move_nothing(changes):
    spec, params = make(**changes)
    tokens, mask = left()
    value, gradients = loss_and_gradients(spec, params, tokens, np.zeros_like(mask))
    assert value == 0 and not any(g.any() for g in jax.tree.leaves(gradients))
    mask[1] = False
    value, gradients = loss_and_gradients(spec, params, tokens, mask)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_bfloat16_computes_in_bfloat16_and_ends_in_float32():
    spec, params = make(**EVERYTHING)
    tokens, mask = right()
    narrow = dataclasses.replace(spec, dtype="bfloat16")
    assert HIDDEN(narrow, params, tokens, mask).dtype == jnp.bfloat16
    assert models.init_cache(narrow, 2, 3).keys.dtype == jnp.bfloat16
    out = LOGITS(narrow, params, tokens, mask)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out[mask], LOGITS(spec, params, tokens, mask)[mask], atol=0.1)


def test_a_fresh_model_has_stacked_layers_that_differ_and_predicts_almost_nothing():
    params = sharding.unbox(INIT(FRESH, jax.random.key(0)))
    assert {x.shape[0] for x in jax.tree.leaves(params["layers"])} == {FRESH.n_layers}
    query = params["layers"]["attention"]["query"]
    assert query.shape == (2, 64, 4, 8) and not np.allclose(query[0], query[1])
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    assert np.std(params["embedding"]) == pytest.approx(64**-0.5, rel=0.02)
    out = LOGITS(FRESH, params, RNG.integers(0, 512, (4, 16)))
    assert 0.5 < out.std() < 2.0  # the first loss is near log v


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"n_kv_heads": 3}, "n_kv_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"window": 0}, "window"),
        ({"n_layers": 0}, "n_layers"),
        ({"vocab_size": 0}, "vocab_size"),
    ],
)
def test_shapes_that_cannot_be_are_refused_by_name(changes, field):
    with pytest.raises(ValueError, match=rf"model\.spec\.{field}"):
        dataclasses.replace(PLAIN, **changes)
