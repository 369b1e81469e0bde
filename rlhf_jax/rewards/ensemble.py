"""Several reward models as one: how they are held, read at once by `jax.vmap`, and combined (Coste et al. 2023).

Parameters are those of one network with the members' axis in front of what each has of its own: every leaf that
trains, or, where they are heads on one trunk, the head's. Shapes: n members, b rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax import models, sharding
from rlhf_jax.models import ModelSpec, lora
from rlhf_jax.numerics import require
from rlhf_jax.types import ArrayLike, Key, Params


@dataclass(frozen=True)
class Combine:
    """How members' scores of a completion become one (Coste et al. 2023, section 3)."""

    rule: Literal["mean", "wco", "uwo"] = "mean"
    """Their mean, the worst of them (worst-case optimisation), or their mean less λ times their variance
    (uncertainty-weighted optimisation)."""
    variance_coef: float = 0.5
    """λ of "uwo"; the paper's is 0.5 for best-of-n and 0.1 for PPO."""

    def __post_init__(self) -> None:
        require("variance_coef", self.variance_coef, "[0, inf)")

    def __call__(self, scores: Any) -> Any:
        """[n, *b] -> [*b], of NumPy's arrays as of JAX's; the variance is the biased one."""
        if self.rule == "wco":
            return scores.min(0)
        mean = scores.mean(0)
        return mean if self.rule == "mean" else mean - self.variance_coef * scores.var(0)


@dataclass(frozen=True)
class Ensemble:
    """Reward models that are trained at once: member i is what a run with the experiment's seed plus i would make."""

    members: int = 4
    """How many."""
    of: Literal["models", "heads"] = "models"
    """Whole models, each with a trunk of its own, or heads on one trunk."""
    bootstrap: bool = False
    """Whether each member learns from its own sample, with replacement, of the rows; heads then read the trunk once
    each, as models do."""
    combine: Combine = field(default_factory=Combine)
    """How their scores become one, in evaluation and as a reward."""

    def __post_init__(self) -> None:
        require("ensemble.members", self.members, "[2, inf)")

    @property
    def own_rows(self) -> bool:
        """Whether members read rows of their own: in their own order, or their own sample."""
        return self.of == "models" or self.bootstrap


def axes(spec: ModelSpec, params: Params, ensemble: Ensemble) -> Params:
    """Where the members' axis of a whole ensemble's parameters is, for `jax.vmap`: 0, or None of what they share."""

    def all_at(tree: Params, axis: int | None) -> Params:
        return {name: all_at(leaf, axis) if isinstance(leaf, dict) else axis for name, leaf in tree.items()}

    trunk, own = params["trunk"], 0 if ensemble.of == "models" else None
    parts = all_at(lora.base(spec, trunk), None), all_at(lora.own(spec, trunk), own)
    return {"trunk": lora.merge(*parts), "head": 0}


def each(
    spec: ModelSpec, params: Params, ensemble: Ensemble | None, read: Callable[[Params], Float[Array, "*b"]]
) -> Float[Array, "n *b"]:
    """What every member reads, by `read(params of one)`; of a single network (None) n is 1."""
    if ensemble is None:
        return read(params)[None]
    return jax.vmap(read, in_axes=(axes(spec, params, ensemble),))(params)


def member_scores(
    spec: ModelSpec,
    params: Params,
    ensemble: Ensemble | None,
    tokens: Int[ArrayLike, "b t"],
    mask: Bool[ArrayLike, "b t"],
) -> Float[Array, "n b"]:
    """Every member's score of every row, read at its last token."""
    return each(spec, params, ensemble, lambda one: models.score(spec, one, tokens, mask))


def reward(
    spec: ModelSpec,
    params: Params,
    ensemble: Ensemble | None,
    tokens: Int[ArrayLike, "b t"],
    mask: Bool[ArrayLike, "b t"],
) -> dict[str, Float[Array, " b"]]:
    """A row's "score", and, of an ensemble, its "uncertainty": the standard deviation among members, in score."""
    return combined(member_scores(spec, params, ensemble, tokens, mask), ensemble)


def combined(scores: Float[Array, "n b"], ensemble: Ensemble | None) -> dict[str, Float[Array, " b"]]:
    """What `reward` says, of all members' scores; a single network's (None) are its own."""
    if ensemble is None:
        return {"score": scores[0]}
    return {"score": ensemble.combine(scores), "uncertainty": scores.std(0)}


def init(one: Callable[[Key], Params], keys: Key, ensemble: Ensemble) -> Params:
    """Boxed parameters of an ensemble, where `one(key)` makes one network's, by a key a member.

    Where the members are heads, the trunk is the first one's.
    """
    boxed = sharding.with_axis(jax.vmap(one)(keys))
    return boxed if ensemble.of == "models" else {"trunk": one(keys[0])["trunk"], "head": boxed["head"]}
