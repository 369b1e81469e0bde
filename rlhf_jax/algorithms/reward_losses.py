"""What a reward model learns by, by name: `LOSSES[name](spec, config)` is a loss of (params, batch, hyper, key).

Shapes: b prompts, k completions, s judged places of a completion.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rlhf_jax import losses, masking, models
from rlhf_jax.models import ModelSpec
from rlhf_jax.types import Hyper, JudgedBatch, Key, LossFn, Mean, Params, PreferenceBatch

if TYPE_CHECKING:
    from rlhf_jax.algorithms.reward_model import Config

Loss = Literal[
    "bradley_terry",
    "k_wise",
    "plackett_luce",
    "best_of_k",
    "scalar_rating",
    "ordinal_rating",
    "outcome_bce",
    "process_bce",
]
"""Functions of losses.reward."""


def pair_loss(spec: ModelSpec, config: "Config") -> LossFn:
    """(params, PreferenceBatch, hyper, key) -> Bradley-Terry's loss a pair, in nats.

    Of a pair with a probability p: −p log σ(h) − (1 − p) log σ(−h), h = r_chosen − r_rejected − margin.
    """

    def loss_fn(params: Params, batch: PreferenceBatch, hyper: Hyper, key: Key) -> tuple[Mean, dict[str, Mean]]:
        del key
        numbers = {name: hyper[name] for name in config.hyper}
        if not config.centering:
            params = _without_bias(params)
        scores = batch_scores(spec, params, batch)
        chosen, rejected = (jnp.take_along_axis(scores, batch.pairs[..., i], axis=1) for i in (0, 1))
        margin = numbers.get("margin_scale", 0.0) * batch.margins
        smoothing = numbers.get("label_smoothing", 0.0)
        loss, diagnostics = losses.bradley_terry(chosen, rejected, margin=margin, label_smoothing=smoothing)
        if batch.probabilities is not None:
            turned, _ = losses.bradley_terry(rejected, chosen, margin=-margin, label_smoothing=smoothing)
            loss = batch.probabilities * loss + (1 - batch.probabilities) * turned
        if config.centering:
            loss += numbers["centering"] * losses.centering(chosen, rejected)[0]
        judged = batch.weights > 0
        return masking.token_mean(loss, judged), {
            name: masking.token_mean(diagnostics[name], judged) for name in ("accuracy", "margin")
        }

    return loss_fn


def group_loss(spec: ModelSpec, config: "Config") -> LossFn:
    """(params, PreferenceBatch, hyper, key) -> a loss of all the completions of a prompt, in nats a prompt."""

    def loss_fn(params: Params, batch: PreferenceBatch, hyper: Hyper, key: Key) -> tuple[Mean, dict[str, Mean]]:
        del hyper, key
        scores, kept = batch_scores(spec, _without_bias(params), batch), jnp.any(batch.mask, axis=-1)
        ranks = jnp.where(kept, batch_ranks(batch), scores.shape[1])
        if config.loss == "k_wise":
            loss, diagnostics = losses.k_wise(scores, ranks, kept)
        elif config.loss == "best_of_k":
            loss, diagnostics = losses.best_of_k(scores, ranks.argmin(1), kept)
        else:
            ranked, there = (jnp.take_along_axis(x, ranks.argsort(1), axis=1) for x in (scores, kept))
            loss, diagnostics = losses.plackett_luce(ranked, there)
        judged = jnp.any(batch.weights > 0, axis=-1)
        return masking.token_mean(loss, judged), {"accuracy": masking.token_mean(diagnostics["accuracy"], judged)}

    return loss_fn


def judged_loss(spec: ModelSpec, config: "Config") -> LossFn:
    """(params, JudgedBatch, hyper, key) -> the loss of a judged place: nats, or half the squared error of a rating."""

    def loss_fn(params: Params, batch: JudgedBatch, hyper: Hyper, key: Key) -> tuple[Mean, dict[str, Mean]]:
        del hyper, key
        scores = models.scores_at(spec, params, batch.tokens, batch.mask, batch.ends)
        if config.loss == "scalar_rating":
            loss, diagnostics = losses.scalar_rating(scores, batch.targets)
        elif config.loss == "ordinal_rating":
            levels = jnp.asarray(batch.targets, jnp.int32)
            loss, diagnostics = losses.ordinal_rating(scores, levels, thresholds(params))
        elif config.loss == "outcome_bce":
            loss, diagnostics = losses.outcome_bce(scores, batch.targets)
        else:
            loss, diagnostics = losses.process_bce(scores, batch.targets, batch.where)
        metrics = {name: diagnostics[name] for name in ("accuracy",) if name in diagnostics}
        return masking.token_mean(loss, batch.where), {
            name: masking.token_mean(x, batch.where) for name, x in metrics.items()
        }

    return loss_fn


LOSSES: dict[Loss, Callable[[ModelSpec, "Config"], LossFn]] = {
    "bradley_terry": pair_loss,
    **dict.fromkeys(("k_wise", "plackett_luce", "best_of_k"), group_loss),
    **dict.fromkeys(("scalar_rating", "ordinal_rating", "outcome_bce", "process_bce"), judged_loss),
}


def of_heads(loss_fn: LossFn, *, own_rows: bool) -> LossFn:
    """The mean loss of heads on one trunk: each on the same batch, or on its own, along the batch's second axis."""
    axes = ({"trunk": None, "head": 0}, 1 if own_rows else None, None, None)

    def heads_loss(params: Params, batch: object, hyper: Hyper, key: Key) -> tuple[Mean, dict[str, Mean]]:
        each = jax.vmap(loss_fn, in_axes=axes)(params, batch, hyper, key)
        return jax.tree.map(lambda x: x.sum(0), each)

    return heads_loss


def batch_scores(spec: ModelSpec, params: Params, batch: PreferenceBatch) -> Float[Array, "b k"]:
    """One score a completion."""
    b, k, t = batch.tokens.shape
    return models.score(spec, params, batch.tokens.reshape(b * k, t), batch.mask.reshape(b * k, t)).reshape(b, k)


def batch_ranks(batch: PreferenceBatch) -> Int[Array, "b k"]:
    """How many completions were preferred to each: 0 is the best, equal ones tie."""
    lost = jax.nn.one_hot(batch.pairs[..., 1], batch.tokens.shape[1]) * (batch.weights > 0)[..., None]
    return lost.sum(1).astype(jnp.int32)


def thresholds(params: Params) -> Float[Array, " k"]:
    """The increasing thresholds of an ordinal rating, from what is trained: the first, and the logs of the gaps."""
    first, gaps = params["head"]["thresholds"][:1], params["head"]["thresholds"][1:]
    return jnp.concatenate([first, first + jnp.cumsum(jnp.exp(gaps))])


def first_thresholds(shares: np.ndarray) -> np.ndarray:
    """What is trained of thresholds, where a score of 0 gives every level its share: the constant's likelihood."""
    below = np.cumsum(shares)[:-1]
    places = np.log(below) - np.log1p(-below)
    return np.concatenate([places[:1], np.log(np.diff(places))]).astype(np.float32)


def _without_bias(params: Params) -> Params:
    """A difference of scores does not see the bias: its gradient is rounding, and Adam would make steps of it."""
    return {**params, "head": {**params["head"], "bias": jax.lax.stop_gradient(params["head"]["bias"])}}
