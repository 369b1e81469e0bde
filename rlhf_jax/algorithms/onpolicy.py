"""What every on-policy stage shares around its algorithm: fields, rewards, the loop, the reading before and after."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from rlhf_jax import guard, hosts
from rlhf_jax.algorithms import iterations, pair_judges, truncation
from rlhf_jax.algorithms.context import Context, Kind, Role, check_positive, named
from rlhf_jax.algorithms.evaluation import Drawing, evaluate, sentiment_judges
from rlhf_jax.algorithms.iterations import Algorithm, Iterations, Phases, Whole, ensemble_of, texts
from rlhf_jax.algorithms.loop import Loop, finish
from rlhf_jax.algorithms.prompting import Completing, Prompting, check_prompts, load_prompts, prompt_batches
from rlhf_jax.algorithms.truncation import Truncation
from rlhf_jax.data.encoding import Selected
from rlhf_jax.data.prompt_rows import PromptRow
from rlhf_jax.data.sources import Data
from rlhf_jax.errors import UserError
from rlhf_jax.evals.bootstrap import interval, mean_of
from rlhf_jax.evals.policy import Judge, Row, Scorer, compare, write_samples
from rlhf_jax.interop.tokenizers import Tokenizer
from rlhf_jax.metrics import read_jsonl
from rlhf_jax.models import ModelSpec
from rlhf_jax.numerics import require
from rlhf_jax.placement import Colocated, Disaggregated, Idle, Placement
from rlhf_jax.rewards.ensemble import Combine, Ensemble
from rlhf_jax.rewards.group_judge import GroupJudge, JudgeReward, Reward
from rlhf_jax.rewards.host import HostReward, Texts
from rlhf_jax.rewards.judging import LocalJudge
from rlhf_jax.rewards.with_network import NetworkPart
from rlhf_jax.sampling import Sampling, stops
from rlhf_jax.types import Params

Reader = HostReward | GroupJudge
"""Who reads completions on the host, and has metrics of it."""


@dataclass(frozen=True)
class ValueHead:
    """A critic that starts as a policy does: its trunk, and a head of zeros (Ziegler et al. 2019)."""

    trunk: str = "sft"
    """The stage that made the policy, or "base"."""


@dataclass(frozen=True)
class SharedTrunk:
    """A head of zeros on the policy's own trunk: one network, one optimiser, one forward pass (Ziegler et al. 2019).

    What stops the policy's updates (`stop_at_kl`, `optimizer.bad_steps`) stops the critic's with them.
    """

    value_coef: float = 0.1
    """Weight of the value loss beside the policy's."""

    def __post_init__(self) -> None:
        require("critic.value_coef", self.value_coef, "(0, inf)")


