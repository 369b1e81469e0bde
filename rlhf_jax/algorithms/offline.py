"""Learning a policy from completions with scores or thumbs, without sampling: ILQL (Snell et al. 2022), and behaviour
cloning of the better ones, by weight or filtered.

`<stage>/params` is a plain policy. Of ILQL it is the one that learnt to predict the completions, without what perturbs
it: later stages and `export` read it so, `rlhf-jax sample` perturbs it by `<stage>/heads`.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np

from rlhf_jax import checkpoint, hosts, sharding
from rlhf_jax.algorithms import offline_rows
from rlhf_jax.algorithms.context import Context, Role, check_field, check_positive, check_prompt_tokens, named
from rlhf_jax.algorithms.evaluation import Drawing, evaluate, sentiment_judges
from rlhf_jax.algorithms.loop import finish
from rlhf_jax.algorithms.offline_ilql import Ilql
from rlhf_jax.algorithms.offline_methods import Filtered, Method, Numbers, Weighted
from rlhf_jax.algorithms.offline_rows import ScoredRow, batch_rows
from rlhf_jax.algorithms.prompting import heldout_openings, prompts_of
from rlhf_jax.algorithms.sft import Openings
from rlhf_jax.algorithms.supervised import SupervisedConfig, heldout_means, take_steps
from rlhf_jax.data.pipeline import by_part
from rlhf_jax.data.preference_batches import batches
from rlhf_jax.data.sources import Data, Source
from rlhf_jax.data.texts import check_texts
from rlhf_jax.errors import UserError
from rlhf_jax.evals.bootstrap import mean_of, with_interval
from rlhf_jax.evals.policy import Row, compare, write_samples
from rlhf_jax.files import write_whole
from rlhf_jax.models import Policy
from rlhf_jax.models.perturbed import init_heads
from rlhf_jax.sampling import Sampling
from rlhf_jax.train_step import Step

HEADS = "heads"
"""Where ILQL's heads lie, beside the stage's `params`."""


@dataclass(frozen=True)
class Config(SupervisedConfig):
    """A policy from scored completions."""

    init: str = "sft"
    """The stage whose policy it starts from; or "base"."""
    method: Ilql | Weighted | Filtered = field(default_factory=Ilql)
    """How it learns."""
    data: Openings | Source | None = None
    """Completions with scores: rows of a source of its own, or, if None, of the experiment's, with prompt, completion
    and score, rating or label, or messages in place of the first two; or openings of the experiment's labelled texts,
    whose labels are the scores."""
    row_length: int = 49
    """Tokens of a row, prompt and completion; longer prompts lose their start."""
    evaluation_openings: tuple[int, int] | None = (2, 8)
    """Fewest and most tokens of openings of the experiment's test texts, which the first and the last policy complete
    and sentiment judges read; none: they complete held-out rows' prompts, and nobody judges."""
    evaluation_prompts: int = 256
    """How many, at most."""
    completion_tokens: int = 40
    """Most tokens of such a completion."""
    sampling: Sampling = field(default_factory=Sampling)
    """How these are drawn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "completion_tokens", "evaluation_prompts")
        if self.evaluation_openings is not None:
            check_prompt_tokens(self.evaluation_openings)
        elif self.completion_tokens >= self.row_length:
            raise ValueError(f"row_length={self.row_length} must exceed completion_tokens={self.completion_tokens}")
        if isinstance(self.data, Openings) and self.data.length > self.row_length:
            raise ValueError(
                f"row_length={self.row_length} must hold BOS, prompt and completion of data: {self.data.length} tokens"
            )

    @property
    def has_heads(self) -> bool:
        """Whether it leaves values to decode by beside its policy."""
        return isinstance(self.method, Ilql)

    def requires(self) -> dict[str, tuple[str, Role]]:
        """The stage in `init`."""
        return named("policy", init=self.init)

    def lengths(self) -> dict[str, int]:
        """A row, and what is sampled."""
        return super().lengths() | {
            "evaluation_openings + completion_tokens (with BOS)": self.prompt_length + self.completion_tokens
        }

    @property
    def prompt_length(self) -> int:
        """Columns of a prompt that is completed, BOS included."""
        openings = self.evaluation_openings
        return self.row_length - self.completion_tokens if openings is None else 1 + openings[1]

    def check_inputs(self, data: Data) -> None:
        """The scored rows, and the labelled texts whose openings are completed."""
        offline_rows.check(self, data)
        if self.evaluation_openings is not None:
            check_field("evaluation_openings", lambda: check_texts(data, labelled=True))


def start(config: Config, context: Context, name: str) -> tuple[Any, Step]:
    """The state that training starts from, and its compiled step; of a context of shapes, both abstract."""
    return config.method.start(config, context, name, context.policy_params(config.init))


def train(config: Config, context: Context, name: str) -> dict[str, Any]:
    """Learn from the rows; the figures are for summary.json."""
    method, selected = config.method, offline_rows.load(config, context, name)
    train_rows, heldout = numbered(method, selected.train, selected.heldout, name)
    make = partial(batch_rows, pad_id=context.tokenizer.pad_id, length=config.row_length)
    shard, size = sharding.process_shard(context.mesh), config.batch_size
    loss_fn = method.loss(context.spec, balance=False)
    means = heldout_means(config, context, loss_fn, batches(heldout, make, batch_size=size, seed=0))
    state, figures = take_steps(
        config,
        context,
        name,
        begin=partial(start, config, context, name),
        batches=batches(train_rows, make, batch_size=size, seed=context.seed, shard=shard),
        heldout=lambda state: means(method.whole(state, context.base), method.learner(state).hyper),
        note=selected.counts.line(),
    )
    if isinstance(method, Ilql):
        checkpoint.save_params(context.stage_dir(name) / HEADS, method.decoding_heads(state))
    finish(context, name, method.own(state))
    read = written(config, context, name, selected.heldout, method.policies(state, context.base))
    return {**read, **figures, **selected.counts.figures(), "rows_learnt": len(train_rows)}


def policy(config: Config, context: Context, name: str) -> Policy:
    """A finished stage's policy as it is meant to be sampled: ILQL's perturbed, at the config's β."""
    plain, method = context.policy(name), config.method
    if not isinstance(method, Ilql):
        return plain
    boxed = jax.eval_shape(partial(init_heads, context.spec, heads=method.heads), jax.random.key(0))
    shapes = sharding.in_shards(sharding.shardings(context.mesh, boxed), sharding.unbox(boxed))
    return method.perturbed(plain, checkpoint.load_params(context.stage_dir(name) / HEADS, shapes), method.beta)


