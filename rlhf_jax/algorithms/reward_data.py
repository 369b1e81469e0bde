"""What a reward model learns from and is read on: comparisons, or completions that were judged one by one.

`READERS` says which rows each loss takes. Either kind of rows gives batches, held-out figures while training goes on,
and the final ones.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from rlhf_jax import hosts
from rlhf_jax.algorithms import comparisons
from rlhf_jax.algorithms.comparisons import Comparisons, SampledPairs
from rlhf_jax.algorithms.context import Context, own_source
from rlhf_jax.algorithms.reward_losses import Loss, thresholds
from rlhf_jax.data import formats
from rlhf_jax.data.encoding import Selected, encode_rated, encode_steps, select
from rlhf_jax.data.formats import Order
from rlhf_jax.data.judged import JudgedRow, judged_batches
from rlhf_jax.data.pipeline import by_part
from rlhf_jax.data.preference_batches import preference_batches
from rlhf_jax.data.reading import first_row, read
from rlhf_jax.data.sources import Data, Mixture, Source
from rlhf_jax.errors import UserError
from rlhf_jax.evals.judgements import (
    Figures,
    evaluate_levels,
    evaluate_outcomes,
    evaluate_ratings,
    evaluate_solutions,
)
from rlhf_jax.evals.reward import comparisons_json, evaluate_best, evaluate_groups, evaluate_spread
from rlhf_jax.rewards.network import RewardNetwork
from rlhf_jax.sharding import Shard
from rlhf_jax.types import Params

if TYPE_CHECKING:
    from rlhf_jax.algorithms.reward_model import Config


class Reader(NamedTuple):
    """The rows of completions that are judged one by one: what must stand in them, and what reads and encodes them."""

    fields: tuple[str, ...]
    parse: Callable[..., Any]
    encode: Callable[..., Callable[[Any], JudgedRow]]


ORDERS: dict[Loss, Order] = {"bradley_terry": "some", "k_wise": "some", "best_of_k": "best", "plackett_luce": "all"}
"""How far a loss of comparisons needs them told apart."""

READERS: dict[Loss, Reader] = {
    "scalar_rating": Reader(("prompt", "completion", "rating"), formats.rated, encode_rated),
    "ordinal_rating": Reader(("prompt", "completion", "rating"), formats.level, encode_rated),
    "outcome_bce": Reader(("prompt", "completion", "label"), formats.thumb, encode_rated),
    "process_bce": Reader(("prompt", "completions", "labels"), formats.stepwise, encode_steps),
}
"""What the other losses read."""

_GROUPED = (("prompt", "completions", "ranks"), ("prompt", "completions", "scores"), ("prompt", "completions", "best"))
_ALSO = {"process_bce": ("prompt", "completions", "ratings")}


class Final(NamedTuple):
    """A finished reward model's held-out figures, for summary.json and for evaluation.json, and its scores."""

    figures: dict[str, float]
    evaluation: dict[str, Any]
    scores: np.ndarray


def source(config: "Config", data: Data) -> Source:
    """The rows that a config names, or the experiment's."""
    assert not isinstance(config.pairs, SampledPairs)
    return own_source(config.pairs, data, instead="pairs=SampledPairs() makes comparisons of them")


def check(config: "Config", data: Data) -> None:
    """Read all rows of a source; raises UserError for what is wrong with them, or for rows of another kind."""
    rows = source(config, data)
    _check_kind(config.loss, rows)
    if config.loss in ORDERS:
        comparisons.check(rows, needs=ORDERS[config.loss], ties=config.ties, certain=config.certain)
    else:
        read(rows, _parser(config))


def load(config: "Config", context: Context, name: str) -> "ComparedRows | JudgedRows":
    """The rows, in tokens; sampled and judged first where the config says so."""
    tokenizer = context.tokenizer
    if isinstance(config.pairs, SampledPairs):
        return ComparedRows(config, context, comparisons.sample(config.pairs, context, name))
    rows = source(config, context.data)
    if config.loss in ORDERS:
        kinds = {"needs": ORDERS[config.loss], "ties": config.ties, "certain": config.certain}
        return ComparedRows(config, context, comparisons.load(rows, tokenizer, length=config.length, **kinds))
    encode = READERS[config.loss].encode(tokenizer)
    selected = select(rows, read(rows, _parser(config)), encode, length=config.length, tells=lambda row: row.tells)
    return JudgedRows(config, context, selected)


