"""Learning from pairs without a reward model: DPO and its variants (Rafailov et al. 2023), by the losses' names.

The reference is the policy's start. Its log-probs are read once, before training, or again at each step, from weights
that may follow the policy (TR-DPO, Gorbatovski et al. 2024).

Shapes: b prompts, k completions of each, p pairs of them, t tokens.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rlhf_jax import masking, models, sharding
from rlhf_jax.algorithms import comparisons
from rlhf_jax.algorithms.comparisons import Comparisons, SampledPairs
from rlhf_jax.algorithms.context import Context, Kind, check_positive, named
from rlhf_jax.algorithms.loop import Loop, finish
from rlhf_jax.algorithms.preference_losses import Side, Term, weighted
from rlhf_jax.algorithms.reference import GroupLogps, Sync, completion_logps, with_reference
from rlhf_jax.data.preference_batches import batch_groups, preference_batches
from rlhf_jax.data.preferences import PreferenceGroup
from rlhf_jax.data.sources import TFDS, Data, HuggingFace, Jsonl, Mixture
from rlhf_jax.errors import UserError
from rlhf_jax.evals.preferences import accuracy_interval
from rlhf_jax.models import ModelSpec, lora
from rlhf_jax.models.experts import with_load_balance
from rlhf_jax.models.heads import box
from rlhf_jax.optim import Optimizer
from rlhf_jax.train_step import compiled, in_parts, make_train_step, sharded_state
from rlhf_jax.types import Hyper, Key, LossFn, Mean, Metrics, Params, PreferenceBatch, TrainState


@dataclass(frozen=True)
class Config:
    """A policy from comparisons of completions."""

    init: str = "sft"
    """The stage whose policy it starts from, which is also the reference; or "base"."""
    pairs: SampledPairs | Jsonl | TFDS | HuggingFace | Mixture | None = field(default_factory=SampledPairs)
    """The comparisons: sampled and judged, rows of a source of its own, or, if None, the rows of the experiment's. Rows
    have chosen and rejected, or completions with ranks or scores."""
    losses: tuple[Term, ...] = (Term(),)
    """What is made small: a loss of pairs, or a weighted sum of several."""
    reference: Sync | None = None
    """None: the reference stays as it is, and its log-probs are read once, before training."""
    steps: int = 200
    """Optimiser steps."""
    batch_size: int = 32
    """Prompts a step, each with all its completions."""
    length: int = 49
    """Tokens of a row: BOS, prompt and completion; longer prompts lose their start."""
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=5e-5))
    """How the gradient becomes a step."""
    num_microbatches: int = 1
    """Parts that a batch's gradient is accumulated over."""
    evaluate_every: int = 50
    """Steps between held-out losses; the last step has one too."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        names = ("steps", "batch_size", "length", "num_microbatches", "evaluate_every", "checkpoint_every")
        check_positive(self, *names)
        known = [term.loss for term in self.losses]
        if not known or len(set(known)) < len(known):
            raise ValueError(f"losses: at least one, and each once, got {', '.join(known) or 'none'}")
        if self.batch_size % self.num_microbatches:
            raise ValueError(f"batch_size={self.batch_size} must divide by num_microbatches={self.num_microbatches}")
        if self.num_microbatches > 1 and any(term.is_across_batch for term in self.losses):
            raise ValueError("losses: aot sorts all pairs of a batch, so num_microbatches must be 1")
        if self.reference is not None and not self.needs_reference:
            raise ValueError(f"reference: {', '.join(known)} read none; leave it None")
        if isinstance(self.pairs, SampledPairs) and self.pairs.length > self.length:
            raise ValueError(f"length={self.length} must hold BOS, prompt and completion of pairs: {self.pairs.length}")

    @property
    def needs_reference(self) -> bool:
        """Whether a loss reads the reference."""
        return any(term.needs_reference for term in self.losses)

    @property
    def produces(self) -> Kind:
        """A language model."""
        return "policy"

    def requires(self) -> dict[str, tuple[str, Kind]]:
        """The start, and the policy that is sampled."""
        policy = {"pairs.policy": self.pairs.policy} if isinstance(self.pairs, SampledPairs) else {}
        return named("policy", init=self.init, **policy)

    def check_inputs(self, data: Data) -> None:
        """The comparisons, or the labelled texts that they are made from."""
        comparisons.check_pairs(self.pairs, data)

    def lengths(self) -> dict[str, int]:
        """A row."""
        return {"length": self.length}

    def batch_sizes(self) -> dict[str, int]:
        """A microbatch of a step; what is sampled at once."""
        rows = {"batch_size / num_microbatches": self.batch_size // self.num_microbatches}
        return rows | ({"pairs.batch_size": self.pairs.batch_size} if isinstance(self.pairs, SampledPairs) else {})


class State(flax.struct.PyTreeNode):
    """All that changes: the policy, and a reference that follows it."""

    policy: TrainState
    reference: Params
    """Empty where the reference stays as it is."""


def sides(batch: PreferenceBatch, logps: Float[Array, "b k"]) -> tuple[Side, Side]:
    """The chosen and the rejected completions of all pairs, [b·p]."""
    tokens = jnp.maximum(batch.completion_mask.sum(-1), 1).astype(jnp.float32)

    def side(index: int) -> Side:
        taken = (jnp.take_along_axis(x, batch.pairs[..., index], axis=1) for x in (logps, batch.ref_logps, tokens))
        return Side(*(x.reshape(-1) for x in taken))

    return side(0), side(1)


def preference_loss(spec: ModelSpec, config: Config) -> LossFn:
    """(params, PreferenceBatch with ref_logps, hyper, key) -> the weighted losses a pair, in nats."""

    def loss_fn(params: Params, batch: PreferenceBatch, hyper: Hyper, key: Key) -> tuple[Mean, dict[str, Mean]]:
        del key
        logps, routing, mask = completion_logps(spec, params, batch)
        chosen, rejected = sides(batch, logps)
        loss, diagnostics = weighted(config.losses, chosen, rejected, hyper)
        judged = batch.weights.reshape(-1) > 0
        found = {name: masking.token_mean(x, judged) for name, x in diagnostics.items()}
        found |= {"chosen_logps": masking.token_mean(chosen.logps, judged)}
        found |= {"rejected_logps": masking.token_mean(rejected.logps, judged)}
        total = masking.token_mean(loss, judged)
        total, added = with_load_balance(spec, total, routing, mask)
        return total, found | added

    return loss_fn


def start(config: Config, context: Context, name: str) -> tuple[State, Callable[..., tuple[State, Metrics]]]:
    """The state that training starts from, and its compiled step; of a context of shapes, both abstract."""
    spec, optimizer = context.spec, config.optimizer.make(config.steps)
    boxes = lora.own(spec, jax.eval_shape(partial(models.init, spec), jax.random.key(0)))
    hyper = {"learning_rate": config.optimizer.learning_rate}
    for term in config.losses:
        hyper |= term.hyper()
    first = context.policy_params(config.init)
    policy = sharded_state(
        context.mesh,
        partial(box, boxes=boxes),
        first,
        optimizer,
        hyper,
        context.key(name),
        master=config.optimizer.master,
    )
    # A copy of the policy: it is donated, and what the context gave is its own.
    state = State(policy, {} if config.reference is None else jax.tree.map(jnp.copy, policy.params))
    update = make_train_step(preference_loss(spec, config), optimizer, num_microbatches=config.num_microbatches)

    def step(state: State, batch: PreferenceBatch, base: Params) -> tuple[State, Metrics]:
        reference = state.reference
        if config.reference is not None:
            whole = lora.merge(base, reference)
            read = partial(completion_logps, spec, whole)
            ref_logps = in_parts(lambda part: read(part)[0], batch, config.num_microbatches)
            batch = dataclasses.replace(batch, ref_logps=ref_logps)
        policy, metrics = update(state.policy, batch, base)
        if config.reference is not None:
            reference = config.reference.follow(reference, policy)
        return State(policy, reference), metrics

    return state, compiled(step, state)


def train(config: Config, context: Context, name: str) -> dict[str, Any]:
    """Make or read the comparisons, read the reference's log-probs, train; the figures are for summary.json."""
    data = comparisons.of(config.pairs, context, name, length=config.length)
    if any(term.is_across_batch for term in config.losses):
        _check_pairs(data, name)
    layout = {"pad_id": context.tokenizer.pad_id, "completions": data.completions, "length": config.length}
    read = GroupLogps(context.spec, context.mesh, batch_size=config.batch_size, **layout)
    train, heldout = data.train, data.heldout
    if config.needs_reference:
        reference = lora.merge(context.base, context.policy_params(config.init))
        path, frozen = context.stage_dir(name) / "reference.npz", config.reference is None
        train, heldout = with_reference(path, read, reference, (train if frozen else (), heldout), note=name)
        train = train if frozen else data.train
    state, step_fn = start(config, context, name)
    shard = sharding.process_shard(context.mesh)
    batches = preference_batches(train, batch_size=config.batch_size, seed=context.seed, shard=shard, **layout)
    share = config.optimizer.share(config.steps)
    loop = Loop(context, name, steps=config.steps, checkpoint_every=config.checkpoint_every)
    with loop, sharding.scope(context.mesh):
        loop.note(f"{name}: {data.counts.line()}")
        state = loop.restore(state, batches)
        for step in loop:
            batch = next(batches)
            state, metrics = step_fn(state, sharding.local_batch(context.mesh, batch), context.base)
            metrics["learning_rate"] = config.optimizer.learning_rate * jnp.asarray(share(step - 1))
            if step % config.evaluate_every == 0 or step == config.steps:
                metrics |= heldout_metrics(config, state, read, batch_groups(heldout, **layout), heldout, context)
            loop.record(state, metrics, tokens=int(np.sum(batch.mask)))
        figures = heldout_metrics(config, state, read, batch_groups(heldout, **layout), heldout, context)
    finish(context, name, state.policy.params)
    pairs = sum(len(group.pairs) for group in heldout)
    low, high = accuracy_interval(float(figures["heldout_accuracy"]) * pairs, pairs)
    return {
        **{key: float(value) for key, value in figures.items()},
        **{"heldout_accuracy_low": low, "heldout_accuracy_high": high, "steps": config.steps},
        **data.counts.figures(),
    }


def heldout_metrics(
    config: Config,
    state: State,
    read: GroupLogps,
    batch: PreferenceBatch,
    heldout: Sequence[PreferenceGroup],
    context: Context,
) -> Metrics:
    """The loss of held-out pairs, and how often the policy ranks them as they were judged.

    By the losses' own accuracy: of the implicit rewards where there is a reference, always the first one.
    """
    logps = read(lora.merge(context.base, state.policy.params), heldout)
    loss, diagnostics = weighted(config.losses, *sides(batch, jnp.asarray(logps)), state.policy.hyper)
    judged = batch.weights.reshape(-1) > 0
    found = {"loss": loss, **{key: diagnostics[key] for key in ("accuracy", "margin") if key in diagnostics}}
    return {f"heldout_{key}": masking.token_mean(x, judged).value for key, x in found.items()}


def _check_pairs(data: Comparisons, name: str) -> None:
    if any(len(group.pairs) != 1 for group in (*data.train, *data.heldout)):
        raise UserError(f"stages.{name}.losses: aot sorts pairs across prompts, so each prompt must have one pair")
