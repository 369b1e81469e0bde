"""What a finished run is used for: sampling from its policies, scoring with its reward models."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax import sharding
from rlhf_jax.algorithms import offline, reward_model
from rlhf_jax.algorithms.context import BASE, MAKERS, Context, Role, StageConfig
from rlhf_jax.config import Experiment, from_dict
from rlhf_jax.data.encoding import encode_group, encode_pair, encode_rated, encode_steps
from rlhf_jax.data.formats import Pair, Rated, Scored, Stepwise, Thumb
from rlhf_jax.data.judged import JudgedRow
from rlhf_jax.data.preferences import PreferenceGroup
from rlhf_jax.data.reading import read_judged
from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.data.sources import Jsonl
from rlhf_jax.errors import UserError
from rlhf_jax.evals import evaluate_pairs
from rlhf_jax.evals.judgements import evaluate_outcomes, evaluate_ratings, evaluate_solutions
from rlhf_jax.evals.ranking import evaluate_ranking
from rlhf_jax.interop import Bundled, FromPretrained, Pretrained, Scratch, export, export_adapter
from rlhf_jax.interop.json_tokenizer import JsonTokenizer
from rlhf_jax.interop.tokenizers import Tokenizer
from rlhf_jax.models import Policy
from rlhf_jax.models.spec import DType
from rlhf_jax.rewards.network import RewardNetwork
from rlhf_jax.run import STAGES
from rlhf_jax.sampling import Sampler, Sampling

BUNDLED = "bundled"
"""Where a workdir may stand, the model in the package."""

MODELS = (Bundled, Scratch, FromPretrained)


@dataclass(frozen=True)
class Run:
    """A workdir with its finished stages; the package's own model has none, only BASE."""

    context: Context
    stages: dict[str, StageConfig]
    base: str | None = None
    """By what transformers loads the model that the run started from; None where it cannot."""

    def pick(self, stage: str | None, role: Role) -> str:
        """The stage asked for, or the last that serves in a role; raises UserError where there is none."""
        names = [name for name, config in self.stages.items() if config.produces in MAKERS[role]]
        known = [BASE, *names] if role == "policy" else names
        if stage is None and known:
            return known[-1]
        if stage in known:
            return stage
        there = f"there are: {', '.join(known)}" if known else "there is none"
        asked = f"--stage {stage}: no finished stage of that name" if stage else "no finished stage"
        raise UserError(f"{self.context.workdir}: {asked} made a {MAKERS[role][0]}; {there}")


def open_scored(workdir: Path) -> Run:
    """The run in a folder, to score with; UserError for a model without stages too, such as an exported one."""
    if _is_model(workdir):
        raise UserError(
            f"{workdir}: score takes the folder of a run, whose config.json says how long its reward model's rows are "
            "and what it learnt; an exported model's does not: name the run that it was exported from"
        )
    return open_run(workdir)


def open_run(workdir: Path) -> Run:
    """The run in a folder, read from its config.json; "bundled", unless there is such a folder, is the package's model.

    A .gguf file or a Hugging Face folder is a run without stages, too.
    Raises UserError where there is no run, or not one that this version can read.
    """
    if str(workdir) == BUNDLED and not workdir.exists():
        return Run(_context(Experiment(Bundled(), MovieReviews(), {}), workdir), {})
    if _is_model(workdir):
        context = _context(Experiment(FromPretrained(str(workdir)), MovieReviews(), {}), workdir)
        if context.model.tokenizer is None:
            raise UserError(f"{workdir}: this model comes without a tokenizer")
        return Run(context, {})
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(f"{workdir}: no run (there is no config.json in it), and not {BUNDLED!r}")
    try:
        experiment = from_dict(json.loads(path.read_bytes())["experiment"], [*MODELS, *STAGES])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__} {error}") from None
    finished = {name: stage for name, stage in experiment.stages.items() if (workdir / name / "params").is_dir()}
    base = experiment.model.hugging_face if isinstance(experiment.model, FromPretrained) else None
    return Run(_context(experiment, workdir), finished, base)


def _is_model(path: Path) -> bool:
    """Whether it is a .gguf file or a Hugging Face folder, such as `rlhf-jax export` makes."""
    return path.is_file() or any(path.glob("*.safetensors*"))