def _parser(config: "Config") -> Callable[..., Any]:
    parse = READERS[config.loss].parse
    return partial(parse, neutral=config.neutral == "right") if config.loss == "process_bce" else parse


def _check_kind(loss: Loss, rows: Source) -> None:
    """Raise UserError, which names the fields, where the first row has not those that a loss reads."""
    if loss == "bradley_terry":  # rows of several kinds, which say by themselves what they lack
        return
    known = (READERS[loss].fields, *([_ALSO[loss]] if loss in _ALSO else ())) if loss in READERS else _GROUPED
    for part in rows.parts if isinstance(rows, Mixture) else (rows,):
        first = first_row(part)
        pair = loss in ORDERS and ("chosen" in first or "annotators" in first)
        if not pair and not any(all(name in first for name in fields) for fields in known):
            wanted = ", or ".join(", ".join(map(repr, fields)) for fields in known)
            raise first.error(f"loss={loss!r} reads {wanted}; the row has {first.names}")


class ComparedRows:
    """Comparisons of completions."""

    def __init__(self, config: "Config", context: Context, data: Comparisons) -> None:
        self._config, self._pad_id = config, context.tokenizer.pad_id
        self.data, self.train, self.heldout, self.counts = data, data.train, data.heldout, data.counts
        self.shares = None

    @property
    def heldout_rows(self) -> list[list[int]]:
        """The held-out completions, after their prompts."""
        return [row for group in self.heldout for row in group.rows()]

    def batches(self, rows: Sequence[Any], *, seed: int, shard: Shard) -> Any:
        """Endless batches of some of the rows to train on."""
        sizes = {"completions": self.data.completions, "pairs": self.data.pairs, "length": self._config.length}
        sizes["batch_size"] = self._config.batch_size
        return preference_batches(rows, pad_id=self._pad_id, seed=seed, shard=shard, soft=self.data.soft, **sizes)

    def during(self, network: RewardNetwork, params: Params) -> Figures:
        """Held-out figures of what is being trained; of an ensemble those of the mean."""
        report = evaluate_groups(lambda rows: network.members(params, rows).mean(0), self.heldout).pairs
        return {"heldout_accuracy": report.accuracy, "heldout_log_loss": report.log_loss}

    def final(self, network: RewardNetwork, params: Params) -> Final:
        """All figures."""
        scores = network.members(params, self.heldout_rows)
        report = evaluate_groups(lambda rows: network.combined(scores), self.heldout)
        low, high = report.interval
        figures = {
            "accuracy": report.pairs.accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
            "accuracy_baseline": 0.5,
            "log_loss": report.pairs.log_loss,
            "ece": report.pairs.ece,
            "length_correlation": report.pairs.length_correlation,
        }
        if self._config.loss != "bradley_terry":
            figures |= evaluate_best(report.scores, self.heldout)
        members = [evaluate_groups(lambda rows, own=own: own, self.heldout) for own in scores]
        each = [member.pairs.accuracy for member in members]
        figures |= _among(scores, each, "accuracy")
        if len(members) > 1:
            figures |= evaluate_spread(members, report, self.heldout)
        return Final(figures, {**figures, **comparisons_json(report), "members": each}, report.scores)

    def rescaled(self, params: Params) -> Params:
        """The parameters as they are."""
        return params


@dataclass(frozen=True)
class Scale:
    """What a constant knows of the rows to train on: the mean and spread of targets, and the levels' shares."""

    mean: float
    std: float
    lowest: float
    shares: np.ndarray


