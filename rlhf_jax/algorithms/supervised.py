"""Training a language model on packed rows, for the stages that do: next-token loss, held-out loss, the loop."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grain
import jax

from rlhf_jax import guard, lockstep, losses, models, sharding
from rlhf_jax.algorithms.context import Context, Kind, Role, Stage, check_field, check_positive, copies
from rlhf_jax.algorithms.loop import Loop, finish
from rlhf_jax.data.pipeline import PackedBatch
from rlhf_jax.data.sources import Data
from rlhf_jax.data.texts import check_texts
from rlhf_jax.logprobs import next_token_logps
from rlhf_jax.masking import token_mean
from rlhf_jax.models import ModelSpec, lora
from rlhf_jax.models.experts import with_load_balance
from rlhf_jax.models.heads import box
from rlhf_jax.optim import Optimizer
from rlhf_jax.train_step import Step, compiled, make_train_step, sharded_state
from rlhf_jax.types import Hyper, Key, LossFn, Mean, Metrics, Params, TrainState


@dataclass(frozen=True)
class SupervisedConfig(Stage):
    """Fields of every stage that trains a language model on text."""

    steps: int = 200
    """Optimiser steps."""
    batch_size: int = 64
    """Rows a step."""
    row_length: int = 128
    """Tokens in a row; several texts are packed into one."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """How the gradient becomes a step."""
    num_microbatches: int = 1
    """Parts that a batch's gradient is accumulated over, to save memory."""
    heldout_rows: int = 128
    """Packed rows of held-out text behind each held-out loss."""
    evaluate_every: int = 100
    """Steps between held-out losses; the last step has one too."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        names = ("steps", "batch_size", "num_microbatches", "heldout_rows", "evaluate_every", "checkpoint_every")
        check_positive(self, "row_length", *names)
        if self.batch_size % self.num_microbatches:
            raise ValueError(f"batch_size={self.batch_size} must divide by num_microbatches={self.num_microbatches}")
        if self.heldout_rows % self.batch_size:
            raise ValueError(f"heldout_rows={self.heldout_rows} must divide by batch_size={self.batch_size}")

    @property
    def produces(self) -> Kind:
        """A language model."""
        return "policy"

    def requires(self) -> dict[str, tuple[str, Role]]:
        """Nothing but the experiment's model."""
        return {}

    def lengths(self) -> dict[str, int]:
        """A row."""
        return {"row_length": self.row_length}

    def batch_sizes(self) -> dict[str, int]:
        """A microbatch of a step."""
        return {"batch_size / num_microbatches": self.batch_size // self.num_microbatches}

    def stored(self) -> float:
        """The model."""
        kept = self.optimizer.weights, self.optimizer.copies
        return copies(*kept, steps=self.steps, every=self.checkpoint_every)

    def check_inputs(self, data: Data) -> None:
        """The experiment's texts."""
        check_field("data", lambda: check_texts(data, labelled=False))


def language_model_loss(spec: ModelSpec, *, balance: bool = True) -> LossFn:
    """(params, PackedBatch, hyper, key) -> cross-entropy a counted token, in nats.

    With `balance` and a mixture of experts its load-balance loss is added, by the coefficient in the spec.
    """

    def loss_fn(params: Params, batch: PackedBatch, hyper: Hyper, key: Key) -> tuple[Mean, dict[str, Mean]]:
        del hyper, key
        mask = batch.segment_ids > 0
        states, routing = models.hidden_and_routing(spec, params, batch.tokens, mask, segment_ids=batch.segment_ids)
        logps = next_token_logps(models.unembed(spec, params, states), batch.tokens)
        loss = token_mean(losses.cross_entropy(logps)[0], batch.loss_mask)
        return with_load_balance(spec, loss, routing, mask) if balance else (loss, {})

    return loss_fn


def start(config: SupervisedConfig, context: Context, name: str, params: Params) -> tuple[TrainState, Step]:
    """The state that training of `params` starts from, and its compiled step; of shapes alone, both abstract."""
    state = first_state(config.optimizer, context, name, params, steps=config.steps)
    step = make_train_step(
        language_model_loss(context.spec),
        config.optimizer.make(config.steps),
        num_microbatches=config.num_microbatches,
    )
    return state, compiled(step, state)


def first_state(
    optimizer: Optimizer,
    context: Context,
    name: str,
    params: Params,
    hyper: dict[str, float] | None = None,
    *,
    steps: int,
) -> TrainState:
    """The state that `steps` steps of training of a language model's `params` start from; `hyper` beside the learning
    rate.
    """
    boxes = lora.own(context.spec, jax.eval_shape(partial(models.init, context.spec), jax.random.key(0)))
    return sharded_state(
        context.mesh,
        lambda params: box(params, boxes),
        params,
        optimizer.make(steps),
        {"learning_rate": optimizer.learning_rate, **(hyper or {})},
        context.key(name),
        master=optimizer.master,
    )


def fit(
    config: SupervisedConfig,
    context: Context,
    name: str,
    params: Params,
    batches: grain.DatasetIterator,
    heldout: Iterator[PackedBatch],
    *,
    note: str,
) -> tuple[Params, dict[str, float]]:
    """Train `params` on the batches; returns the final parameters and the stage's figures, its files written.

    The batches are of this process's rows. `heldout` gives batches too, whole ones; as many as make up `heldout_rows`
    are taken. The note, on the data, is printed.
    """
    means = heldout_means(config, context, language_model_loss(context.spec, balance=False), heldout)

    def figures(state: TrainState) -> Metrics:
        return means(lora.merge(context.base, state.params), state.hyper)

    begin = partial(start, config, context, name, params)
    state, found = take_steps(config, context, name, begin, batches, figures, note=note)
    finish(context, name, state.params)
    return state.params, found


def take_steps(
    config: SupervisedConfig,
    context: Context,
    name: str,
    begin: Callable[[], tuple[Any, Step]],
    batches: grain.DatasetIterator,
    heldout: Callable[[Any], Metrics],
    *,
    note: str,
) -> tuple[Any, dict[str, float]]:
    """The steps from the newest checkpoint on: the last state and the stage's figures, those of `heldout` among them.

    `begin` makes the state that training starts from, and its step. Batches have a `loss_mask`. `heldout` of a state is
    read as often as the config says.
    """
    mesh, (state, step_fn) = context.mesh, begin()
    share, shards = config.optimizer.share(config.steps), sharding.process_shard(mesh).count
    with (
        Loop(context, name, steps=config.steps, checkpoint_every=config.checkpoint_every) as loop,
        sharding.scope(mesh),
    ):
        loop.note(f"{name}: {note}")
        state = loop.restore(state, batches)
        for step in loop:
            batch = next(batches)
            state, metrics = step_fn(state, sharding.local_batch(mesh, batch), context.base)
            metrics["learning_rate"] = config.optimizer.learning_rate * share(step - 1)
            if step % config.evaluate_every == 0 or step == config.steps:
                metrics |= heldout(state)
            loop.record(state, metrics, tokens=batch.loss_mask.sum() * shards)
        figures = {name: float(value) for name, value in heldout(state).items()}
    return state, {**figures, "steps": config.steps, **guard.figures(state)}


def heldout_means(
    config: SupervisedConfig, context: Context, loss_fn: LossFn, batches: Iterator[Any]
) -> Callable[[Params, Hyper], Metrics]:
    """Whole parameters, and a state's numbers, to "heldout_loss", and the loss's metrics so named: means over the first
    `heldout_rows` rows of the batches.
    """
    some = itertools.islice(batches, config.heldout_rows // config.batch_size)
    held = [sharding.shard_batch(context.mesh, batch) for batch in some]

    @lockstep.jit
    def one(params: Params, batch: Any, hyper: Hyper) -> dict[str, Mean]:
        loss, metrics = loss_fn(params, batch, hyper, jax.random.key(0))
        return {"loss": loss, **metrics}

    def means(params: Params, hyper: Hyper) -> Metrics:
        total = one(params, held[0], hyper)
        for batch in held[1:]:
            total = {name: mean + total[name] for name, mean in one(params, batch, hyper).items()}
        return {f"heldout_{name}": mean.value for name, mean in total.items()}

    return means
