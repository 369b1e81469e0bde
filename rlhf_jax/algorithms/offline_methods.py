"""What a method of the offline stage has to say, and behaviour cloning: of all completions by weight, or of the best.

Shapes: b rows, t tokens, n rows of a set.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from rlhf_jax import losses, models
from rlhf_jax.algorithms.context import Context
from rlhf_jax.algorithms.offline_rows import OfflineBatch, ScoredRow
from rlhf_jax.algorithms.supervised import SupervisedConfig, first_state
from rlhf_jax.errors import UserError
from rlhf_jax.logprobs import next_token_logps
from rlhf_jax.masking import token_mean
from rlhf_jax.models import ModelSpec, Policy, lora
from rlhf_jax.models.experts import with_load_balance
from rlhf_jax.numerics import require
from rlhf_jax.train_step import Step, compiled, make_train_step
from rlhf_jax.types import Hyper, Key, LossFn, Mean, Params, TrainState

Numbers = Callable[[Sequence[ScoredRow]], Float[np.ndarray, " n"]]
"""Rows to what a method makes of their scores; NaN for a row that is left out."""


class Method(ABC):
    """How the stage learns; `offline.train` has the rest."""

    @abstractmethod
    def fit(self, rows: Sequence[ScoredRow]) -> Numbers:
        """What rows to train on say of the numbers of any rows, NaN for one that is left out; UserError where these say
        nothing.
        """

    @abstractmethod
    def loss(self, spec: ModelSpec, *, balance: bool = True) -> LossFn:
        """(whole, OfflineBatch, hyper, key) -> the loss a token of completions; `balance` as in `supervised`."""

    @abstractmethod
    def start(self, config: SupervisedConfig, context: Context, name: str, params: Params) -> tuple[Any, Step]:
        """The state that training of a policy's own `params` starts from, and its compiled step of (state, batch,
        base); of shapes, both abstract.
        """

    @abstractmethod
    def learner(self, state: Any) -> TrainState:
        """What the optimiser moves."""

    @abstractmethod
    def whole(self, state: Any, base: Params) -> Params:
        """All that the loss reads."""

    @abstractmethod
    def own(self, state: Any) -> Params:
        """The plain policy's own parameters."""

    @abstractmethod
    def policies(self, state: Any, base: Params) -> dict[float, Policy]:
        """What is sampled afterwards, by β; without one it is 0."""


class Cloning(Method):
    """Cross-entropy, each completion by its weight."""

    def loss(self, spec: ModelSpec, *, balance: bool = True) -> LossFn:
        """In nats."""

        def loss_fn(params: Params, batch: OfflineBatch, hyper: Hyper, key: Key) -> tuple[Mean, dict[str, Mean]]:
            del hyper, key
            states, routing = models.hidden_and_routing(spec, params, batch.tokens, batch.mask)
            logps = next_token_logps(models.unembed(spec, params, states), batch.tokens)
            weights = jnp.broadcast_to(batch.numbers[:, None], logps.shape)
            loss = token_mean(losses.weighted_cross_entropy(logps, weights)[0], batch.loss_mask)
            return with_load_balance(spec, loss, routing, batch.mask) if balance else (loss, {})

        return loss_fn

    def start(self, config: SupervisedConfig, context: Context, name: str, params: Params) -> tuple[TrainState, Step]:
        """As in fine-tuning."""
        state = first_state(config.optimizer, context, name, params, steps=config.steps)
        optimizer, parts = config.optimizer.make(config.steps), config.num_microbatches
        return state, compiled(make_train_step(self.loss(context.spec), optimizer, num_microbatches=parts), state)

    def learner(self, state: TrainState) -> TrainState:
        """All of it."""
        return state

    def whole(self, state: TrainState, base: Params) -> Params:
        """The policy."""
        return lora.merge(base, state.params)

    def own(self, state: TrainState) -> Params:
        """All that trains."""
        return state.params

    def policies(self, state: TrainState, base: Params) -> dict[float, Policy]:
        """The policy."""
        return {0.0: self.whole(state, base)}


@dataclass(frozen=True)
class Weighted(Cloning):
    """Each completion weighs exp(advantage / temperature) (Peters & Schaal 2007; AWR, Peng et al. 2019, eq. 10)."""

    temperature: float = 1.0
    """In standard deviations of the advantage over the rows to train on: near 0 only the best completions count."""
    baseline: Literal["all", "prompt"] = "all"
    """What a score's advantage is over: the mean of all rows, or that of the same prompt's completions."""
    most: float = 20.0
    """Largest weight; afterwards the weights are brought to mean 1."""

    def __post_init__(self) -> None:
        require("method.temperature", self.temperature, "(0, inf)")
        require("method.most", self.most, "(0, inf)")

    def fit(self, rows: Sequence[ScoredRow]) -> Numbers:
        """The weights, by the spread and mean of the rows to train on."""
        mean = float(np.mean([row.score for row in rows]))
        found = self._advantages(rows, mean)
        spread = float(np.std(found))
        if found.max() == found.min():
            alike = "a prompt's completions all score the same" if self.baseline == "prompt" else "all score the same"
            raise UserError(f"of {len(rows)} rows to train on {alike}, so there is nothing to tell apart")

        def raw(some: Sequence[ScoredRow]) -> np.ndarray:
            exponents = self._advantages(some, mean) / (self.temperature * spread)
            return np.exp(np.minimum(exponents, np.log(self.most)))

        scale = float(raw(rows).mean())
        return lambda some: raw(some) / scale

    def _advantages(self, some: Sequence[ScoredRow], mean: float) -> np.ndarray:
        scores = np.asarray([row.score for row in some])
        if self.baseline == "all":
            return scores - mean
        of_prompt: dict[tuple[int, ...], list[float]] = {}
        for row in some:
            of_prompt.setdefault(row.prompt, []).append(row.score)
        # of equal scores the mean is the score, which rounding may miss
        means = {prompt: own[0] if min(own) == max(own) else float(np.mean(own)) for prompt, own in of_prompt.items()}
        return scores - np.asarray([means[row.prompt] for row in some])


@dataclass(frozen=True)
class Filtered(Cloning):
    """The best completions are learnt and the others are not (filtered behaviour cloning; Snell et al. 2022)."""

    top: float | None = 0.25
    """Share of the rows to train on that is learnt, the best ones, and all that score as the last of them do."""
    threshold: float | None = None
    """In place of `top` the least score that is learnt; of thumbs 1 is liked."""

    def __post_init__(self) -> None:
        if (self.top is None) == (self.threshold is None):
            raise ValueError(f"method: one of top and threshold is a number, got {self.top} and {self.threshold}")
        require("method.top", self.top, "(0, 1)")
        require("method.threshold", self.threshold, "(-inf, inf)")

    def fit(self, rows: Sequence[ScoredRow]) -> Numbers:
        """1 for what is learnt."""
        least = self._least(np.sort([row.score for row in rows]))
        return lambda some: np.asarray([1.0 if row.score >= least else np.nan for row in some])

    def _least(self, scores: np.ndarray) -> float:
        if self.top is None:
            assert self.threshold is not None
            if scores[-1] < self.threshold:
                raise UserError(
                    f"threshold={self.threshold:g}: no row to train on scores so high; the best has {scores[-1]:g}"
                )
            return self.threshold
        least = float(scores[-max(1, round(self.top * len(scores)))])
        if least == scores[0]:
            raise UserError(
                f"top={self.top:g}: the last of the best of {len(scores)} rows scores {least:g}, as the worst does, "
                "so none is left out; choose a threshold"
            )
        return least
