"""Learning from judgements, without a reward model: DPO and its kin on pairs (Rafailov et al. 2023), KTO and BCO on
single completions (Ethayarajh et al. 2024; Jung et al. 2024), by the losses' names.

The reference is the policy's start. Its log-probs are read once, before training, or again at each step, from weights
that may follow the policy (TR-DPO, Gorbatovski et al. 2024).

Shapes: b prompts, k completions of each, p pairs of them, t tokens.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import flax.struct
import jax
import numpy as np
from jaxtyping import Array, Float

from rlhf_jax import guard, hosts, models, sharding
from rlhf_jax.algorithms import comparisons, preference_heldout, thumbs
from rlhf_jax.algorithms.comparisons import Comparisons, SampledPairs
from rlhf_jax.algorithms.context import Context, Kind, Role, Stage, check_positive, copies, named
from rlhf_jax.algorithms.evaluation import Drawing, evaluate, sentiment_judges
from rlhf_jax.algorithms.loop import Loop, finish
from rlhf_jax.algorithms.preference_heldout import HeldOut
from rlhf_jax.algorithms.preference_losses import Term
from rlhf_jax.algorithms.preference_objectives import beside, number, pair_loss, shifted, thumb_loss
from rlhf_jax.algorithms.prompting import heldout_openings, prompts_of
from rlhf_jax.algorithms.reference import CompletionLogps, Sync, completion_logps, with_reference
from rlhf_jax.algorithms.thumbs import Thumbs
from rlhf_jax.data.preference_batches import batch_groups, batch_thumbs, batches, longest_completion
from rlhf_jax.data.sources import Data, Source
from rlhf_jax.errors import UserError
from rlhf_jax.evals.policy import compare, write_samples
from rlhf_jax.losses import RewardShift
from rlhf_jax.models import lora
from rlhf_jax.models.heads import box
from rlhf_jax.numerics import require
from rlhf_jax.optim import Optimizer
from rlhf_jax.sampling import Sampling
from rlhf_jax.train_step import compiled, in_parts, make_train_step, sharded_state
from rlhf_jax.types import Hyper, Params, TrainState

Judgements = Comparisons | Thumbs
Step = Callable[..., tuple["State", dict[str, Any]]]
"""(state, PreferenceBatch or ThumbBatch, base) -> (state, metrics)."""


@dataclass(frozen=True)
class Config(Stage):
    """A policy from judged completions."""

    init: str = "sft"
    """The stage whose policy it starts from, which is also the reference; or "base"."""
    pairs: SampledPairs | Source | None = field(default_factory=SampledPairs)
    """The comparisons: sampled and judged, rows of a source of its own, or, if None, the rows of the experiment's. Rows
    have chosen and rejected, or completions with ranks or scores; for kto and bco they may have a completion and a
    label. A field probability beside chosen and rejected is that the chosen one is better: the label is then soft."""
    losses: tuple[Term, ...] = (Term(),)
    """What is made small: a loss of pairs, a weighted sum of several, or kto or bco."""
    reference: Sync | None = None
    """None: the reference stays as it is, and its log-probs are read once, before training."""
    steps: int = 200
    """Optimiser steps."""
    batch_size: int = 32
    """Prompts a step, each with all its completions; of kto and bco completions."""
    length: int = 49
    """Tokens of a row: BOS, prompt and completion; longer prompts lose their start."""
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=5e-5))
    """How the gradient becomes a step."""
    num_microbatches: int = 1
    """Parts that a batch's gradient is accumulated over."""
    evaluate_every: int = 50
    """Steps between held-out losses; the last step has one too."""
    evaluation_prompts: int = 256
    """Prompts that the first and the last policy complete: openings of test reviews, read by judges, where the pairs
    are sampled; else at most so many held-out ones. 0: none."""
    completion_tokens: int = 40
    """Most tokens of such a completion of a source's prompts; of openings those of `pairs`."""
    sampling: Sampling = field(default_factory=Sampling)
    """How these are drawn."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        names = ("steps", "batch_size", "length", "num_microbatches", "evaluate_every", "checkpoint_every")
        check_positive(self, *names, "completion_tokens")
        require("evaluation_prompts", self.evaluation_prompts, "[0, inf)")
        known = [term.loss for term in self.losses]
        if not known or len(set(known)) < len(known):
            raise ValueError(f"losses: at least one, and each once, got {', '.join(known) or 'none'}")
        if len(known) > 1 and any(term.is_of_thumbs for term in self.losses):
            raise ValueError(f"losses: kto and bco read single completions and stand alone, got {', '.join(known)}")
        if self.batch_size % self.num_microbatches:
            raise ValueError(f"batch_size={self.batch_size} must divide by num_microbatches={self.num_microbatches}")
        if self.num_microbatches > 1 and any(term.is_across_batch for term in self.losses):
            raise ValueError("losses: aot sorts all pairs of a batch, so num_microbatches must be 1")
        if self.reference is not None and not self.needs_reference:
            raise ValueError(f"reference: {', '.join(known)} read none; leave it None")
        if isinstance(self.pairs, SampledPairs) and self.pairs.length > self.length:
            raise ValueError(f"length={self.length} must hold BOS, prompt and completion of pairs: {self.pairs.length}")
        if self._completes_rows and self.completion_tokens >= self.length:
            raise ValueError(f"length={self.length} must exceed completion_tokens={self.completion_tokens}")

    @property
    def needs_reference(self) -> bool:
        """Whether a loss reads the reference."""
        return any(term.needs_reference for term in self.losses)

    @property
    def of_thumbs(self) -> Term | None:
        """The loss of single completions, where it is one."""
        return self.losses[0] if self.losses[0].is_of_thumbs else None

    @property
    def certain(self) -> str | None:
        """The first loss that takes no pairs with a probability, by the name of its field."""
        return next((f"losses={term.loss}" for term in self.losses if not term.takes_probabilities), None)

    @property
    def _completes_rows(self) -> bool:
        return self.evaluation_prompts > 0 and not isinstance(self.pairs, SampledPairs)

    @property
    def produces(self) -> Kind:
        """A language model."""
        return "policy"

    def requires(self) -> dict[str, tuple[str, Role]]:
        """The start, and what sampled pairs need."""
        pairs = self.pairs.requires() if isinstance(self.pairs, SampledPairs) else {}
        return named("policy", init=self.init) | pairs

    def check_inputs(self, data: Data) -> None:
        """The judgements, or the labelled texts that they are made from."""
        (thumbs.check_thumbs if self.of_thumbs else comparisons.check_pairs)(self.pairs, data, certain=self.certain)

    def stored(self) -> float:
        """The policy; a reference that follows it is in every checkpoint."""
        state = self.optimizer.copies + (self.reference is not None)
        return copies(self.optimizer.weights, state, steps=self.steps, every=self.checkpoint_every)

    def lengths(self) -> dict[str, int]:
        """A row."""
        return {"length": self.length}

    def batch_sizes(self) -> dict[str, int]:
        """A microbatch of a step; what is sampled at once."""
        rows = {"batch_size / num_microbatches": self.batch_size // self.num_microbatches}
        return rows | ({"pairs.batch_size": self.pairs.batch_size} if isinstance(self.pairs, SampledPairs) else {})


class State(flax.struct.PyTreeNode):
    """All that changes."""

    policy: TrainState
    reference: Params
    """That follows the policy; empty where it stays as it is."""
    shift: RewardShift | dict[str, Array]
    """Of bco; empty without it."""


def start(config: Config, context: Context, name: str) -> tuple[State, Step]:
    """The state that training starts from, and its compiled step; of a context of shapes, both abstract."""
    spec, optimizer = context.spec, config.optimizer.make(config.steps)
    boxes = lora.own(spec, jax.eval_shape(partial(models.init, spec), jax.random.key(0)))
    hyper = {"learning_rate": config.optimizer.learning_rate}
    for one in config.losses:
        hyper |= one.hyper()
    policy = sharded_state(
        context.mesh,
        partial(box, boxes=boxes),
        context.policy_params(config.init),
        optimizer,
        hyper,
        context.key(name),
        master=config.optimizer.master,
    )
    term, follows = config.of_thumbs, config.reference
    reference = {} if follows is None else jax.tree.map(_copied, context.policy_params(config.init))
    shift = context.replicated(RewardShift.init()) if term is not None and term.loss == "bco" else {}
    state = State(policy, reference, shift)
    loss_fn = pair_loss(spec, config.losses) if term is None else thumb_loss(spec, term)
    update = make_train_step(loss_fn, optimizer, num_microbatches=config.num_microbatches)

    def read(params: Params, batch: Any) -> Float[Array, "b k"]:
        return in_parts(lambda part: completion_logps(spec, params, part)[0], batch, config.num_microbatches)

    def step(state: State, batch: Any, base: Params) -> tuple[State, dict[str, Any]]:
        before, reference, shift = state.policy, state.reference, state.shift
        if follows is not None:
            batch = dataclasses.replace(batch, ref_logps=read(lora.merge(base, reference), batch))
        numbers: Hyper = {}
        if term is not None:
            other = beside(batch, own=False)
            whole = lora.merge(base, before.params)
            numbers = number(term, shift, lambda: (read(whole, other) - other.ref_logps)[:, 0])
        policy, metrics = update(dataclasses.replace(before, hyper=before.hyper | numbers), batch, base)
        policy = dataclasses.replace(policy, hyper=before.hyper)
        if follows is not None:
            reference = follows.follow(reference, policy)
        if isinstance(shift, RewardShift):
            shift = shifted(shift, batch, metrics)
        return State(policy, reference, shift), metrics | numbers

    return state, compiled(step, state)


def _copied(leaf: Any) -> Any:
    """An array of the state's own, to donate; a shape as it is."""
    return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else leaf.copy()


