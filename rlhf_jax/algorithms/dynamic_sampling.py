"""DAPO's dynamic sampling: groups of equal scores give way to those of further prompts (Yu et al. 2025, section 3.2).

Shapes: b completions, g groups of them; a group's stand beside each other.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.types import Rollout


def equal_groups(scores: Float[np.ndarray, " b"], size: int) -> Bool[np.ndarray, " g"]:
    """Whether the scores of each group, `size` beside each other, are all the same."""
    groups = scores.reshape(-1, size)
    return groups.max(-1) == groups.min(-1)


def refilled(scores: Float[np.ndarray, " b"], more: Float[np.ndarray, " b"], size: int) -> Int[np.ndarray, " b"]:
    """Rows of the two batches, one after the other, that make one: those of the first, its groups of equal scores
    replaced in order by those groups of the second whose scores are not, as far as these go.

    >>> refilled(np.array([1.0, 1.0, 0.0, 1.0]), np.array([0.0, 0.0, 1.0, 0.0]), 2).tolist()
    [6, 7, 2, 3]
    """
    chosen = np.arange(len(scores) // size)
    empty, good = np.flatnonzero(equal_groups(scores, size)), np.flatnonzero(~equal_groups(more, size))
    count = min(len(empty), len(good))
    chosen[empty[:count]] = len(chosen) + good[:count]
    return (chosen[:, None] * size + np.arange(size)).reshape(-1)


def chosen(rollout: Rollout, more: Rollout, index: Int[Array, " b"]) -> Rollout:
    """The rows of two batches that `refilled` says, groups numbered as in the first."""
    rows = jax.tree.map(lambda a, b: jnp.concatenate([a, b])[index], rollout, more)
    return rows.replace(group_ids=rollout.group_ids)
