"""What a measuring process repeats: the stages' own functions, on rows of random tokens. `TASKS` has one by kind."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from rlhf_jax import models, sharding
from rlhf_jax.algorithms import iterations, policy, ppo, preference, reference, reward_model, sft, supervised
from rlhf_jax.algorithms.context import BASE, Context
from rlhf_jax.algorithms.iterations import behaviour
from rlhf_jax.algorithms.onpolicy import SharedTrunk
from rlhf_jax.algorithms.packing import Packing
from rlhf_jax.algorithms.policy_gradient import PolicyGradient
from rlhf_jax.bench.work import BOS, EOS, PAD, Work
from rlhf_jax.checkpoint import save_params
from rlhf_jax.data.pipeline import packed
from rlhf_jax.data.preference_batches import batch_groups, batches
from rlhf_jax.data.preferences import PreferenceGroup
from rlhf_jax.data.prompt_rows import PromptRow, Prompts
from rlhf_jax.data.prompts import pad_left
from rlhf_jax.data.text import Row
from rlhf_jax.optim import Optimizer
from rlhf_jax.plan import flops
from rlhf_jax.sampling import Sampling, Turns
from rlhf_jax.sampling.batched import sampling_program
from rlhf_jax.train_step import compiled

SLOW = Optimizer(learning_rate=1e-9)
"""A learning rate that leaves the policy, and with it the lengths of its completions, as they are: EOS's probability
hangs on few and small weights (`weights.ending`), which at 1e-6 are others after some iterations."""
BATCHES = 4
"""Different batches of rows that there are; steps draw from these for ever."""


def short(work: Work) -> dict[str, Any]:
    """Fields of an on-policy stage whose completions end long before their limit, a quarter of it in the mean."""
    *fewer, rows = sorted({math.ceil(share * work.rows / work.minibatches) for share in (0.43, 0.5, 0.62, 0.75)})
    packing = Packing(rows=rows, fewer=tuple(fewer), length=1, completions=0.5)
    return {"turns": Turns(work.rows // 4), "packing": packing}


@dataclass
class Task:
    """Something that a stage does again and again."""

    turn: Callable[[], tuple[Any, int]]
    """Queues it once more: what to wait for at the end, and the tokens that it learns from or makes."""
    flops: int
    """Of a turn's matrix products; 0 where they depend on what is drawn."""
    step_bytes: int = 0
    """That each step of decoding reads: weights and cache."""
    steps: int = 0
    """Of decoding in a turn."""
    updates: Callable[[], tuple[Callable[[], Any], int]] | None = None
    """Makes an iteration's update alone, by one scored rollout again and again, and says its FLOPs."""


def tokens(work: Work, vocab: int, count: int) -> np.ndarray:
    """Rows of random tokens after BOS, [count, length]; other libraries draw the same."""
    rows = np.random.default_rng(0).integers(EOS + 1, vocab, (count, work.length))
    rows[:, 0] = BOS
    return rows


def sft_task(work: Work, context: Context) -> Task:
    """The step of `sft`; whole rows are learnt from."""
    config = sft.Config(row_length=work.length, batch_size=work.rows, heldout_rows=work.rows, optimizer=SLOW, data=None)
    rows = [Row(row, [True] * len(row)) for row in tokens(work, context.spec.vocab_size, BATCHES * work.rows).tolist()]
    drawn = packed(
        rows,
        lambda row, rng: row,
        pad_id=PAD,
        row_length=work.length,
        batch_size=work.rows,
        seed=0,
    )
    started = supervised.start(config, context, "sft", context.policy_params(BASE))
    return _stepping(started, drawn, context, context.base, work.rows * work.length)


def rm_task(work: Work, context: Context) -> Task:
    """The step of `reward_model` with Bradley-Terry's loss."""
    config = reward_model.Config(
        init=BASE,
        pairs=None,
        batch_size=work.rows,
        length=work.length,
        completion_tokens=work.completion,
        optimizer=SLOW,
    )
    drawn = batches(_pairs(work, context), _stacked(work), batch_size=work.rows, seed=0)
    started = reward_model.start(config, context, "reward_model")
    return _stepping(started, drawn, context, context.head_base, 2 * work.rows * work.length)


