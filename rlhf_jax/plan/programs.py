"""The programs that an experiment compiles, of shapes in their shards instead of arrays: the stages' own functions."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlhf_jax import models, sharding
from rlhf_jax.algorithms import (
    ai_feedback,
    best_of_n,
    compare,
    consolidation,
    constitutional,
    distill,
    iterations,
    offline,
    online_preference,
    policy,
    ppo,
    preference,
    pretrain,
    pretraining_mix,
    reward_model,
    sft,
    supervised,
)
from rlhf_jax.algorithms.comparisons import SampledPairs
from rlhf_jax.algorithms.context import BASE, Context
from rlhf_jax.algorithms.offline_ilql import Ilql
from rlhf_jax.algorithms.offline_rows import OfflineBatch
from rlhf_jax.algorithms.policy_gradient import PolicyGradient, PolicyGradientConfig
from rlhf_jax.algorithms.prompting import Completing
from rlhf_jax.algorithms.reference import logps_program
from rlhf_jax.config import Experiment
from rlhf_jax.data.pipeline import PackedBatch
from rlhf_jax.data.prompts import PromptBatch
from rlhf_jax.errors import UserError
from rlhf_jax.interop.load import FromPretrained
from rlhf_jax.interop.pretrained import Pretrained
from rlhf_jax.models import ModelSpec, lora, quantized
from rlhf_jax.models.heads import HEAD
from rlhf_jax.models.kv_cache import CacheType, rows_axis
from rlhf_jax.models.spec import DType
from rlhf_jax.placement import Colocated
from rlhf_jax.plan.sizes import device_bytes
from rlhf_jax.rewards.judging import LocalJudge
from rlhf_jax.rewards.local_judge import judging_program
from rlhf_jax.sampling import Sampling
from rlhf_jax.sampling.batched import sampling_program
from rlhf_jax.sampling.prefill import CACHE_AXES
from rlhf_jax.types import JudgedBatch, Params, PreferenceBatch, Rollout, ThumbBatch

ENDS: dict[str, Any] = {"eos_id": 1, "pad_id": 0}
"""Any two tokens: which they are changes no shape."""


@dataclass(frozen=True)
class Program:
    """One compiled function of a stage, with what it is called on."""

    stage: str
    """The stage's name."""
    name: str
    """train, reference, iteration, sample, learn, decode, judge, answer or critique."""
    function: Any
    """Jitted."""
    args: tuple[Any, ...]
    """Trees of shapes in their shards."""
    roles: dict[str, Any]
    """Parts of `args` by what they are for: parameters, optimiser, frozen."""
    calls: int
    """How often the experiment calls it."""
    tokens: int
    """Tokens of all rows of a call, padding included."""
    decode_steps: int = 0
    """Turns of a loop without a fixed number of them: tokens of a completion, at most."""
    cache: int = 0
    """Bytes on a device of the keys and values while it decodes."""


class Shapes(Context):
    """A context without files: parameters are their shapes in their shards."""

    @functools.cached_property
    def base(self) -> Params:
        """The frozen weights' shapes."""
        boxed = lora.base(self.spec, _initial(self.spec))
        return quantized.stored_shapes(self.spec, lora.base(self.spec, self.model.params), boxed, self.mesh)

    def replicated(self, tree: Any) -> Any:
        """Shapes, whole on every device."""
        return jax.tree.map(lambda x: _struct(jnp.shape(x), jnp.result_type(x), sharding.replicated(self.mesh)), tree)

    def zeros(self, shapes: Any) -> Any:
        """The shapes themselves, as a batch's."""
        return jax.tree.map(lambda x: _batch(self, x.shape, x.dtype), shapes)

    def _params(self, source: str, init: Callable[..., Any]) -> Params:
        boxed = jax.eval_shape(init, jax.random.key(0))
        loaded = source == BASE and self.spec.lora is None
        shapes = self.model.params if loaded else sharding.unbox(boxed)
        return sharding.in_shards(sharding.shardings(self.mesh, boxed), shapes)


