"""What every on-policy stage shares around its algorithm: fields, rewards, the loop, the reading before and after."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp

from rlhf_jax import guard, hosts, sharding
from rlhf_jax.algorithms.context import BASE, Context, Kind, check_field, check_positive, named
from rlhf_jax.algorithms.loop import Loop, finish
from rlhf_jax.algorithms.prompting import Prompting, load_prompts, prompt_batches
from rlhf_jax.data import formats
from rlhf_jax.data.encoding import Selected
from rlhf_jax.data.formats import Prompt
from rlhf_jax.data.prompt_rows import PromptRow
from rlhf_jax.data.prompts import PromptBatch
from rlhf_jax.data.reading import read
from rlhf_jax.data.sources import Data, Source
from rlhf_jax.data.texts import check_texts
from rlhf_jax.errors import UserError
from rlhf_jax.evals.policy import Judge, PolicyEvaluation, Row, Scorer, compare, write_samples
from rlhf_jax.interop.tokenizers import Tokenizer
from rlhf_jax.metrics import read_jsonl
from rlhf_jax.models import lora
from rlhf_jax.rewards.host import HostFunction, HostReward, Texts
from rlhf_jax.rewards.python import PythonReward
from rlhf_jax.rewards.sentiment import GoldClassifier, vader
from rlhf_jax.sampling import Sampler, Sampling
from rlhf_jax.train_step import compiled
from rlhf_jax.types import Metrics, Params, Rollout


@dataclass(frozen=True)
class ValueHead:
    """A critic that starts as a policy does: its trunk, and a head of zeros (Ziegler et al. 2019)."""

    trunk: str = "sft"
    """The stage that made the policy, or "base"."""


@dataclass(frozen=True)
class OnPolicyConfig(Prompting):
    """Fields of every stage that samples from its policy and learns from a reward."""

    policy: str = "sft"
    """The stage that the policy starts from, which is also the frozen reference; or "base"."""
    reward: str | HostFunction = "reward_model"
    """What scores completions: a reward_model stage, or a function of texts."""
    steps: int = 40
    """Iterations: each samples a batch and learns from it."""
    completion_tokens: int = 40
    """Most tokens of a completion."""
    sampling: Sampling = field(default_factory=Sampling)
    """How completions are drawn."""
    evaluation_sampling: Sampling | None = None
    """How they are drawn before and after; none: as in training. KL is read at the temperature of training."""
    checkpoint_every: int = 10
    """Iterations between checkpoints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "steps", "completion_tokens", "checkpoint_every")

    @property
    def produces(self) -> Kind:
        """A language model."""
        return "policy"

    def requires(self) -> dict[str, tuple[str, Kind]]:
        """Policy and reward model."""
        reward = named("reward", reward=self.reward) if isinstance(self.reward, str) else {}
        return named("policy", policy=self.policy) | reward

    def check_inputs(self, data: Data) -> None:
        """The rows, or the labelled texts that openings are cut from, and what a reward reads of them; its file."""
        if isinstance(self.reward, PythonReward):
            self.reward.check_inputs()
        rows: list[Prompt] = []
        if self.data is None:
            check_field("data=None", lambda: check_texts(data, labelled=True))
            rows.append(Prompt("", (), {}))
        else:
            check_field("data", partial(_read_into, rows, self.data))
        if isinstance(self.reward, str):
            return
        for row in rows:
            try:
                self.reward.check_row(row.metadata)
            except ValueError as error:
                raise UserError(f"{error}; prompt: {' '.join(row.prompt.split())[:80]!r}") from None

    def lengths(self) -> dict[str, int]:
        """BOS, prompt and completion."""
        return {"prompt_tokens + completion_tokens (with BOS)": self.prompt_length + self.completion_tokens}


def _read_into(rows: list[Prompt], source: Source) -> None:
    for part in read(source, formats.prompt):
        rows += [*part.train, *part.heldout]


@flax.struct.dataclass
class Frozen:
    """What no on-policy stage trains: reference, reward model, and the weights under all networks' adapters."""

    reference: Params
    reward: Params
    base: Params
    head_base: Params

    def policy(self, own: Params) -> Params:
        """A whole policy, as models read it: its own parameters over the shared base."""
        return lora.merge(self.base, own)

    def network(self, own: Params) -> Params:
        """A whole reward model or critic: trunk and head."""
        return lora.merge(self.head_base, own)


