"""Best of n: a policy writes n completions of each prompt, and those that a reward likes best are taken.

Of held-out prompts that says what the best of n is worth, for n = 1, 2, 4, … (Nakano et al. 2021; Gao et al. 2022); of
others the best are kept as rows, which an `sft` stage learns from: rejection sampling (Bai et al. 2022; Touvron et al.
2023). `raft` is both in turn, for a policy that changes.

Shapes: p prompts, n completions of each.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
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
from rlhf_jax.evals.bootstrap import interval, mean_of
from rlhf_jax.evals.policy import Judge, Row, compare, write_samples
from rlhf_jax.files import write_whole
from rlhf_jax.numerics import require


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
        return {"batch_size": self.batch_size} | self.turn_rows


def train(config: Config, context: Context, name: str) -> dict[str, Any]:
    """Sample and score for both sets of prompts, and write the rows; the figures are for summary.json."""
    prompts = load_prompts(config, context, name)
    order = context.rng(f"{name}/rows").permutation(len(prompts.train))[: config.prompts]
    groups = sampled(config, context, name, [*prompts.heldout, *(prompts.train[int(i)] for i in order)])
    heldout, others = groups[: len(prompts.heldout)], groups[len(prompts.heldout) :]
    rows = kept(config, others, name)
    read = readings(heldout, onpolicy.judges(config, context))
    points = curve(read)
    first = [own[0] for own in read]
    best = [max(own, key=lambda row: row.readings["score"]) for own in read]
    if hosts.is_writer():
        write_whole(context.stage_dir(name) / "evaluation.json", json.dumps({"best_of_n": points}) + "\n")
        write_samples(context.stage_dir(name) / "samples.jsonl", first, best, step=config.n)
    made_rows.write(context, name, rows)
    counts = {} if config.data is None else prompts.counts.figures()
    score = float(np.mean([row["score"] for row in rows]))
    return {**compare(first, best), **_ends(points), **counts, "rows_kept": len(rows), "score_kept": score}


def sampled(config: Config, context: Context, name: str, prompts: Sequence[PromptRow]) -> list[made_rows.Rows]:
    """The n completions of each prompt as rows with their scores; NonFiniteError for one that is not finite."""
    drawing = Drawing(
        config.prompt_length,
        config.completion_tokens,
        config.sampling,
        config.batch_size,
        turns=config.turns,
    )
    policy, key = context.policy(config.policy), context.key(f"{name}/completions")
    with onpolicy.reward_of(config, context, name) as (reward, ensemble):
        reader = evaluator(drawing, context, name, prompts=prompts, reward=reward, ensemble=ensemble, judges={})

        def made(number: int, batch: Sequence[PromptRow]) -> made_rows.Rows:
            repeated = [prompt for prompt in batch for _ in range(config.n)]
            written = reader.read(policy, None, repeated, jax.random.fold_in(key, number))
            broken = [row for row in written if not math.isfinite(row.readings["score"])]
            if broken:
                raise NonFiniteError(f"{name}: a score is {broken[0].readings['score']}: {broken[0].completion[:80]!r}")
            return [made_rows.written(prompt, row) for prompt, row in zip(repeated, written, strict=True)]

        at_once = max(1, config.batch_size // config.n)
        rows = made_rows.in_batches(context, name, prompts, made, batch_size=at_once)
    return [rows[start : start + config.n] for start in range(0, len(rows), config.n)]


def kept(config: Config, groups: Sequence[made_rows.Rows], name: str) -> made_rows.Rows:
    """The rows that another stage is to learn from; UserError where there is none."""
    scores = np.asarray([[row["score"] for row in own] for own in groups])
    chosen = selected(scores, keep=config.keep, threshold=config.threshold)
    if not chosen.any():
        raise UserError(
            f"stages.{name}.threshold={config.threshold}: no completion scores so high; the best has {scores.max():g}"
        )
    rows = [row for own in groups for row in own]
    return [row for row, is_chosen in zip(rows, chosen.reshape(-1), strict=True) if is_chosen]


def selected(scores: Float[np.ndarray, "p n"], *, keep: int, threshold: float | None) -> Bool[np.ndarray, "p n"]:
    """Which completions of each prompt are kept: its `keep` best, of equal ones the earlier, from `threshold` on.

    >>> selected(np.array([[0.1, 0.7, 0.7], [0.0, 0.2, 0.1]]), keep=1, threshold=0.5).tolist()
    [[False, True, False], [False, False, False]]
    """
    places = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1)
    return (places < keep) & (scores >= (-np.inf if threshold is None else threshold))


def readings(groups: Sequence[made_rows.Rows], judges: Mapping[str, Judge]) -> list[list[Row]]:
    """The completions with their scores and what the judges say of them."""
    found = []
    for own in groups:
        said = {name: judge([row["prompt"] + row["completion"] for row in own]) for name, judge in judges.items()}
        found.append([])
        for i, row in enumerate(own):
            numbers = {"score": row["score"], **{name: float(values[i]) for name, values in said.items()}}
            ids = tuple(row["completion_tokens"])
            found[-1].append(Row(row["prompt"], row["completion"], ids, row["ended"], numbers))
    return found


def curve(groups: Sequence[Sequence[Row]]) -> list[dict[str, float]]:
    """For each n what its best completion is worth by every reading, with a 95% interval over prompts, and its KL."""
    names = groups[0][0].readings
    columns = {name: np.asarray([[row.readings[name] for row in own] for own in groups]) for name in names}
    points = []
    for n in powers_up_to(len(groups[0])):
        point = {"n": n, "kl": best_of_n_kl(n)}
        for name, values in columns.items():
            worth = best_of_n(columns["score"], values, n=n)
            low, high = interval(mean_of(worth), range(len(worth)))
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
