"""Compute in bfloat16: what must be in float32 is, in the program itself and in its numbers."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from rlhf_jax import losses, models, sharding
from rlhf_jax.logprobs import entropy, next_token_logps
from rlhf_jax.masking import token_mean
from rlhf_jax.models import ModelSpec
from rlhf_jax.models.attention import attend
from rlhf_jax.models.layers import look_up
from rlhf_jax.models.spec import Experts
from rlhf_jax.sampling import Sampling, generate

pytestmark = pytest.mark.usefixtures("compile_quickly")

PLAIN = ModelSpec(
    vocab_size=64, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48, max_len=16, dtype="bfloat16"
)
VARIANTS = {
    "plain": {},
    "capped": {"attention_softcap": 5.0, "logits_softcap": 10.0, "tied": False, "window": 4},
    "experts": {"experts": Experts(4, 2)},
    "layer-norm-biases": {
        "norm": "layer",
        "positions": "learned",
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
    },
    "qk-norm": {"qk_norm": True, "post_norms": True},
}
WIDE = {"exp", "exp2", "log", "log1p", "expm1", "tanh", "rsqrt", "sqrt", "div", "square", "integer_pow", "reduce_sum",
        "reduce_max", "argmax", "cumsum", "cos", "sin", "sort", "top_k"}  # fmt: skip
"""What softmax, norms, soft caps, losses, sampling and sums are made of; SiLU's logistic is none of them."""
TOKENS = np.random.default_rng(0).integers(0, 64, (3, 9))
MASK = np.arange(9) >= np.array([[0], [2], [5]])


def equations(jaxpr):
    """All of a program, inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr)):
            if isinstance(value, core.ClosedJaxpr):
                yield from equations(value.jaxpr)
            elif isinstance(value, core.Jaxpr):
                yield from equations(value)


def narrow(fn, *args):
    """(the wide operations that read bfloat16, the types that matrix products read)."""
    program = jax.make_jaxpr(fn)(*args).jaxpr
    found, products = set(), set()
    for equation in equations(program):
        types = {str(v.aval.dtype) for v in equation.invars if hasattr(v.aval, "dtype")}
        if equation.primitive.name in WIDE and "bfloat16" in types:
            found.add(equation.primitive.name)
        if equation.primitive.name in ("dot_general", "ragged_dot", "ragged_dot_general"):
            products |= types
    return found, products


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_no_softmax_norm_logit_or_loss_is_computed_in_bfloat16(changes, stored):
    """In the language model's loss, the critic's and their gradients, for both types that parameters are kept in."""
    spec = dataclasses.replace(PLAIN, **changes)

    def narrow_shapes(init):
        def keep(path, x):
            return jax.ShapeDtypeStruct(x.shape, jnp.float32 if "norm" in str(path) or "head" in str(path) else stored)

        return jax.tree_util.tree_map_with_path(
            keep, sharding.unbox(jax.eval_shape(partial(init, spec), jax.random.key(0)))
        )

    def language_loss(params):
        logits = models.logits(spec, params, TOKENS, MASK)
        assert logits.dtype == jnp.float32
        loss, _ = losses.cross_entropy(next_token_logps(logits, TOKENS))
        return token_mean(loss + entropy(logits), MASK).value

    def value_loss(params):
        values = models.values(spec, params, TOKENS, MASK)
        loss, _ = losses.clipped_value(values, jnp.zeros((3, 9)), jnp.ones((3, 9)), clip_eps=0.2)
        return token_mean(loss, MASK).value + models.score(spec, params, TOKENS, MASK).sum()

    for fn, init in ((language_loss, models.init), (value_loss, models.init_with_head)):
        found, products = narrow(jax.value_and_grad(fn), narrow_shapes(init))
        assert not found
        assert "bfloat16" in products  # the projections


def test_the_reader_of_programs_sees_a_narrow_softmax_inside_a_loop():
    def fn(x):
        return jax.lax.scan(lambda carry, row: (carry, jax.checkpoint(jax.nn.softmax)(row)), 0, x)[1]

    assert {"exp", "div"} <= narrow(fn, jnp.ones((2, 3), jnp.bfloat16))[0]
    assert not narrow(fn, jnp.ones((2, 3)))[0]


def test_sampling_draws_from_float32():
    params = sharding.unbox(jax.eval_shape(partial(models.init, PLAIN), jax.random.key(0)))

    def sample(params):
        return generate(PLAIN, params, TOKENS[:, :4], MASK[:, -4:], jax.random.key(0), max_new_tokens=3,
                        sampling=Sampling(temperature=0.7, top_k=5), eos_id=1, pad_id=0)  # fmt: skip

    found, products = narrow(sample, params)
    assert not found and "bfloat16" in products
    assert jax.eval_shape(sample, params).logps.dtype == jnp.float32


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_attention_on_bfloat16_inputs_is_that_of_float64_but_for_its_own_rounding(softcap):
    """256 keys with scores of either sign up to 60: a softmax in bfloat16 would be off by a tenth."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 256, 2, 16)) * size, jnp.bfloat16) for size in (4, 4, 1))
    seen = np.tril(np.ones((1, 256, 256), bool))
    spec = dataclasses.replace(PLAIN, n_heads=2, n_kv_heads=2, head_dim=16, attention_softcap=softcap)
    found = np.asarray(attend(spec, q, k, v, jnp.asarray(seen)), np.float64)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("btnh,bsnh->bnts", q, k) / 4
    assert np.abs(scores).max() > 30
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    scores = np.where(seen[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)
    # Weights and outputs are rounded to bfloat16, 2^-9 each, and no more than that.
    assert np.abs(found - expected).max() < 2.5 * 2**-9 * np.abs(v).max()


def test_gradients_of_a_frequent_row_add_up_in_float32():
    table = jnp.ones((3, 4), jnp.bfloat16)
    rows = jnp.zeros(8192, jnp.int32)
    gradient = jax.grad(lambda table: look_up(table, rows).sum())(table)
    assert gradient.dtype == jnp.bfloat16  # which 256 + 1 is not a number of
    np.testing.assert_array_equal(np.asarray(gradient, np.float32), [[8192] * 4, [0] * 4, [0] * 4])


def test_embeddings_are_scaled_and_placed_before_they_are_rounded():
    """One rounding to bfloat16, of the sum in float32."""
    spec = dataclasses.replace(PLAIN, positions="learned", n_layers=1)
    params = sharding.unbox(models.init(spec, jax.random.key(0)))
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    params["layers"] = jax.tree.map(jnp.zeros_like, params["layers"])  # the block adds nothing
    params["final_norm"] = jax.tree.map(lambda x: jnp.ones_like(x, jnp.float32), params["final_norm"])
    found = np.asarray(jax.jit(partial(models.hidden, spec))(params, TOKENS), np.float64)
    table, places = (np.asarray(params[name], np.float64) for name in ("embedding", "positions"))
    x = np.asarray(jnp.asarray(table[TOKENS] * 32**0.5 + places[np.arange(9)], jnp.bfloat16), np.float64)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + spec.norm_eps)
    np.testing.assert_allclose(found, expected, rtol=2**-8)
