"""Divergence from a reference policy: estimators per token, the exact sum, and controllers of its coefficient.

The estimators are those of Schulman 2020, "Approximating KL divergence", for KL(π‖π_ref) with tokens sampled from π, in
nats a token. In the reward only `k1` yields the gradient of the KL. As a loss, k1's expected gradient is 0, k2's is
that of KL(π‖π_ref), and k3's is that of the forward KL(π_ref‖π).

Shapes: *b any leading axes (tokens among them), d and e widths of hidden states, v vocabulary.
"""

from dataclasses import dataclass
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax import vocabulary
from rlhf_jax.masking import keep
from rlhf_jax.numerics import LOG_RATIO_LIMIT, as_float, require
from rlhf_jax.types import ArrayLike, Scalar, typed

ERROR_LIMIT = 0.2  # of AdaptiveKL's proportional error: Ziegler et al. 2019, section 2.2


@typed
def k1(logps: Float[ArrayLike, "*b"], ref_logps: Float[ArrayLike, "*b"]) -> Float[Array, "*b"]:
    """The log-ratio log π/π_ref: unbiased, of high variance, and negative half of the time. Schulman 2020.

    >>> k1(jnp.array([-1.0]), jnp.array([-1.5]))
    Array([0.5], dtype=float32)
    """
    return as_float(logps) - as_float(ref_logps)


@typed
def k2(logps: Float[ArrayLike, "*b"], ref_logps: Float[ArrayLike, "*b"]) -> Float[Array, "*b"]:
    """½ (log π/π_ref)²: biased, of low variance, never negative. Schulman 2020.

    >>> k2(jnp.array([-1.0]), jnp.array([-1.5]))
    Array([0.125], dtype=float32)
    """
    return 0.5 * jnp.square(k1(logps, ref_logps))


@typed
def k3(logps: Float[ArrayLike, "*b"], ref_logps: Float[ArrayLike, "*b"]) -> Float[Array, "*b"]:
    """With r = π_ref/π, r − 1 − log r: unbiased, of low variance, never negative. Schulman 2020.

    Above, log r is clamped at 20 and the gradient becomes 0, lest r overflow; below −20, r is 0 in any case.

    >>> k3(jnp.array([-1.0]), jnp.array([-1.5]))
    Array([0.1065], dtype=float32)
    """
    log_ratio = jnp.minimum(as_float(ref_logps) - as_float(logps), LOG_RATIO_LIMIT)
    return jnp.maximum(jnp.expm1(log_ratio) - log_ratio, 0)  # the maximum undoes rounding near 0


@typed
def exact(logits: Float[ArrayLike, "*b v"], ref_logits: Float[ArrayLike, "*b v"]) -> Float[Array, "*b"]:
    """KL(π‖π_ref) = Σ_v π (log π − log π_ref), summed over the whole vocabulary; never negative.

    Infinite where π has mass that π_ref lacks (a logit of −inf in `ref_logits` alone).

    >>> exact(jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.25, 0.75]])))
    Array([0.1438], dtype=float32)
    """
    log_p = jax.nn.log_softmax(as_float(logits), axis=-1)
    log_q = jax.nn.log_softmax(as_float(ref_logits), axis=-1)
    p = jnp.exp(log_p)
    return jnp.maximum(jnp.sum(p * jnp.where(p > 0, log_p - log_q, 0), axis=-1), 0)  # as in k3


