"""From one score a sequence to one advantage a token: KL-penalised rewards, GAE, and baselines without a critic.

Shapes: *b any leading axes, t tokens, k completions of one prompt. Units: those of the score.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax.masking import keep, last_index, whiten
from rlhf_jax.numerics import as_float, require
from rlhf_jax.types import ArrayLike, Scalar, typed


@typed
def token_rewards(
    scores: Float[ArrayLike, "*b"], kl: Float[ArrayLike, "*b t"], mask: Bool[ArrayLike, "*b t"], *, kl_coef: Scalar
) -> Float[Array, "*b t"]:
    """−kl_coef · kl on each kept token, plus the score on the last one. Ziegler et al. 2019, eq. 2.

    `kl` is per token, `kl.k1` of the sampled ones. A row that keeps nothing gets zeros: its score is lost.

    >>> token_rewards(jnp.array(1.0), jnp.array([0.5, 0.5, 9.0]), jnp.array([True, True, False]), kl_coef=0.1)
    Array([-0.05,  0.95,  0.  ], dtype=float32)
    """
    is_last = jnp.arange(mask.shape[-1]) == last_index(mask)[..., None]
    return -keep(kl, mask) * kl_coef + jnp.where(is_last, as_float(scores)[..., None], 0)


@typed
def gae(
    rewards: Float[ArrayLike, "*b t"],
    values: Float[ArrayLike, "*b t"],
    mask: Bool[ArrayLike, "*b t"],
    *,
    gamma: Scalar,
    lam: Scalar,
) -> tuple[Float[Array, "*b t"], Float[Array, "*b t"]]:
    """Generalised advantage estimates and λ-returns, (advantages, returns), both 0 outside the mask.

        δ_t = r_t + γ V_{t+1} − V_t;   A_t = δ_t + γλ A_{t+1};   R_t = A_t + V_t

    Schulman et al. 2016, eq. 16 (https://arxiv.org/abs/1506.02438). `values[t]` is V before token t, and V after the
    last kept token is 0. What stands outside the mask, a prompt or a tool's output, takes no time: t + 1 is the next
    kept token. Gradients flow; who trains on the result stops them.

    Raises ValueError if gamma or lam is outside [0, 1].

    >>> mask = jnp.array([False, True, True])
    >>> advantages, returns = gae(jnp.array([9.0, 0.0, 1.0]), jnp.array([9.0, 0.5, 0.5]), mask, gamma=1.0, lam=1.0)
    >>> advantages, returns
    (Array([0. , 0.5, 0.5], dtype=float32), Array([0., 1., 1.], dtype=float32))
    """
    require("gamma", gamma, "[0, 1]")
    require("lam", lam, "[0, 1]")
    rewards, values = keep(rewards, mask), keep(values, mask)
    dtype = jnp.promote_types(rewards.dtype, values.dtype)  # one for all, or scan would see its carry change type
    rewards, values, gamma, lam = (jnp.asarray(x, dtype) for x in (rewards, values, gamma, lam))

    def step(later, now):
        later_advantage, later_value = later
        reward, value, kept = now
        advantage = reward + gamma * later_value - value + gamma * lam * later_advantage
        carry = jnp.where(kept, advantage, later_advantage), jnp.where(kept, value, later_value)
        return carry, advantage

    end = jnp.zeros_like(values[..., 0]), jnp.zeros_like(values[..., 0])
    time_first = [jnp.moveaxis(x, -1, 0) for x in (rewards, values, jnp.asarray(mask))]
    _, advantages = jax.lax.scan(step, end, tuple(time_first), reverse=True)
    advantages = keep(jnp.moveaxis(advantages, 0, -1), mask)
    return advantages, advantages + values


def require_group(scores: ArrayLike, *, more_than: int) -> int:
    """The group size k; ValueError if the baseline is undefined for it."""
    k = scores.shape[-1]
    if k <= more_than:
        raise ValueError(f"scores must hold more than {more_than} completions of a prompt, got {k}")
    return k


@typed
def group_centered(scores: Float[ArrayLike, "*b k"]) -> Float[Array, "*b k"]:
    """Scores minus their mean over a prompt's completions, 0 where all are equal. Liu et al. 2025 (Dr. GRPO), §3.2.

    >>> group_centered(jnp.array([1.0, 2.0, 6.0]))
    Array([-2., -1.,  3.], dtype=float32)
    """
    scores = as_float(scores)
    equal = scores.max(-1, keepdims=True) == scores.min(-1, keepdims=True)  # whose mean may be rounded
    return jnp.where(equal, 0, scores - scores.mean(-1, keepdims=True))


@typed
def group_normalized(scores: Float[ArrayLike, "*b k"], *, ddof: int = 1, eps: Scalar = 1e-4) -> Float[Array, "*b k"]:
    """(s − mean(s)) / (std(s) + eps) over a prompt's completions. Shao et al. 2024 (GRPO), section 4.1.2.

    The paper does not say which std; `ddof` 1 and `eps` are TRL's. Raises ValueError if k ≤ ddof or eps < 0.

    >>> group_normalized(jnp.array([1.0, 2.0, 3.0]), eps=0.0)
    Array([-1.,  0.,  1.], dtype=float32)
    """
    require("eps", eps, "[0, inf)")
    centered = group_centered(scores)
    degrees = require_group(scores, more_than=ddof) - ddof
    var = jnp.sum(jnp.square(centered), axis=-1, keepdims=True) / degrees
    std = jnp.where(var > 0, jnp.sqrt(jnp.where(var > 0, var, 1)), 0)  # sqrt'(0) is infinite
    return centered / jnp.where(var > 0, std + eps, 1)  # equal scores, eps 0: 0 and not 0/0


@typed
def leave_one_out(scores: Float[ArrayLike, "*b k"]) -> Float[Array, "*b k"]:
    """s_i − mean of the other k − 1 scores of the prompt. Kool et al. 2019; Ahmadian et al. 2024 (RLOO).

    Raises ValueError if k is 1.

    >>> leave_one_out(jnp.array([1.0, 2.0, 6.0]))
    Array([-3. , -1.5,  4.5], dtype=float32)
    """
    k = require_group(scores, more_than=1)
    return group_centered(scores) * (k / (k - 1))


@typed
def remax(scores: Float[ArrayLike, "*b"], greedy_scores: Float[ArrayLike, "*b"]) -> Float[Array, "*b"]:
    """s(x, y) − s(x, ŷ): the baseline is the score of the prompt's greedy completion ŷ. Li et al. 2023 (ReMax).

    `greedy_scores` are those of the same prompts, repeated for prompts that were sampled more than once.

    >>> remax(jnp.array([1.0, 3.0]), jnp.array([2.0, 2.0]))
    Array([-1.,  1.], dtype=float32)
    """
    return as_float(scores) - as_float(greedy_scores)


@typed
def reinforce_plus_plus(
    rewards: Float[ArrayLike, "*b t"], mask: Bool[ArrayLike, "*b t"], *, gamma: Scalar = 1.0
) -> Float[Array, "*b t"]:
    """Rewards to go, whitened over all kept tokens of the batch at once; 0 outside the mask.

        G_t = r_t + γ G_{t+1};   A_t = (G_t − μ) · rsqrt(σ² + 1e-8)

    Hu et al. 2025 (REINFORCE++), section 3: `rewards` are those of `token_rewards` with k1, so that G_t = score −
    kl_coef · Σ_{u ≥ t} k1_u at γ = 1. Their variant with a baseline has scores from `group_centered` in these rewards.
    Mean and variance are the whole batch's: compute advantages before it is split. OpenRLHF clamps σ² at 1e-8 where we
    add 1e-8. Raises ValueError if gamma is outside [0, 1].

    >>> mask = jnp.array([[True, True], [True, False]])
    >>> reinforce_plus_plus(jnp.array([[0.0, 1.0], [3.0, 9.0]]), mask).round(4)
    Array([[-0.7071, -0.7071],
           [ 1.4142,  0.    ]], dtype=float32)
    """
    no_values = jnp.zeros_like(as_float(rewards))
    returns_to_go, _ = gae(rewards, no_values, mask, gamma=gamma, lam=1.0)
    return whiten(returns_to_go, mask)
