"""A mean that is divided last, and the key of a step."""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.types import Mean, Rollout, TrainState


def test_means_add_up_over_unequal_parts():
    parts = Mean(jnp.float32(6), jnp.float32(3)) + Mean(jnp.float32(4), jnp.float32(1))
    assert parts.value == 2.5
    assert Mean(jnp.float32(0), jnp.float32(0)).value == 0


def test_a_count_may_be_a_fraction():
    """Weights add up to any number: half a count is not one."""
    assert Mean(jnp.float32(1), jnp.float32(0.25)).value == 4
    halves = Mean(jnp.float32(1), jnp.float32(0.25)) + Mean(jnp.float32(2), jnp.float32(0.25))
    assert halves.value == 6


def test_a_mean_has_a_finite_gradient_whatever_its_count():
    gradient = jax.vmap(jax.grad(lambda total, count: Mean(total, count).value, argnums=(0, 1)))
    by_total, by_count = gradient(jnp.float32([3, 3, 3]), jnp.float32([0, 0.5, 2]))
    np.testing.assert_allclose(by_total, [0, 2, 0.5])
    np.testing.assert_allclose(by_count, [0, -12, -0.75])


def test_the_key_of_a_step_depends_on_seed_and_step_alone():
    def key(seed, step, params):
        state = TrainState(jnp.int32(step), params, None, {}, jax.random.key(seed))
        return tuple(np.asarray(jax.random.key_data(state.step_key())).tolist())

    assert key(0, 3, {"w": 1}) == key(0, 3, {"w": 2})
    assert len({key(0, 3, {}), key(0, 4, {}), key(1, 3, {})}) == 3


def test_a_rollout_is_a_pytree_that_holds_prompt_and_completion():
    prompt, completion = np.array([[True, False, False]]), np.array([[False, True, False]])
    rollout = Rollout(jnp.zeros((1, 3), jnp.int32), prompt, completion)
    assert rollout.mask.tolist() == [[True, True, False]]
    assert len(jax.tree.leaves(rollout)) == 3
