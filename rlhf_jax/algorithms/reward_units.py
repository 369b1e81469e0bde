"""The zero and the unit of a reward model's scores, which comparisons leave free: set after training, or before it too.

Scores are shifted, or shifted and scaled, by their moments on samples (Ziegler et al. 2019) or on reference texts alone
(Stiennon et al. 2020; Ouyang et al. 2022; Huang et al. 2024), which is folded into the head.
"""

import dataclasses
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

from rlhf_jax import sharding
from rlhf_jax.algorithms import comparisons
from rlhf_jax.algorithms.comparisons import SampledPairs
from rlhf_jax.algorithms.context import Context
from rlhf_jax.algorithms.reward_data import ComparedRows, JudgedRows, normalized
from rlhf_jax.data import formats
from rlhf_jax.data.encoding import Learnt, encode_example, select
from rlhf_jax.data.reading import read
from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.data.sources import Data, Source
from rlhf_jax.errors import NonFiniteError, UserError
from rlhf_jax.models import lora
from rlhf_jax.rewards.network import RewardNetwork
from rlhf_jax.types import Params, TrainState

if TYPE_CHECKING:
    from rlhf_jax.algorithms.reward_model import Config

Normalize = Literal["none", "mean", "mean_std"]
"""Scores as they are learnt; with mean 0; with mean 0 and standard deviation 1."""
NormalizeOn = Literal["samples", "references"] | Source
"""Completions that a policy samples; those of the experiment's rows; those of other rows."""


def check(config: "Config", data: Data) -> None:
    """Read all reference texts; raises UserError for what is wrong with them."""
    if config.normalizes and config.normalize_on != "samples":
        read(source(config, data), formats.example)


def source(config: "Config", data: Data) -> Source:
    """Where the references are; raises UserError where there cannot be any."""
    rows = data if isinstance(config.normalize_on, str) else config.normalize_on
    if isinstance(rows, MovieReviews):
        raise UserError(
            "'references' are of the experiment's rows, which are movie reviews; name a source of such texts"
        )
    return rows


class Units:
    """Of one stage; its samples are drawn, or its references read, once."""

    def __init__(
        self, config: "Config", context: Context, name: str, data: ComparedRows | JudgedRows, network: RewardNetwork
    ) -> None:
        self._config, self._context, self._name, self._data, self._network = config, context, name, data, network

    @cached_property
    def _rows(self) -> list[list[int]]:
        c, context = self._config, self._context
        if c.normalize_on != "samples":
            rows, encode = source(c, context.data), encode_example(context.tokenizer)
            found = select(rows, read(rows, formats.example), encode, length=c.length)
            return [_answered(row) for row in comparisons.first_rows(found, c.samples)]
        if isinstance(c.pairs, SampledPairs):
            return self._data.heldout_rows
        return comparisons.policy_samples(
            self._data,
            context,
            self._name,
            policy=c.init,
            count=c.samples,
            completion_tokens=c.completion_tokens,
            length=c.length,
            batch_size=c.batch_size,
        )

    def moments(self, params: Params) -> tuple[Any, Any]:
        """Mean and standard deviation of each member's scores, [m]; of a single network two numbers.

        Raises NonFiniteError where scores cannot be brought to the unit that is asked.
        """
        scores = self._network.members(lora.merge(self._context.head_base, params), self._rows)
        moments = [(float(own.mean()), float(own.std())) for own in scores]
        for mean, std in moments:
            if not (std > 0 or (self._config.normalize == "mean" and np.isfinite(mean))):
                raise NonFiniteError(
                    f"{self._name}: all {len(self._rows)} scores are {mean:g} and cannot be normalised; nothing is "
                    "saved"
                )
        if self._config.ensemble is None:
            return moments[0]
        means, stds = np.asarray(moments, np.float32).T
        return means, stds

    def set(self, params: Params, moments: tuple[Any, Any]) -> Params:
        """The same network, or members, with these moments at 0 and 1, or the mean alone at 0."""
        mean, std = moments
        return normalized(params, mean, std if self._config.normalize == "mean_std" else 1.0)

    def at_start(self, state: TrainState) -> TrainState:
        """The state whose head is normalised before it has learnt, in the shards that it lies in."""
        head = self.set(state.params, self.moments(state.params))["head"]
        layout = jax.tree.map(lambda leaf: leaf.sharding, state.params["head"])
        return dataclasses.replace(state, params={**state.params, "head": sharding.put(head, layout)})


def _answered(row: Learnt) -> list[int]:
    """Up to the end of its last answer, where a score is read; a chat template may write more."""
    return list(row.tokens[: len(row.counted) - row.counted[::-1].index(True)])
