"""What a finished run is used for: sampling from its policies, scoring with its reward models."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy.stats import spearmanr

from rlhf_jax import sharding
from rlhf_jax.algorithms.context import BASE, Context
from rlhf_jax.config import from_dict
from rlhf_jax.data.formats import Pair, Scored, read_judged
from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.errors import UserError
from rlhf_jax.evals import accuracy_interval
from rlhf_jax.interop.pretrained import Bundled, ModelConfig, Scratch
from rlhf_jax.rewards.network import RewardNetwork
from rlhf_jax.run import STAGES
from rlhf_jax.sampling import Sampler, Sampling

BUNDLED = "bundled"
"""The name, where a workdir may stand, of the model in the package."""

_BATCH = 64


@dataclass(frozen=True)
class Run:
    """A workdir with the stages in it that are finished."""

    context: Context
    stages: dict[str, str]  # name -> "policy" or "reward"
    lengths: dict[str, int]  # of a reward model's rows, by stage

    def pick(self, stage: str | None, kind: str) -> str:
        """The stage asked for, or the last of a kind; UserError where there is none."""
        names = [name for name, made in self.stages.items() if made == kind]
        if stage is None and names:
            return names[-1]
        if stage in names:
            return stage
        known = ", ".join(names) or "none"
        what = (
            f"--stage {stage}: no finished stage of that name makes a {kind}" if stage else f"no finished {kind} stage"
        )
        raise UserError(f"{self.context.workdir}: {what}; there are: {known}")


def open_run(workdir: Path) -> Run:
    """Read a run's config.json; "bundled" is the package's own model, with one stage, "base"."""
    if str(workdir) == BUNDLED and not workdir.exists():
        return Run(_context(Bundled(), workdir, 0), {BASE: "policy"}, {})
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(f"{workdir}: no run (it has no config.json) and not {BUNDLED!r}")
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))["experiment"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__} {error}") from None
    experiment = from_dict(plain, [Bundled, Scratch, *STAGES])
    done = {name: stage for name, stage in experiment.stages.items() if (workdir / name / "params").exists()}
    kinds = {name: stage.produces for name, stage in done.items()}
    lengths = {name: stage.lengths()["length"] for name, stage in done.items() if stage.produces == "reward"}
    return Run(_context(experiment.model, workdir, experiment.seed), kinds, lengths)


def sample(run: Run, prompt: str, *, stage: str | None, n: int, max_tokens: int, sampling: Sampling, seed: int) -> Any:
    """N completions of a prompt: {"prompt", "stage", "completions": [{"text", "ended", "tokens"}]}."""
    context, tokenizer = run.context, run.context.tokenizer
    name = run.pick(stage, "policy")
    tokens = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    if len(tokens) + max_tokens > context.spec.max_len:
        raise UserError(
            f"--prompt has {len(tokens)} tokens and --max-tokens is {max_tokens}: more than the model's context, "
            f"{context.spec.max_len}"
        )
    sampler = Sampler(
        context.spec,
        context.mesh,
        tokenizer,
        prompt_length=len(tokens),
        max_new_tokens=max_tokens,
        sampling=sampling,
        batch_size=n,
    )
    samples = sampler(context.policy_params(name), [tokens] * n, jax.random.key(seed))
    completions = [{"text": tokenizer.decode(s.tokens), "ended": s.ended, "tokens": len(s.tokens)} for s in samples]
    return {"prompt": prompt, "stage": name, "completions": completions}


def score(run: Run, path: Path, *, stage: str | None) -> dict[str, Any]:
    """A reward model on a file: accuracy on its pairs, or how its scores agree with the file's.

    Pairs: {"n", "accuracy", "interval", "mean_margin", "cut", "stage"}. Rows of text and score: the same, with accuracy
    over all pairs of rows that the file scores differently and the interval of as many independent pairs as there are
    rows, and "spearman". `cut` counts rows that were too long.
    """
    name = run.pick(stage, "reward")
    judged = read_judged(path)
    context, length = run.context, run.lengths[name]
    network = RewardNetwork(
        context.spec, context.mesh, length=length, pad_id=context.tokenizer.pad_id, batch_size=_BATCH
    )
    params = context.head_params(name)
    rows: list[list[int]] = []
    for row in judged:
        texts = (row.chosen, row.rejected) if isinstance(row, Pair) else (row.text,)
        rows += [_row(context, row.prompt, text) for text in texts]
    cut = sum(len(row) > length for row in rows)
    scores = network(params, [row[-length:] for row in rows])
    if isinstance(judged[0], Pair):
        margins = scores[::2] - scores[1::2]
        wins = float(np.sum((np.sign(margins) + 1) / 2))
        n, extra = len(margins), {}
    else:
        margins, extra = _against(scores, [row.score for row in judged if isinstance(row, Scored)])
        n = len(judged)
        wins = float(np.mean((np.sign(margins) + 1) / 2)) * n
    return {
        "n": n,
        "accuracy": wins / n,
        "interval": list(accuracy_interval(wins, n)),
        "mean_margin": float(np.mean(margins)),
        **extra,
        "cut": cut,
        "stage": name,
    }


def _against(scores: np.ndarray, given: Sequence[float]) -> tuple[np.ndarray, dict[str, float]]:
    """Score gaps, winner minus loser, of all rows that the file scores differently; and the rank correlation."""
    targets = np.asarray(given)
    better, worse = np.nonzero(targets[:, None] > targets[None, :])
    if not len(better):
        raise UserError("--input: every row has the same score, so there is nothing to rank")
    return scores[better] - scores[worse], {"spearman": float(spearmanr(scores, targets).statistic)}


def _row(context: Context, prompt: str, text: str) -> list[int]:
    tokenizer = context.tokenizer
    return [tokenizer.bos_id, *tokenizer.encode(prompt), *tokenizer.encode(text), tokenizer.eos_id]


def _context(model: ModelConfig, workdir: Path, seed: int) -> Context:
    data = MovieReviews()
    return Context(
        workdir, seed, sharding.single_device_mesh(), model.load(data=data, workdir=workdir, seed=seed), data
    )
