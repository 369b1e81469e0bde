"""Reward model: Bradley-Terry on comparisons (Stiennon et al. 2020; Ouyang et al. 2022).

All pairs of a prompt's completions stand in one batch element, so that each completion is read once. The comparisons
are a source's rows, or are made as in Rafailov et al. 2023's controlled sentiment: a policy completes prefixes of
held-out reviews and the gold classifier judges.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rlhf_jax import guard, hosts, losses, masking, models, sharding
from rlhf_jax.algorithms import comparisons
from rlhf_jax.algorithms.comparisons import Comparisons, SampledPairs
from rlhf_jax.algorithms.context import Context, Kind, check_field, check_positive, named, own_source
from rlhf_jax.algorithms.loop import Loop, finish
from rlhf_jax.data.preference_batches import preference_batches
from rlhf_jax.data.sources import Data, Source
from rlhf_jax.data.texts import check_texts
from rlhf_jax.errors import NonFiniteError
from rlhf_jax.evals.reward import ScoreRows, evaluate_groups, review_accuracy, write_evaluation
from rlhf_jax.models import ModelSpec, lora
from rlhf_jax.numerics import require
from rlhf_jax.optim import Optimizer
from rlhf_jax.rewards.network import RewardNetwork
from rlhf_jax.train_step import Step, compiled, make_train_step, sharded_state
from rlhf_jax.types import Hyper, Key, LossFn, Mean, Params, PreferenceBatch, TrainState


@dataclass(frozen=True)
class Config:
    """A reward model from comparisons of completions."""

    init: str = "sft"
    """The stage whose trunk it starts from, or "base"; the head is new, N(0, 1/√(d+1))."""
    pairs: SampledPairs | Source | None = field(default_factory=SampledPairs)
    """The comparisons: sampled and judged, rows of a source of its own, or, if None, the rows of the experiment's. Rows
    have chosen and rejected, or completions with ranks or scores."""
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
    normalize: bool = True
    """Afterwards scores get mean 0 and standard deviation 1 on samples: the held-out completions of `pairs.policy`, or,
    where the pairs are a source's rows, completions of their prompts by `init`."""
    samples: int = 256
    """Prompts of a source that `init` completes to normalise on, the held-out ones first."""
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
        if isinstance(self.pairs, SampledPairs) and self.pairs.length > self.length:
            raise ValueError(f"length={self.length} must hold BOS, prompt and completion of pairs: {self.pairs.length}")
        if not isinstance(self.pairs, SampledPairs) and self.completion_tokens >= self.length:
            raise ValueError(f"length={self.length} must exceed completion_tokens={self.completion_tokens}")

    @property
    def produces(self) -> Kind:
        """A trunk and a head."""
        return "reward"

    def requires(self) -> dict[str, tuple[str, Kind]]:
        """The trunk, and the policy that is sampled."""
        policy = {"pairs.policy": self.pairs.policy} if isinstance(self.pairs, SampledPairs) else {}
        return named("policy", init=self.init, **policy)

    def check_inputs(self, data: Data) -> None:
        """The comparisons, or the labelled texts that they are made from."""
        if isinstance(self.pairs, SampledPairs):
            check_field("pairs=SampledPairs", lambda: check_texts(data, labelled=True))
        else:
            check_field("pairs", lambda: comparisons.check(_source(self, data)))

    def lengths(self) -> dict[str, int]:
        """A row."""
        return {"length": self.length}

    def batch_sizes(self) -> dict[str, int]:
        """A microbatch of a step; what is sampled at once."""
        rows = {"batch_size / num_microbatches": self.batch_size // self.num_microbatches}
        return rows | ({"pairs.batch_size": self.pairs.batch_size} if isinstance(self.pairs, SampledPairs) else {})


def pair_loss(spec: ModelSpec, config: Config) -> LossFn:
    """(params, PreferenceBatch, hyper, key) -> Bradley-Terry's loss a pair, in nats."""

    def loss_fn(params: Params, batch: PreferenceBatch, hyper: Hyper, key: Key) -> tuple[Mean, dict[str, Mean]]:
        del hyper, key
        if not config.centering:
            # A difference of scores does not see the bias: its gradient is rounding, and Adam would make steps of it.
            head = {**params["head"], "bias": jax.lax.stop_gradient(params["head"]["bias"])}
            params = {**params, "head": head}
        scores = batch_scores(spec, params, batch)
        chosen, rejected = (jnp.take_along_axis(scores, batch.pairs[..., i], axis=1) for i in (0, 1))
        loss, diagnostics = losses.bradley_terry(
            chosen,
            rejected,
            margin=config.margin_scale * batch.margins,
            label_smoothing=config.label_smoothing,
        )
        if config.centering:
            loss += config.centering * losses.centering(chosen, rejected)[0]
        judged = batch.weights > 0
        return masking.token_mean(loss, judged), {
            name: masking.token_mean(diagnostics[name], judged) for name in ("accuracy", "margin")
        }

    return loss_fn


def batch_scores(spec: ModelSpec, params: Params, batch: PreferenceBatch) -> Float[Array, "b k"]:
    """One score a completion."""
    b, k, t = batch.tokens.shape
    return models.score(spec, params, batch.tokens.reshape(b * k, t), batch.mask.reshape(b * k, t)).reshape(b, k)


def start(config: Config, context: Context, name: str) -> tuple[TrainState, Step]:
    """The state that training starts from, and its compiled step; of a context of shapes, both abstract."""
    spec, optimizer = context.spec, config.optimizer.make(config.steps)
    state = sharded_state(
        context.mesh,
        lambda source: models.init_with_head(spec, context.key(name), source),
        context.policy_params(config.init),
        optimizer,
        {"learning_rate": config.optimizer.learning_rate},
        context.key(name),
        master=config.optimizer.master,
    )
    step = make_train_step(pair_loss(spec, config), optimizer, num_microbatches=config.num_microbatches)
    return state, compiled(step, state)


def train(config: Config, context: Context, name: str) -> dict[str, Any]:
    """Make or read the comparisons, train, normalise, evaluate; the figures are for summary.json."""
    spec, mesh, tokenizer = context.spec, context.mesh, context.tokenizer
    data = _comparisons(config, context, name)
    state, step_fn = start(config, context, name)
    layout = {"pad_id": tokenizer.pad_id, "completions": data.completions, "length": config.length}
    shard = sharding.process_shard(mesh)
    batches = preference_batches(data.train, batch_size=config.batch_size, seed=context.seed, shard=shard, **layout)
    share = config.optimizer.share(config.steps)
    network = RewardNetwork(spec, mesh, length=config.length, pad_id=tokenizer.pad_id)

    loop = Loop(context, name, steps=config.steps, checkpoint_every=config.checkpoint_every)
    with loop, sharding.scope(mesh):
        loop.note(f"{name}: {data.counts.line()}")
        state = loop.restore(state, batches)
        for step in loop:
            batch = next(batches)
            state, metrics = step_fn(state, sharding.local_batch(mesh, batch), context.head_base)
            metrics["learning_rate"] = config.optimizer.learning_rate * share(step - 1)
            if step % config.evaluate_every == 0 or step == config.steps:
                score = partial(network, lora.merge(context.head_base, state.params))
                report = evaluate_groups(score, data.heldout).pairs
                metrics |= {"heldout_accuracy": report.accuracy, "heldout_log_loss": report.log_loss}
            loop.record(state, metrics, tokens=int(np.sum(batch.mask)) * shard.count)

    score = partial(network, lora.merge(context.head_base, state.params))
    report = evaluate_groups(score, data.heldout)  # before normalising, which changes the odds
    external = (
        review_accuracy(score, context.reviews.test, tokenizer, length=config.length) if context.labelled else None
    )
    if hosts.is_writer():
        write_evaluation(context.stage_dir(name) / "evaluation.json", report, external)
    mean, std = _mean_and_std(config, context, name, data, report.scores, score)
    finish(context, name, normalized(state.params, mean, std) if config.normalize else state.params)
    low, high = report.pairs.interval
    return {
        "accuracy": report.pairs.accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "log_loss": report.pairs.log_loss,
        "ece": report.pairs.ece,
        "length_correlation": report.pairs.length_correlation,
        **({} if external is None else {"external_accuracy": external["accuracy"]}),
        "score_mean": mean,
        "score_std": std,
        "steps": config.steps,
        **guard.figures(state),
        **data.counts.figures(),
    }


def _comparisons(config: Config, context: Context, name: str) -> Comparisons:
    if isinstance(config.pairs, SampledPairs):
        return comparisons.sample(config.pairs, context, name)
    return comparisons.load(_source(config, context.data), context.tokenizer, length=config.length)


def _source(config: Config, data: Data) -> Source:
    assert not isinstance(config.pairs, SampledPairs)
    return own_source(config.pairs, data, instead="pairs=SampledPairs() makes comparisons of them")


def _mean_and_std(
    config: Config, context: Context, name: str, data: Comparisons, heldout: np.ndarray, score: ScoreRows
) -> tuple[float, float]:
    """Of the scores of samples: the held-out completions where these were sampled, else completions of `init`."""
    scores = heldout
    if config.normalize and not isinstance(config.pairs, SampledPairs):
        samples = comparisons.policy_samples(
            data,
            context,
            name,
            policy=config.init,
            count=config.samples,
            completion_tokens=config.completion_tokens,
            length=config.length,
            batch_size=config.batch_size,
        )
        scores = score(samples)
    mean, std = float(scores.mean()), float(scores.std())
    if config.normalize and not std > 0:
        raise NonFiniteError(
            f"{name}: all {len(scores)} scores are {mean:g} and cannot be normalised; nothing is saved"
        )
    return mean, std


def normalized(params: Params, mean: float, std: float) -> Params:
    """The same reward model with its scores shifted and scaled: (r − mean) / std, folded into the head."""
    head = params["head"]
    return {**params, "head": {"kernel": head["kernel"] / std, "bias": (head["bias"] - mean) / std}}