def frozen(context: Context, *, policy: str, reward: str | HostFunction) -> Frozen:
    """The reference, which is the policy's start, and a reward model, from the stages that made them.

    The model itself (BASE) as a reference is the base without adapters. A reward that is a function has no parameters.
    """
    shared = policy == BASE and context.spec.lora is not None
    return Frozen(
        reference={} if shared else context.policy_params(policy),
        reward=context.head_params(reward) if isinstance(reward, str) else {},
        base=context.base,
        head_base=context.head_base,
    )


def critic_params(context: Context, critic: str | ValueHead) -> Params:
    """What trains of a critic at its start: a finished reward model, or a policy's trunk with a head of zeros."""
    if isinstance(critic, str):
        return context.head_params(critic)
    trunk = {name: value for name, value in context.policy_params(critic.trunk).items() if name != "unembedding"}
    head = {"kernel": jnp.zeros((context.spec.d_model,), jnp.float32), "bias": jnp.zeros((), jnp.float32)}
    return {"trunk": trunk, "head": head}


Iteration = Callable[[Any, Frozen, PromptBatch, Sequence[PromptRow]], tuple[Any, Metrics, Rollout]]
"""(state, frozen, prompts, their rows) -> (state, metrics, rollout)."""


class Algorithm(Protocol):
    """One iteration of an on-policy stage, whole and in its two parts; its state has a `policy`, a TrainState."""

    @property
    def config(self) -> Any:
        """The stage's, an `OnPolicyConfig` with an `optimizer` and its number of `updates`."""
        ...

    def iteration(self, state: Any, frozen: Frozen, prompts: PromptBatch) -> tuple[Any, Metrics, Rollout]:
        """Sample and learn."""
        ...

    def sample(self, state: Any, frozen: Frozen, prompts: PromptBatch) -> Rollout:
        """A completion for each prompt."""
        ...

    def learn(self, state: Any, frozen: Frozen, rollout: Rollout) -> tuple[Any, Metrics, Rollout]:
        """Score, where the reward is a network, and update."""
        ...


def train(algorithm: Algorithm, state: Any, context: Context, name: str) -> dict[str, Any]:
    """All iterations, then what the first and the last policy write; the figures are for summary.json."""
    config = algorithm.config
    prompts, judged_by = load_prompts(config, context, name), judges(config, context)
    fixed = frozen(context, policy=config.policy, reward=config.reward)
    with nullcontext() if isinstance(config.reward, str) else HostReward(config.reward, name) as scorer:
        iteration = make_iteration(algorithm, state, context, scorer)
        state = fit(algorithm, iteration, state, fixed, prompts, context, name, judged_by)
        before, after = evaluate(
            config,
            context,
            name,
            (fixed.policy(fixed.reference), fixed.policy(state.policy.params)),
            prompts=prompts.heldout,
            reference=fixed.policy(fixed.reference),
            reward=fixed.network(fixed.reward) if scorer is None else scorer,
            judges=judged_by,
        )
    if hosts.is_writer():
        write_samples(context.stage_dir(name) / "samples.jsonl", before, after, step=config.steps)
    deviations = hosts.from_writer(lambda: largest(context, name, "ratio_deviation", "sampling_deviation"))
    counts = {} if config.data is None else prompts.counts.figures()
    return {**compare(before, after), **deviations, **counts, **guard.figures(state), "steps": config.steps}


def fit(
    algorithm: Algorithm,
    iteration: Iteration,
    state: Any,
    frozen: Frozen,
    prompts: Selected[PromptRow],
    context: Context,
    name: str,
    judges: Mapping[str, Judge],
) -> Any:
    """The iterations from the newest checkpoint on; returns the last state, its policy written."""
    config, batches = algorithm.config, prompt_batches(prompts.train, algorithm.config, context)
    share = config.optimizer.share(config.updates)
    with (
        Loop(context, name, steps=config.steps, checkpoint_every=config.checkpoint_every) as loop,
        sharding.scope(context.mesh),
    ):
        if config.sampling.truncates:
            loop.note(f"{name}: top_k or top_p cuts the distribution that is sampled, not the one in the ratio: biased")
        if config.data is not None:
            loop.note(f"{name}: {prompts.counts.line()}")
        state = loop.restore(state, batches)
        for _ in loop:
            state, metrics, rollout = iteration(state, frozen, *next(batches))
            if "gold" in judges:
                metrics["gold"] = judges["gold"](texts(rollout, context.tokenizer)).mean()
            metrics["learning_rate"] = config.optimizer.learning_rate * share(state.policy.step)
            loop.record(state, metrics, tokens=int(rollout.completion_mask.sum()))
    finish(context, name, state.policy.params)
    return state


