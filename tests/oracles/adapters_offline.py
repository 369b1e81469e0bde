"""ILQL, as trlx has it: a mean over the actions of the batch."""

import jax
import jax.numpy as jnp

from rlhf_jax import logprobs, losses, masking
from tests.oracles.comparing import Oracle


def ilql(x, p, cql_coef):
    """trlx's heads come first, and its values have one state more, after the last action."""
    q, target_q = (jnp.moveaxis(each, 0, -2) for each in (x.qs, x.target_qs))
    return losses.offline.ilql(
        q, target_q, x.values[:, :-1], x.rewards, x.actions, x.mask, gamma=p.gamma, tau=p.tau, cql_coef=cql_coef
    )


def mean(x, loss):
    return masking.token_mean(loss, x.mask).value


def awac(x, p):
    """trlx's policy extraction: cross-entropy weighted by exp(β (Q − V))."""
    weights = jnp.exp(p.beta * jax.lax.stop_gradient(ilql(x, p, 0.0)[1]["advantage"]))
    return losses.supervised.weighted_cross_entropy(logprobs.token_logps(x.logits, x.actions), weights)[0]


def conservative(x, p):
    """Both heads' terms."""
    return mean(x, sum(losses.offline.conservative(q, x.actions)[0] for q in x.qs))


def in_pieces(x, p):
    """The Q and V terms without `ilql`."""
    values, kept = x.values[:, :-1], x.mask
    targets = losses.offline.bellman_targets(x.rewards, jax.lax.stop_gradient(values), kept, gamma=p.gamma)
    taken, target = (jnp.take_along_axis(q, x.actions[None, ..., None], -1)[..., 0] for q in (x.qs, x.target_qs))
    q_loss = losses.offline.q_regression(jnp.moveaxis(taken, 0, -1), targets)[0]
    return mean(x, q_loss + losses.offline.expectile(values, target.min(0), tau=p.tau)[0])


ORACLES = (
    Oracle(
        "losses.offline.ilql",
        "trlx",
        "ilql",
        lambda x, p: mean(x, ilql(x, p, p.cql_scale)[0] + p.awac_scale * awac(x, p)),
    ),
    Oracle("losses.offline.ilql", "trlx", "ilql_q_and_v", lambda x, p: mean(x, ilql(x, p, 0.0)[0])),
    Oracle("losses.offline.q_regression", "trlx", "ilql_q_and_v", in_pieces),
    Oracle("losses.offline.bellman_targets", "trlx", "ilql_q_and_v", in_pieces),
    Oracle("losses.offline.conservative", "trlx", "ilql_cql", conservative),
    Oracle("losses.supervised.weighted_cross_entropy", "trlx", "ilql_awac", lambda x, p: mean(x, awac(x, p))),
    Oracle(
        "losses.offline.expectile",
        "rlax",
        "expectile_loss",
        lambda x, p: losses.offline.expectile(x.scores, x.ratings, tau=p.tau)[0],
    ),
)