class JudgedRows:
    """Completions that were rated or labelled one by one, whole or by step.

    Ratings are standardised while they are learnt, and levels count from 0.
    """

    def __init__(self, config: "Config", context: Context, selected: Selected[JudgedRow]) -> None:
        self._config, self._pad_id, self.counts = config, context.tokenizer.pad_id, selected.counts
        self.heldout = selected.heldout
        self.scale = _scale(config.loss, selected.train, selected.heldout)
        self.shares = self.scale.shares if config.loss == "ordinal_rating" else None
        self.train = by_part(selected.train, lambda part: [self._learnt(row) for row in part])
        self._judged = np.asarray([target is not None for row in self.heldout for target in row.targets])
        self._places = max(len(row.judged) for row in (*selected.train, *selected.heldout))

    @property
    def heldout_rows(self) -> list[list[int]]:
        """The held-out completions, after their prompts."""
        return [row.tokens for row in self.heldout]

    def batches(self, rows: Sequence[Any], *, seed: int, shard: Shard) -> Any:
        """Endless batches of some of the rows to train on."""
        sizes = {"places": self._places, "length": self._config.length, "batch_size": self._config.batch_size}
        return judged_batches(rows, pad_id=self._pad_id, seed=seed, shard=shard, **sizes)

    def during(self, network: RewardNetwork, params: Params) -> Figures:
        """Held-out figures of what is being trained; of an ensemble those of the mean."""
        found = self._figures(self._scores(network, params).mean(0), params, intervals=False)
        return {f"heldout_{name}": found[name] for name in ("accuracy", "auc", "log_loss", "rmse") if name in found}

    def final(self, network: RewardNetwork, params: Params) -> Final:
        """All figures."""
        scores = self._scores(network, params)
        figures, headline = self._figures(network.combined(scores), params), HEADLINES[self._config.loss]
        each = [self._figures(own, params, member=i, intervals=False)[headline] for i, own in enumerate(scores)]
        scores = scores[:, self._judged]
        combined, figures = network.combined(scores), figures | _among(scores, each, headline)
        readings = {"scores": combined.tolist(), "targets": self._column(1).tolist(), "members": each}
        return Final(figures, {**figures, "n": len(combined), **readings}, combined)

    def rescaled(self, params: Params) -> Params:
        """The parameters whose scores are ratings where standardised ones were learnt; without thresholds."""
        if self._config.loss == "scalar_rating":
            return normalized(params, -self.scale.mean / self.scale.std, 1 / self.scale.std)
        return {**params, "head": {name: params["head"][name] for name in ("kernel", "bias")}}

    def _learnt(self, row: JudgedRow) -> JudgedRow:
        loss, scale = self._config.loss, self.scale
        shift, std = {"scalar_rating": (scale.mean, scale.std), "ordinal_rating": (scale.lowest, 1.0)}.get(loss, (0, 1))
        return replace(row, targets=tuple(None if x is None else (x - shift) / std for x in row.targets))

    def _column(self, i: int) -> np.ndarray:
        """The places, or the targets, of all that was judged."""
        return np.asarray([judged[i] for row in self.heldout for judged in row.judged])

    def _scores(self, network: RewardNetwork, params: Params) -> np.ndarray:
        """Every member's score of all parts, judged or not, ratings in their own unit."""
        scores = network.at(params, self.heldout_rows, [row.ends for row in self.heldout])
        is_scaled = self._config.loss == "scalar_rating"
        return scores * self.scale.std + self.scale.mean if is_scaled else scores

    def _figures(
        self, scores: np.ndarray, params: Params, *, member: int | None = None, intervals: bool = True
    ) -> Figures:
        """Of scores of all members together, or of one of them."""
        loss, targets, scale = self._config.loss, self._column(1), self.scale
        rows = np.repeat(np.arange(len(self.heldout)), [len(row.parts) for row in self.heldout])
        prompts = [row.prompt for row in self.heldout]
        every, scores, clusters = scores, scores[self._judged], [prompts[i] for i in rows[self._judged]]
        if loss == "scalar_rating":
            return evaluate_ratings(scores, targets, clusters, mean=scale.mean, intervals=intervals)
        if loss == "ordinal_rating":
            learnt = np.atleast_2d(hosts.fetch(params["head"]["thresholds"]))
            learnt = learnt if member is None else learnt[member : member + 1]
            places = np.mean([thresholds({"head": {"thresholds": own}}) for own in learnt], axis=0)
            levels = (targets - scale.lowest).astype(np.int64)
            given = {"thresholds": places, "shares": scale.shares, "intervals": intervals}
            return evaluate_levels(scores, levels, clusters, **given)
        figures = evaluate_outcomes(scores, targets, clusters, share=scale.mean, intervals=intervals)
        if loss == "process_bce":
            labels = np.asarray([np.nan if x is None else x for row in self.heldout for x in row.targets], np.float64)
            figures |= evaluate_solutions(every, labels, rows, prompts, intervals=intervals)
        return figures