@dataclass(frozen=True)
class Rewarded(Completing):
    """Fields of every stage in which a reward scores what a policy writes."""

    policy: str = "sft"
    """The stage whose policy writes; or "base"."""
    reward: str | Reward = "reward_model"
    """What scores completions: a reward_model stage, a function of texts, or a judge of those of a prompt."""
    combine: Combine | None = None
    """How the scores of an ensemble become one, where `reward` names such; none: as its stage says."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.combine is not None and not isinstance(self.reward, str):
            raise ValueError("combine is for a reward that is an ensemble, not a function of texts")
        if isinstance(self.reward, JudgeReward) and self.copies < 2:
            raise ValueError(
                "reward: a judge compares completions of one prompt, of stages with a group_size of at least 2: policy "
                "and online_preference"
            )

    @property
    def local_judge(self) -> LocalJudge | None:
        """The reward, where it is a model of the run that judges."""
        judge = self.reward.judge if isinstance(self.reward, JudgeReward) else None
        return judge if isinstance(judge, LocalJudge) else None

    def requires(self) -> dict[str, tuple[str, Role]]:
        """Policy, and reward model or judge."""
        role = "scorer" if self.combine is None else "ensemble"
        reward = named(role, reward=self.reward) if isinstance(self.reward, str) else {}
        judge = {} if self.local_judge is None else {"reward.judge.model": self.local_judge.model}
        return named("policy", policy=self.policy, **judge) | reward

    def lengths(self) -> dict[str, int]:
        """What a judge of the run reads, too."""
        judge = self.local_judge
        return super().lengths() | ({} if judge is None else {"reward.judge.length": judge.length})

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """What a judge of the run asks of it."""
        if isinstance(self.reward, JudgeReward):
            try:
                asked = {"principles": (self.reward.principle,), "completion_tokens": self.completion_tokens}
                pair_judges.check(self.reward.judge, tokenizer, **asked)
            except UserError as error:
                raise UserError(f"reward.{error}") from None

    @property
    def judge_rows(self) -> dict[str, int]:
        """Questions that a judge of the run reads at once, by their field."""
        return {} if self.local_judge is None else {"reward.judge.batch_size": self.local_judge.batch_size}

    def check_inputs(self, data: Data) -> None:
        """The rows, or the labelled texts that openings are cut from, and what a reward reads of them; its file."""
        if isinstance(self.reward, str | JudgeReward):
            check_prompts(self, data, labelled=True)
            return
        self.reward.check_inputs()
        rows = check_prompts(self, data, labelled=True)
        for row in rows:
            try:
                self.reward.check_row(row.metadata)
            except ValueError as error:
                raise UserError(f"{error}; prompt: {' '.join(row.prompt.split())[:80]!r}") from None


@dataclass(frozen=True)
class OnPolicyConfig(Rewarded):
    """Fields of every stage that samples from its policy and learns from a reward."""

    policy: str = "sft"
    """The stage that the policy starts from, which is also the frozen reference; or "base"."""
    network: NetworkPart | None = None
    """A reward model whose weighed score is added to that of `reward`, a function of texts; none: `reward` alone."""
    truncate: Truncation | None = None
    """Where the reward stops reading a completion; none: at its end."""
    old_logps: Literal["sampled", "recomputed"] = "recomputed"
    """Which log-probs of the policy that wrote the completions, and values of a head on it, are learnt from.

    recomputed: those of a forward pass over them, as training reads them, so that the ratio begins at exactly 1.
    sampled: the sampler's, without that pass but for `exact_kl_rows` completions, of which entropy and exact KL then
    are. They are the same but for rounding: of 2,300 tokens of the bundled LM at most 1.1e-5 nats apart in float32 and
    0.065 in bfloat16. With `sampling.cache="int8"` they are those of the policy that did write, and the pass's not."""
    steps: int = 40
    """Iterations: each samples a batch and learns from it."""
    evaluation_sampling: Sampling | None = None
    """How they are drawn before and after; none: as in training. KL is read at the temperature of training."""
    checkpoint_every: int = 10
    """Iterations between checkpoints."""
    placement: Placement = field(default_factory=Colocated)
    """Which devices hold which role: all of them every one, or some each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "steps", "checkpoint_every")
        if self.network is not None and isinstance(self.reward, str | JudgeReward):
            given = self.reward if isinstance(self.reward, str) else "a judge"
            raise ValueError(f"network is added to a reward that is a function of texts, not to reward={given!r}")
        if self.truncate is not None and isinstance(self.reward, JudgeReward):
            raise ValueError("truncate: a judge reads completions to their end; leave it None")
        if self.truncate is not None and self.truncate.after >= self.completion_tokens:
            raise ValueError(
                f"truncate.after={self.truncate.after} must be under completion_tokens={self.completion_tokens}"
            )
        roles = ", ".join(self.idle_roles)
        for role in self.placement.offload:
            if role not in self.idle_roles:
                raise ValueError(f"placement.offload: {role!r} has nothing on the devices here; these have: {roles}")

    @property
    def idle_roles(self) -> tuple[Idle, ...]:
        """Roles that hold parameters or states in phases in which they are idle."""
        reads = isinstance(self.scored_by, str)
        return ("reference", "reward", "optimizers") if reads else ("reference", "optimizers")

    @property
    def scored_by(self) -> str | Reward:
        """The stage whose network scores on the devices; or, where none does, what reads texts."""
        return self.reward if self.network is None else self.network.stage

    def requires(self) -> dict[str, tuple[str, Role]]:
        """The network beside a function, too."""
        beside = {} if self.network is None else named("scorer", **{"network.stage": self.network.stage})
        return super().requires() | beside

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """That the vocabulary has the token to cut at, too."""
        super().check_tokenizer(tokenizer)
        truncation.token_ids(self.truncate, tokenizer)

    @property
    def max_weight(self) -> float | None:
        """Largest importance weight of a token, where rollouts are made ahead; None where they are the policy's own."""
        return self.placement.max_weight if isinstance(self.placement, Disaggregated) and self.placement.ahead else None

    @property
    def redraws(self) -> int:
        """How often, at most, groups of equal scores are replaced by those of further prompts."""
        return 0

    @property
    def own_rows(self) -> slice:
        """The rows of a rollout that the policy wrote."""
        return slice(None)

    def notes(self) -> list[str]:
        """What a reader of the figures should know: lines of the log."""
        cuts = "top_k or top_p cuts the distribution that is sampled, not the one in the ratio: biased"
        other = "sampling.cache='int8' writes, and not what is in the ratio: biased, where old_logps='sampled' is not"
        recomputed = self.sampling.cache == "int8" and self.old_logps == "recomputed"
        return [cuts] * self.sampling.truncates + [other] * recomputed

    @property
    def produces(self) -> Kind:
        """A language model."""
        return "policy"


