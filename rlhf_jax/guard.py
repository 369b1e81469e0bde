"""Updates that are left out: a loss or a gradient that is not finite, or far above its recent level.

All of it happens inside the compiled step and in the optimiser's state, so that it is saved, repeated and sharded as
that is. Steps that were left out do not move the recent level; if that has really moved, they follow on each other, and
the run stops.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.types import Metrics


class Guarded(NamedTuple):
    """State of `guarded`: what it compares a step with, what it has left out so far, and the state that it guards."""

    losses: Float[Array, " w"]  # of the last steps that were taken, in a ring
    norms: Float[Array, " w"]
    taken: Int[Array, ""]
    skipped: Int[Array, ""]
    in_row: Int[Array, ""]
    given_up: Bool[Array, ""]
    inner: Any


def guarded(
    inner: optax.GradientTransformation, *, sigmas: float | None, window: int, most: int
) -> optax.GradientTransformationExtraArgs:
    """`inner`, but for bad steps, whose update is nothing and leaves its state as it was.

    Bad is a loss or gradient norm that is not finite or, with `sigmas`, that many standard deviations above the mean of
    the last `window` steps, once there are half as many. After more than `most` in a row `given_up` is set.
    `update` takes the step's loss as `loss=`.
    """

    def init(params: Any) -> Guarded:
        losses, norms = jnp.zeros(window), jnp.zeros(window)
        taken, skipped, in_row = (jnp.zeros((), jnp.int32) for _ in range(3))
        return Guarded(losses, norms, taken, skipped, in_row, jnp.zeros((), bool), inner.init(params))

    def update(grads: Any, state: Any, params: Any = None, *, loss: Array) -> tuple[Any, Guarded]:
        norm = optax.tree.norm(grads)
        bad = ~(jnp.isfinite(loss) & jnp.isfinite(norm))
        if sigmas is not None:
            bad |= _spikes(loss, state.losses, state.taken, sigmas) | _spikes(norm, state.norms, state.taken, sigmas)
        updates, after = inner.update(grads, state.inner, params)
        in_row = jnp.where(bad, state.in_row + 1, 0)
        here = (jnp.arange(window) == state.taken % window) & ~bad
        return jax.tree.map(lambda x: jnp.where(bad, -0.0, x), updates), Guarded(  # x + -0.0 is x, bit for bit
            losses=jnp.where(here, loss, state.losses),
            norms=jnp.where(here, norm, state.norms),
            taken=state.taken + ~bad,
            skipped=state.skipped + bad,
            in_row=in_row,
            given_up=in_row > most,
            inner=jax.tree.map(lambda old, new: jnp.where(bad, old, new), state.inner, after),
        )

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]  # it has loss=


def _spikes(x: Array, recent: Float[Array, " w"], taken: Int[Array, ""], sigmas: float) -> Bool[Array, ""]:
    window = recent.shape[0]
    known = jnp.arange(window) < taken
    count = jnp.maximum(known.sum(), 1)
    mean = jnp.where(known, recent, 0).sum() / count
    deviation = jnp.sqrt(jnp.where(known, (recent - mean) ** 2, 0).sum() / count)
    return (taken >= window // 2) & (x > mean + sigmas * deviation)


def counters(opt_state: Any) -> Metrics:
    """What a guard in an optimiser's state has left out, as metrics of a step; empty where there is no guard."""
    counts = {}
    for one in _guards(opt_state):
        counts = {"skipped": one.skipped, "skipped_in_row": one.in_row, "given_up": one.given_up}
    return {name: count.astype(jnp.float32) for name, count in counts.items()}


def over_steps(metrics: Metrics) -> Metrics:
    """Metrics [n] of n steps as those of one: means, where updates were left out those of the others, NaN without any.

    Counters are as after the last step, but the longest row and `given_up` as at their worst.
    """
    if "skipped" not in metrics:
        return jax.tree.map(jnp.mean, metrics)
    taken = metrics["skipped_in_row"] == 0
    means = {name: jnp.where(taken, x, 0).sum() / taken.sum() for name, x in metrics.items()}
    worst = {name: metrics[name].max() for name in ("skipped_in_row", "given_up")}
    return means | worst | {"skipped": metrics["skipped"][-1]}


def together(*metrics: Metrics) -> Metrics:
    """The counters of several networks' steps as one: updates left out add up; empty where none is guarded."""
    guards = [one for one in metrics if "skipped" in one]
    if not guards:
        return {}
    worst = {name: jnp.stack([one[name] for one in guards]).max() for name in ("skipped_in_row", "given_up")}
    return {"skipped": jnp.stack([one["skipped"] for one in guards]).sum(), **worst}


def of_members(metrics: Metrics) -> Metrics:
    """Metrics [n] of a step of n networks as those of one: means, and the counters as `together` has them."""
    means = {name: x.mean() for name, x in metrics.items()}
    counters = {name: metrics[name] for name in ("skipped", "skipped_in_row", "given_up") if name in metrics}
    worst = {name: x.sum() if name == "skipped" else x.max() for name, x in counters.items()}
    return means | worst


def figures(state: Any) -> dict[str, int]:
    """The summary's count of updates that were left out, of all guards in a state; empty where there is none."""
    found = _guards(state)
    return {"skipped": sum(int(np.sum(one.skipped)) for one in found)} if found else {}


def _guards(tree: Any) -> list[Guarded]:
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Guarded))
    return [node for node in nodes if isinstance(node, Guarded)]