def numbered(
    method: Method, rows: Sequence[ScoredRow], heldout: Sequence[ScoredRow], name: str
) -> tuple[Sequence[ScoredRow], Sequence[ScoredRow]]:
    """The rows that the method learns from and is read on, its numbers in the scores' place."""
    try:
        numbers = method.fit(list(rows))
    except UserError as error:
        raise UserError(f"stages.{name}.method: {error}") from None
    return by_part(rows, partial(_with, numbers=numbers, what="to train on", name=name)), _with(
        heldout, numbers=numbers, what="held out", name=name
    )


def _with(rows: Sequence[ScoredRow], *, numbers: Numbers, what: str, name: str) -> list[ScoredRow]:
    each = zip(rows, numbers(rows), strict=True)
    found = [dataclasses.replace(row, score=float(number)) for row, number in each if not np.isnan(number)]
    if not found:
        raise UserError(f"stages.{name}.method: none of {len(rows)} rows {what} is left that scores high enough")
    return found


def written(
    config: Config, context: Context, name: str, heldout: Sequence[ScoredRow], policies: Mapping[float, Policy]
) -> dict[str, float]:
    """What the first and the last policy write for the same prompts, into samples.jsonl, and the figures of both; of
    ILQL's those at every β too, in evaluation.json with 95% intervals over prompts.
    """
    openings, count = config.evaluation_openings, config.evaluation_prompts
    if openings is not None:
        prompts, judges = heldout_openings(context, name, tokens=openings, count=count), sentiment_judges(context)
    else:
        tokens, judges = [row.prompt for row in heldout], {}
        prompts = prompts_of(tokens, context.tokenizer, length=config.prompt_length, count=count)
    first = context.policy(config.init)
    before, *others = evaluate(
        Drawing(config.prompt_length, config.completion_tokens, config.sampling, config.batch_size),
        context,
        name,
        [first, *policies.values()],
        prompts=prompts,
        reference=first,
        reward={},
        judges=judges,
    )
    rows = dict(zip(policies, others, strict=True))
    after = rows[config.method.beta] if isinstance(config.method, Ilql) else others[0]
    figures = compare(before, after)
    if hosts.is_writer():
        write_samples(context.stage_dir(name) / "samples.jsonl", before, after, step=config.steps)
    if not isinstance(config.method, Ilql):
        return figures
    points = [_point(beta, before, rows[beta]) for beta in sorted(rows)]
    if hosts.is_writer():
        write_whole(context.stage_dir(name) / "evaluation.json", json.dumps({"betas": points}) + "\n")
    return figures | {
        f"{figure}_at_beta_{point['beta']:g}": point[figure] for point in points for figure in ("seq_kl", *judges)
    }


def _point(beta: float, before: Sequence[Row], rows: Sequence[Row]) -> dict[str, float]:
    """The figures at a β, with 95% intervals over prompts of what was read of each completion."""
    compared = compare(before, rows)
    found = {"beta": beta, **{figure: compared[f"{figure}_after"] for figure in ("distinct2", "length")}}
    for reading in rows[0].readings:
        values = mean_of([row.readings[reading] for row in rows])
        figure = "seq_kl" if reading == "kl" else reading
        found |= with_interval(figure, values, range(len(rows)), intervals=True)
    return found
