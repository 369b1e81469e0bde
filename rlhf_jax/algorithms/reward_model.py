"""Reward models: of comparisons by Bradley-Terry (Stiennon et al. 2020), K-wise (Ouyang et al. 2022), Plackett-Luce or
the best of k (Ziegler et al. 2019); of ratings; of outcomes (Cobbe et al. 2021); of steps (Lightman et al. 2023).

`loss` names what is learnt (`reward_losses`) and with it the rows (`reward_data`). All completions of a prompt stand in
one batch element, so that each is read once. Comparisons are a source's rows, or are made as in Rafailov et al. 2023's
controlled sentiment: a policy completes prefixes of held-out reviews and the gold classifier judges. With `ensemble`
several are trained at once (Coste et al. 2023).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from rlhf_jax import guard, hosts, models, sharding
from rlhf_jax.algorithms import reward_data, reward_units
from rlhf_jax.algorithms.comparisons import SampledPairs, Ties
from rlhf_jax.algorithms.context import (
    Context,
    Kind,
    Role,
    Stage,
    StageConfig,
    check_field,
    check_positive,
    copies,
    named,
)
from rlhf_jax.algorithms.loop import Loop, finish
from rlhf_jax.algorithms.reward_data import ORDERS, normalized
from rlhf_jax.algorithms.reward_losses import LOSSES, Loss, first_thresholds, of_heads
from rlhf_jax.algorithms.reward_losses import pair_loss as pair_loss
from rlhf_jax.algorithms.reward_units import Normalize, NormalizeOn, Units
from rlhf_jax.data.sources import Data, Source
from rlhf_jax.data.texts import check_texts
from rlhf_jax.evals.reward import review_accuracy, write_evaluation
from rlhf_jax.models import lora
from rlhf_jax.numerics import require
from rlhf_jax.optim import Optimizer
from rlhf_jax.rewards.ensemble import Ensemble
from rlhf_jax.rewards.ensemble import init as init_members
from rlhf_jax.rewards.network import RewardNetwork
from rlhf_jax.train_step import Step, compiled, make_train_step, of_members, sharded_state, sharded_states
from rlhf_jax.types import Key, Params, TrainState


@dataclass(frozen=True)
class Config(Stage):
    """A reward model from comparisons of completions."""

    init: str = "sft"
    """The stage whose trunk it starts from, or "base"; the head is new, N(0, 1/√(d+1))."""
    loss: Loss = "bradley_terry"
    """The function of losses.reward. Of comparisons: bradley_terry (a term a pair), k_wise (all pairs of a prompt are
    one term), plackett_luce, best_of_k; of completions one by one: scalar_rating, ordinal_rating, outcome_bce; of
    steps: process_bce."""
    pairs: SampledPairs | Source | None = field(default_factory=SampledPairs)
    """The rows: comparisons that are sampled and judged, rows of a source of its own, or, if None, the rows of the
    experiment's. Comparisons have chosen and rejected (for bradley_terry perhaps with a probability that it is so, a
    soft label), completions with ranks, scores or best, or two responses with annotators' votes, of which bradley_terry
    counts each and k_wise the majority; others prompt, completion and rating, or label; steps are completions with
    labels or ratings. A field annotator says who judged."""
    ties: Ties = "refuse"
    """Whether comparisons in which nothing is told apart, or less than the loss needs, are an error, or dropped and
    counted."""
    neutral: Literal["right", "wrong"] = "right"
    """What a step is that was rated 0 (Lightman et al. 2023, section 2.6, and their appendix on scoring)."""
    ensemble: Ensemble | None = None
    """Several reward models at once; none: one."""
    steps: int = 200
    """Optimiser steps."""
    batch_size: int = 32
    """Prompts a step, each with all its completions."""
    length: int = 49
    """Tokens of a row: BOS, prompt and completion; longer prompts lose their start."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """How the gradient becomes a step."""
    num_microbatches: int = 1
    """Parts that a batch's gradient is accumulated over."""
    margin_scale: float = 0.0
    """Times a pair's own margin is what the chosen score must lead by (Touvron et al. 2023); 0: no margin."""
    label_smoothing: float = 0.0
    """Expected share of wrong labels."""
    centering: float = 0.0
    """Weight of (r_chosen + r_rejected)², which holds scores around 0 (Eisenstein et al. 2023)."""
    normalize: Normalize = "mean_std"
    """What scores of comparisons get afterwards, every member's of an ensemble: mean 0, or mean 0 and standard
    deviation 1 (Ziegler et al. 2019). Ratings and logits of labels mean something as they are, and are left so."""
    normalize_on: NormalizeOn = "samples"
    """The completions that it is on. samples: the held-out ones of `pairs.policy`, or, of a source's rows, completions
    of their prompts by `init`. references: those of the experiment's rows, or of a source that is named here: prompt
    and completion, messages, or text (Stiennon et al. 2020; Ouyang et al. 2022)."""
    normalize_before: bool = False
    """Whether the new head is normalised before it is trained, too (Ziegler et al. 2019)."""
    samples: int = 256
    """Prompts of a source that `init` completes, or references that are read, to normalise on; held-out ones first."""
    completion_tokens: int = 40
    """Most tokens of such a completion."""
    evaluate_every: int = 50
    """Steps between held-out accuracies; the last step has one too."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        names = ("steps", "batch_size", "length", "num_microbatches", "evaluate_every", "checkpoint_every")
        check_positive(self, *names, "completion_tokens")
        require("samples", self.samples, "[2, inf)")
        require("margin_scale", self.margin_scale, "[0, inf)")
        require("label_smoothing", self.label_smoothing, "[0, 0.5)")
        require("centering", self.centering, "[0, inf)")
        if self.batch_size % self.num_microbatches:
            raise ValueError(f"batch_size={self.batch_size} must divide by num_microbatches={self.num_microbatches}")
        if isinstance(self.pairs, SampledPairs):
            self._check_sampled(self.pairs)
        if not self.normalizes and (self.normalize_on != "samples" or self.normalize_before):
            why = (
                "normalize='none'" if self.normalize == "none" else f"scores of loss={self.loss!r} are left as they are"
            )
            raise ValueError(f"normalize_on and normalize_before: {why}: leave them 'samples' and False")
        for name in self.hyper:
            if self.loss != "bradley_terry":
                raise ValueError(f"{name}={vars(self)[name]} is for loss='bradley_terry', not {self.loss!r}")
        if isinstance(self.pairs, SampledPairs) and self.pairs.length > self.length:
            raise ValueError(f"length={self.length} must hold BOS, prompt and completion of pairs: {self.pairs.length}")
        if not isinstance(self.pairs, SampledPairs) and self.completion_tokens >= self.length:
            raise ValueError(f"length={self.length} must exceed completion_tokens={self.completion_tokens}")

    def _check_sampled(self, pairs: SampledPairs) -> None:
        if self.loss not in ORDERS:
            raise ValueError(f"pairs: SampledPairs makes comparisons; loss={self.loss!r} needs rows of a source")
        noise = pairs.label_noise or (pairs.disagreement and pairs.annotators > 1)
        if noise and self.loss != "bradley_terry":
            raise ValueError(f"pairs: with noise or several annotators pairs make no order, which {self.loss!r} needs")

    @property
    def hyper(self) -> dict[str, float]:
        """What of the loss's numbers is not 0, which a sweep may vary."""
        return {name: vars(self)[name] for name in ("margin_scale", "label_smoothing", "centering") if vars(self)[name]}

    @property
    def certain(self) -> str | None:
        """The loss, where it takes no pairs with a probability: an order is there, or it is not."""
        return None if self.loss == "bradley_terry" else f"loss={self.loss}"

    @property
    def normalizes(self) -> bool:
        """Whether scores are normalised afterwards."""
        return self.normalize != "none" and self.loss in ORDERS

    @property
    def produces(self) -> Kind:
        """A trunk and a head, or several."""
        return "reward" if self.ensemble is None else "ensemble"

    def requires(self) -> dict[str, tuple[str, Role]]:
        """The trunk, and what sampled pairs need."""
        pairs = self.pairs.requires() if isinstance(self.pairs, SampledPairs) else {}
        return named("policy", init=self.init) | pairs

    def check_inputs(self, data: Data) -> None:
        """The rows, or the labelled texts that comparisons are made from; reference texts."""
        if isinstance(self.pairs, SampledPairs):
            check_field("pairs=SampledPairs", lambda: check_texts(data, labelled=True))
        else:
            check_field("pairs", lambda: reward_data.check(self, data))
        check_field("normalize_on", lambda: reward_units.check(self, data))

    def stored(self) -> float:
        """A trunk, or each model's of an ensemble; heads are small."""
        many = self.ensemble.members if self.ensemble is not None and self.ensemble.of == "models" else 1
        kept = many * self.optimizer.weights, many * self.optimizer.copies
        return copies(*kept, steps=self.steps, every=self.checkpoint_every)

    def lengths(self) -> dict[str, int]:
        """A row."""
        return {"length": self.length}

    def batch_sizes(self) -> dict[str, int]:
        """A microbatch of a step; what is sampled at once."""
        rows = {"batch_size / num_microbatches": self.batch_size // self.num_microbatches}
        return rows | ({"pairs.batch_size": self.pairs.batch_size} if isinstance(self.pairs, SampledPairs) else {})


def ensembles(stages: Mapping[str, StageConfig]) -> dict[str, Ensemble]:
    """The stages of an experiment that make ensembles."""
    made = {name: stage.ensemble for name, stage in stages.items() if isinstance(stage, Config)}
    return {name: ensemble for name, ensemble in made.items() if ensemble is not None}


def start(config: Config, context: Context, name: str, shares: np.ndarray | None = None) -> tuple[TrainState, Step]:
    """The state that training starts from, and its compiled step; of a context of shapes, both abstract.

    `shares` are those of the levels of an ordinal rating.
    """
    spec, ensemble, optimizer = context.spec, config.ensemble, config.optimizer.make(config.steps)

    def init(source: Params, key: Key) -> Params:
        boxed = models.init_with_head(spec, key, source)
        places = {} if shares is None else {"thresholds": jnp.asarray(first_thresholds(shares))}
        return {**boxed, "head": {**boxed["head"], **places}}

    def make(given: tuple[Params, Key]) -> Params:
        source, keys = given
        return init(source, keys) if ensemble is None else init_members(partial(init, source), keys, ensemble)

    loss_fn = LOSSES[config.loss](spec, config)
    if ensemble is not None and ensemble.of == "heads":
        loss_fn = of_heads(loss_fn, own_rows=ensemble.own_rows)
    step = make_train_step(loss_fn, optimizer, num_microbatches=config.num_microbatches)
    hyper = {"learning_rate": config.optimizer.learning_rate, **config.hyper}
    source, key, master = context.policy_params(config.init), context.key(name), config.optimizer.master
    keys = key if ensemble is None else context.keys(name, ensemble.members)
    if ensemble is not None and ensemble.of == "models":
        step = of_members(step)
        state = sharded_states(context.mesh, init, source, optimizer, hyper, keys, master=master)
    else:
        state = sharded_state(context.mesh, make, (source, keys), optimizer, hyper, key, master=master)
    return state, compiled(step, state)


def train(config: Config, context: Context, name: str) -> dict[str, Any]:
    """Make or read the rows, train, normalise, evaluate; the figures are for summary.json."""
    spec, mesh, tokenizer = context.spec, context.mesh, context.tokenizer
    data = reward_data.load(config, context, name)
    state, step_fn = start(config, context, name, data.shares)
    shard = sharding.process_shard(mesh)
    batches = reward_data.batches(config, context, name, data, shard)
    share = config.optimizer.share(config.steps)
    network = RewardNetwork(spec, mesh, length=config.length, pad_id=tokenizer.pad_id, ensemble=config.ensemble)

    loop = Loop(context, name, steps=config.steps, checkpoint_every=config.checkpoint_every)
    units = Units(config, context, name, data, network) if config.normalizes else None
    with loop, sharding.scope(mesh):
        loop.note(f"{name}: {data.counts.line()}")
        new, state = state, loop.restore(state, batches)
        if units is not None and config.normalize_before and state is new:
            state = units.at_start(state)
        del new  # its arrays are the first step's to donate
        for step in loop:
            batch = next(batches)
            state, metrics = step_fn(state, sharding.local_batch(mesh, batch), context.head_base)
            metrics["learning_rate"] = config.optimizer.learning_rate * share(step - 1)
            if step % config.evaluate_every == 0 or step == config.steps:
                metrics |= data.during(network, lora.merge(context.head_base, state.params))
            loop.record(state, metrics, tokens=int(np.sum(batch.mask)) * shard.count)

    params = read = state.params
    moments = None if units is None else units.moments(params)
    if moments is not None and config.ensemble is not None:  # what a comparison leaves free is a constant a member
        read = normalized(params, moments[0], np.ones_like(moments[1]))
    score = partial(network, lora.merge(context.head_base, read))
    final = data.final(network, lora.merge(context.head_base, read))  # before normalising, which changes the odds
    external = None
    if context.labelled:
        external = review_accuracy(score, context.reviews.test, tokenizer, length=config.length)
    if hosts.is_writer():
        write_evaluation(context.stage_dir(name) / "evaluation.json", final.evaluation, external)
    finish(context, name, data.rescaled(params) if units is None or moments is None else units.set(params, moments))
    mean, std = (final.scores.mean(), final.scores.std()) if moments is None else moments
    return {
        **final.figures,
        **({} if external is None else {"external_accuracy": external["accuracy"]}),
        "score_mean": float(np.mean(mean)),
        "score_std": float(np.mean(std)),
        "steps": config.steps,
        **guard.figures(state),
        **data.counts.figures(),
    }
