"""Older rollouts that are learnt from once more, weighed by how far the policy has moved from the one that wrote them.

They are part of the state, and so of checkpoints. Shapes: b rollouts of an iteration, k older iterations, t tokens.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from rlhf_jax import sharding
from rlhf_jax.algorithms.context import Context
from rlhf_jax.numerics import require
from rlhf_jax.types import Rollout

_TOKENS = ("tokens", "prompt_mask", "completion_mask", "logps", "ref_logps")
_ROWS: dict[str, Any] = {"scores": jnp.float32, "written_at": jnp.int32, "used": jnp.bool_, "stopped": jnp.bool_}
"""What stays as it was written: values and advantages are estimated anew, at the price of KL of the day."""


@dataclass(frozen=True)
class Replay:
    """Each minibatch holds rows of the newest rollout and as many of each of the older ones.

    The loss is decoupled PPO's, as `placement.Disaggregated` has it for rollouts that are made ahead: the clip range
    is around the policy that the iteration starts from, π_prox, and a token's loss is weighed by π_prox/π_behaviour.
    """

    rollouts: int = 1
    """Older iterations whose rollouts are learnt from, too; the first iterations have fewer behind them."""
    max_weight: float = 2.0
    """Largest importance weight of a token (importance.token_weights)."""

    def __post_init__(self) -> None:
        require("replay.rollouts", self.rollouts, "[1, inf)")
        require("replay.max_weight", self.max_weight, "[1, inf)")


def empty(config: Replay, context: Context, *, rows: int, length: int) -> Rollout:
    """[k·b, …]: where older rollouts will lie, b = `rows` and t = `length`, none of them used yet."""
    n = config.rollouts * rows
    types = {"tokens": jnp.int32, "logps": jnp.float32, "ref_logps": jnp.float32}
    wide = {name: jax.ShapeDtypeStruct((n, length), types.get(name, jnp.bool_)) for name in _TOKENS}
    ones = {name: jax.ShapeDtypeStruct((n,), dtype) for name, dtype in _ROWS.items()}
    return Rollout(**context.zeros(wide | ones))


def joined(newest: Rollout, older: Rollout) -> Rollout:
    """[(1+k)·b, …]: what was written of the newest rollout, then of older ones, the last written first."""
    never = jnp.zeros(len(newest.tokens), bool)  # where no strings end completions
    newest = newest.replace(used=~never, stopped=never if newest.stopped is None else newest.stopped)

    def one(name: str) -> Array:
        both = jnp.concatenate([vars(newest)[name], vars(older)[name]])
        return sharding.constrain(both, "batch", *[None] * (both.ndim - 1))

    return Rollout(**{name: one(name) for name in (*_TOKENS, *_ROWS)})  # pyright: ignore[reportArgumentType]  # arrays


def without_oldest(rollouts: Rollout, config: Replay) -> Rollout:
    """[(1+k)·b, …] -> [k·b, …]: what the next iteration finds as older rollouts."""
    kept = len(rollouts.tokens) * config.rollouts // (1 + config.rollouts)
    return jax.tree.map(lambda x: sharding.constrain(x[:kept], "batch", *[None] * (x.ndim - 1)), rollouts)


def of_each(rows: Int[Array, "s m"], config: Replay, *, batch_size: int) -> Int[Array, "s n"]:
    """Rows of steps over one rollout to those of steps over all of them, as many of each."""
    starts = jnp.arange(1 + config.rollouts) * batch_size
    return (rows[..., None] + starts).reshape(len(rows), -1)
