"""PPO-ptx: every step of the policy learns pretraining texts too, so that it does not forget them (Ouyang et al. 2022).

Shapes: r rows of texts, t tokens of each.
"""

from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax import losses, models, sharding
from rlhf_jax.algorithms import pretrain
from rlhf_jax.algorithms.context import Context, check_positive
from rlhf_jax.data.pipeline import WHOLE, PackedBatch
from rlhf_jax.logprobs import next_token_logps
from rlhf_jax.masking import keep, token_mean
from rlhf_jax.models import ModelSpec
from rlhf_jax.numerics import require
from rlhf_jax.types import Hyper, Key, LossFn, Mean, Params


@dataclass(frozen=True)
class PretrainingMix:
    """Texts of the experiment beside the rollouts, and what they weigh."""

    coef: float = 27.8
    """Weight of the texts' cross-entropy, a mean over tokens."""
    batch_size: int = 64
    """Rows of text a step."""
    row_length: int = 64
    """Tokens in a row; several texts are packed into one."""
    rows: int = 1024
    """Rows that are held on the devices, from which each step draws its own."""

    def __post_init__(self) -> None:
        check_positive(self, "batch_size", "row_length", "rows")
        require("ptx.coef", self.coef, "(0, inf)")


@flax.struct.dataclass
class Mixed:
    """A minibatch of rollouts with rows of text."""

    rollout: Any
    texts: PackedBatch
    share: Float[Array, " r"]  # what a token of text weighs, where an element of the policy's loss weighs 1


def held(config: PretrainingMix, context: Context) -> PackedBatch:
    """The rows that steps draw from, whole on every device; the first ones of the experiment's texts, by its seed."""
    reviews = context.reviews.train
    batches = pretrain.batches(
        reviews, context, row_length=config.row_length, batch_size=config.rows, seed=context.seed, shard=WHOLE
    )
    return sharding.put(next(batches), sharding.replicated(context.mesh))


def shapes(config: PretrainingMix) -> PackedBatch:
    """Of `held`, as shapes alone."""
    rows: Any = [jax.ShapeDtypeStruct((config.rows, config.row_length), x) for x in (jnp.int32, jnp.int32, jnp.bool_)]
    return PackedBatch(*rows)


def mixed(config: PretrainingMix, rollout: Any, count: Array, texts: PackedBatch, key: Key) -> Mixed:
    """A minibatch with rows drawn by the key; `count` is that of the policy's loss over all of it.

    The two terms have other counts. The share turns the texts' mean into that of the policy's loss, before a split into
    microbatches, which therefore changes nothing.
    """
    rows = jax.random.randint(key, (config.batch_size,), 0, config.rows)
    some = jax.tree.map(lambda x: jnp.asarray(x)[rows], texts)
    share = count / jnp.maximum(some.loss_mask.sum(), 1)
    return Mixed(rollout, some, jnp.full(config.batch_size, share))


def with_texts(loss_fn: LossFn, spec: ModelSpec) -> LossFn:
    """A policy's loss, of `Mixed`, with the mean of `losses.pretraining_mix` added, times `hyper["ptx_coef"]`."""

    def added(params: Params, batch: Mixed, hyper: Hyper, key: Key) -> tuple[Mean, dict[str, Mean]]:
        loss, metrics = loss_fn(params, batch.rollout, hyper, key)
        texts, mask = batch.texts, batch.texts.segment_ids > 0
        states = models.hidden(spec, params, texts.tokens, mask, segment_ids=texts.segment_ids)
        logps = next_token_logps(models.unembed(spec, params, states), texts.tokens)
        terms, d = losses.pretraining_mix(logps, ptx_coef=hyper["ptx_coef"])
        total = loss.total + (keep(terms, texts.loss_mask) * batch.share[:, None]).sum()
        return Mean(total, loss.count), metrics | {"ptx_loss": token_mean(d["cross_entropy"], texts.loss_mask)}

    return added