def critic_params(context: Context, critic: str | ValueHead) -> Params:
    """What trains of a critic at its start: a finished reward model, or a policy's trunk with a head of zeros."""
    if isinstance(critic, str):
        return context.head_params(critic)
    trunk = {name: value for name, value in context.policy_params(critic.trunk).items() if name != "unembedding"}
    return {"trunk": trunk, "head": zero_head(context.spec)}


def zero_head(spec: ModelSpec) -> Params:
    """A value head before it has learnt."""
    return {"kernel": jnp.zeros((spec.d_model,), jnp.float32), "bias": jnp.zeros((), jnp.float32)}


def train(
    config: OnPolicyConfig,
    context: Context,
    name: str,
    make: Callable[..., Algorithm],
    first: Callable[[Any, Context, str], Any],
) -> dict[str, Any]:
    """All iterations, then what the first and the last policy write; the figures are for summary.json.

    `make` is the algorithm's class, and `first(algorithm, context, name)` its state before training.
    """
    tokenizer, places = context.tokenizer, iterations.places(config.placement, context)
    ends: dict[str, Any] = {"eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    ends |= {"stops": stops(config.sampling.stop, tokenizer)}
    algorithm = make(config, context.spec, **ends, cut_ids=truncation.token_ids(config.truncate, tokenizer))
    state = first(algorithm, places.training, name)
    prompts, judged_by = load_prompts(config, context, name), judges(config, context)
    with reader(config, context, name) as scorer:
        run = Whole if config.placement == Colocated() else Phases
        fixed = algorithm.frozen(places.sampling, name)
        turns = run(algorithm, state, places, fixed, scorer)
        del fixed  # some of it may wait in the host's memory from now on
        judge = scorer if isinstance(scorer, GroupJudge) else None  # who compares, and has no score for one completion
        state = fit(algorithm, turns, state, prompts, context, name, judged_by, scorer)
        fixed, last = turns.readers(state)
        before, after = evaluate(
            Drawing(
                config.prompt_length,
                config.completion_tokens,
                config.evaluation_sampling or config.sampling,
                config.batch_size,
                config.sampling.temperature,
                config.turns,
            ),
            places.sampling,
            name,
            (fixed.policy(fixed.reference), fixed.policy(last)),
            prompts=prompts.heldout,
            reference=fixed.policy(fixed.reference),
            reward={} if judge else fixed.network(fixed.reward) if scorer is None else scorer,
            ensemble=fixed.ensemble,
            judges=judged_by,
            cut=None if config.truncate is None else algorithm.cut,
            network=None if config.network is None else (config.network, fixed.network(fixed.reward)),
        )
        judged = {} if judge is None else judge_figures(judge, context, name, prompts.heldout, before, after)
    if hosts.is_writer():
        write_samples(context.stage_dir(name) / "samples.jsonl", before, after, step=config.steps)
    deviations = hosts.from_writer(lambda: largest(context, name, "ratio_deviation", "sampling_deviation"))
    counts = {} if config.data is None else prompts.counts.figures()
    return {
        **compare(before, after),
        **judged,
        **deviations,
        **counts,
        **guard.figures(state),
        "steps": config.steps,
    }


def fit(
    algorithm: Algorithm,
    iterations: Iterations,
    state: Any,
    prompts: Selected[PromptRow],
    context: Context,
    name: str,
    judges: Mapping[str, Judge],
    scorer: Reader | None,
) -> Any:
    """The iterations from the newest checkpoint on; returns what the last one left, its policy written."""
    config, batches = algorithm.config, prompt_batches(prompts.train, algorithm.config, context)
    share = config.optimizer.share(config.updates)
    with Loop(context, name, steps=config.steps, checkpoint_every=config.checkpoint_every) as loop:
        for text in config.notes():
            loop.note(f"{name}: {text}")
        if config.data is not None:
            loop.note(f"{name}: {prompts.counts.line()}")
        shapes = iterations.shapes(state)
        held = loop.restore(shapes, batches)
        if held is shapes:  # there was no checkpoint
            held = iterations.first(state, batches)
        del state, shapes  # its arrays are the first iteration's to donate
        for step in loop:
            held, metrics, rollout = iterations(held, batches, last=step == config.steps)
            if "gold" in judges:
                metrics["gold"] = judges["gold"](texts(rollout, context.tokenizer)[config.own_rows]).mean()
            if scorer is not None:
                metrics |= scorer.metrics()
            metrics["learning_rate"] = config.optimizer.learning_rate * share(held.policy.step)
            loop.record(held, metrics, tokens=rollout.completion_mask.sum())
    finish(context, name, held.final)
    return held


@contextmanager
def reader(config: Rewarded, context: Context, name: str) -> Iterator[Reader | None]:
    """Who reads completions on the host: a function's process, which is ended afterwards, or a judge; None for a
    network.
    """
    if isinstance(config.reward, str):
        yield None
    elif isinstance(config.reward, JudgeReward):
        yield GroupJudge(config.reward, pair_judges.of(config.reward.judge, context, name), size=config.copies)
    else:
        with HostReward(config.reward, name) as scorer:
            yield scorer


@contextmanager
def reward_of(config: Rewarded, context: Context, name: str) -> Iterator[tuple[Params | Scorer, Ensemble | None]]:
    """What reads completions for their scores: a network's parameters, of an ensemble or not, or a `reader`."""
    with reader(config, context, name) as scorer:
        if scorer is not None:
            yield scorer, None
        else:
            assert isinstance(config.reward, str)
            yield context.network(config.reward), ensemble_of(context, config.reward, config.combine)


def judge_figures(
    judge: GroupJudge,
    context: Context,
    name: str,
    prompts: Sequence[PromptRow],
    before: Sequence[Row],
    after: Sequence[Row],
) -> dict[str, float]:
    """What a judge makes of the last policy, how often its answers were none, and what they have cost."""
    said = hosts.from_writer(lambda: mean(context, name, "judge_unread", "judge_cut"))
    return {**win_rate(judge, prompts, before, after), **said, **pair_judges.costs(judge.ask)}


def win_rate(
    judge: GroupJudge, prompts: Sequence[PromptRow], before: Sequence[Row], after: Sequence[Row]
) -> dict[str, float]:
    """How probably a later completion is better than an earlier one of its prompt, with a 95% interval over prompts."""
    later, earlier = (
        [Texts(prompt.text, row.completion, {}) for prompt, row in zip(prompts, rows, strict=True)]
        for rows in (after, before)
    )
    better = judge.better(list(zip(later, earlier, strict=True)))
    low, high = interval(mean_of(better), range(len(better)))
    return {"win_rate": float(better.mean()), "win_rate_low": low, "win_rate_high": high}


def judges(config: Prompting, context: Context) -> dict[str, Judge]:
    """Who else reads completions, where prompts are openings of labelled reviews."""
    return {} if config.data is not None else sentiment_judges(context)


def largest(context: Context, name: str, *metrics: str) -> dict[str, float]:
    """The largest value of each metric over a stage's steps, those of earlier sessions included."""
    lines = [line for line in read_jsonl(context.workdir / "metrics.jsonl") if line["stage"] == name]
    return {metric: max(line[metric] for line in lines) for metric in metrics}


def mean(context: Context, name: str, *metrics: str) -> dict[str, float]:
    """The mean of each metric over those of a stage's steps that have it, those of earlier sessions included."""
    lines = [line for line in read_jsonl(context.workdir / "metrics.jsonl") if line["stage"] == name]
    return {metric: float(np.mean([line[metric] for line in lines if metric in line])) for metric in metrics}
