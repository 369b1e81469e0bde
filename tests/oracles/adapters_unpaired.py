"""Losses of single completions, each desirable or not, from log-probabilities a token."""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import logprobs, losses
from tests.oracles.comparing import Oracle


def logratios(x):
    return logprobs.sequence_logps(x.logps - x.ref_logps, x.mask)


def mismatched(x):
    """Log-ratios of completions beside other prompts than their own."""
    return np.where(x.kl_mask, x.kl_logps - x.ref_kl_logps, 0).sum(-1)


def kto_with(baseline):
    """KTO's mean over the batch with z = `baseline(x)`, which has no gradient."""

    def ours(x, p):
        weights = {"desirable_weight": p.desirable_weight, "undesirable_weight": p.undesirable_weight}
        z = jax.lax.stop_gradient(jnp.asarray(baseline(x)))
        return losses.unpaired.kto(logratios(x), x.desirable, z, beta=p.beta, **weights)[0].mean()

    return ours


def clamped(x):
    """z as section 4.1 of the paper has it."""
    return losses.unpaired.kto_kl_baseline(mismatched(x))


def own(x):
    """z as some have it: of the batch's own completions, which are what the loss moves."""
    return jnp.maximum(logratios(x).mean(), 0)


def shifts(x, p):
    """BCO's state after each of the two batches that the peer saw."""
    state, states = losses.unpaired.RewardShift.init(), []
    for rows in (slice(0, 6), slice(2, 5)):
        state = state.update(p.beta * logratios(x)[rows], x.desirable[rows])
        states.append(state)
    return states


def pooled(state):
    """TRL's δ: one running mean over desirable and undesirable completions together."""
    return (state.desirable + state.undesirable).value


def halfway(state):
    """The paper's."""
    return state.delta


def deltas(of):
    return lambda x, p: jnp.stack([of(state) for state in shifts(x, p)])


def bco_with(of):
    """BCO's losses of the second batch, in TRL's order: the desirable ones first."""

    def ours(x, p):
        rows = np.array([3, 2, 4])
        return losses.unpaired.bco(logratios(x)[rows], x.desirable[rows], of(shifts(x, p)[-1]), beta=p.beta)[0]

    return ours


ONE_MEAN = "δ is one mean over desirable and undesirable; equal to the paper's where both are equally many"

ORACLES = (
    Oracle(
        "losses.unpaired.kto",
        "trl_1_16",
        "kto",
        kto_with(clamped),
        reading="z is the KL of mismatched completions, as in the paper; of the batch's own it is another",
        otherwise=kto_with(own),
    ),
    Oracle(
        "losses.unpaired.kto",
        "trl_1_16",
        "kto_negative_kl",
        kto_with(clamped),
        reading="z is clamped at 0, as in the paper; without the clamp it is another",
        otherwise=kto_with(lambda x: mismatched(x).mean()),
    ),
    Oracle("losses.unpaired.kto_kl_baseline", "trl_1_16", "kto", kto_with(clamped)),
    Oracle(
        "losses.unpaired.kto",
        "trl_1_16",
        "apo_zero_unpaired",
        lambda x, p: losses.unpaired.kto(logratios(x), x.desirable, 0.0, beta=p.beta)[0].mean(),
    ),
    Oracle(
        "losses.unpaired.bco",
        "trl_1_12",
        "bco_losses",
        bco_with(pooled),
        reading=ONE_MEAN,
        otherwise=bco_with(halfway),
    ),
    Oracle(
        "losses.unpaired.RewardShift",
        "trl_1_12",
        "bco_deltas",
        deltas(pooled),
        reading=ONE_MEAN,
        otherwise=deltas(halfway),
    ),
)
