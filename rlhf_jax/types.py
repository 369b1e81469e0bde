"""The types that every layer shares: array aliases, the reducer's `Mean`, and the pytrees that travel through a step.

Shapes: b batch, k completions of one prompt, p pairs of one prompt, t tokens.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from beartype import beartype
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, jaxtyped

if TYPE_CHECKING:
    ArrayLike = jax.Array | np.ndarray
else:  # and NumPy's scalars, the rows of a [b]; jaxtyping refuses them where an axis is named
    ArrayLike = jax.Array | np.ndarray | np.floating | np.integer | np.bool_
Scalar = int | float | np.floating | Float[ArrayLike, ""]

Params = Any  # a plain dict pytree of arrays
Batch = Any  # a pytree of arrays whose leading axis is the batch
Hyper = dict[str, Array]  # scalars that a sweep may vary, by name
Key = PRNGKeyArray
Metrics = dict[str, Array]

typed = jaxtyped(typechecker=beartype)
"""Checks a function's annotations, shapes included, whenever it is called or traced."""


@flax.struct.dataclass
class Mean:
    """A mean that has not been divided yet, so that microbatches and devices add up to the whole batch exactly.

    `+` accumulates one metric over parts of a batch. Two terms of a loss are combined per element, before they are
    reduced; adding their `Mean`s would add up their counts.
    """

    total: Array
    count: Array

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> Array:
        """The mean, total / count; 0 when nothing was counted. The count need not be whole: weights add up too."""
        counted = self.count > 0
        return jnp.where(counted, self.total / jnp.where(counted, self.count, 1), 0)


@flax.struct.dataclass
class TrainState:
    """What one network's training needs to go on: saved and restored as a whole."""

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    hyper: Hyper
    key: Key

    def step_key(self) -> Key:
        """The key of the current step: a function of the seed and the step alone, so that a resumed run repeats it."""
        return jax.random.fold_in(self.key, self.step)


LossFn = Callable[[Params, Batch, Hyper, Key], tuple[Mean, dict[str, Mean]]]


class Rollout(flax.struct.PyTreeNode):
    """Prompts with their sampled completions, aligned on tokens and filled step by step; None is not filled yet.

    Every `[b, t]` array is 0 where its mask is False. `logps[:, t]` scores `tokens[:, t]`; `values[:, t]` is the value
    before token t; `completion_mask` includes EOS.
    """

    tokens: Int[Array, "b t"]
    prompt_mask: Bool[Array, "b t"]
    completion_mask: Bool[Array, "b t"]
    logps: Float[Array, "b t"] = flax.struct.field(default=None)  # of the behaviour policy
    old_logps: Float[Array, "b t"] = flax.struct.field(
        default=None
    )  # of the policy that an update starts from, if other
    ref_logps: Float[Array, "b t"] = flax.struct.field(default=None)
    values: Float[Array, "b t"] = flax.struct.field(default=None)
    scores: Float[Array, " b"] = flax.struct.field(default=None)  # raw, one a sequence
    rewards: Float[Array, "b t"] = flax.struct.field(default=None)  # after the KL penalty
    advantages: Float[Array, "b t"] = flax.struct.field(default=None)
    returns: Float[Array, "b t"] = flax.struct.field(default=None)
    group_ids: Int[Array, " b"] = flax.struct.field(default=None)  # completions of one prompt have the same
    used: Bool[Array, " b"] = flax.struct.field(default=None)  # whether it is learnt from; None: all are
    written_at: Int[Array, " b"] = flax.struct.field(
        default=None
    )  # optimiser steps that the behaviour policy had taken
    placed: Int[Array, "b t"] = flax.struct.field(default=None)  # where tokens lie in a part
    laid: int = flax.struct.field(pytree_node=False, default=0)  # longer rows of that part
    stopped: Bool[Array, " b"] = flax.struct.field(default=None)  # whether a stop string ended it; None: there are none
    read_mask: Bool[Array, "b t"] = flax.struct.field(default=None)  # of completions what a reward reads; None: all

    @property
    def mask(self) -> Bool[Array, "b t"]:
        """True on prompt and completion tokens alike."""
        return self.prompt_mask | self.completion_mask

    @property
    def read(self) -> Bool[Array, "b t"]:
        """True on the completion tokens that a reward reads."""
        return self.completion_mask if self.read_mask is None else self.read_mask


@flax.struct.dataclass
class PreferenceBatch:
    """Prompts with k completions each and the pairs that were judged; a chosen/rejected pair is k = 2, p = 1."""

    tokens: Int[ArrayLike, "b k t"]
    mask: Bool[ArrayLike, "b k t"]
    completion_mask: Bool[ArrayLike, "b k t"]
    pairs: Int[ArrayLike, "b p 2"]  # (winner, loser), indices into k
    weights: Float[ArrayLike, "b p"]  # 0 where there is no pair
    margins: Float[ArrayLike, "b p"]
    ref_logps: Float[ArrayLike, "b k"] = flax.struct.field(default=None)  # of whole completions under a reference
    probabilities: Float[ArrayLike, "b p"] | None = flax.struct.field(default=None)  # of the winners; None: all 1
    longest: int | None = flax.struct.field(pytree_node=False, default=None)  # tokens of a completion; None: any number


@flax.struct.dataclass
class ThumbBatch:
    """Prompts with a completion each that was liked or not; where k is 2, the second is one of another prompt."""

    tokens: Int[ArrayLike, "b k t"]
    mask: Bool[ArrayLike, "b k t"]
    completion_mask: Bool[ArrayLike, "b k t"]
    desirable: Bool[ArrayLike, " b"]
    ref_logps: Float[ArrayLike, "b k"]  # of whole completions under a reference; 0 where none was read
    longest: int | None = flax.struct.field(pytree_node=False, default=None)  # tokens of a completion; None: any number


@flax.struct.dataclass
class JudgedBatch:
    """Completions after their prompts, and targets for the scores that are read at some of their tokens."""

    tokens: Int[ArrayLike, "b t"]
    mask: Bool[ArrayLike, "b t"]
    ends: Int[ArrayLike, "b s"]  # the tokens at which scores are read
    targets: Float[ArrayLike, "b s"]
    where: Bool[ArrayLike, "b s"]  # False where a row has fewer