def sample(
    run: Run,
    prompt: str,
    *,
    stage: str | None,
    n: int,
    max_tokens: int,
    sampling: Sampling,
    seed: int,
    chat: bool = False,
) -> dict[str, Any]:
    """N completions of a prompt, or answers: {"prompt", "stage", "completions": [{"text", "ended", "tokens"}]}."""
    context, tokenizer = run.context, run.context.tokenizer
    name = run.pick(stage, "policy")
    tokens = _chat_prompt(run, prompt) if chat else [tokenizer.bos_id, *tokenizer.encode(prompt)]
    if len(tokens) + max_tokens > context.spec.max_len:
        raise UserError(
            f"--prompt has {len(tokens)} tokens (with BOS) and --max_tokens is {max_tokens}: more than the model's "
            f"context, {context.spec.max_len}"
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
    samples = sampler(_sampled(run, name), [tokens] * n, jax.random.key(seed))
    completions = [{"text": tokenizer.decode(s.tokens), "ended": s.ended, "tokens": len(s.tokens)} for s in samples]
    return {"prompt": prompt, "stage": name, "completions": completions}


def _sampled(run: Run, name: str) -> Policy:
    """A stage's policy as it is meant to be sampled: ILQL's by its values too."""
    stage = run.stages.get(name)
    return offline.policy(stage, run.context, name) if isinstance(stage, offline.Config) else run.context.policy(name)


def _chat_prompt(run: Run, prompt: str) -> list[int]:
    """The prompt as the user's turn, by the model's chat template."""
    tokenizer = run.context.tokenizer
    if not isinstance(tokenizer, JsonTokenizer):
        raise UserError(f"{run.context.workdir}: --chat: this model's tokenizer has no chat template")
    return tokenizer.encode_chat_prompt([{"role": "user", "content": prompt}])


def score(run: Run, path: Path, *, stage: str | None, fields: Mapping[str, str] | None = None) -> dict[str, Any]:
    """How a reward model ranks a JSONL file: {"n", "accuracy", "interval", "mean_margin", "cut", "dropped", "stage"}.

    n counts pairs: the file's, or, where it has texts with scores, all pairs of texts with different scores. `cut`
    counts the rows of the file that were longer than those that the model was trained on, and were cut to that,
    `dropped` transcripts without an answer to compare. Raises UserError where no row is left.

    Of ratings, labels and labelled steps n counts these, and the figures are those of `evals.judgements` that the
    stage's scores have the unit for: rmse those of "scalar_rating" alone, accuracy and log_loss logits. Baselines are
    of the file's own mean. `fields` are the rows' own names of fields, by TRL's. UserError names the file and the row
    that is of another kind.
    """
    name = run.pick(stage, "scorer")
    config = run.stages[name]
    assert isinstance(config, reward_model.Config)
    judged = read_judged(Jsonl(path, fields=fields or {}), neutral=config.neutral == "right")
    context, length = run.context, max(run.stages[name].lengths().values())
    ensemble, pad_id = context.ensembles.get(name), context.tokenizer.pad_id
    network = RewardNetwork(context.spec, context.mesh, length=length, pad_id=pad_id, ensemble=ensemble)
    if isinstance(judged[0], Rated | Thumb | Stepwise):
        encode = (encode_steps if isinstance(judged[0], Stepwise) else encode_rated)(context.tokenizer)
        whole = [encode(one) for one in judged]
        kept = [row for row in (row.cut(length) for row in whole) if row.tells]
        read = partial(network.at, context.network(name))
        figures = _judgements(kept, lambda *at: network.combined(read(*at)), judged[0], path)
        return {**_of_unit(figures, config.loss), "cut": sum(row.longest > length for row in whole), "stage": name}
    rows: list[list[int]] = []
    cut = dropped = 0
    encode = encode_pair(context.tokenizer)
    for one in judged:
        whole = encode(one) if isinstance(one, Pair) else _text_group(context.tokenizer, one)
        if isinstance(one, Pair) and not whole.pairs:
            dropped += 1
            continue
        rows += whole.cut(length).rows()
        cut += whole.longest > length
    if not rows:
        raise UserError(f"{path}: no transcript has an answer to compare")
    scores = network(context.network(name), rows)
    targets = [one.score for one in judged if isinstance(one, Scored)]
    return {**_agreement(scores, targets, path), "cut": cut, "dropped": dropped, "stage": name}


def export_stage(
    run: Run, folder: Path, *, stage: str | None, dtype: DType, adapter: bool = False
) -> tuple[str, str | None]:
    """Write a stage's policy or reward model for transformers; returns the stage and what a reader must know.

    Without a stage it is the last policy. With `adapter` its adapters alone are written, for PEFT. Raises UserError as
    `interop.export` and `interop.export_adapter` do.
    """
    context = run.context
    is_reward = stage is not None and stage in run.stages and run.stages[stage].produces == "reward"
    name = run.pick(stage, "reward" if is_reward else "policy")
    if adapter:
        if name == BASE:
            raise UserError(f"{context.workdir}: --adapter: {BASE} is the model without adapters; leave --adapter out")
        own = context.head_params(name) if is_reward else context.policy_params(name)
        model = Pretrained(context.spec, own, context.tokenizer)
        return name, export_adapter(model, folder, base=run.base, dtype=dtype)
    whole = context.network(name) if is_reward else context.policy(name)
    return name, export(Pretrained(context.spec, whole, context.tokenizer), folder, dtype=dtype)


def _agreement(scores: np.ndarray, targets: Sequence[float], path: Path) -> dict[str, Any]:
    """The figures for texts with scores, or, where there are no targets, for chosen and rejected in turn."""
    if not targets:
        report = evaluate_pairs(scores[::2], scores[1::2], scores=scores, lengths=np.zeros(len(scores)))
        n = report.n
    else:
        try:
            report = evaluate_ranking(scores, np.asarray(targets))
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
        n = report.pairs
    return {
        "n": n,
        "accuracy": report.accuracy,
        "interval": list(report.interval),
        "mean_margin": report.mean_margin,
    }


def _judgements(
    rows: Sequence[JudgedRow], score: Callable[..., np.ndarray], first: Rated | Thumb | Stepwise, path: Path
) -> dict[str, Any]:
    """The figures for completions that were judged one by one, whole or by step; `score` reads rows at their places."""
    said = [target for row in rows for target in row.targets]
    judged = np.asarray([target is not None for target in said], bool)
    labels = np.asarray([np.nan if target is None else target for target in said], np.float64)
    targets = labels[judged]
    if len(set(targets.tolist())) < 2:
        found = f"all {targets[0]:g}" if len(targets) else "not there"
        raise UserError(f"{path}: what was said of the completions is {found}: there is nothing to tell apart")
    which = np.repeat(np.arange(len(rows)), [len(row.parts) for row in rows])
    prompts = [row.prompt for row in rows]
    clusters = [prompts[i] for i in which[judged]]
    scores = score([row.tokens for row in rows], [row.ends for row in rows])
    if isinstance(first, Rated):
        return {"n": len(targets), **evaluate_ratings(scores, targets, clusters, mean=float(targets.mean()))}
    figures = evaluate_outcomes(scores[judged], targets, clusters, share=float(targets.mean()))
    if isinstance(first, Stepwise):
        figures |= evaluate_solutions(scores, labels, which, prompts)
    return {"n": len(targets), **figures}


def _of_unit(figures: dict[str, Any], loss: str) -> dict[str, Any]:
    """Without the figures that ask for scores in another unit than a loss has taught: the ratings', or logits."""
    other = () if loss == "scalar_rating" else ("rmse",)
    other += () if loss in ("outcome_bce", "process_bce") else ("accuracy", "log_loss", "solution")
    return {name: value for name, value in figures.items() if not name.startswith(other)}


def _text_group(tokenizer: Tokenizer, row: Scored) -> PreferenceGroup:
    """A text on its own, after its prompt, as a row that is cut as in training."""
    return encode_group(tokenizer, row.prompt, (row.text,), (), ())


def _context(experiment: Experiment, workdir: Path) -> Context:
    """A stage's surroundings on one device."""
    model = experiment.model.load(data=experiment.data, workdir=workdir, seed=experiment.seed)
    made = reward_model.ensembles(experiment.stages)
    return Context(workdir, experiment.seed, sharding.single_device_mesh(), model, experiment.data, ensembles=made)
