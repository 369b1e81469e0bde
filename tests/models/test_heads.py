"""A score is read at the last kept token, a value before its token."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import sharding
from rlhf_jax.models import heads
from rlhf_jax.models.heads import box
from tests.models import reference
from tests.models.test_transformer import FRESH, INIT, LENGTHS, PLAIN, TEXTS, left, make, right, with_holes

pytestmark = pytest.mark.usefixtures("compile_quickly")

init_with_head, score, values = (  # the spec is part of the program
    jax.jit(fn, static_argnums=0) for fn in (heads.init_with_head, heads.score, heads.values)
)


@pytest.fixture(scope="module")
def network():
    """(spec, parameters off their start, the reference's head outputs after each token of each text)."""
    spec, trunk = make(n_kv_heads=2)
    rng = np.random.default_rng(2)
    head = {"kernel": rng.normal(size=32).astype(np.float32), "bias": np.float32(0.7)}
    wide = jax.tree.map(lambda x: x.astype(np.float64), trunk)
    outputs = [reference.hidden(spec, wide, text) @ head["kernel"] + head["bias"] for text in TEXTS]
    return spec, {"trunk": trunk, "head": head}, outputs


def padded():
    return (np.concatenate(x) for x in zip(left(), right(), with_holes(), strict=True))


def test_the_score_is_read_at_the_last_kept_token_under_any_padding(network):
    spec, params, outputs = network
    tokens, mask = padded()
    scores = score(spec, params, tokens, mask)
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, [output[-1] for output in outputs] * 3, atol=1e-5)


def test_a_value_is_the_output_after_the_token_before(network):
    spec, params, outputs = network
    tokens, mask = left()
    out = values(spec, params, tokens, mask)
    assert out.dtype == jnp.float32 and not out[:, 0].any()
    for row, kept, expected in zip(np.asarray(out), mask, outputs, strict=True):
        np.testing.assert_allclose(row[kept][1:], expected[:-1], atol=1e-5)


def test_a_value_is_the_score_of_what_stands_before(network):
    spec, params, _ = network
    tokens, mask = right()
    out = values(spec, params, tokens, mask)
    for t in (1, 2, LENGTHS[0] - 1):
        prefix = score(spec, params, tokens, mask & (np.arange(mask.shape[1]) < t))
        np.testing.assert_allclose(out[0, t], prefix[0], atol=1e-5)


def test_a_value_does_not_know_its_token(network):
    spec, params, _ = network
    tokens, mask = right()
    other = tokens.copy()
    other[:, 3:] = (other[:, 3:] + 1) % 64
    np.testing.assert_array_equal(values(spec, params, tokens, mask)[:, :4], values(spec, params, other, mask)[:, :4])


def test_a_row_of_padding_alone_has_a_finite_score_and_gradient(network):
    spec, params, _ = network
    tokens, mask = left()
    mask[1] = False

    def total(params):
        return score(spec, params, tokens, mask).sum() + values(spec, params, tokens, mask).sum()

    value, gradients = jax.jit(jax.value_and_grad(total))(params)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_in_bfloat16_the_head_itself_stays_in_float32(network):
    spec, params, _ = network
    tokens, mask = right()
    scores = score(dataclasses.replace(spec, dtype="bfloat16"), params, tokens, mask)
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, score(spec, params, tokens, mask), atol=0.3)


def test_a_fresh_head_has_standard_deviation_one_over_the_root_of_d_plus_one():
    spec = dataclasses.replace(PLAIN, vocab_size=4, d_model=2048, n_layers=1, d_ff=1, n_heads=1, n_kv_heads=1)
    head = sharding.unbox(init_with_head(spec, jax.random.key(0)))["head"]
    assert head["kernel"].shape == (2048,) and head["bias"] == 0
    assert np.std(head["kernel"]) == pytest.approx(2049**-0.5, rel=0.05)
    assert abs(np.mean(head["kernel"])) < 4 / 2048


def test_a_head_on_a_given_trunk_keeps_its_numbers_and_the_names_of_its_axes():
    spec, trunk = make(tied=False)
    boxed = init_with_head(spec, jax.random.key(3), trunk)
    assert "unembedding" not in boxed["trunk"]
    plain = sharding.unbox(boxed)["trunk"]
    jax.tree.map(np.testing.assert_array_equal, plain, {name: trunk[name] for name in plain})
    fresh = jax.eval_shape(init_with_head, spec, jax.random.key(3))
    names = [x.names for x in jax.tree.leaves(boxed, is_leaf=is_box) if is_box(x)]
    assert names == [x.names for x in jax.tree.leaves(fresh, is_leaf=is_box) if is_box(x)] and len(names) > 8
    assert boxed["head"]["kernel"].names == ("embed",)


def test_boxing_undoes_unboxing():
    boxed = INIT(FRESH, jax.random.key(0))
    again = box(sharding.unbox(boxed), boxed)
    assert jax.tree.structure(again) == jax.tree.structure(boxed)
    jax.tree.map(np.testing.assert_array_equal, again, boxed)


def is_box(x):
    return isinstance(x, nn.LogicallyPartitioned)