def programs(algorithm: Algorithm, state: Any) -> dict[str, Callable[..., Any]]:
    """What an iteration compiles, by name: itself as a whole, or sampling and learning where a function scores."""
    if isinstance(algorithm.config.reward, str):
        return {"iteration": compiled(algorithm.iteration, state, others=2)}
    return {"sample": jax.jit(algorithm.sample), "learn": compiled(algorithm.learn, state, others=2)}


def make_iteration(algorithm: Algorithm, state: Any, context: Context, scorer: Scorer | None) -> Iteration:
    """One compiled program where the reward is a network; else sampling and learning, and the reward between them."""
    mesh, tokenizer, parts = context.mesh, context.tokenizer, programs(algorithm, state)
    if scorer is None:
        whole = parts["iteration"]
        return lambda state, frozen, prompts, rows: whole(state, frozen, sharding.shard_batch(mesh, prompts))
    sample, learn = parts["sample"], parts["learn"]

    def iteration(state: Any, frozen: Frozen, prompts: PromptBatch, rows: Sequence[PromptRow]) -> Any:
        rollout = sample(state, frozen, sharding.shard_batch(mesh, prompts))
        scores = hosts.by_rows(scorer, with_rows(rollout, rows, tokenizer))
        return learn(state, frozen, rollout.replace(scores=sharding.shard_batch(mesh, scores)))

    return iteration


def judges(config: OnPolicyConfig, context: Context) -> dict[str, Judge]:
    """Who else reads completions: of openings of labelled reviews a classifier fitted on others, and VADER."""
    return {} if config.data is not None else {"gold": GoldClassifier.fit(context.reviews.train), "vader": vader}


def largest(context: Context, name: str, *metrics: str) -> dict[str, float]:
    """The largest value of each metric over a stage's steps, those of earlier sessions included."""
    lines = [line for line in read_jsonl(context.workdir / "metrics.jsonl") if line["stage"] == name]
    return {metric: max(line[metric] for line in lines) for metric in metrics}


def texts(rollout: Rollout, tokenizer: Tokenizer) -> list[str]:
    """Prompt and completion of each row, as a judge reads them."""
    return _decoded(rollout.tokens, rollout.mask, tokenizer)


def with_rows(rollout: Rollout, rows: Sequence[PromptRow], tokenizer: Tokenizer) -> list[Texts]:
    """What a reward function reads: each completion with its prompt and its row's other fields."""
    completions = _decoded(rollout.tokens, rollout.completion_mask, tokenizer)
    return [Texts(row.text, text, row.metadata) for row, text in zip(rows, completions, strict=True)]


def _decoded(tokens: jax.Array, mask: jax.Array, tokenizer: Tokenizer) -> list[str]:
    rows, kept = hosts.fetch((tokens, mask))
    return [tokenizer.decode(row[keep].tolist()) for row, keep in zip(rows, kept, strict=True)]


def evaluate(
    config: OnPolicyConfig,
    context: Context,
    name: str,
    policies: Sequence[Params],
    *,
    prompts: Sequence[PromptRow],
    reference: Params,
    reward: Params | Scorer,
    judges: Mapping[str, Judge],
) -> list[list[Row]]:
    """Let each policy complete the same prompts, and read what it writes."""
    sampler = Sampler(
        context.spec,
        context.mesh,
        context.tokenizer,
        prompt_length=config.prompt_length,
        max_new_tokens=config.completion_tokens,
        sampling=config.evaluation_sampling or config.sampling,
        batch_size=config.batch_size,
    )
    evaluation = PolicyEvaluation(
        context.spec,
        context.mesh,
        context.tokenizer,
        sampler,
        prompts,
        context.key(f"{name}/evaluation"),
        reward=reward,
        judges=judges,
        temperature=config.sampling.temperature,
    )
    return [evaluation(params, reference) for params in policies]