def dpo_task(work: Work, context: Context) -> Task:
    """The step of `preference` with DPO's loss; the reference's log-probs have been read before."""
    config = preference.Config(
        init=BASE,
        pairs=None,
        batch_size=work.rows,
        length=work.length,
        completion_tokens=work.completion,
        optimizer=SLOW,
    )
    make, pairs = _stacked(work), _pairs(work, context)
    read = reference.CompletionLogps(context.spec, context.mesh, make=make, batch_size=work.rows)
    path = context.stage_dir("dpo") / "reference.npz"
    (pairs,) = reference.with_reference(path, read, context.policy(BASE), [pairs], note="dpo")
    drawn = batches(pairs, make, batch_size=work.rows, seed=0)
    return _stepping(
        preference.start(config, context, "dpo"), drawn, context, context.base, 2 * work.rows * work.length
    )


def _stepping(started: tuple[Any, Any], drawn: Any, context: Context, base: Any, learnt: int) -> Task:
    """A supervised stage's loop, without its log."""
    state, step = started
    first = sharding.local_batch(context.mesh, next(drawn))
    with sharding.scope(context.mesh):
        counted = flops.count(step.trace(state, first, base).jaxpr)

    def turn() -> tuple[Any, int]:
        nonlocal state
        state, metrics = step(state, sharding.local_batch(context.mesh, next(drawn)), base)
        return metrics, learnt

    return Task(turn, counted.total())


def _pairs(work: Work, context: Context) -> list[PreferenceGroup]:
    """Two completions of each prompt, the first preferred."""
    rows = tokens(work, context.spec.vocab_size, 2 * BATCHES * work.rows).tolist()
    return [
        PreferenceGroup(
            prompt="",
            completions=("", ""),
            prompt_tokens=tuple(chosen[: work.prompt]),
            completion_tokens=(tuple(chosen[work.prompt :]), tuple(rejected[work.prompt :])),
            scores=(),
            pairs=((0, 1),),
            margins=(0.0,),
            source="bench",
        )
        for chosen, rejected in zip(rows[::2], rows[1::2], strict=True)
    ]


def _stacked(work: Work) -> Callable[..., Any]:
    return lambda groups: batch_groups(groups, pad_id=PAD, completions=2, length=work.length, longest=work.completion)


def decode_task(work: Work, context: Context) -> Task:
    """`sampling_program`, as evaluation and `rlhf-jax sample` call it."""
    spec, params = context.spec, context.policy(BASE)
    program: Any = sampling_program(spec, max_new_tokens=work.completion, sampling=Sampling(), eos_id=EOS, pad_id=PAD)
    rows = tokens(work, spec.vocab_size, work.rows)[:, : work.prompt].tolist()
    prompts = sharding.shard_batch(context.mesh, pad_left(rows, length=work.prompt, pad_id=PAD))
    keys = iter(range(2**31))

    def arguments() -> tuple[Any, ...]:
        return params, prompts.tokens, prompts.mask, jax.random.key(next(keys))

    with sharding.scope(context.mesh):
        counted = flops.count(program.trace(*arguments()).jaxpr, decode_steps=work.completion)

    def turn() -> tuple[Any, int]:
        rollout = program(*arguments())
        return rollout, int(rollout.completion_mask.sum())

    return Task(turn, counted.total(), step_bytes=step_bytes(work, params, context), steps=work.completion)


def step_bytes(work: Work, params: Any, context: Context) -> int:
    """That a step of decoding cannot do without: all weights but the embedding's other rows, and half the completion's
    keys and values beside the prompt's.
    """
    spec, itemsize = context.spec, np.dtype(context.spec.dtype).itemsize
    read = {name: part for name, part in params.items() if name != "embedding" or spec.tied}
    weights = sum(x.size for x in jax.tree.leaves(read)) * itemsize  # in the products' type, as decoding has them
    held = work.prompt + work.completion // 2
    return weights + 2 * work.rows * held * spec.n_layers * spec.n_kv_heads * spec.head_dim * itemsize


