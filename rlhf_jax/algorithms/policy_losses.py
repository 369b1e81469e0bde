"""The losses of losses.policy as the `policy` stage calls them by name. Shapes: b completions, n tokens of each."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax import losses
from rlhf_jax.masking import keep

Loss = Literal["reinforce", "ppo_clip", "cispo", "gspo", "gmpo", "p3o", "surrogate"]
OF_COMPLETIONS = ("gspo", "gmpo", "p3o")
"""Those of one ratio a completion, or a pair of them: all tokens have the completion's loss."""


class Taken(NamedTuple):
    """What a loss may read of a minibatch; pairs of p3o stand beside each other."""

    logps: Float[Array, "b n"]
    old_logps: Float[Array, "b n"]
    advantages: Float[Array, "b n"]
    returns: Float[Array, " b"]  # the score after KL in the reward
    mask: Bool[Array, "b n"]


Called = Callable[[Taken, Array | None, Array | None], tuple[Float[Array, "b n"], Float[Array, "b n"]]]
"""(what it reads, clip_eps, clip_eps_high) -> (loss, clipped), of tokens."""


def _reinforce(x: Taken, low: Array | None, high: Array | None) -> tuple[Array, Array]:
    del low, high
    return losses.reinforce(x.logps, x.advantages)[0], jnp.zeros_like(x.logps)


def _surrogate(x: Taken, low: Array | None, high: Array | None) -> tuple[Array, Array]:
    del low, high
    return losses.trpo_surrogate(x.logps, x.old_logps, x.advantages)[0], jnp.zeros_like(x.logps)


def _ppo_clip(x: Taken, low: Array | None, high: Array | None) -> tuple[Array, Array]:
    assert low is not None
    loss, d = losses.ppo_clip(x.logps, x.old_logps, x.advantages, clip_eps=low, clip_eps_high=high)
    return loss, d["clipped"]


def _cispo(x: Taken, low: Array | None, high: Array | None) -> tuple[Array, Array]:
    assert high is not None
    loss, d = losses.cispo(x.logps, x.old_logps, x.advantages, clip_eps=low, clip_eps_high=high)
    return loss, d["clipped"]


def _gspo(x: Taken, low: Array | None, high: Array | None) -> tuple[Array, Array]:
    assert low is not None
    return _of_completions(*losses.gspo(*_whole(x), clip_eps=low, clip_eps_high=high), x.mask)


def _gmpo(x: Taken, low: Array | None, high: Array | None) -> tuple[Array, Array]:
    assert low is not None
    return _of_completions(*losses.gmpo(*_whole(x), clip_eps=low, clip_eps_high=high), x.mask)


def _p3o(x: Taken, low: Array | None, high: Array | None) -> tuple[Array, Array]:
    assert low is not None and high is None
    pairs = [y.reshape(-1, 2) for y in (keep(x.logps, x.mask).sum(-1), keep(x.old_logps, x.mask).sum(-1), x.returns)]
    loss, d = losses.p3o(*pairs, clip_eps=low)
    return _of_completions(jnp.repeat(loss, 2), {"clipped": jnp.repeat(d["clipped"], 2)}, x.mask)


def _whole(x: Taken) -> tuple[Array, Array, Array, Array]:
    """With one advantage a completion: that of its first token, which every completion has."""
    return x.logps, x.old_logps, x.advantages[:, 0], x.mask


def _of_completions(loss: Array, diagnostics: dict[str, Array], mask: Array) -> tuple[Array, Array]:
    """A completion's loss at each of its tokens: the mean over these, then over completions, is the latter's."""
    clipped = jnp.broadcast_to(diagnostics["clipped"][:, None], mask.shape)
    return keep(jnp.broadcast_to(loss[:, None], mask.shape), mask), clipped


LOSSES: dict[Loss, Called] = {
    "reinforce": _reinforce,
    "ppo_clip": _ppo_clip,
    "cispo": _cispo,
    "gspo": _gspo,
    "gmpo": _gmpo,
    "p3o": _p3o,
    "surrogate": _surrogate,
}

CLIPS: dict[Loss, tuple[str | None, str | None]] = {
    "reinforce": (None, None),
    "ppo_clip": ("(0, 1)", "(0, inf)"),
    "cispo": ("(0, 1]", "(0, inf)"),
    "gspo": ("(0, 1)", "(0, inf)"),
    "gmpo": ("(0, inf)", "(0, inf)"),
    "p3o": ("(0, 1)", None),
    "surrogate": (None, None),
}
"""Where `clip_eps` and `clip_eps_high` must lie; None: the loss has no such range."""
