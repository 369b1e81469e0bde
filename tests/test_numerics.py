"""Promotion, exponentials that cannot overflow, and domain checks that let tracers pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.numerics import LOG_RATIO_LIMIT, as_float, exp_log_ratio, require


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float32, np.int8, np.int32, bool])
def test_everything_becomes_at_least_float32(dtype):
    assert as_float(np.ones(2, dtype)).dtype == jnp.float32


def test_double_precision_is_kept_where_jax_has_it(float64):
    assert as_float(np.ones(2)).dtype == jnp.float64


def test_numpy_doubles_become_float32_without_a_warning(recwarn):
    assert as_float(np.ones(2)).dtype == jnp.float32
    assert not recwarn.list


def test_the_exponential_of_a_log_ratio_is_clamped_and_its_gradient_stops_there():
    x = np.float32([-1e30, -LOG_RATIO_LIMIT, 0, 1, 1e30, np.inf])
    value, gradient = map(np.asarray, jax.vmap(jax.value_and_grad(exp_log_ratio))(x))
    np.testing.assert_allclose(value, np.exp(np.clip(x, -20, 20)), rtol=1e-5)
    assert np.isfinite(gradient).all() and not gradient[[0, 4, 5]].any()
    np.testing.assert_allclose(gradient[2:4], np.exp([0, 1]), rtol=1e-6)


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [("(0, inf)", (1e-9, 5), (0, -1)), ("[0, 1]", (0, 1), (-0.1, 1.1)), ("(0, 1)", (0.5,), (0, 1))],
)
def test_require_knows_open_and_closed_ends(interval, inside, outside):
    for value in inside:
        require("x", value, interval)
    for value in (*outside, float("nan")):
        with pytest.raises(ValueError, match="x must lie in"):
            require("x", value, interval)
        with pytest.raises(ValueError, match="x must lie in"):
            require("x", jnp.float32(value), interval)


@pytest.mark.parametrize("value", ["x", (1, 2), [0.5]])
def test_require_says_what_is_no_number(value):
    with pytest.raises(TypeError, match="beta: expected a number, got"):
        require("beta", value, "(0, 1)")


def test_require_lets_tracers_and_none_pass():
    assert require("x", None, "(0, 1)") is None
    assert jax.jit(lambda x: require("x", x, "(0, 1)") or x)(5.0) == 5  # outside, and nobody could know
