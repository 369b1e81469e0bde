"""The clipped value loss case by case."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.value import clipped_value
from tests.properties import Case, Properties, normal

THREE = normal("values", "old_values", "returns")


class TestProperties(Properties):
    cases = (
        Case(clipped_value, THREE, label="-unclipped"),
        Case(clipped_value, THREE, {"clip_eps": 0.2}),
    )


@pytest.mark.parametrize(
    ("value", "target", "loss", "gradient"),
    [
        (0.1, 1.0, 0.405, -0.9),  # inside the range
        (0.5, 1.0, 0.32, 0.0),  # ran ahead of 0 ± 0.2 towards the target: the pessimistic error is ½ (0.2 − 1)²
        (-0.5, 1.0, 1.125, -1.5),  # ran away from it: its own error is the larger
        (2.0, 1.0, 0.5, 1.0),  # overshot as far as it started: ½ (2 − 1)² > ½ (0.2 − 1)²
    ],
)
def test_the_larger_of_the_clipped_and_the_plain_error(value, target, loss, gradient):
    def run(x):
        out, diagnostics = clipped_value(x, jnp.zeros(()), jnp.float32(target), clip_eps=0.2)
        return out, diagnostics["clipped"]

    (out, clipped), slope = jax.value_and_grad(run, has_aux=True)(jnp.float32(value))
    np.testing.assert_allclose((out, slope), (loss, gradient), rtol=1e-5, atol=1e-7)
    assert clipped == (gradient == 0)


def test_without_a_range_it_is_half_the_squared_error():
    values, returns = np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32)
    loss, diagnostics = clipped_value(values, np.full(6, np.float32(99)), returns)
    np.testing.assert_allclose(loss, (values - returns) ** 2 / 2, rtol=1e-6)
    assert not diagnostics["clipped"].any()


def test_nothing_is_called_clipped_inside_the_range():
    """old + (new − old) is not new in floating point: rounding must not count as clipping."""
    rng = np.random.default_rng(0)
    old, values, returns = rng.uniform(-0.09, 0.09, size=(3, 1000)).astype(np.float32)
    loss, diagnostics = clipped_value(values, old, returns, clip_eps=0.2)
    assert diagnostics["clipped"].sum() == 0
    np.testing.assert_array_equal(loss, clipped_value(values, old, returns)[0])


@pytest.mark.parametrize("clip_eps", [0.0, -0.2])
def test_an_empty_range_is_refused(clip_eps):
    x = np.zeros(2, np.float32)
    with pytest.raises(ValueError, match="clip_eps"):
        clipped_value(x, x, x, clip_eps=clip_eps)