def train(config: Config, context: Context, name: str) -> dict[str, Any]:
    """Make or read the judgements, read the reference's log-probs, train; the figures are for summary.json."""
    data = _judgements(config, context, name)
    layout: dict[str, Any] = {
        "pad_id": context.tokenizer.pad_id,
        "completions": data.completions,
        "length": config.length,
    }
    if context.mesh.shape["sequence"] == 1:  # else a row's columns are on several devices
        layout["longest"] = longest_completion(chain(data.train, data.heldout), length=config.length)
    # Several annotators may have judged the same two completions.
    compared = isinstance(data, Comparisons)
    judged = partial(batch_groups, pairs=data.pairs, soft=data.soft) if compared else batch_thumbs
    make = partial(judged, **layout)
    read = CompletionLogps(context.spec, context.mesh, make=make, batch_size=config.batch_size)
    rows, heldout = data.train, data.heldout
    if config.needs_reference:
        path, frozen = context.stage_dir(name) / "reference.npz", config.reference is None
        splits = (heldout, rows) if frozen else (heldout,)
        heldout, *own = with_reference(path, read, context.policy(config.init), splits, note=name)
        rows = own[0] if frozen else rows
    state, step_fn = start(config, context, name)
    shard = sharding.process_shard(context.mesh)
    drawn = batches(rows, make, batch_size=config.batch_size, seed=context.seed, shard=shard)
    share = config.optimizer.share(config.steps)
    evaluation = partial(heldout_figures, config, context, read, heldout)
    loop = Loop(context, name, steps=config.steps, checkpoint_every=config.checkpoint_every)
    with loop, sharding.scope(context.mesh):
        loop.note(f"{name}: {data.counts.line()}")
        state = loop.restore(state, drawn)
        for step in loop:
            batch = next(drawn)
            state, metrics = step_fn(state, sharding.local_batch(context.mesh, batch), context.base)
            metrics["learning_rate"] = config.optimizer.learning_rate * share(step - 1)
            if step % config.evaluate_every == 0 or step == config.steps:
                metrics |= evaluation(state).means()
            loop.record(state, metrics, tokens=int(np.sum(batch.mask)) * shard.count)
    finish(context, name, state.policy.params)
    figures = evaluation(state).summary() | guard.figures(state) | data.counts.figures()
    return {**written(config, context, name, heldout, state.policy.params), **figures, "steps": config.steps}


