"""What PPO and the methods without a critic share of an iteration: its fields, sampling, scoring, minibatches.

Shapes: b rollouts, p prompt tokens, n completion tokens, t = p + n, v vocabulary.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax import kl, masking, models
from rlhf_jax.algorithms import consolidation, iterations, pretraining_mix, scoring, truncation
from rlhf_jax.algorithms import packing as packed
from rlhf_jax.algorithms.consolidation import Consolidation
from rlhf_jax.algorithms.context import Context, check_field, check_positive, copies
from rlhf_jax.algorithms.iterations import Behaviour, Frozen
from rlhf_jax.algorithms.onpolicy import OnPolicyConfig
from rlhf_jax.algorithms.packing import Packing, Reading
from rlhf_jax.algorithms.pretraining_mix import PretrainingMix
from rlhf_jax.algorithms.rollouts import loss_mask, minibatch_rows, old_logps, row_mean
from rlhf_jax.algorithms.scoring import Compared
from rlhf_jax.data.prompts import PromptBatch
from rlhf_jax.data.sources import Data
from rlhf_jax.data.texts import check_texts
from rlhf_jax.kl import AdaptiveKL, FixedKL
from rlhf_jax.logprobs import entropy, ratio_deviation, token_logps
from rlhf_jax.models import ModelSpec
from rlhf_jax.models.heads import HEAD
from rlhf_jax.normalizer import Moments
from rlhf_jax.numerics import require
from rlhf_jax.optim import Optimizer
from rlhf_jax.placement import Colocated
from rlhf_jax.rewards.shaping import Shaping, shape_scores
from rlhf_jax.sampling import Stops, ended, generate
from rlhf_jax.train_step import InParts, Step, in_parts, keep_if, make_train_step
from rlhf_jax.types import Key, LossFn, Mean, Metrics, Params, Rollout, TrainState

_TEXTS = 2**31 - 2  # of a step's keys: no microbatch has this index


@dataclass(frozen=True)
class PolicyGradientConfig(OnPolicyConfig):
    """Fields of the stages whose policy learns from rewards of its own completions, a few minibatches of each."""

    epochs: int = 4
    """Passes over an iteration's rollouts."""
    minibatches: int = 4
    """Optimiser steps a pass."""
    num_microbatches: int = 1
    """Parts that a minibatch's gradient is accumulated over; scoring is done in `minibatches` times as many."""
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=1e-4))
    """The policy's."""
    kl: FixedKL | AdaptiveKL = field(default_factory=FixedKL)
    """Price of KL to the reference."""
    shaping: Shaping = field(default_factory=Shaping)
    """Scaling, clipping, EOS penalty and whitening of rewards."""
    gamma: float = 1.0
    """Discount a token."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    stop_at_kl: float | None = None
    """Ends an iteration's policy updates where the KL to the policy it began with exceeds this, in nats a token."""
    ptx: PretrainingMix | None = None
    """Texts of the experiment that the policy learns beside its rollouts: PPO-ptx."""
    ewc: Consolidation | None = None
    """What the experiment's texts need of the policy's parameters is held near the start."""
    average: float | None = None
    """Decay of a moving average of the policy's parameters over iterations, which is what the stage ends with."""
    packing: Packing | None = None
    """Completions are laid end to end where they are scored and learnt from, in parts: fewer tokens are computed
    where many are short, though not always in less time; none: as they are, a minibatch in `num_microbatches`."""
    exact_kl_rows: int = 32
    """Completions an iteration whose KL is also summed over the whole vocabulary."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "epochs", "minibatches", "num_microbatches", "exact_kl_rows")
        if self.batch_size % self.parts:
            raise ValueError(
                f"batch_size={self.batch_size} must divide by minibatches × num_microbatches = "
                f"{self.minibatches} × {self.num_microbatches} = {self.parts}"
            )
        if isinstance(self.kl, AdaptiveKL) and self.batch_size >= 5 * self.kl.horizon:
            raise ValueError(f"kl.horizon={self.kl.horizon} must be over a fifth of batch_size={self.batch_size}")
        sampled, rows = self.old_logps == "sampled", self.exact_kl_rows
        if rows * (1 + sampled) > self.batch_size:
            most = "half of batch_size={}, or old_logps='sampled' saves nothing" if sampled else "batch_size={}"
            raise ValueError(f"exact_kl_rows={rows} must be at most {most.format(self.batch_size)}")
        known = {"gamma": "[0, 1]", "entropy_coef": "[0, inf)", "stop_at_kl": "(0, inf)", "average": "(0, 1)"}
        for name, interval in known.items():
            require(name, vars(self)[name], interval)
        texts, n = self.ptx, self.num_microbatches
        if texts is not None and texts.batch_size % n:
            raise ValueError(f"ptx.batch_size={texts.batch_size} must divide by num_microbatches={n}")
        if self.packing is not None:
            self.packing.check(self.prompt_length, self.completion_tokens)
        if self.packing is not None and self.ptx is not None:
            raise ValueError("packing lays completions alone: ptx must be None")
        for name in ("ptx", "ewc"):
            if vars(self)[name] is not None and self.placement != Colocated():
                raise ValueError(f"{name} needs placement=Colocated() without offload")
        if self.shaping.eos_penalty is not None and not self.sampling.ends:
            raise ValueError("shaping.eos_penalty is for completions that may end: sampling.ends must be True")

    def check_inputs(self, data: Data) -> None:
        """The experiment's texts too, where the policy learns them."""
        super().check_inputs(data)
        for name in ("ptx", "ewc"):
            if vars(self)[name] is not None:
                check_field(name, lambda: check_texts(data, labelled=False))

    def lengths(self) -> dict[str, int]:
        """A row of text too."""
        texts = {name: vars(self)[name] for name in ("ptx", "ewc") if vars(self)[name] is not None}
        return super().lengths() | {f"{name}.row_length": part.row_length for name, part in texts.items()}

    def stored(self) -> float:
        """The policy, its moving average, what `ewc` knows of it."""
        own, average = self.optimizer, self.average is not None
        kept = own.weights + (self.ewc is not None), own.copies + average * own.weights
        return copies(*kept, steps=self.steps, every=self.checkpoint_every)

    @property
    def parts(self) -> int:
        """How many parts of a batch are scored one after another."""
        return self.minibatches * self.num_microbatches

    def batch_sizes(self) -> dict[str, int]:
        """A microbatch of a minibatch."""
        microbatch = {"batch_size / (minibatches × num_microbatches)": self.batch_size // self.parts}
        again = {"exact_kl_rows (a part of them)": self.exact_kl_rows // self.parts_read_again}
        return microbatch | self.judge_rows | self.turn_rows | (again if self.old_logps == "sampled" else {})

    @property
    def parts_read_again(self) -> int:
        """How many parts of `exact_kl_rows` are read one after another, none of more rows than one of a batch."""
        least = math.ceil(self.exact_kl_rows * self.parts / self.batch_size)
        return next(n for n in range(least, self.exact_kl_rows + 1) if self.exact_kl_rows % n == 0)

    @property
    def updates(self) -> int:
        """Optimiser steps of the whole stage."""
        return self.steps * self.epochs * self.minibatches


class PolicyGradient(ABC):
    """An iteration but for what is learnt from a scored rollout; the config fixes shapes and choices."""

    def __init__(
        self,
        config: Any,
        spec: ModelSpec,
        *,
        eos_id: int,
        pad_id: int,
        cut_ids: tuple[int, ...] = (),
        stops: Stops | None = None,
    ) -> None:
        """`cut_ids` are the tokens of `config.truncate`, `stops` the strings of `config.sampling` in tokens."""
        self.config, self.spec, self.eos_id, self.pad_id = config, spec, eos_id, pad_id
        self.cut_ids, self.stops = cut_ids, stops
        self.policy_optimizer = config.optimizer.make(config.updates)

    @abstractmethod
    def policy_loss(self) -> LossFn:
        """Of a minibatch."""

    @abstractmethod
    def improve(self, state: Any, frozen: Frozen, rollout: Rollout, metrics: Metrics) -> tuple[Any, Metrics, Rollout]:
        """Update by a scored rollout; the scoring's `metrics` stand in those given back."""

    def frozen(self, context: Context, name: str) -> Frozen:
        """Reference, reward model, what lies under adapters, and of a stage's texts what it is asked to keep."""
        c = self.config
        fixed = iterations.frozen(context, policy=c.policy, reward=c.scored_by, combine=c.combine)
        if c.ptx is not None:
            fixed = dataclasses.replace(fixed, texts=pretraining_mix.held(c.ptx, context))
        if c.ewc is not None:
            start = fixed.reference or context.policy_params(c.policy)
            fixed = dataclasses.replace(fixed, anchor=consolidation.anchored(c.ewc, context, name, start))
        return fixed

    def policy_step(self, frozen: Frozen) -> Step:
        """A step of the policy by its own loss, and by what it is asked to keep."""
        c, loss_fn = self.config, self.policy_loss()
        if c.ptx is not None:
            loss_fn = pretraining_mix.with_texts(loss_fn, self.spec)
        if c.ewc is not None:
            assert frozen.anchor is not None
            loss_fn = consolidation.held(loss_fn, frozen.anchor)
        return make_train_step(
            loss_fn, self.policy_optimizer, num_microbatches=c.num_microbatches, parts=self.parts_of_step()
        )

    def parts_of_step(self) -> InParts | None:
        """How a minibatch is laid in parts, where it is."""
        packing = self.config.packing
        if packing is None:
            return None
        return lambda batch: packed.parts(packing, batch, loss_mask(batch))

    def iteration(self, state: Any, frozen: Frozen, prompts: PromptBatch) -> tuple[Any, Metrics, Rollout]:
        """Sample, score, update."""
        with jax.named_scope("sample"):
            rollout = self.sample(iterations.behaviour(state.policy), frozen, prompts)
        return self.learn(state, frozen, rollout)

    def learn(self, state: Any, frozen: Frozen, rollout: Rollout) -> tuple[Any, Metrics, Rollout]:
        """Score what this policy has written, update."""
        with jax.named_scope("score"):
            rollout, metrics = self.score(state.policy.params, frozen, rollout)
        return self.improve(state, frozen, rollout, metrics)

    def sample(
        self,
        behaviour: Behaviour,
        frozen: Frozen,
        prompts: PromptBatch,
        *,
        greedy: Bool[Array, " b"] | None = None,
        copies: int | None = None,
    ) -> Rollout:
        """A completion for each prompt, drawn, or where `greedy` says so the most probable tokens.

        Runs of `copies` prompts are the same one; None: as the config says.
        """
        rollout = generate(
            self.spec,
            frozen.policy(behaviour.params),
            prompts.tokens,
            prompts.mask,
            jax.random.fold_in(behaviour.key, 0),
            max_new_tokens=self.config.completion_tokens,
            sampling=self.config.sampling,
            eos_id=self.eos_id,
            pad_id=self.pad_id,
            greedy=greedy,
            copies=self.config.copies if copies is None else copies,
            turns=self.config.turns,
            stops=self.stops,
            values=self.config.old_logps == "sampled" and HEAD in behaviour.params,
        )
        rollout = rollout.replace(written_at=jnp.full(len(prompts.tokens), behaviour.step))
        return rollout if self.config.truncate is None else self.cut(rollout)

    def cut(self, rollout: Rollout) -> Rollout:
        """With what of its completions the reward reads."""
        return truncation.cut(self.config.truncate, self.cut_ids, rollout)

    def score(self, own: Params, frozen: Frozen, rollout: Rollout) -> tuple[Rollout, Metrics]:
        """Scores, where the reward is a network, log-probs and reference log-probs, and what compares the two policies.

        `own` are the parameters of the policy that wrote the rollout; where it has a head, values are read beside its
        log-probs. With `old_logps` "sampled" both are the sampler's, and only the first rows are read again, without a
        cache, as training reads them; `sampling_deviation` says how far the sampler's log-probs were from these.
        """
        c, recomputed = self.config, self.config.old_logps == "recomputed"
        policy, reference, reward = frozen.policy(own), frozen.policy(frozen.reference), frozen.network(frozen.reward)

        def compared(rows: Rollout, ref_logits: Array) -> Compared:
            logits, at, values = self.logits_and_values(policy, rows)
            entropies = entropy(logits, temperature=c.sampling.temperature)
            exact = kl.exact(logits / c.sampling.temperature, ref_logits / c.sampling.temperature)
            spread = (self.in_rows(x, at, rows) for x in (entropies, exact))
            return Compared(self.read_logps(logits, at, rows), values, *spread)

        def part(rows: Rollout) -> tuple[Any, ...]:
            ref_logits, at, _ = self.logits_and_values(reference, rows)
            again = compared(rows, ref_logits) if recomputed else None
            return again, self.read_logps(ref_logits, at, rows), self.readings(reward, frozen, rows)

        read, ref_logps, readings = scoring.in_parts(c.packing, part, rollout, c.parts)
        if read is None:
            some = jax.tree.map(lambda x: x[: c.exact_kl_rows], rollout)
            again = lambda rows: compared(rows, self.logits_and_values(reference, rows)[0])  # noqa: E731
            read = in_parts(again, some, c.parts_read_again)
        sampled_logps, scores = rollout.logps, readings.pop("score")
        if recomputed:
            rollout = self.with_own_values(rollout.replace(logps=self.padded(read.logps)), read.values)
        rollout = rollout.replace(ref_logps=self.padded(ref_logps), scores=scores)
        has_ended = ended(rollout, self.eos_id)
        metrics = {
            "score": row_mean(scores, rollout.used),
            **{name: row_mean(reading, rollout.used) for name, reading in readings.items()},  # an ensemble's spread
            **scoring.metrics(rollout, sampled_logps, read, has_ended, exact_kl_rows=c.exact_kl_rows),
        }
        return rollout, metrics

    def readings(self, reward: Params, frozen: Frozen, rows: Rollout) -> dict[str, Float[Array, " b"]]:
        """Scores, by a network or as a function has given them, and what else is known of them."""
        c = self.config
        if not isinstance(c.scored_by, str):
            return {"score": rows.scores}
        read = scoring.scores(self.spec, c.packing, reward, frozen.ensemble, rows)
        if c.network is None:
            return read
        return {**read, "score": rows.scores + c.network.shaped(read["score"]), "network_score": read["score"]}

    def with_old_logps(self, rollout: Rollout, state: Any, frozen: Frozen) -> tuple[Rollout, Metrics]:
        """Of a rollout made ahead this policy's log-probs, and how far it has moved on."""
        c, bound = self.config, self.config.max_weight
        if bound is None:
            return rollout, {}
        policy = frozen.policy(state.policy.params)

        def part(rows: Rollout) -> tuple[Array, Array | None]:
            logits, at, values = self.logits_and_values(policy, rows)
            return self.read_logps(logits, at, rows), values

        logps, values = scoring.in_parts(c.packing, part, rollout, c.parts)
        rollout = self.with_own_values(rollout.replace(old_logps=self.padded(logps)), values)
        return rollout, scoring.stale_metrics(rollout, state.policy.step, bound)

    def minibatch_rows(self, key: Key, *, together: int = 1) -> Int[Array, "s m"]:
        """Of an update's steps, in random order; runs of `together` rows stay so."""
        c = self.config
        return minibatch_rows(key, rows=c.batch_size, epochs=c.epochs, minibatches=c.minibatches, together=together)

    def deviation(self, policy: TrainState, frozen: Frozen, first: Rollout) -> Float[Array, ""]:
        """How far the ratio is from 1 before the first update: on its rows, or on as few of them as are read again."""
        c, params = self.config, frozen.policy(policy.params)
        few = c.old_logps == "sampled" and c.exact_kl_rows < len(first.tokens)
        rows, parts = (c.exact_kl_rows, c.parts_read_again) if few else (None, c.num_microbatches)
        first = jax.tree.map(lambda x: x[:rows], first)
        read = lambda rows: self.read_logps(*self.logits_and_values(params, rows)[:2], rows)  # noqa: E731
        logps = scoring.in_parts(c.packing, read, first, parts)
        return ratio_deviation(logps, old_logps(first)[:, c.prompt_length :])

    def policy_update(
        self, policy: TrainState, stopped: Bool[Array, ""], batch: Any, frozen: Frozen
    ) -> tuple[TrainState, Bool[Array, ""], Metrics]:
        """One minibatch's step, which is not taken once the policy went too far."""
        if self.config.ptx is not None:
            assert frozen.texts is not None
            mask, key = loss_mask(batch), jax.random.fold_in(policy.step_key(), _TEXTS)
            count = self.reduce(jnp.zeros(mask.shape), mask).count
            batch = pretraining_mix.mixed(self.config.ptx, batch, count, frozen.texts, key)
        new, metrics = self.policy_step(frozen)(policy, batch, frozen.base)
        if self.config.stop_at_kl is not None:
            stopped |= metrics["approx_kl"] > self.config.stop_at_kl  # went too far already
            new = keep_if(stopped, policy, new)
        metrics["stopped"] = stopped.astype(jnp.float32)
        return new, stopped, metrics

    def shaped(self, rollout: Rollout, moments: Moments | None) -> Float[Array, " b"]:
        """Scores as rewards are made of them."""
        scores = shape_scores(rollout.scores, ended(rollout, self.eos_id), self.config.shaping, moments)
        return truncation.penalised(scores, self.config.truncate, self.cut_ids, rollout)

    def reduce(self, x: Float[Array, "*b t"], mask: Bool[Array, "*b t"]) -> Mean:
        """The loss's mean, as the config's `reducer` says."""
        longest = self.config.completion_tokens
        return {
            **masking.REDUCERS,
            "fixed": partial(masking.fixed_length_mean, length=longest),
            "sum": partial(masking.fixed_length_mean, length=1),
        }[self.config.reducer](x, mask)

    def padded(self, x: Float[Array, "b n"]) -> Float[Array, "b t"]:
        """Zeros in place of the prompt."""
        return jnp.pad(x, ((0, 0), (self.config.prompt_length, 0)))

    def with_own_values(self, rollout: Rollout, values: Float[Array, "b n"] | None) -> Rollout:
        """With the values of a policy's own head; as it is where the policy has none."""
        if values is None:
            return rollout
        return rollout.replace(values=masking.keep(self.padded(values), rollout.completion_mask))

    def reading(self, params: Params, batch: Rollout) -> Reading:
        """What a transformer's states are of a minibatch, as it is or laid in parts."""
        return packed.read(self.config.packing, self.spec, params, batch, prompt=self.config.prompt_length)

    def read_logps(self, logits: Float[Array, "*c v"], at: Reading, batch: Rollout) -> Float[Array, "b n"]:
        """Of the completion's tokens at the sampling temperature, in their rows, 0 elsewhere."""
        return self.in_rows(token_logps(logits, at.tokens, temperature=self.config.sampling.temperature), at, batch)

    def in_rows(self, x: Float[Array, "*c"], at: Reading, batch: Rollout) -> Float[Array, "b n"]:
        """What was computed of a minibatch's completion tokens, in their rows, 0 elsewhere."""
        prompt = self.config.prompt_length
        return masking.keep(at.in_rows(x, prompt=prompt), batch.completion_mask[:, prompt:])

    def logits_and_values(
        self, params: Params, rows: Rollout
    ) -> tuple[Float[Array, "*c v"], Reading, Float[Array, "b n"] | None]:
        """Logits that predict the completion's tokens, and the values before them where the parameters have a head.

        Prompts never reach the vocabulary.
        """
        at = self.reading(params, rows)
        values = self.in_rows(models.read_head(params, at.states), at, rows) if HEAD in params else None
        return models.unembed(self.spec, params, at.states), at, values