@typed
def exact_from_hidden(
    hidden: Float[ArrayLike, "*b d"],
    unembedding: Float[ArrayLike, "d v"] | Float[ArrayLike, "v d"],
    ref_hidden: Float[ArrayLike, "*b e"],
    ref_unembedding: Float[ArrayLike, "e v"] | Float[ArrayLike, "v e"],
    *,
    chunk: int = vocabulary.CHUNK,
    temperature: Scalar = 1.0,
    softcap: Scalar | None = None,
    tied: bool = False,
) -> Float[Array, "*b"]:
    """`exact` of the logits that two models' hidden states give, which are never held; never negative.

    `temperature`, `softcap` and `tied` apply to both models, whose widths may differ. There are gradients by both.
    Arguments and what raises are those of `logprobs.from_hidden`.

    >>> p, q = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.25, 0.75]]))
    >>> exact_from_hidden(jnp.ones((1, 1)), p, jnp.ones((1, 1)), q, chunk=1)
    Array([0.1438], dtype=float32)
    """
    of_both = partial(vocabulary.head, chunk=chunk, temperature=temperature, softcap=softcap, tied=tied)
    heads = of_both(hidden, unembedding), of_both(ref_hidden, ref_unembedding)
    return vocabulary.exact_kl(chunk, heads)


@typed
def sequence_kl(kl: Float[ArrayLike, "*b t"], mask: Bool[ArrayLike, "*b t"]) -> Float[Array, "*b"]:
    """Σ_t of what `k1`, `k2`, `k3` or `exact` gave for each kept token: the divergence of whole sequences, in nats.

    The chain rule: where tokens are sampled from π, each after its prefix, k1's and k3's sums and that of the exact
    divergences are unbiased for KL(π‖π_ref) of sequences. 0 for a row that keeps nothing.

    >>> sequence_kl(jnp.array([0.5, -0.2, 9.0]), jnp.array([True, True, False]))
    Array(0.3, dtype=float32)
    """
    return keep(kl, mask).sum(-1)


@flax.struct.dataclass
class KLState:
    """A controller's state: the coefficient in force."""

    coef: Float[Array, ""]


@dataclass(frozen=True)
class FixedKL:
    """A KL coefficient that stays as it is."""

    coef: float = 0.05
    """Price of one nat of KL, in units of the score."""

    def __post_init__(self):
        require("coef", self.coef, "[0, inf)")

    def init(self) -> KLState:
        """The state before the first step."""
        return KLState(jnp.asarray(self.coef, jnp.float32))

    def update(self, state: KLState, kl: Scalar, n_steps: Scalar) -> KLState:
        """The same state."""
        del kl, n_steps
        return state


@dataclass(frozen=True)
class AdaptiveKL:
    """A KL coefficient that steers the sequence KL to a target. Ziegler et al. 2019, section 2.2.

        e = clip(KL / target − 1, −0.2, 0.2);   coef ← coef · (1 + e · n_steps / horizon)

    The paper writes K_β = 0.1 for n_steps / horizon; its code is followed here. With 512 sequences a step and a horizon
    of 10,000 the coefficient moves by at most 1% a step.

    >>> controller = AdaptiveKL(coef=0.1, target=6.0, horizon=10_000)
    >>> controller.update(controller.init(), kl=jnp.array(12.0), n_steps=5_000).coef
    Array(0.11, dtype=float32)
    """

    coef: float = 0.15
    """Price of one nat of KL, in units of the score, before the first step."""
    target: float = 6.0
    """Sequence KL to hold, in nats."""
    horizon: int = 10_000
    """Sequences over which an error of 20% changes the coefficient by 20%."""

    def __post_init__(self):
        for name in ("coef", "target", "horizon"):
            require(name, vars(self)[name], "(0, inf)")

    def init(self) -> KLState:
        """The state before the first step."""
        return KLState(jnp.asarray(self.coef, jnp.float32))

    def update(self, state: KLState, kl: Scalar, n_steps: Scalar) -> KLState:
        """The state after a batch of `n_steps` sequences whose mean sequence KL was `kl`, in nats.

        Raises ValueError if n_steps ≥ 5 · horizon, where one step could turn the coefficient negative.
        """
        require("n_steps", n_steps, f"(0, {self.horizon / ERROR_LIMIT:g})")
        error = jnp.clip(as_float(jnp.asarray(kl)) / self.target - 1, -ERROR_LIMIT, ERROR_LIMIT)
        factor = 1 + error * n_steps / self.horizon
        return KLState((state.coef * factor).astype(state.coef.dtype))
