"""Distillation: a student learns a teacher's distribution of each next token (GKD, Agarwal et al. 2023).

Completions are the student's own (on-policy), so that it learns where it goes itself, or the teacher's (off-policy).
Both are policies of one run, read by its one architecture: where the paper's teachers are larger models, these differ
in their weights alone, as a policy of PPO's teaches the SFT policy that it came from.

Shapes: b completions, p prompt tokens, n completion tokens, t = p + n, v vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rlhf_jax import guard, hosts, losses, masking, models, sharding
from rlhf_jax.algorithms.context import Context, Kind, Role, check_positive, copies, named
from rlhf_jax.algorithms.evaluation import Drawing, evaluate, sentiment_judges
from rlhf_jax.algorithms.loop import Loop, finish
from rlhf_jax.algorithms.prompting import Completing, check_prompts, load_prompts, prompt_batches
from rlhf_jax.algorithms.supervised import first_state
from rlhf_jax.data.prompt_rows import PromptRow
from rlhf_jax.data.sources import Data
from rlhf_jax.evals.policy import compare, write_samples
from rlhf_jax.models import ModelSpec, lora
from rlhf_jax.models.experts import Routing, with_load_balance
from rlhf_jax.numerics import require
from rlhf_jax.optim import Optimizer
from rlhf_jax.sampling import ended, stops
from rlhf_jax.sampling.batched import sampling_program
from rlhf_jax.train_step import Step, compiled, make_train_step
from rlhf_jax.types import Hyper, Key, Mean, Metrics, Params, Rollout, TrainState

DIVERGENCES: dict[str, Callable[..., tuple[Array, dict[str, Array]]]] = {
    "forward_kl": lambda logits, teacher, hyper: losses.forward_kl(logits, teacher),
    "reverse_kl": lambda logits, teacher, hyper: losses.reverse_kl(logits, teacher),
    "jensen_shannon": lambda logits, teacher, hyper: losses.jensen_shannon(logits, teacher, beta=hyper["beta"]),
}
"""What a student is far from its teacher by, of the logits of both and the numbers of a state."""


@dataclass(frozen=True)
class Config(Completing):
    """A student that learns from a teacher on completions of prompts, its own or the teacher's."""

    student: str = "base"
    """The stage that the student starts from; or "base"."""
    teacher: str = "sft"
    """The stage that teaches; or "base". Like the student it is a policy of this run, and so of the experiment's one
    architecture, `Experiment.model`: weights teach weights, not a large model a small one."""
    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon"] = "forward_kl"
    """What is made small: KL(teacher‖student), KL(student‖teacher), or the generalised divergence between them."""
    beta: float = 0.5
    """Weight of the teacher in the mixture of jensen_shannon: near 0 it is like the forward KL, near 1 the reverse."""
    student_share: float = 1.0
    """Share of the batches that the student writes (the paper's λ), drawn at random; the teacher writes the others."""
    steps: int = 100
    """Optimiser steps, each on a batch of new completions."""
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=1e-4))
    """How the gradient becomes a step."""
    num_microbatches: int = 1
    """Parts that a batch's gradient is accumulated over."""
    checkpoint_every: int = 20
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "steps", "num_microbatches", "checkpoint_every")
        require("beta", self.beta, "(0, 1)")
        require("student_share", self.student_share, "[0, 1]")
        if self.student == self.teacher:
            raise ValueError(f"teacher={self.teacher!r} is the student too; name another stage")
        if self.batch_size % self.num_microbatches:
            raise ValueError(f"batch_size={self.batch_size} must divide by num_microbatches={self.num_microbatches}")

    @property
    def produces(self) -> Kind:
        """A language model."""
        return "policy"

    def requires(self) -> dict[str, tuple[str, Role]]:
        """Student and teacher."""
        return named("policy", student=self.student, teacher=self.teacher)

    def batch_sizes(self) -> dict[str, int]:
        """A microbatch."""
        return {"batch_size / num_microbatches": self.batch_size // self.num_microbatches} | self.turn_rows

    def stored(self) -> float:
        """The student."""
        kept = self.optimizer.weights, self.optimizer.copies
        return copies(*kept, steps=self.steps, every=self.checkpoint_every)

    def check_inputs(self, data: Data) -> None:
        """The rows of prompts, or the texts that openings are cut from."""
        check_prompts(self, data, labelled=False)


def distillation_loss(
    spec: ModelSpec, config: Config, teacher: Params, params: Params, batch: Rollout, hyper: Hyper, key: Key
) -> tuple[Mean, dict[str, Mean]]:
    """The divergence a completion token, and how often student and teacher think the same token the most probable."""
    del key
    window = slice(config.prompt_length, None)
    logits, routing = completion_logits(spec, config, params, batch)
    teacher_logits, _ = completion_logits(spec, config, jax.lax.stop_gradient(teacher), batch)
    loss, _ = DIVERGENCES[config.divergence](logits, teacher_logits, hyper)
    mask = batch.completion_mask[:, window]
    agree = (logits.argmax(-1) == teacher_logits.argmax(-1)).astype(jnp.float32)
    total, balance = with_load_balance(spec, masking.token_mean(loss, mask), routing, batch.mask)
    return total, {"same_choice": masking.token_mean(agree, mask), **balance}


def completion_logits(
    spec: ModelSpec, config: Config, params: Params, batch: Rollout
) -> tuple[Float[Array, "b n v"], Routing | None]:
    """Logits that predict the completion's tokens, and what the routers of experts did."""
    read = slice(config.prompt_length - 1, -1)
    states, routing = models.hidden_and_routing(spec, params, batch.tokens, batch.mask, read=read)
    return models.unembed(spec, params, states), routing


def start(config: Config, context: Context, name: str) -> tuple[TrainState, Step]:
    """The student at the start, and its compiled step of (state, completions, base, teacher)."""
    optimizer = config.optimizer.make(config.steps)
    params, hyper = context.policy_params(config.student), {"beta": config.beta}
    state = first_state(config.optimizer, context, name, params, hyper, steps=config.steps)

    def step(state: TrainState, batch: Rollout, base: Params, teacher: Params) -> tuple[TrainState, Metrics]:
        loss_fn = partial(distillation_loss, context.spec, config, teacher)
        return make_train_step(loss_fn, optimizer, num_microbatches=config.num_microbatches)(state, batch, base)

    return state, compiled(step, state)


def train(config: Config, context: Context, name: str) -> dict[str, Any]:
    """Train the student; the figures are for summary.json."""
    prompts, teacher = load_prompts(config, context, name), context.policy(config.teacher)
    state = fit(config, context, name, prompts.train, teacher, note=prompts.counts.line())
    judges = sentiment_judges(context) if config.data is None and context.labelled else {}
    policies = context.policy(config.student), lora.merge(context.base, state.params), teacher
    before, after, taught = evaluate(
        Drawing(
            config.prompt_length,
            config.completion_tokens,
            config.sampling,
            config.batch_size,
            turns=config.turns,
        ),
        context,
        name,
        policies,
        prompts=prompts.heldout,
        reference=teacher,
        reward={},
        judges=judges,
    )
    if hosts.is_writer():
        write_samples(context.stage_dir(name) / "samples.jsonl", before, after, step=config.steps)
    figures = compare(before, after)
    del figures["seq_kl"]  # to the teacher, where other stages' is to the start
    for when, rows in (("before", before), ("after", after)):
        figures[f"teacher_kl_{when}"] = float(np.mean([row.readings["kl"] for row in rows]))
    for judge in judges:
        figures[f"{judge}_teacher"] = float(np.mean([row.readings[judge] for row in taught]))
    counts = {} if config.data is None else prompts.counts.figures()
    return {**figures, **counts, **guard.figures(state), "steps": config.steps}


def fit(
    config: Config, context: Context, name: str, rows: Sequence[PromptRow], teacher: Params, *, note: str
) -> TrainState:
    """The steps from the newest checkpoint on; returns the last state, its parameters written."""
    mesh, tokenizer = context.mesh, context.tokenizer
    state, step_fn = start(config, context, name)
    write = sampling_program(
        context.spec,
        max_new_tokens=config.completion_tokens,
        sampling=config.sampling,
        turns=config.turns,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        stops=stops(config.sampling.stop, tokenizer),
    )
    batches, share = prompt_batches(rows, config, context), config.optimizer.share(config.steps)
    with (
        Loop(context, name, steps=config.steps, checkpoint_every=config.checkpoint_every) as loop,
        sharding.scope(mesh),
    ):
        loop.note(f"{name}: {note}")
        state = loop.restore(state, batches)
        for step in loop:
            tokens, mask = sharding.shard_batch(mesh, next(batches)[0])
            is_own = student_writes(config, context, name, step)
            writer = lora.merge(context.base, state.params) if is_own else teacher
            rollout = write(writer, tokens, mask, jax.random.fold_in(state.step_key(), 0))
            state, metrics = step_fn(state, rollout, context.base, teacher)
            metrics |= {
                "learning_rate": config.optimizer.learning_rate * share(step - 1),
                "student_writes": float(is_own),
                "length": rollout.completion_mask.sum(-1).mean(dtype=jnp.float32),
                "no_eos": jnp.mean(~ended(rollout, tokenizer.eos_id), dtype=jnp.float32),
            }
            loop.record(state, metrics, tokens=rollout.completion_mask.sum())
    finish(context, name, state.params)
    return state


def student_writes(config: Config, context: Context, name: str, step: int) -> bool:
    """Whose a step's completions are: by the seed and the step alone, so that a resumed run draws the same."""
    return bool(context.rng(f"{name}/writer/{step}").random() < config.student_share)
