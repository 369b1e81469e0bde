"""How an on-policy iteration runs: as one program, or in phases, whose roles wait in host memory or work elsewhere.

Phases and who takes part in them: `sample` (the policy that samples), `score` (it, the reference, the reward model),
`improve` (policy and critic with their optimisers).
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rlhf_jax import hosts, lockstep, models, sharding, transfer
from rlhf_jax.algorithms import dynamic_sampling
from rlhf_jax.algorithms.consolidation import Anchor
from rlhf_jax.algorithms.context import BASE, Context
from rlhf_jax.data.pipeline import PackedBatch
from rlhf_jax.data.prompt_rows import PromptRow, Prompts
from rlhf_jax.data.prompts import PromptBatch
from rlhf_jax.errors import UserError
from rlhf_jax.evals.policy import Scorer
from rlhf_jax.interop.tokenizers import Tokenizer
from rlhf_jax.models import lora
from rlhf_jax.placement import Idle, Placement
from rlhf_jax.rewards.ensemble import Combine, Ensemble
from rlhf_jax.rewards.group_judge import Reward
from rlhf_jax.rewards.host import Texts
from rlhf_jax.train_step import compiled
from rlhf_jax.types import Key, Metrics, Params, Rollout, TrainState


@flax.struct.dataclass
class Frozen:
    """What no on-policy stage trains: reference, reward model, and the weights under all networks' adapters."""

    reference: Params
    reward: Params
    base: Params
    head_base: Params
    ensemble: Ensemble | None = flax.struct.field(pytree_node=False, default=None)  # of the reward, if it is one
    texts: PackedBatch | None = None  # that the policy learns beside its rollouts
    anchor: Anchor | None = None  # where its parameters are held, and how tightly

    def policy(self, own: Params) -> Params:
        """A whole policy, as models read it: its own parameters over the shared base."""
        return lora.merge(self.base, own)

    def network(self, own: Params) -> Params:
        """A whole reward model or critic: trunk and head."""
        return lora.merge(self.head_base, own)


def frozen(context: Context, *, policy: str, reward: str | Reward, combine: Combine | None = None) -> Frozen:
    """The reference, which is the policy's start, and a reward model, from the stages that made them.

    An ensemble's scores become one by `combine`, or as its stage says. The model itself (BASE) as a reference is the
    base without adapters. A reward that is a function has no parameters.
    """
    shared = policy == BASE and context.spec.lora is not None
    return Frozen(
        reference={} if shared else context.policy_params(policy),
        reward=context.head_params(reward) if isinstance(reward, str) else {},
        base=context.base,
        head_base=context.head_base,
        ensemble=ensemble_of(context, reward, combine),
    )


def ensemble_of(context: Context, reward: str | Reward, combine: Combine | None) -> Ensemble | None:
    """How the scores of a stage's reward models become one, by `combine` or as the stage says; None where it is one."""
    ensemble = context.ensembles.get(reward) if isinstance(reward, str) else None
    if ensemble is None or combine is None:
        return ensemble
    return dataclasses.replace(ensemble, combine=combine)


@flax.struct.dataclass
class Behaviour:
    """What writes a rollout: a policy's own parameters, the key of its draws, the optimiser steps that it had taken."""

    params: Params
    key: Key
    step: Int[Array, ""]


def behaviour(policy: TrainState, *, ahead: bool = False) -> Behaviour:
    """The policy as it is; for a rollout beside the one that it learns from now, with a key of another stream."""
    key = policy.step_key()
    return Behaviour(policy.params, jax.random.fold_in(key, 2) if ahead else key, policy.step)


class Algorithm(Protocol):
    """One iteration of an on-policy stage, whole and in its phases; its state has a `policy` and `final` parameters."""

    def frozen(self, context: Context, name: str) -> Frozen:
        """What the stage of that name does not train, on a mesh."""
        ...

    @property
    def config(self) -> Any:
        """The stage's, an `OnPolicyConfig` with an `optimizer` and its number of `updates`."""
        ...

    def iteration(self, state: Any, frozen: Frozen, prompts: PromptBatch) -> tuple[Any, Metrics, Rollout]:
        """Sample and learn."""
        ...

    def learn(self, state: Any, frozen: Frozen, rollout: Rollout) -> tuple[Any, Metrics, Rollout]:
        """Score what this state's policy has written, and improve."""
        ...

    def sample(self, behaviour: Behaviour, frozen: Frozen, prompts: PromptBatch) -> Rollout:
        """A completion for each prompt."""
        ...

    def cut(self, rollout: Rollout) -> Rollout:
        """With what of its completions the reward reads, where the config has a `truncate`."""
        ...

    def score(self, own: Params, frozen: Frozen, rollout: Rollout) -> tuple[Rollout, Metrics]:
        """What the reward, where it is a network, the reference, and the policy that wrote it say of a rollout."""
        ...

    def improve(self, state: Any, frozen: Frozen, rollout: Rollout, metrics: Metrics) -> tuple[Any, Metrics, Rollout]:
        """Update by a scored rollout."""
        ...