def programs(experiment: Experiment, mesh: Mesh, *, spec: ModelSpec | None = None) -> list[Program]:
    """All that the stages compile for their loops; `spec` in place of the model's.

    Raises UserError for a stage whose programs are not known here.
    """
    spec = experiment.model.spec if spec is None else spec
    dtype = experiment.model.dtype if isinstance(experiment.model, FromPretrained) else "float32"
    model = Pretrained(spec, _as_loaded(spec, dtype), None)
    ensembles = reward_model.ensembles(experiment.stages)
    context = Shapes(Path(), experiment.seed, mesh, model, experiment.data, ensembles=ensembles)
    found: list[Program] = []
    for name, config in experiment.stages.items():
        if type(config) not in BUILDERS:
            known = ", ".join(cls.__module__.rpartition(".")[2] for cls in BUILDERS)
            raise UserError(f"stages.{name}: plan knows {known}, not {type(config).__module__.rpartition('.')[2]}")
        if isinstance(config, Completing):  # how long turns take hangs on the lengths, stop strings on the tokenizer
            config = dataclasses.replace(config, turns=None, sampling=dataclasses.replace(config.sampling, stop=()))
        if isinstance(config, PolicyGradientConfig):  # how many parts there are, too: all padding is planned for
            config = dataclasses.replace(config, packing=None)
        found += BUILDERS[type(config)](config, context, name)
    return found


def _initial(spec: ModelSpec) -> Params:
    return jax.eval_shape(functools.partial(models.init, spec), jax.random.key(0))


