"""Elastic weight consolidation: what a policy's texts needed of its parameters is held near where training starts.

The penalty is λ/2 Σ_i F_i (θ_i − θ0_i)² (Kirkpatrick et al. 2017, eq. 3). F is the diagonal of the empirical Fisher
information of the starting policy θ0: the mean over texts of (∂ log p(text) / ∂θ)², the texts being those of the
experiment, not the policy's own (`losses.regularizers.fisher_diagonal`).
"""

from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import digests, hosts, losses, models, sharding
from rlhf_jax.algorithms.context import Context, check_positive
from rlhf_jax.checkpoint import damage, load_params, save_params
from rlhf_jax.data.text import sentence_rows
from rlhf_jax.logprobs import next_token_logps
from rlhf_jax.losses.regularizers import fisher_diagonal
from rlhf_jax.masking import keep
from rlhf_jax.metrics import Progress
from rlhf_jax.models import lora
from rlhf_jax.numerics import require
from rlhf_jax.types import Hyper, Key, LossFn, Mean, Params

FOLDER = "fisher"
"""Of a stage, where F is kept."""


@dataclass(frozen=True)
class Consolidation:
    """A price for moving parameters that the experiment's texts depend on."""

    coef: float = 1.0
    """λ, beside a loss that is a mean."""
    texts: int = 256
    """How many texts F is the mean of, drawn by the experiment's seed."""
    row_length: int = 64
    """Tokens of a text that are read, from its start."""

    def __post_init__(self) -> None:
        check_positive(self, "texts", "row_length")
        require("ewc.coef", self.coef, "(0, inf)")


@flax.struct.dataclass
class Anchor:
    """Trees like what trains of a policy."""

    params: Params
    """θ0."""
    fisher: Params
    """F, float32."""


def anchored(config: Consolidation, context: Context, name: str, start: Params) -> Anchor:
    """The policy that a stage starts from, with F: read from `<stage>/fisher`, or found and written there."""
    folder = context.stage_dir(name) / FOLDER
    wrong = damage(folder)
    if wrong is not None:
        if hosts.from_writer(folder.exists):
            aside = hosts.from_writer(lambda: digests.set_aside(folder))
            Progress(name, 0).note(f"{name}: {wrong}; it is set aside as {aside} and found again")
        save_params(folder, fisher(config, context, name, start))
    return Anchor(start, load_params(folder, shapes(start)))


def shapes(start: Params) -> Params:
    """Of F, in shards like those of what it is of."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), start)


def fisher(config: Consolidation, context: Context, name: str, start: Params) -> Params:
    """F, one text's gradient after the other; devices that split a batch read copies of it."""
    texts, tokenizer = context.reviews.train, context.tokenizer
    chosen = context.rng(f"{name}/{FOLDER}").permutation(len(texts))[: config.texts]
    tokens = np.full((len(chosen), config.row_length), tokenizer.pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for i, index in enumerate(chosen.tolist()):
        row = sentence_rows([texts[index].text], tokenizer, row_length=config.row_length)[0].tokens
        tokens[i, : len(row)], mask[i, : len(row)] = row, True

    copies = sharding.row_multiple(context.mesh)  # of a text in a batch, which the mesh divides

    def logp(own: Params, example: Any, base: Params) -> jax.Array:
        params = lora.merge(base, own)
        tokens, mask = (jnp.broadcast_to(x, (copies, *x.shape)) for x in example)
        states = models.hidden(context.spec, params, tokens, mask)
        logps = next_token_logps(models.unembed(context.spec, params, states), tokens)
        return keep(logps, mask).sum() / copies

    def program(start: Params, base: Params, examples: Any) -> Params:
        return fisher_diagonal(lambda own, example: logp(own, example, base), start, examples)

    layout = jax.tree.map(lambda x: x.sharding, start)
    with sharding.scope(context.mesh):
        return jax.jit(program, out_shardings=layout)(start, context.base, context.replicated((tokens, mask)))


def held(loss_fn: LossFn, anchor: Anchor) -> LossFn:
    """A policy's loss with the penalty, whose λ is `hyper["ewc_coef"]`, whatever parts its batch is read in."""

    def added(params: Params, batch: Any, hyper: Hyper, key: Key) -> tuple[Mean, dict[str, Mean]]:
        loss, metrics = loss_fn(params, batch, hyper, key)
        own = _like(params, anchor.params)
        penalty = hyper["ewc_coef"] * losses.elastic_weight_consolidation(own, anchor.params, anchor.fisher)[0]
        total = loss.total + penalty * loss.count
        return Mean(total, loss.count), metrics | {"ewc_penalty": Mean(penalty * loss.count, loss.count)}

    return added


def _like(params: Params, own: Params) -> Params:
    """The part of whole parameters that trains, as `own` has it."""
    return {name: _like(params[name], part) if isinstance(part, dict) else params[name] for name, part in own.items()}