class Places(NamedTuple):
    """A stage's context on each of its sub-meshes; where roles are colocated, the same one twice."""

    training: Context
    sampling: Context


def places(placement: Placement, context: Context) -> Places:
    """The stage's sub-meshes; UserError where the devices do not make them, or have no memory for who waits."""
    try:
        meshes = placement.meshes(context.mesh)
    except UserError as error:
        raise UserError(f"placement.{error}") from None
    return Places(*(context if mesh is context.mesh else dataclasses.replace(context, mesh=mesh) for mesh in meshes))


class Iterations(Protocol):
    """A stage's iterations. What goes from one to the next, and into checkpoints, has a `policy`, a TrainState."""

    def shapes(self, state: Any) -> Any:
        """What a checkpoint holds, in shards; shapes alone where an algorithm's first state has nothing to give."""
        ...

    def first(self, state: Any, batches: Prompts) -> Any:
        """What the first iteration begins with."""
        ...

    def __call__(self, held: Any, batches: Prompts, *, last: bool) -> tuple[Any, Metrics, Rollout]:
        """One iteration, which is the stage's last or not, and the rollout that it learned from."""
        ...

    def readers(self, held: Any) -> tuple[Frozen, Params]:
        """Where completions are sampled and scored: what is frozen, and the policy's own parameters as they are now."""
        ...


class Whole:
    """Every role on one mesh. A reward that is a network: one program; else two, and the reward between them."""

    def __init__(self, algorithm: Algorithm, state: Any, places: Places, frozen: Frozen, scorer: Scorer | None) -> None:
        self._programs, self._context = programs(algorithm, state), places.training
        self._frozen, self._scorer = frozen, scorer
        self._copies, self._redraws = algorithm.config.copies, algorithm.config.redraws
        layout = sharding.batch_sharding(places.training.mesh)
        self._chosen = lockstep.jit(dynamic_sampling.chosen, out_shardings=layout)

    def shapes(self, state: Any) -> Any:
        """The state itself."""
        return state

    def first(self, state: Any, batches: Prompts) -> Any:
        """The state itself."""
        del batches
        return state

    def readers(self, held: Any) -> tuple[Frozen, Params]:
        """They are there."""
        return self._frozen, held.final

    def __call__(self, held: Any, batches: Prompts, *, last: bool) -> tuple[Any, Metrics, Rollout]:
        """Sample and learn from the next batch."""
        del last
        mesh = self._context.mesh
        with sharding.scope(mesh):
            if self._scorer is None:
                return self._programs["iteration"](held, self._frozen, sharding.shard_batch(mesh, next(batches)[0]))
            rollout, scores = self._scored(held, batches, self._scorer, 0)
            drawn = [scores]
            while len(drawn) <= self._redraws and dynamic_sampling.equal_groups(scores, self._copies).any():
                more, more_scores = self._scored(held, batches, self._scorer, len(drawn))
                drawn += [more_scores]
                index = dynamic_sampling.refilled(scores, more_scores, self._copies)
                rollout, scores = self._chosen(rollout, more, index), np.concatenate([scores, more_scores])[index]
            rollout = rollout.replace(scores=sharding.shard_batch(mesh, scores))
            held, metrics, rollout = self._programs["learn"](held, self._frozen, rollout)
        if self._redraws:
            metrics |= {"draws": jnp.float32(len(drawn)), "score_drawn": jnp.float32(np.mean(drawn))}
        return held, metrics, rollout

    def _scored(
        self, held: Any, batches: Prompts, scorer: Scorer, draw: int
    ) -> tuple[Rollout, Float[np.ndarray, " b"]]:
        """Completions of the next batch, the iteration's first or a later one, and what a function says of them."""
        prompts, rows = next(batches)
        which = (np.int32(draw),) if self._redraws else ()
        inputs = held, self._frozen, sharding.shard_batch(self._context.mesh, prompts), *which
        rollout = self._programs["sample"](*inputs)
        return rollout, scorer(with_rows(rollout, rows, self._context.tokenizer))


