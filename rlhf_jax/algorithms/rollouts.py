"""What an update reads of a rollout. Shapes: b completions, t tokens, s steps, m rows of each."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax import masking
from rlhf_jax.types import Key, Rollout


def old_logps(rollout: Rollout) -> Float[Array, "b t"]:
    """Of the policy that an update starts from: the one that wrote the rollout, or, made ahead of it, an older one."""
    return rollout.logps if rollout.old_logps is None else rollout.old_logps


def loss_mask(rollout: Rollout) -> Bool[Array, "b t"]:
    """The tokens that are learnt from."""
    mask = rollout.completion_mask
    return mask if rollout.used is None else mask & rollout.used[..., None]


def row_mean(x: Float[Array, " b"], used: Bool[Array, " b"] | None, *, rows: int | None = None) -> Float[Array, ""]:
    """Over the completions that are used, of the first `rows` of them."""
    return x[:rows].mean() if used is None else masking.masked_mean(x[:rows], used[:rows])


def minibatch_rows(key: Key, *, rows: int, epochs: int, minibatches: int, together: int = 1) -> Int[Array, "s m"]:
    """Rows of each of the epochs × minibatches steps, an epoch's in random order; runs of `together` stay so."""
    units = rows // together
    orders = jax.vmap(lambda epoch: jax.random.permutation(jax.random.fold_in(key, epoch), units))
    order = orders(jnp.arange(epochs)).reshape(epochs * minibatches, -1)
    if together == 1:
        return order
    return (order[..., None] * together + jnp.arange(together)).reshape(len(order), -1)