def ppo_task(work: Work, context: Context) -> Task:
    """An iteration of `ppo` as `Whole` runs it, its reward a network."""
    config = ppo.Config(
        **_on_policy(work),
        critic=SharedTrunk() if work.variant == "shared" else "reward_model",
        critic_optimizer=ppo.CRITIC_OPTIMIZER if work.variant == "shared" else SLOW,
        epochs=work.epochs,
        minibatches=work.minibatches,
    )
    _write_reward_model(context)
    algorithm = ppo.Algorithm(config, context.spec, eos_id=EOS, pad_id=PAD)
    return _iterating(work, algorithm, ppo.initial_state(algorithm, context, "ppo"), context)


def grpo_task(work: Work, context: Context) -> Task:
    """An iteration of `policy` with GRPO's fields, its reward a network."""
    config = policy.Config(**_on_policy(work), group_size=work.group, epochs=work.epochs, minibatches=work.minibatches)
    _write_reward_model(context)
    algorithm = policy.Algorithm(config, context.spec, eos_id=EOS, pad_id=PAD)
    return _iterating(work, algorithm, policy.initial_state(algorithm, context, "grpo"), context)


def _on_policy(work: Work) -> dict[str, Any]:
    """Fields of both stages; log-probs are the sampler's, as TRL's are, which reads its completions no second time."""
    return {
        "policy": BASE,
        "batch_size": work.rows,
        "prompt_tokens": (work.prompt - 1, work.prompt - 1),
        "completion_tokens": work.completion,
        "old_logps": "sampled",
        "exact_kl_rows": max(1, work.rows // 16),
        "optimizer": SLOW,
        **(short(work) if work.variant == "natural" else {}),
    }


def _write_reward_model(context: Context) -> None:
    """A finished stage that makes a reward model: the policy's trunk with a random head."""
    boxed = models.init_with_head(context.spec, jax.random.key(1), context.policy_params(BASE))
    save_params(context.stage_dir("reward_model") / "params", sharding.unbox(boxed))


def _iterating(work: Work, algorithm: PolicyGradient, held: Any, context: Context) -> Task:
    """An on-policy stage's loop, without its log."""
    fixed = algorithm.frozen(context, "bench")
    rows = tokens(work, context.spec.vocab_size, BATCHES * work.rows)[:, : work.prompt].tolist()
    prompts = Prompts(
        [PromptRow(tuple(row), "", {}) for row in rows],
        length=work.prompt,
        pad_id=PAD,
        batch_size=work.rows,
        seed=0,
        copies=work.group,
    )
    whole = iterations.Whole(algorithm, held, iterations.Places(context, context), fixed, None)
    held = whole.first(held, prompts)

    def turn() -> tuple[Any, int]:
        nonlocal held
        held, metrics, rollout = whole(held, prompts, last=False)
        return metrics, int(rollout.completion_mask.sum())

    if work.variant == "natural":  # what is computed depends on lengths that are drawn
        return Task(turn, 0)
    first = sharding.shard_batch(context.mesh, next(prompts)[0])
    program: Any = iterations.programs(algorithm, held)["iteration"]
    with sharding.scope(context.mesh):
        counted = flops.count(program.trace(held, fixed, first).jaxpr, decode_steps=work.completion)

    def updates() -> tuple[Callable[[], Any], int]:
        rollout = jax.jit(algorithm.sample)(behaviour(held.policy), fixed, first)
        rollout, metrics = jax.jit(algorithm.score)(held.policy.params, fixed, rollout)
        improve: Any = compiled(algorithm.improve, held, others=2)

        def update() -> Any:
            nonlocal held
            held, found, _ = improve(held, fixed, rollout, metrics)
            return found

        return update, flops.count(improve.trace(held, fixed, rollout, metrics).jaxpr).total()

    return Task(turn, counted.total(), updates=updates)


TASKS: dict[str, Callable[[Work, Context], Task]] = {
    "sft": sft_task,
    "rm": rm_task,
    "dpo": dpo_task,
    "decode": decode_task,
    "ppo": ppo_task,
    "cost": ppo_task,
    "grpo": grpo_task,
}
"""By kind of work."""
