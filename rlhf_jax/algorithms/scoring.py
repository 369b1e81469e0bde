"""What the scoring of a rollout says of the policy that wrote it beside its reference.

Shapes: b rollouts, m of them, n completion tokens, t tokens of prompt and completion.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax import kl, masking
from rlhf_jax.algorithms.rollouts import loss_mask, row_mean
from rlhf_jax.logprobs import entropy, ratio_deviation
from rlhf_jax.types import Metrics, Rollout


class Compared(NamedTuple):
    """A forward pass of the policy over the first m rollouts, without a cache, as training reads them."""

    logps: Float[Array, "m n"]
    values: Float[Array, "m n"] | None
    """Of the policy's own head, where it has one."""
    entropies: Float[Array, "m n"]
    exact: Float[Array, "m n"]
    """KL to the reference, over the whole vocabulary."""


def compared(
    logps: Float[Array, "m n"],
    logits: Float[Array, "m n v"],
    values: Float[Array, "m n"] | None,
    ref_logits: Float[Array, "m n v"],
    mask: Bool[Array, "m n"],
    *,
    temperature: float,
) -> Compared:
    """What the logits of both say of each completion token; 0 where `mask` is False."""
    entropies = masking.keep(entropy(logits, temperature=temperature), mask)
    return Compared(
        logps, values, entropies, masking.keep(kl.exact(logits / temperature, ref_logits / temperature), mask)
    )


def metrics(
    rollout: Rollout,
    sampled_logps: Float[Array, "b t"],
    read: Compared,
    has_ended: Bool[Array, " b"],
    *,
    exact_kl_rows: int,
) -> Metrics:
    """Of a scored rollout; entropy, exact KL and `sampling_deviation` of the rows that were read again."""
    mask, again, prompt = loss_mask(rollout), len(read.logps), rollout.tokens.shape[1] - read.logps.shape[1]
    k1 = masking.keep(kl.k1(rollout.logps, rollout.ref_logps), mask)
    return {
        "kl": masking.masked_mean(k1, mask),
        "seq_kl": row_mean(k1.sum(-1), rollout.used),
        "seq_kl_exact": row_mean(read.exact.sum(-1), rollout.used, rows=exact_kl_rows),
        "entropy": masking.masked_mean(read.entropies, mask[:again, prompt:]),
        "sampling_deviation": ratio_deviation(read.logps, sampled_logps[:again, prompt:]),
        "length": row_mean(mask.sum(-1, dtype=jnp.float32), rollout.used),
        "no_eos": row_mean((~has_ended).astype(jnp.float32), rollout.used),
    }


def stale_metrics(rollout: Rollout, step: Int[Array, ""], max_weight: float) -> Metrics:
    """How far a policy that has taken so many steps has moved on from those that wrote a rollout."""
    mask, cut = loss_mask(rollout), jnp.exp(rollout.old_logps - rollout.logps) > max_weight
    return {
        "staleness": row_mean((step - rollout.written_at).astype(jnp.float32), rollout.used),
        "stale_kl": masking.masked_mean(kl.k3(rollout.logps, rollout.old_logps), mask),
        "weights_cut": masking.masked_mean(cut.astype(jnp.float32), mask),
    }
