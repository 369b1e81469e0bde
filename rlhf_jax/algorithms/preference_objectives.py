"""What the preference stage makes small, of a batch of pairs or of single completions.

Shapes: b prompts, k completions of each, p pairs of them, t tokens.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax import losses, masking
from rlhf_jax.algorithms.preference_losses import Side, Term, weighted
from rlhf_jax.algorithms.reference import completion_logps
from rlhf_jax.losses import RewardShift
from rlhf_jax.models import ModelSpec
from rlhf_jax.models.experts import with_load_balance
from rlhf_jax.types import ArrayLike, Hyper, Key, LossFn, Mean, Metrics, Params, PreferenceBatch, ThumbBatch


def pair_loss(spec: ModelSpec, terms: Sequence[Term]) -> LossFn:
    """(params, PreferenceBatch with ref_logps, hyper, key) -> the weighted losses a pair, in nats."""

    def loss_fn(params: Params, batch: PreferenceBatch, hyper: Hyper, key: Key) -> tuple[Mean, dict[str, Mean]]:
        del key
        logps, routing, mask = completion_logps(spec, params, batch)
        chosen, rejected = sides(batch, logps)
        soft = None if batch.probabilities is None else jnp.reshape(batch.probabilities, -1)
        loss, diagnostics = weighted(terms, chosen, rejected, hyper, soft)
        judged = jnp.reshape(batch.weights, -1) > 0
        diagnostics |= {"chosen_logps": chosen.logps, "rejected_logps": rejected.logps}
        found = {name: masking.token_mean(x, judged) for name, x in diagnostics.items()}
        total, added = with_load_balance(spec, masking.token_mean(loss, judged), routing, mask)
        return total, found | added

    return loss_fn


def sides(batch: PreferenceBatch, logps: Float[Array, "b k"]) -> tuple[Side, Side]:
    """The chosen and the rejected completions of all pairs, [b·p]."""
    tokens = jnp.maximum(batch.completion_mask.sum(-1), 1).astype(jnp.float32)

    def side(index: int) -> Side:
        taken = (jnp.take_along_axis(x, batch.pairs[..., index], axis=1) for x in (logps, batch.ref_logps, tokens))
        return Side(*(x.reshape(-1) for x in taken))

    return side(0), side(1)


def thumb_loss(spec: ModelSpec, term: Term) -> LossFn:
    """(params, ThumbBatch with ref_logps, hyper, key) -> the loss a completion; `hyper` has the batch's number."""

    def loss_fn(params: Params, batch: ThumbBatch, hyper: Hyper, key: Key) -> tuple[Mean, dict[str, Mean]]:
        del key
        desirable = jnp.asarray(batch.desirable)
        logps, routing, mask = completion_logps(spec, params, beside(batch, own=True))
        loss, diagnostics = term.of_thumbs(logps[:, 0] - batch.ref_logps[:, 0], desirable, hyper)
        everyone = jnp.ones_like(desirable)
        found = {
            "desirable_reward": masking.token_mean(diagnostics["reward"], desirable),
            "undesirable_reward": masking.token_mean(diagnostics["reward"], ~desirable),
        }
        total, added = with_load_balance(spec, masking.token_mean(loss, everyone), routing, mask)
        return total, found | added

    return loss_fn


def beside(batch: ThumbBatch, *, own: bool) -> ThumbBatch:
    """The batch with the rows' own completions alone, or with those of other prompts alone."""
    one = slice(0, 1) if own else slice(1, 2)
    names = ("tokens", "mask", "completion_mask", "ref_logps")
    return dataclasses.replace(batch, **{name: vars(batch)[name][:, one] for name in names})


def number(term: Term, shift: Any, others: Callable[[], Float[ArrayLike, " b"]]) -> Hyper:
    """What kto or bco takes of a whole batch, or of all before it; `others` are log-ratios beside other prompts."""
    return {"kl_baseline": losses.kto_kl_baseline(others())} if term.loss == "kto" else {"delta": shift.delta}


def shifted(shift: RewardShift, batch: ThumbBatch, metrics: Metrics) -> RewardShift:
    """BCO's running means after a step; a step that was not finite leaves them as they are."""
    liked = batch.desirable.sum().astype(jnp.float32)
    count = batch.desirable.size - liked
    after = RewardShift(
        shift.desirable + Mean(metrics["desirable_reward"] * liked, liked),
        shift.undesirable + Mean(metrics["undesirable_reward"] * count, count),
    )
    return jax.tree.map(lambda old, new: jnp.where(jnp.isfinite(metrics["loss"]), new, old), shift, after)
