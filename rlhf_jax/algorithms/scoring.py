"""What the scoring of a rollout says of the policy that wrote it beside its reference.

Shapes: b rollouts, m of them, n completion tokens, t tokens of prompt and completion.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax import kl, masking, models, train_step
from rlhf_jax.algorithms import packing as packed
from rlhf_jax.algorithms.packing import Packing
from rlhf_jax.algorithms.rollouts import loss_mask, row_mean
from rlhf_jax.logprobs import ratio_deviation
from rlhf_jax.models import ModelSpec
from rlhf_jax.rewards.ensemble import Ensemble, combined, each, reward
from rlhf_jax.types import Metrics, Params, Rollout


class Compared(NamedTuple):
    """A forward pass of the policy over the first m rollouts, without a cache, as training reads them."""

    logps: Float[Array, "m n"]
    values: Float[Array, "m n"] | None
    """Of the policy's own head, where it has one."""
    entropies: Float[Array, "m n"]
    exact: Float[Array, "m n"]
    """KL to the reference, over the whole vocabulary."""


def in_parts(packing: Packing | None, fn: Callable[[Rollout], Any], rollout: Rollout, parts: int) -> Any:
    """fn(rollout) for a row-wise function, a part at a time: of so many, or of those that completions are laid in."""
    if packing is None:
        return train_step.in_parts(fn, rollout, parts)
    return packed.summed(packing, fn, rollout)


def scores(
    spec: ModelSpec, packing: Packing | None, params: Params, ensemble: Ensemble | None, rows: Rollout
) -> dict[str, Float[Array, " b"]]:
    """`rewards.ensemble.reward` of what a reward reads of rows, as they are or laid in parts."""
    mask = rows.prompt_mask | rows.read
    if packing is None or rows.placed is None:
        return reward(spec, params, ensemble, rows.tokens, mask)

    def read(one: Params) -> Float[Array, " b"]:
        return models.read_head(one, packed.at_last(packing, spec, one["trunk"], rows, mask))

    return combined(each(spec, params, ensemble, read), ensemble)


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