HEADLINES: dict[Loss, str] = {
    "scalar_rating": "rmse",
    "ordinal_rating": "accuracy",
    "outcome_bce": "accuracy",
    "process_bce": "auc",
}
"""The figure that is given of each member."""


def _scale(loss: Loss, train: Sequence[JudgedRow], heldout: Sequence[JudgedRow]) -> Scale:
    """UserError where the targets to train on, or of outcomes those held out, are all the same."""
    targets, others = (np.asarray([x for row in rows for _, x in row.judged]) for rows in (train, heldout))
    for what, values in (("to train on", targets), ("held out", others)):
        if len(set(values)) < 2 and (what == "to train on" or READERS[loss].fields[-1] != "rating"):
            raise UserError(f"the rows {what} are all judged {values[0]:g}, so there is nothing to tell apart")
    levels = np.arange(targets.min(), targets.max() + 1)
    counts = np.asarray([(targets == level).sum() for level in levels])
    if loss == "ordinal_rating" and (0 in counts or not set(others) <= set(levels)):
        low, high = levels[0], levels[-1]
        raise UserError(
            f"the rows to train on must have each rating that is held out, and all from {low:g} to {high:g}"
        )
    return Scale(float(targets.mean()), float(targets.std()), float(levels[0]), counts / counts.sum())


def _among(scores: np.ndarray, each: Sequence[float], headline: str) -> Figures:
    """Of an ensemble's scores [m, n]: their standard deviation among members, and the members' mean figure."""
    if len(scores) == 1:
        return {}
    return {"uncertainty": float(scores.std(0).mean()), f"members_{headline}": float(np.mean(each))}


def normalized(params: Params, mean: Any, std: Any) -> Params:
    """The same reward model with its scores shifted and scaled: (r − mean) / std, folded into the head.

    Of an ensemble `mean` and `std` may be a member's each, [n]. What else the head has is left out.
    """
    head = params["head"]
    scale = std if isinstance(std, float) else np.asarray(std, np.float32)[:, None]
    return {**params, "head": {"kernel": head["kernel"] / scale, "bias": (head["bias"] - mean) / std}}


class MemberBatches:
    """Batches of several iterators as one, their axis behind that of the rows; a `Cursor` over all of them."""

    def __init__(self, iterators: Sequence[Any]) -> None:
        self._iterators = iterators

    def __next__(self) -> Any:
        """One of each."""
        return jax.tree.map(lambda *parts: np.stack(parts, axis=1), *(next(one) for one in self._iterators))

    def get_state(self) -> dict[str, Any]:
        """Where each stands."""
        return {"members": [one.get_state() for one in self._iterators]}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to where each stood."""
        for one, own in zip(self._iterators, state["members"], strict=True):
            one.set_state(own)


def batches(config: "Config", context: Context, name: str, data: "ComparedRows | JudgedRows", shard: Shard) -> Any:
    """A stage's batches; an ensemble's are of its members' own rows, where they have such."""
    ensemble = config.ensemble
    if ensemble is None or not ensemble.own_rows:
        return data.batches(data.train, seed=context.seed, shard=shard)
    own = []
    for seed in range(context.seed, context.seed + ensemble.members):
        rows = data.train
        if ensemble.bootstrap:
            rng = np.random.default_rng([seed, zlib.crc32(f"{name}/bootstrap".encode())])
            rows = by_part(rows, lambda part, rng=rng: [part[i] for i in rng.integers(len(part), size=len(part))])
        own.append(data.batches(rows, seed=seed, shard=shard))
    return MemberBatches(own)