def _judgements(config: Config, context: Context, name: str) -> Judgements:
    if config.of_thumbs is not None:
        beside = config.of_thumbs.loss == "kto"
        return thumbs.of(config.pairs, context, name, length=config.length, beside=beside, certain=config.certain)
    data = comparisons.of(config.pairs, context, name, length=config.length, certain=config.certain)
    single = all(len(group.pairs) == 1 for group in (*data.train, *data.heldout))
    if not single and any(term.is_across_batch for term in config.losses):
        raise UserError(f"stages.{name}.losses: aot sorts pairs across prompts, so each prompt must have one pair")
    return data


def heldout_figures(
    config: Config, context: Context, read: CompletionLogps, heldout: Sequence[Any], state: State
) -> HeldOut:
    """What the policy makes of the held-out judgements, which have the log-probs of its start."""
    logps = read(lora.merge(context.base, state.policy.params), heldout)
    hyper, shift = hosts.fetch((state.policy.hyper, state.shift))
    term = config.of_thumbs
    if term is None:
        return preference_heldout.of_pairs(config.losses, heldout, logps, hyper)
    ratios = logps - np.asarray([row.ref_logps for row in heldout], np.float32)
    found = number(term, shift, lambda: ratios[:, 1])
    return preference_heldout.of_thumbs(term, heldout, ratios[:, 0], hyper | found)


def written(config: Config, context: Context, name: str, heldout: Sequence[Any], last: Params) -> dict[str, float]:
    """What the first and the last policy write for the same prompts, into samples.jsonl; the figures of both."""
    pairs = config.pairs
    if not config.evaluation_prompts:
        return {}
    if isinstance(pairs, SampledPairs):
        drawing = Drawing(1 + pairs.prompt_tokens[1], pairs.completion_tokens, pairs.sampling, pairs.batch_size)
        prompts = heldout_openings(context, name, tokens=pairs.prompt_tokens, count=config.evaluation_prompts)
        judges = sentiment_judges(context)
    else:
        room = config.length - config.completion_tokens
        drawing, judges = Drawing(room, config.completion_tokens, config.sampling, config.batch_size), {}
        tokens = [row.prompt_tokens for row in heldout]
        prompts = prompts_of(tokens, context.tokenizer, length=room, count=config.evaluation_prompts)
    first = context.policy(config.init)
    policies = first, lora.merge(context.base, last)
    before, after = evaluate(
        drawing, context, name, policies, prompts=prompts, reference=first, reward={}, judges=judges
    )
    if hosts.is_writer():
        write_samples(context.stage_dir(name) / "samples.jsonl", before, after, step=config.steps)
    return compare(before, after)