def _as_loaded(spec: ModelSpec, dtype: DType) -> Params:
    """The shapes of a whole model's parameters as `load_pretrained` gives them: norms in float32."""

    def one(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        norm = any("norm" in str(entry) for entry in path)
        return jax.ShapeDtypeStruct(leaf.shape, jnp.float32 if norm else jnp.dtype(dtype))

    return jax.tree_util.tree_map_with_path(one, sharding.unbox(_initial(spec)))


def _supervised(config: supervised.SupervisedConfig, context: Context, name: str) -> Iterator[Program]:
    start = config.init if isinstance(config, sft.Config) else BASE
    state, step = supervised.start(config, context, name, context.policy_params(start))
    rows = (config.batch_size, config.row_length)
    batch = PackedBatch(*(_batch(context, rows, dtype) for dtype in (jnp.int32, jnp.int32, jnp.bool_)))
    args, tokens = (state, batch, context.base), math.prod(rows)
    yield Program(name, "train", step, args, _roles(context.base, state), config.steps, tokens)


def _reward_model(config: reward_model.Config, context: Context, name: str) -> Iterator[Program]:
    # What only the rows know is guessed: two ranked completions, a rating's five levels, eight steps.
    shares = np.full(5, 0.2) if config.loss == "ordinal_rating" else None
    state, step = reward_model.start(config, context, name, shares)
    k = config.pairs.completions if isinstance(config.pairs, SampledPairs) else 2
    ensemble = config.ensemble
    b = (config.batch_size, *((ensemble.members,) if ensemble is not None and ensemble.own_rows else ()))

    def of(*shape: int, dtype: Any) -> Any:
        return _batch(context, (*b, *shape), dtype)

    if config.loss in reward_model.ORDERS:
        tokens, mask = (of(k, config.length, dtype=dtype) for dtype in (jnp.int32, jnp.bool_))
        weights, judged = of(math.comb(k, 2), dtype=jnp.float32), of(math.comb(k, 2), 2, dtype=jnp.int32)
        batch = PreferenceBatch(tokens, mask, mask, judged, weights, weights, of(k, dtype=jnp.float32))
    else:
        tokens, mask = (of(config.length, dtype=dtype) for dtype in (jnp.int32, jnp.bool_))
        places = 8 if config.loss == "process_bce" else 1
        batch = JudgedBatch(tokens, mask, *(of(places, dtype=dtype) for dtype in (jnp.int32, jnp.float32, jnp.bool_)))
    args = (state, batch, context.head_base)
    yield Program(name, "train", step, args, _roles(context.head_base, state), config.steps, math.prod(tokens.shape))


def _preference(config: preference.Config, context: Context, name: str) -> Iterator[Program]:
    state, step = preference.start(config, context, name)
    if config.of_thumbs is not None:
        k = 2 if config.of_thumbs.loss == "kto" else 1
    else:  # how many completions a source's ranked rows have only they know: two are planned for
        k = config.pairs.completions if isinstance(config.pairs, SampledPairs) else 2
    b, p = config.batch_size, math.comb(k, 2)
    rows = (b, k, config.length)
    tokens, mask = _batch(context, rows, jnp.int32), _batch(context, rows, jnp.bool_)
    ref_logps = _batch(context, (b, k), jnp.float32)
    if config.of_thumbs is not None:
        batch = ThumbBatch(tokens, mask, mask, _batch(context, (b,), jnp.bool_), ref_logps)
    else:
        weights, judged = _batch(context, (b, p), jnp.float32), _batch(context, (b, p, 2), jnp.int32)
        batch = PreferenceBatch(tokens, mask, mask, judged, weights, weights, ref_logps)
    if config.needs_reference and config.reference is None:  # else it is read in the step
        pairs, policy = config.pairs, context.policy(config.init)
        # How many rows a source has only it knows: as many are planned for as are learnt.
        n = pairs.prompts + pairs.heldout_prompts if isinstance(pairs, SampledPairs) else config.steps * b
        args, roles = (policy, batch), {"parameters": policy}
        yield Program(
            name, "reference", logps_program(context.spec), args, roles, calls=math.ceil(n / b), tokens=math.prod(rows)
        )
    args = (state, batch, context.base)
    kept = _roles((context.base, state.reference), state.policy)
    yield Program(name, "train", step, args, kept, config.steps, math.prod(rows))


def _ppo(config: ppo.Config, context: Context, name: str) -> Iterator[Program]:
    algorithm = ppo.Algorithm(config, context.spec, **ENDS)
    state = ppo.initial_state(algorithm, context, name)
    trained = [network for network in (state.policy, state.critic) if network is not None]
    yield from _on_policy(algorithm, state, context, name, *trained)


def _policy(config: policy.Config, context: Context, name: str) -> Iterator[Program]:
    algorithm = policy.Algorithm(config, context.spec, **ENDS)
    state = policy.initial_state(algorithm, context, name)
    yield from _on_policy(algorithm, state, context, name, state.policy)


def _online_preference(config: online_preference.Config, context: Context, name: str) -> Iterator[Program]:
    algorithm = online_preference.Algorithm(config, context.spec, **ENDS)
    state = online_preference.initial_state(algorithm, context, name)
    yield from _on_policy(algorithm, state, context, name, state.policy)


def _on_policy(algorithm: PolicyGradient, state: Any, context: Context, name: str, *trained: Any) -> Iterator[Program]:
    config = algorithm.config
    b, p, n = config.batch_size, config.prompt_length, config.completion_tokens
    if config.placement != Colocated():
        raise UserError(f"stages.{name}.placement: plan knows Colocated() without offload alone")
    frozen = iterations.frozen(context, policy=config.policy, reward=config.scored_by, combine=config.combine)
    if config.ptx is not None:
        frozen = dataclasses.replace(frozen, texts=context.replicated(pretraining_mix.shapes(config.ptx)))
    if config.ewc is not None:
        start = context.policy_params(config.policy)
        frozen = dataclasses.replace(frozen, anchor=consolidation.Anchor(start, consolidation.shapes(start)))
    prompts = PromptBatch(_batch(context, (b, p), jnp.int32), _batch(context, (b, p), jnp.bool_))
    rollout = _rollout(context, b, p + n)
    if config.truncate is not None:
        rollout = rollout.replace(read_mask=rollout.completion_mask)
    if config.old_logps == "sampled" and HEAD in state.policy.params:
        rollout = rollout.replace(values=rollout.logps)
    inputs = {"iteration": prompts, "sample": prompts, "learn": rollout}
    kept = _roles(frozen, *trained)
    cache = _cache_bytes(context, b, p + n, config.sampling.cache)
    for part, function in iterations.programs(algorithm, state).items():
        decodes = part != "learn"
        yield Program(
            *(name, part, function, (state, frozen, inputs[part]), kept, config.steps, b * (p + n)),
            decode_steps=n if decodes else 0,
            cache=cache if decodes else 0,
        )
    calls = 2 * math.ceil(config.evaluation_prompts / b)  # before and after
    policy, sampling = frozen.policy(state.policy.params), config.evaluation_sampling or config.sampling
    yield _decode(context, name, "decode", policy, (b, p, n), sampling, calls)
    judge = config.local_judge
    if judge is not None:
        asked = b * (config.copies - 1), 2 * config.evaluation_prompts  # an iteration, and the last policy at the end
        calls = [math.ceil(questions / judge.batch_size) for questions in asked]
        yield _judge(context, name, judge, config.steps * calls[0] + calls[1])


def _judge(context: Context, stage: str, judge: LocalJudge, calls: int) -> Program:
    """Questions to a model of the run."""
    rows, params = (judge.batch_size, judge.length), context.policy(judge.model)
    args = (params, _batch(context, rows, jnp.int32), _batch(context, rows, jnp.bool_))
    function, roles = judging_program(context.spec, 0, 1), {"parameters": params}
    return Program(stage, "judge", function, args, roles, calls, math.prod(rows))


def _decode(
    context: Context, stage: str, name: str, policy: Params, sizes: tuple[int, int, int], sampling: Sampling, calls: int
) -> Program:
    """Sampling b completions of n tokens for prompts of p."""
    b, p, n = sizes
    sampling = dataclasses.replace(sampling, stop=())
    function = sampling_program(context.spec, max_new_tokens=n, sampling=sampling, **ENDS)
    prompts = _batch(context, (b, p), jnp.int32), _batch(context, (b, p), jnp.bool_)
    args, cache = (policy, *prompts, jax.random.key(0)), _cache_bytes(context, b, p + n, sampling.cache)
    roles = {"parameters": policy}
    return Program(stage, name, function, args, roles, calls, b * (p + n), decode_steps=n, cache=cache)


def _ai_feedback(config: ai_feedback.Config, context: Context, name: str) -> Iterator[Program]:
    b, judge = config.batch_size, config.judge
    sizes = (b, config.prompt_length, config.completion_tokens)
    calls = math.ceil(config.prompts / (b // 2))
    yield _decode(context, name, "decode", context.policy(config.policy), sizes, config.sampling, calls)
    if isinstance(judge, LocalJudge):
        yield _judge(context, name, judge, calls * math.ceil(b / judge.batch_size))


def _constitutional(config: constitutional.Config, context: Context, name: str) -> Iterator[Program]:
    params, batches = context.policy(config.policy), math.ceil(config.prompts / config.batch_size)
    counts = {"answer": (config.answer_tokens, 1 + config.rounds), "critique": (config.critique_tokens, config.rounds)}
    for what, (tokens, times) in counts.items():
        sizes = (config.batch_size, config.length, tokens)
        yield _decode(context, name, what, params, sizes, config.sampling, batches * times)


def _best_of_n(config: best_of_n.Config, context: Context, name: str) -> Iterator[Program]:
    sizes = (config.batch_size, config.prompt_length, config.completion_tokens)
    calls = sum(math.ceil(n * config.n / config.batch_size) for n in (config.prompts, config.evaluation_prompts))
    decode = _decode(context, name, "decode", context.policy(config.policy), sizes, config.sampling, calls)
    reward = context.network(config.reward) if isinstance(config.reward, str) else {}
    yield dataclasses.replace(decode, roles={**decode.roles, "frozen": reward})


def _compare(config: compare.Config, context: Context, name: str) -> Iterator[Program]:
    sizes = (config.batch_size, config.prompt_length, config.completion_tokens)
    calls = 2 * math.ceil(config.evaluation_prompts / config.batch_size)
    decode = _decode(context, name, "decode", context.policy(config.policy), sizes, config.sampling, calls)
    reward = context.network(config.reward) if isinstance(config.reward, str) else {}
    yield dataclasses.replace(decode, roles={**decode.roles, "frozen": (context.policy(config.reference), reward)})


def _distill(config: distill.Config, context: Context, name: str) -> Iterator[Program]:
    b, p, n = config.batch_size, config.prompt_length, config.completion_tokens
    state, step = distill.start(config, context, name)
    teacher, rows = context.policy(config.teacher), functools.partial(_batch, context, (b, p + n))
    rollout = Rollout(rows(jnp.int32), rows(jnp.bool_), rows(jnp.bool_), logps=rows(jnp.float32))
    roles = _roles((context.base, teacher), state)
    yield Program(name, "train", step, (state, rollout, context.base, teacher), roles, config.steps, b * (p + n))
    calls = config.steps + 3 * math.ceil(config.evaluation_prompts / b)  # student before and after, teacher
    yield _decode(context, name, "decode", teacher, (b, p, n), config.sampling, calls)


def _offline(config: offline.Config, context: Context, name: str) -> Iterator[Program]:
    state, step = offline.start(config, context, name)
    rows = functools.partial(_batch, context, (config.batch_size, config.row_length))
    numbers = _batch(context, (config.batch_size,), jnp.float32)
    batch = OfflineBatch(rows(jnp.int32), rows(jnp.bool_), rows(jnp.bool_), numbers)
    args, tokens = (state, batch, context.base), config.batch_size * config.row_length
    trained, slow = (state.learner, state.target) if isinstance(config.method, Ilql) else (state, {})
    yield Program(name, "train", step, args, _roles((context.base, slow), trained), config.steps, tokens)
    sizes = (config.batch_size, config.prompt_length, config.completion_tokens)
    policies = config.method.policies(state, context.base)
    calls = (1 + len(policies)) * math.ceil(config.evaluation_prompts / config.batch_size)
    last = list(policies.values())[-1]
    yield _decode(context, name, "decode", last, sizes, config.sampling, calls)


BUILDERS: dict[type, Callable[..., Iterator[Program]]] = {
    pretrain.Config: _supervised,
    sft.Config: _supervised,
    reward_model.Config: _reward_model,
    preference.Config: _preference,
    ppo.Config: _ppo,
    ai_feedback.Config: _ai_feedback,
    constitutional.Config: _constitutional,
    policy.Config: _policy,
    online_preference.Config: _online_preference,
    best_of_n.Config: _best_of_n,
    compare.Config: _compare,
    distill.Config: _distill,
    offline.Config: _offline,
}
"""What makes the programs of each kind of stage."""


def _roles(frozen: Any, *states: Any) -> dict[str, Any]:
    return {
        "parameters": [state.params for state in states],
        "optimiser": [state.opt_state for state in states],
        "frozen": frozen,
    }


def _rollout(context: Context, b: int, t: int) -> Rollout:
    """What has been sampled, and scored by a function."""
    rows = functools.partial(_batch, context, (b, t))
    scores, written_at = (_batch(context, (b,), dtype) for dtype in (jnp.float32, jnp.int32))
    made = Rollout(rows(jnp.int32), rows(jnp.bool_), rows(jnp.bool_), logps=rows(jnp.float32))
    return made.replace(scores=scores, written_at=written_at)


def _cache_bytes(context: Context, batch: int, length: int, kind: CacheType) -> int:
    cache = jax.eval_shape(functools.partial(models.init_cache, context.spec, batch, length, kind))
    layout = functools.partial(sharding.decoding_layout, context.mesh)
    arrays, axes = jax.tree.leaves((cache.keys, cache.values)), (*(None,) * rows_axis(cache.keys), *CACHE_AXES)
    return device_bytes([_struct(x.shape, x.dtype, layout(x.shape, axes[: x.ndim])) for x in arrays])


def _batch(context: Context, shape: tuple[int, ...], dtype: Any) -> Any:
    return _struct(shape, dtype, sharding.batch_sharding(context.mesh))


def _struct(shape: tuple[int, ...], dtype: Any, place: Any) -> Any:
    # Any: it stands where an array would, in pytrees that are annotated with arrays.
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def without_remat(spec: ModelSpec) -> ModelSpec:
    """The same model, whose backward pass computes nothing again: blocks, nor a kernel's scores of attention."""
    return dataclasses.replace(spec, remat="none", attention="xla")
