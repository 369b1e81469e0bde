"""Losses of single completions, each desirable or not, from log-probabilities a token."""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import logprobs, losses
from tests.oracles.comparing import Oracle


def logratios(x):
    return logprobs.sequence_logps(x.logps - x.ref_logps, x.mask)


def mismatched(x):
    """Mean log-ratio of completions beside other prompts than their own."""
    return np.where(x.kl_mask, x.kl_logps - x.ref_kl_logps, 0).sum(-1).mean()


def kto_with(baseline):
    """KTO's mean over the batch with z = `baseline(x)`, which has no gradient."""

    def ours(x, p):
        weights = {"desirable_weight": p.desirable_weight, "undesirable_weight": p.undesirable_weight}
        z = jax.lax.stop_gradient(jnp.asarray(baseline(x)))
        return losses.unpaired.kto(logratios(x), x.desirable, z, beta=p.beta, **weights)[0].mean()

    return ours


def clamped(x):
    """z as section 4.1 of the paper has it."""
    return jnp.maximum(mismatched(x), 0)


def own(x):
    """z as some have it: of the batch's own completions, which are what the loss moves."""
    return jnp.maximum(logratios(x).mean(), 0)


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
        otherwise=kto_with(mismatched),
    ),
)
