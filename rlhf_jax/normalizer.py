"""Running mean and variance of scores, as a state that is handed in and out, and scores on their scale.

`state = update(state, scores)` once a batch, then `normalize(scores, state)`. The state is a pytree of three numbers:
it is carried through jit and scan, and saved with a run.

Shapes: *s any axes.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax.masking import VARIANCE_EPS, keep, token_mean
from rlhf_jax.numerics import as_float
from rlhf_jax.types import ArrayLike, typed


def _zero() -> Float[Array, ""]:
    return jnp.zeros((), jnp.float32)


@flax.struct.dataclass
class Moments:
    """The scores so far: how many, their mean, and Σ (s − mean)². `Moments()` has seen none."""

    count: Float[Array, ""] = flax.struct.field(default_factory=_zero)
    mean: Float[Array, ""] = flax.struct.field(default_factory=_zero)
    squares: Float[Array, ""] = flax.struct.field(default_factory=_zero)

    @property
    def variance(self) -> Float[Array, ""]:
        """The biased variance, Σ (s − mean)² / count; 0 before the first score."""
        return self.squares / jnp.maximum(self.count, 1)


@typed
def update(state: Moments, scores: Float[ArrayLike, "*s"], mask: Bool[ArrayLike, "*s"] | None = None) -> Moments:
    """The moments of what came before and of these scores; nothing decays, so the split into batches does not matter.

        δ = mean_b − mean_a;   mean = mean_a + δ n_b/n;   squares = squares_a + squares_b + δ² n_a n_b/n

    Chan et al. 1979: exact, and free of the cancellation of E[s²] − E[s]². `mask` keeps the scores that count.
    In float32 the count is exact up to 2²⁴ scores.

    >>> state = update(update(Moments(), jnp.array([1.0, 2.0])), jnp.array([6.0]))
    >>> state.mean, state.variance
    (Array(3., dtype=float32), Array(4.6667, dtype=float32))
    """
    kept = jnp.ones(scores.shape, bool) if mask is None else jnp.asarray(mask)
    scores = keep(scores, kept)
    batch = token_mean(scores, kept)
    squares = keep(jnp.square(scores - batch.value), kept).sum()
    count, difference = state.count + batch.count, batch.value - state.mean
    share = batch.count / jnp.maximum(count, 1)
    return Moments(
        count, state.mean + difference * share, state.squares + squares + difference**2 * state.count * share
    )


@typed
def normalize(scores: Float[ArrayLike, "*s"], state: Moments, *, center: bool = True) -> Float[Array, "*s"]:
    """(s − mean) · rsqrt(variance + 1e-8), or s · rsqrt(variance + 1e-8) unless `center`.

    Ziegler et al. 2019 normalise a reward model's scores once, to mean 0 and variance 1; a running scale does it as it
    goes (Zheng et al. 2023, "score reparameterization"). Scores that were all the same so far, but for float32's
    rounding of their mean, have no scale and are not divided; before the first update nothing is changed.

    >>> normalize(jnp.array([3.0]), update(Moments(), jnp.array([0.0, 2.0])))
    Array([2.], dtype=float32)
    """
    shift, differ = state.mean if center else 0, state.variance > 1e-13 * state.mean**2
    return (as_float(scores) - shift) * jnp.where(differ, jax.lax.rsqrt(state.variance + VARIANCE_EPS), 1)