def programs(algorithm: Algorithm, state: Any) -> dict[str, Callable[..., Any]]:
    """What `Whole` compiles, by name: an iteration, or sampling and learning where a function scores."""

    def sample(state: Any, frozen: Frozen, prompts: PromptBatch, draw: Array | None = None) -> Rollout:
        writer = behaviour(state.policy)
        if draw is not None:  # of several in an iteration, each with a key of its own
            writer = dataclasses.replace(writer, key=jax.random.fold_in(writer.key, 3 + draw))
        return algorithm.sample(writer, frozen, prompts)

    if isinstance(algorithm.config.reward, str):
        return {"iteration": compiled(algorithm.iteration, state, others=2)}
    return {"sample": lockstep.jit(sample), "learn": compiled(algorithm.learn, state, others=2)}


@flax.struct.dataclass
class Ahead:
    """A state, and the scored rollout that its next iteration learns from."""

    state: Any
    rollout: Rollout
    metrics: Metrics

    @property
    def policy(self) -> TrainState:
        """The state's."""
        return self.state.policy

    @property
    def final(self) -> Params:
        """The state's."""
        return self.state.final


class Drawn(NamedTuple):
    """A rollout on its way: what was sampled, by which parameters, of which rows."""

    rollout: Rollout
    own: Params
    rows: Sequence[PromptRow]


