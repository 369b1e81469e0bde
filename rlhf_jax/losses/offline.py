"""ILQL: implicit language Q-learning, from fixed data, and the pieces that it is made of.

Values stand as everywhere: `q_values[t]` holds Q(s_t, ·) beside tokens[t], the action taken there, and `values[t]` is
V(s_t), before that token; both are read from the hidden state at t − 1.

Shapes: *b any leading axes, t tokens, h heads of Q, v vocabulary. Units: those of the rewards, squared in the losses.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.advantages import gae
from rlhf_jax.logprobs import token_logps
from rlhf_jax.masking import keep
from rlhf_jax.numerics import as_float, require
from rlhf_jax.types import ArrayLike, Scalar, typed


@typed
def bellman_targets(
    rewards: Float[ArrayLike, "*b t"], values: Float[ArrayLike, "*b t"], mask: Bool[ArrayLike, "*b t"], *, gamma: Scalar
) -> Float[Array, "*b t"]:
    """What Q should be: r_t + γ V(s_{t+1}), with V = 0 after the last kept token; 0 outside the mask.

    The λ-return of `advantages.gae` for λ = 0, on the same terms: t + 1 is the next kept token. Gradients flow.
    Raises ValueError if gamma is outside [0, 1].

    >>> mask = jnp.array([True, True, False])
    >>> bellman_targets(jnp.array([0.0, 1.0, 9.0]), jnp.array([0.5, 0.8, 9.0]), mask, gamma=0.5)
    Array([0.4, 1. , 0. ], dtype=float32)
    """
    return gae(rewards, values, mask, gamma=gamma, lam=0.0)[1]


@typed
def q_regression(
    q_values: Float[ArrayLike, "*b h"], targets: Float[ArrayLike, "*b"]
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """Σ_h (Q_h(s, a) − target)²: every head learns the same target. Kostrikov et al. 2022 (IQL), eq. 6.

    `q_values` are those of the action taken. Diagnostics: `spread`, the largest Q minus the smallest.

    >>> q_regression(jnp.array([[1.0, 2.0]]), jnp.array([0.0]))[0]
    Array([5.], dtype=float32)
    """
    q_values = as_float(q_values)
    errors = q_values - as_float(targets)[..., None]
    return jnp.square(errors).sum(-1), {"spread": q_values.max(-1) - q_values.min(-1)}


@typed
def expectile(
    values: Float[ArrayLike, "*b"], targets: Float[ArrayLike, "*b"], *, tau: Scalar = 0.7
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """|τ − 1(u < 0)| u² with u = target − V: V learns the τ-expectile of its targets, their mean at τ = ½.

    Kostrikov et al. 2022 (IQL), eq. 5, with targets Q(s, a): the nearer τ is to 1, the nearer V comes to the best
    action in the data. Diagnostics: `advantage` u. Raises ValueError if tau is outside (0, 1).

    >>> expectile(jnp.array([0.0, 2.0]), jnp.array([1.0, 1.0]), tau=0.9)[0]
    Array([0.9, 0.1], dtype=float32)
    """
    require("tau", tau, "(0, 1)")
    error = as_float(targets) - as_float(values)
    return jnp.where(error < 0, 1 - tau, tau) * jnp.square(error), {"advantage": error}


@typed
def conservative(
    q_values: Float[ArrayLike, "*b v"], actions: Int[ArrayLike, "*b"]
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """−Q(s, a) + log Σ_a' exp Q(s, a'): holds down the Q of actions that the data do not take.

    Kumar et al. 2020 (CQL), eq. 4; Snell et al. 2022 (ILQL), section 4. It is the cross-entropy of Q as logits, in nats
    although Q is in units of the reward. No diagnostics.

    >>> conservative(jnp.array([[0.0, 0.0]]), jnp.array([1]))[0]
    Array([0.6931], dtype=float32)
    """
    return -token_logps(q_values, actions), {}


@typed
def ilql(
    q_values: Float[ArrayLike, "*b t h v"],
    target_q_values: Float[ArrayLike, "*b t h v"],
    values: Float[ArrayLike, "*b t"],
    rewards: Float[ArrayLike, "*b t"],
    actions: Int[ArrayLike, "*b t"],
    mask: Bool[ArrayLike, "*b t"],
    *,
    gamma: Scalar = 0.99,
    tau: Scalar = 0.7,
    cql_coef: Scalar = 0.1,
    lam: Scalar = 0.0,
) -> tuple[Float[Array, "*b t"], dict[str, Float[Array, "*b t"]]]:
    """The loss of Q and V: regression on the Bellman target, an expectile, and the conservative term.

        Σ_h (Q_h(s, a) − sg[r + γ V(s')])²  +  |τ − 1(u < 0)| u²  +  cql_coef Σ_h (log Σ_a' exp Q_h(s, a') − Q_h(s, a))

    with u = sg[min_h Q̂_h(s, a)] − V(s). Snell et al. 2022 (ILQL), section 4. `target_q_values` Q̂ come from a slow
    copy of the heads; two of them are usual. With `lam` Q learns λ-returns (`advantages.gae`) in place of r + γ V(s'):
    at 1 what the sequence got, so that Q is that of the policy that wrote it. The policy has no part in it: train it by
    `supervised.cross_entropy` (trlx instead weighs that by exp(β u), which `weighted_cross_entropy` does), and sample
    from `perturbed_logits`. Defaults are trlx's; the paper's depend on the task. Loss and diagnostics are 0 outside the
    mask. Diagnostics: `q_loss`, `v_loss` and `cql_loss` before its coefficient, and `advantage` u. Raises ValueError if
    gamma or lam is outside [0, 1], tau outside (0, 1) or cql_coef < 0.

    >>> zeros, reward = jnp.zeros((1, 2, 2)), jnp.array([3.0])  # one token, two heads, a vocabulary of two
    >>> ilql(zeros, zeros, jnp.array([1.0]), reward, jnp.array([0]), jnp.array([True]), cql_coef=0.0)[0]
    Array([18.3], dtype=float32)
    """
    require("cql_coef", cql_coef, "[0, inf)")
    kept = jnp.asarray(mask)
    actions = jnp.where(kept, actions, 0)
    q, target_q = (jnp.where(kept[..., None, None], as_float(x), 0) for x in (q_values, target_q_values))
    taken, target_taken = (jnp.take_along_axis(x, actions[..., None, None], -1)[..., 0] for x in (q, target_q))
    still = jax.lax.stop_gradient
    targets = gae(rewards, still(as_float(values)), mask, gamma=gamma, lam=lam)[1]
    q_loss, _ = q_regression(taken, targets)
    v_loss, diagnostics = expectile(keep(values, mask), still(target_taken.min(-1)), tau=tau)
    cql_loss = conservative(q, jnp.broadcast_to(actions[..., None], q.shape[:-1]))[0].sum(-1)
    terms = {"q_loss": q_loss, "v_loss": v_loss, "cql_loss": cql_loss, **diagnostics}
    return keep(q_loss + v_loss + cql_coef * cql_loss, mask), {name: keep(x, mask) for name, x in terms.items()}


@typed
def perturbed_logits(
    logits: Float[ArrayLike, "*b v"],
    q_values: Float[ArrayLike, "*b v"],
    values: Float[ArrayLike, "*b"],
    *,
    beta: Scalar,
) -> Float[Array, "*b v"]:
    """The policy that ILQL extracts: log π_β + β (Q − V), as logits for a sampler to filter and draw from.

    Snell et al. 2022, section 4; `q_values` are the smallest of the (target) heads'. V is the same for every token, and
    cancels in the softmax. Logits of −∞ stay. β = 0 is the behaviour policy π_β. Raises ValueError if beta < 0.

    >>> logits = perturbed_logits(jnp.zeros(2), jnp.array([1.0, 3.0]), jnp.array(2.0), beta=0.5)
    >>> logits[1] - logits[0]
    Array(1., dtype=float32)
    """
    require("beta", beta, "[0, inf)")
    advantage = as_float(q_values) - as_float(values)[..., None]
    return jax.nn.log_softmax(as_float(logits), axis=-1) + beta * advantage
