"""Best of n: a policy writes n completions of each prompt, and those that a reward likes best are taken.

Of held-out prompts that says what the best of n is worth, for n = 1, 2, 4, … (Nakano et al. 2021; Gao et al. 2022); of
others the best are kept as rows, which an `sft` stage learns from: rejection sampling (Bai et al. 2022; Touvron et al.
2023). `raft` is both in turn, for a policy that changes.

Shapes: p prompts, n completions of each.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from rlhf_jax import hosts
from rlhf_jax.algorithms import made_rows, onpolicy
from rlhf_jax.algorithms.context import Context, Kind, check_positive
from rlhf_jax.algorithms.evaluation import Drawing, evaluator
from rlhf_jax.algorithms.onpolicy import Rewarded
from rlhf_jax.algorithms.prompting import load_prompts
from rlhf_jax.data.prompt_rows import PromptRow
from rlhf_jax.errors import NonFiniteError, UserError
from rlhf_jax.evals.best_of_n import best_of_n, best_of_n_kl, powers_up_to
from rlhf_jax.evals.bootstrap import bootstrap_interval, weighted_mean
from rlhf_jax.evals.policy import Judge, Row, Scorer, compare, write_samples
from rlhf_jax.files import write_whole
from rlhf_jax.metrics import Progress
from rlhf_jax.numerics import require
from rlhf_jax.types import Params


@dataclass(frozen=True)
class Config(Rewarded):
    """The best of n completions: their worth on held-out prompts, and those of other prompts as rows."""

    n: int = 16
    """Completions of a prompt."""
    prompts: int = 1_000
    """Prompts to train on, at most, whose completions may become rows."""
    keep: int = 1
    """Completions of each that do, the best ones."""
    threshold: float | None = None
    """Least score of a row; none: whatever it is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "n", "prompts", "keep")
        if self.keep > self.n:
            raise ValueError(f"keep={self.keep} must be at most n={self.n}, the completions of a prompt")
        require("threshold", self.threshold, "(-inf, inf)")

    @property
    def produces(self) -> Kind:
        """What was kept."""
        return "rows"

    def batch_sizes(self) -> dict[str, int]:
        """What is sampled at once."""
        return {"batch_size": self.batch_size}


def train(config: Config, context: Context, name: str) -> dict[str, Any]:
    """Sample and score both sets of prompts, and write the rows; the figures are for summary.json."""
    prompts = load_prompts(config, context, name)
    order = context.rng(f"{name}/rows").permutation(len(prompts.train))[: config.prompts]
    chosen = [prompts.train[int(i)] for i in order]
    with onpolicy.reward_of(config, context, name) as reward:
        judges = onpolicy.judges(config, context)
        heldout = sampled(config, context, f"{name}/evaluation", prompts.heldout, reward, judges)
        written = sampled(config, context, f"{name}/rows", chosen, reward, {})
    kept = selected(_scores(written), keep=config.keep, threshold=config.threshold)
    rows = [
        _row(prompt, row)
        for prompt, own, good in zip(chosen, written, kept, strict=True)
        for row, is_kept in zip(own, good, strict=True)
        if is_kept
    ]
    if not rows:
        best = _scores(written).max()
        raise UserError(
            f"stages.{name}.threshold={config.threshold}: no completion scores so high; the best has {best:g}"
        )
    first, best = (
        [own[0] for own in heldout],
        [own[int(i)] for own, i in zip(heldout, _scores(heldout).argmax(1), strict=True)],
    )
    points = curve(heldout)
    if hosts.is_writer():
        write_whole(context.stage_dir(name) / "evaluation.json", json.dumps({"best_of_n": points}) + "\n")
        write_samples(context.stage_dir(name) / "samples.jsonl", first, best, step=config.n)
    made_rows.write(context, name, rows)
    counts = {} if config.data is None else prompts.counts.figures()
    score = float(np.mean([row["score"] for row in rows]))
    return {**compare(first, best), **_ends(points), **counts, "rows_kept": len(rows), "score_kept": score}


def sampled(
    config: Config,
    context: Context,
    stream: str,
    prompts: Sequence[PromptRow],
    reward: Params | Scorer,
    judges: Mapping[str, Judge],
) -> list[list[Row]]:
    """The n completions of each prompt, read by reward and judges; NonFiniteError for a score that is not finite."""
    drawing = Drawing(
        config.prompt_length,
        config.completion_tokens,
        config.sampling,
        config.sampling.temperature,
        config.batch_size,
    )
    repeated = [prompt for prompt in prompts for _ in range(config.n)]
    read = evaluator(drawing, context, stream, prompts=repeated, reward=reward, judges=judges)
    rows: list[Row] = []
    with Progress(f"{stream}: sampling", len(repeated)) as progress:
        for some in read.batches(context.policy(config.policy), None):
            rows += some
            progress.update(len(rows), {})
    broken = [row for row in rows if not np.isfinite(row.readings["score"])]
    if broken:
        raise NonFiniteError(f"{stream}: {len(broken)} of {len(rows)} scores are not finite; nothing is written")
    return [rows[start : start + config.n] for start in range(0, len(rows), config.n)]


def selected(scores: Float[np.ndarray, "p n"], *, keep: int, threshold: float | None) -> Bool[np.ndarray, "p n"]:
    """Which completions of each prompt are kept: its `keep` best, of equal ones the earlier, from `threshold` on.

    >>> selected(np.array([[0.1, 0.7, 0.7], [0.0, 0.2, 0.1]]), keep=1, threshold=0.5).tolist()
    [[False, True, False], [False, False, False]]
    """
    places = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1)
    return (places < keep) & (scores >= (-np.inf if threshold is None else threshold))


def curve(groups: Sequence[Sequence[Row]]) -> list[dict[str, float]]:
    """For each n what its best completion is worth by every reading, with a 95% interval over prompts, and its KL."""
    columns = {name: _readings(groups, name) for name in groups[0][0].readings}
    points = []
    for n in powers_up_to(len(groups[0])):
        point = {"n": n, "kl": best_of_n_kl(n)}
        for name, values in columns.items():
            worth = best_of_n(columns["score"], values, n=n)
            low, high = bootstrap_interval(weighted_mean(worth), np.arange(len(worth)))
            point |= {name: float(worth.mean()), f"{name}_low": low, f"{name}_high": high}
        points.append(point)
    return points


def _ends(points: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """One completion as before, the best of all as after; of the latter the intervals too."""
    first, last = points[0], points[-1]
    names = [name for name in first if f"{name}_low" in first]
    before = {f"{name}_before": first[name] for name in names}
    after = {f"{name}_after{end}": last[f"{name}{end}"] for name in names for end in ("", "_low", "_high")}
    return {**before, **after, "seq_kl": last["kl"]}


def _readings(groups: Sequence[Sequence[Row]], name: str) -> Float[np.ndarray, "p n"]:
    return np.asarray([[row.readings[name] for row in own] for own in groups])


def _scores(groups: Sequence[Sequence[Row]]) -> Float[np.ndarray, "p n"]:
    return _readings(groups, "score")


def _row(prompt: PromptRow, row: Row) -> dict[str, Any]:
    """With the ids that were read and written: those of the texts may be others, and have an EOS too many."""
    ids = {"prompt_tokens": list(prompt.tokens), "completion_tokens": list(row.tokens)}
    return {"prompt": row.prompt, "completion": row.completion, "score": row.readings["score"], **ids}