class Phases:
    """Sampling, scoring and improving as programs of their own, on the sub-meshes of `places`.

    Apart, everything is queued and nothing waited for, but for a reward that reads texts: with rollouts ahead the
    devices that sample work on the next one while the others improve. Rollouts, and the policy's parameters for the
    next of them, move from device to device; for a moment two versions of these are on the devices that sample.
    """

    def __init__(self, algorithm: Algorithm, state: Any, places: Places, frozen: Frozen, scorer: Scorer | None) -> None:
        """`frozen` is on the sampling sub-mesh."""
        placement = algorithm.config.placement
        self._algorithm, self._places, self._scorer = algorithm, places, scorer
        self._ahead, self._offload = placement.ahead, placement.offload
        self._apart = places.training is not places.sampling
        self._frozen = _put(frozen, self._offload, transfer.to_host)
        self._base = dataclasses.replace(frozen, reference={}, reward={})
        training, self._sampling = places.training, places.sampling.mesh
        self._trained = Frozen({}, {}, training.base, training.head_base)
        rows: Any = sharding.batch_sharding(self._sampling)
        whole: Any = sharding.replicated(self._sampling)
        self._sample = lockstep.jit(algorithm.sample, out_shardings=rows)
        self._score = lockstep.jit(algorithm.score, out_shardings=(rows, whole))
        self._improve = compiled(algorithm.improve, state, others=2)
        boxes = lora.own(training.spec, jax.eval_shape(partial(models.init, training.spec), jax.random.key(0)))
        self._behaviour = Behaviour(sharding.shardings(self._sampling, boxes), whole, whole)

    def shapes(self, state: Any) -> Any:
        """The state, and where rollouts are made ahead the shapes of one."""
        if not self._ahead:
            return state
        c, algorithm = self._algorithm.config, self._algorithm
        rows = (c.batch_size, c.prompt_length)
        prompts = PromptBatch(np.zeros(rows, np.int32), np.zeros(rows, bool))

        def scored(behaviour: Behaviour, frozen: Frozen) -> tuple[Rollout, Metrics]:
            rollout = algorithm.sample(behaviour, frozen, prompts)
            if self._scorer is not None:
                rollout = rollout.replace(scores=jnp.zeros(c.batch_size))
            return algorithm.score(behaviour.params, frozen, rollout)

        writer = Behaviour(state.policy.params, state.policy.key, state.policy.step)
        with sharding.scope(self._sampling):
            made = jax.eval_shape(
                scored, *jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (writer, self._frozen))
            )
        return Ahead(state, *sharding.in_shards(self._learned_from(made), made))

    def first(self, state: Any, batches: Prompts) -> Any:
        """The state, with the first rollout where later ones are made ahead: it is the first policy's own."""
        return Ahead(state, *self._scored(self._drawn(state, batches))) if self._ahead else state

    def __call__(self, held: Any, batches: Prompts, *, last: bool) -> tuple[Any, Metrics, Rollout]:
        """Improve by the rollout that was made ahead, beside the making of the next; or by one that is made now."""
        if not self._ahead:
            state = self._in_turn(_put(held, self._offload, partial(transfer.to_host, donate=True)))
            scored = self._in_turn(self._scored(self._drawn(state, batches)))
            return self._improved(_put(state, self._offload, transfer.to_device), *scored)
        drawn = None if last else self._drawn(held.state, batches, ahead=True)
        state, metrics, rollout = self._improved(held.state, held.rollout, held.metrics)
        following = (held.rollout, held.metrics) if drawn is None else self._scored(drawn)
        return Ahead(state, *following), metrics, rollout

    def readers(self, held: Any) -> tuple[Frozen, Params]:
        """The policy moves once more, and who waits in the host's memory comes back."""
        own = held.final
        awake = _put(self._frozen, self._offload, transfer.to_device)
        return awake, transfer.move(own, self._behaviour.params) if self._apart else own

    def _drawn(self, state: Any, batches: Prompts, *, ahead: bool = False) -> Drawn:
        """Queue the sampling of the next batch's completions by this state's policy."""
        prompts, rows = next(batches)
        with sharding.scope(self._places.training.mesh):
            writer = behaviour(state.policy, ahead=ahead)
        if self._apart:
            writer = transfer.move(writer, self._behaviour)
        with sharding.scope(self._sampling):
            rollout = self._sample(writer, self._base, sharding.shard_batch(self._sampling, prompts))
        return Drawn(rollout, writer.params, rows)

    def _scored(self, drawn: Drawn) -> tuple[Rollout, Metrics]:
        """Queue the scoring of a rollout, after a reward of texts has read it, for those who improve by it."""
        rollout, own, rows = drawn
        if self._scorer is not None:
            scores = self._scorer(with_rows(rollout, rows, self._places.sampling.tokenizer))
            rollout = rollout.replace(scores=sharding.shard_batch(self._sampling, scores))
        rollout = self._in_turn(rollout)
        with sharding.scope(self._sampling):
            scored = self._score(own, _put(self._frozen, self._offload, transfer.to_device), rollout)
        return transfer.move(scored, self._learned_from(scored)) if self._apart else scored

    def _improved(self, state: Any, rollout: Rollout, metrics: Metrics) -> tuple[Any, Metrics, Rollout]:
        with sharding.scope(self._places.training.mesh):
            return self._improve(state, self._trained, rollout, metrics)

    def _in_turn(self, tree: Any) -> Any:
        """The arrays, waited for where roles come and go: memory is taken when work is queued, not when it begins."""
        return jax.block_until_ready(tree) if self._offload else tree

    def _learned_from(self, scored: tuple[Rollout, Metrics]) -> Any:
        """Where a rollout and its metrics lie on the sub-mesh that improves."""
        mesh = self._places.training.mesh
        places = sharding.batch_sharding(mesh), sharding.replicated(mesh)
        return tuple(
            jax.tree.map(lambda _, place=place: place, tree) for tree, place in zip(scored, places, strict=True)
        )


def _put(holder: Any, roles: Sequence[Idle], put: Callable[[Any], Any]) -> Any:
    """A state or `Frozen` with the arrays of some roles where `put` puts them."""
    changed = {}
    for name, part in vars(holder).items():
        if isinstance(part, TrainState) and "optimizers" in roles:
            part = dataclasses.replace(part, opt_state=put(part.opt_state))
        if name in roles:
            part = dataclasses.replace(part, params=put(part.params)) if isinstance(part, TrainState) else put(part)
        changed[name] = part
    return dataclasses.replace(holder, **changed)


def texts(rollout: Rollout, tokenizer: Tokenizer) -> list[str]:
    """Prompt and completion of each row, as a judge reads them."""
    return _decoded(rollout.tokens, rollout.mask, tokenizer)


def with_rows(rollout: Rollout, rows: Sequence[PromptRow], tokenizer: Tokenizer) -> list[Texts]:
    """What a reward function reads: of each completion what is read, with its prompt and its row's other fields."""
    completions = _decoded(rollout.tokens, rollout.read, tokenizer)
    return [Texts(row.text, text, row.metadata) for row, text in zip(rows, completions, strict=True)]


def _decoded(tokens: jax.Array, mask: jax.Array, tokenizer: Tokenizer) -> list[str]:
    rows, kept = hosts.fetch((tokens, mask))
    return [tokenizer.decode(row[keep].tolist()) for row, keep in zip(rows, kept, strict=True)]
