"""The programs of a plan are those that a run compiles: the same text, the same memory, on eight fake devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models, sharding
from rlhf_jax.algorithms import (
    ai_feedback,
    best_of_n,
    constitutional,
    distill,
    iterations,
    offline,
    online_preference,
    onpolicy,
    policy,
    ppo,
    preference,
    pretrain,
    reward_model,
    sft,
    supervised,
)
from rlhf_jax.algorithms.comparisons import SampledPairs
from rlhf_jax.algorithms.consolidation import Consolidation
from rlhf_jax.algorithms.context import Context
from rlhf_jax.algorithms.offline_ilql import Ilql
from rlhf_jax.algorithms.offline_methods import Weighted
from rlhf_jax.algorithms.packing import Packing
from rlhf_jax.algorithms.policy_methods import METHODS
from rlhf_jax.algorithms.pretraining_mix import PretrainingMix
from rlhf_jax.algorithms.replay import Replay
from rlhf_jax.algorithms.truncation import Truncation
from rlhf_jax.checkpoint import save_params
from rlhf_jax.config import Experiment
from rlhf_jax.data.pipeline import PackedBatch
from rlhf_jax.data.prompts import PromptBatch
from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.data.sources import Jsonl
from rlhf_jax.errors import UserError
from rlhf_jax.interop.pretrained import Pretrained, Scratch
from rlhf_jax.models import ModelSpec, lora
from rlhf_jax.models.spec import Lora
from rlhf_jax.optim import Optimizer
from rlhf_jax.plan import estimate, flops, programs
from rlhf_jax.plan.sizes import device_bytes
from rlhf_jax.rewards.ensemble import Ensemble
from rlhf_jax.rewards.group_judge import JudgeReward
from rlhf_jax.rewards.judging import LocalJudge
from rlhf_jax.rewards.verifiers import PatternMatch
from rlhf_jax.rewards.with_network import NetworkPart
from rlhf_jax.sharding import MeshConfig
from rlhf_jax.types import PreferenceBatch
from tests.toys import ToyStage

SPEC = ModelSpec(vocab_size=512, d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=16, d_ff=64, max_len=64)
ADAPTED = ModelSpec(**{**vars(SPEC), "lora": Lora(rank=2, base="bfloat16")})
MESHES = [MeshConfig(data=2, fsdp=4), MeshConfig(data=2, fsdp=2, tensor=2)]
STAGES = {
    "sft": sft.Config(steps=3, batch_size=16, row_length=64, num_microbatches=2,
                      optimizer=Optimizer(master="bfloat16")),
    "reward_model": reward_model.Config(pairs=SampledPairs(completions=3, completion_tokens=20), length=32, steps=4),
    "ppo": ppo.Config(steps=5, batch_size=64, minibatches=2, num_microbatches=2, prompt_tokens=(2, 7), epochs=1,
                      completion_tokens=20, evaluation_prompts=100, exact_kl_rows=16),
}  # fmt: skip


def experiment(spec=SPEC, **changes):
    return Experiment(**{"model": Scratch(spec), "data": MovieReviews(), "stages": STAGES, **changes})


def planned(mesh, spec=SPEC):
    return {f"{one.stage}.{one.name}": one for one in programs.programs(experiment(spec), mesh)}


@pytest.fixture(params=[(SPEC, MESHES[0]), (ADAPTED, MESHES[1])], ids=["whole on fsdp", "adapters on tensor"])
def context(request, tmp_path):
    """A run's, in which stages "sft" and "reward_model" have finished."""
    spec, mesh = request.param[0], sharding.make_mesh(request.param[1])
    params = sharding.unbox(models.init(spec, jax.random.key(0)))
    context = Context(tmp_path, 0, mesh, Pretrained(spec, params, None), MovieReviews())
    own = lora.own(spec, params)
    save_params(tmp_path / "sft/params", own)
    save_params(tmp_path / "reward_model/params", sharding.unbox(models.init_with_head(spec, jax.random.key(0), own)))
    return context


def a_run_of(context):
    """The jitted functions of a run and the arrays that it calls them on."""
    put = functools.partial(sharding.shard_batch, context.mesh)
    config = STAGES["sft"]
    state, step = supervised.start(config, context, "sft", context.policy_params("base"))
    rows = np.zeros((16, 64), np.int32)
    yield "sft.train", step, (state, put(PackedBatch(rows, rows, rows > 0)), context.base)
    state, step = reward_model.start(STAGES["reward_model"], context, "reward_model")
    rows, pairs = np.zeros((32, 3, 32), np.int32), np.zeros((32, 3), np.float32)
    batch = put(PreferenceBatch(rows, rows > 0, rows > 0, np.zeros((32, 3, 2), np.int32), pairs, pairs, pairs))
    yield "reward_model.train", step, (state, batch, context.head_base)
    algorithm = ppo.Algorithm(STAGES["ppo"], context.spec, **programs.ENDS)
    state = ppo.initial_state(algorithm, context, "ppo")
    frozen = iterations.frozen(context, policy="sft", reward="reward_model")
    prompts = np.zeros((64, 8), np.int32)
    iteration = iterations.programs(algorithm, state)["iteration"]
    yield "ppo.iteration", iteration, (state, frozen, put(PromptBatch(prompts, prompts > 0)))


def on_one_device(tree):
    """Bytes of arrays on the first device."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)


def test_the_programs_of_a_run_are_those_of_its_plan(context):
    plan = planned(context.mesh, context.spec)
    for name, function, args in a_run_of(context):
        with sharding.scope(context.mesh):
            assert plan[name].function.lower(*plan[name].args).as_text() == function.lower(*args).as_text(), name


def test_memory_is_that_of_a_run(tmp_path):
    mesh = sharding.make_mesh(MESHES[1])
    params = sharding.unbox(models.init(SPEC, jax.random.key(0)))
    context = Context(tmp_path, 0, mesh, Pretrained(SPEC, params, None), MovieReviews())
    name, step, args = next(a_run_of(context))
    program = planned(mesh)[name]
    with sharding.scope(mesh):
        real = step.lower(*args).compile().memory_analysis()
        compiled = program.function.lower(*program.args).compile()
    np.testing.assert_allclose(estimate.peak_memory(compiled), real.peak_memory_in_bytes, rtol=0.1)
    held = estimate.argument_bytes(program)
    assert held["parameters"] == on_one_device(args[0].params)
    assert held["optimiser"] == on_one_device(args[0].opt_state)
    np.testing.assert_allclose(sum(held.values()), real.argument_size_in_bytes, rtol=0.01)
    assert real.peak_memory_in_bytes > sum(held.values())


def test_the_cache_is_split_as_decoding_splits_it():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    whole = 2 * SPEC.n_layers * 64 * (1 + 7 + 20) * SPEC.n_kv_heads * SPEC.head_dim * 4  # keys and values, float32
    assert planned(mesh)["ppo.iteration"].cache == planned(mesh)["ppo.decode"].cache == whole / 8
    assert planned(mesh)["sft.train"].cache == 0


def test_calls_and_tokens():
    plan = planned(sharding.make_mesh(MESHES[0]))
    assert {name: one.calls for name, one in plan.items()} == {
        "sft.train": 3, "reward_model.train": 4, "ppo.iteration": 5, "ppo.decode": 4,  # 100 prompts by 64, twice
    }  # fmt: skip
    assert plan["reward_model.train"].tokens == 32 * 3 * 32
    assert plan["ppo.iteration"].decode_steps == 20


def test_a_reward_on_the_host_parts_the_iteration():
    config = ppo.Config(policy="base", reward=PatternMatch("x"), critic=onpolicy.ValueHead("base"))
    found = programs.programs(experiment(stages={"ppo": config}), sharding.make_mesh(MESHES[0]))
    assert [one.name for one in found] == ["sample", "learn", "decode"]


def test_a_method_without_a_critic_has_its_programs():
    """Its iteration is traced on shapes alone; PPO's critic and its optimiser are not there."""
    sizes = {"policy": "sft", "batch_size": 64, "prompt_tokens": (2, 7), "completion_tokens": 20}
    stages = {**STAGES, "grpo": policy.Config(**METHODS["grpo"], **sizes, ptx=PretrainingMix(rows=64))}
    found = programs.programs(experiment(stages=stages), sharding.make_mesh(MESHES[0]))
    of_ppo, one = (next(p for p in found if (p.stage, p.name) == (name, "iteration")) for name in ("ppo", "grpo"))
    with sharding.scope(sharding.make_mesh(MESHES[0])):
        assert one.function.lower(*one.args) is not None
    ppo_bytes, own = (device_bytes(p.roles["optimiser"]) for p in (of_ppo, one))
    assert own < 0.6 * ppo_bytes


def test_ppos_details_have_their_programs():
    """A critic on the policy's trunk has no optimiser of its own; older rollouts are split as a batch is."""
    details = dataclasses.replace(
        STAGES["ppo"], critic=onpolicy.SharedTrunk(), replay=Replay(rollouts=2), ewc=Consolidation(), average=0.9,
        reward=PatternMatch("x"), network=NetworkPart(), truncate=Truncation(after=3),
    )  # fmt: skip
    mesh = sharding.make_mesh(MESHES[0])
    found = programs.programs(experiment(stages={**STAGES, "details": details}), mesh)
    by_name = {f"{one.stage}.{one.name}": one for one in found}
    plain, learn = by_name["ppo.iteration"], by_name["details.learn"]
    with sharding.scope(mesh):
        assert learn.function.lower(*learn.args) is not None
    plain_bytes, own = (device_bytes(p.roles["optimiser"]) for p in (plain, learn))
    assert own < 0.6 * plain_bytes
    assert learn.args[0].older.tokens.sharding.shard_shape((128, 28)) == (16, 28)
    fisher = jax.tree.leaves(learn.args[1].anchor.fisher)
    assert sum(x.size for x in fisher) == sum(x.size for x in jax.tree.leaves(learn.args[1].reference))


def test_packing_is_planned_for_as_all_of_its_padding():
    """A loop of as many parts as there are has no length to count."""
    mesh, plain = sharding.make_mesh(MESHES[0]), STAGES["ppo"]
    packed = dataclasses.replace(plain, packing=Packing(rows=1))
    found = programs.programs(experiment(stages={**STAGES, "packed": packed}), mesh)
    by_name = {f"{one.stage}.{one.name}": one for one in found}
    with sharding.scope(mesh):
        counted = [
            flops.count(one.function.trace(*one.args).jaxpr, decode_steps=one.decode_steps).total()
            for one in (by_name["ppo.iteration"], by_name["packed.iteration"])
        ]
    assert counted[0] == counted[1] > 0


def test_online_pairs_that_a_model_of_the_run_judges():
    judge = JudgeReward(LocalJudge("sft", length=48, batch_size=16))
    sizes = {"prompt_tokens": (2, 7), "completion_tokens": 20, "batch_size": 64, "group_size": 4}
    online = online_preference.Config(policy="sft", reward=judge, steps=5, evaluation_prompts=100, **sizes)
    stages = {"sft": STAGES["sft"], "online": online}
    _, *found = programs.programs(experiment(stages=stages), sharding.make_mesh(MESHES[0]))
    assert {one.name: (one.calls, one.tokens) for one in found} == {
        "sample": (5, 64 * 28), "learn": (5, 64 * 28), "decode": (2 * 2, 64 * 28),
        "judge": (5 * 16 * 6 * 2 // 16 + 13, 16 * 48),  # six pairs a prompt in both orders; 200 questions at the end
    }  # fmt: skip
    with sharding.scope(sharding.make_mesh(MESHES[0])):
        for one in found:
            one.function.lower(*one.args)


def test_stages_that_make_rows_sample_and_judge():
    judge = ai_feedback.LocalJudge("sft", length=48, batch_size=16)
    feedback = {"prompt_tokens": (2, 7), "completion_tokens": 20, "batch_size": 32, "prompts": 40}
    stages = {
        "sft": STAGES["sft"],
        "revisions": constitutional.Config(policy="sft", prompts=40, batch_size=32, rounds=2, length=32,
                                           answer_tokens=16, critique_tokens=8),
        "feedback": ai_feedback.Config(policy="sft", judge=judge, **feedback),
    }  # fmt: skip
    _, *found = programs.programs(experiment(stages=stages), sharding.make_mesh(MESHES[0]))
    assert {f"{one.stage}.{one.name}": (one.calls, one.tokens, one.decode_steps) for one in found} == {
        "revisions.answer": (2 * 3, 32 * (32 + 16), 16), "revisions.critique": (2 * 2, 32 * (32 + 8), 8),
        "feedback.decode": (3, 32 * 28, 20), "feedback.judge": (3 * 2, 16 * 48, 0),
    }  # fmt: skip
    with sharding.scope(sharding.make_mesh(MESHES[0])):
        for one in found:
            one.function.lower(*one.args)


@pytest.mark.parametrize(("loss", "completions"), [("dpo", 3), ("kto", 2), ("bco", 1)])
def test_a_policy_from_judgements(loss, completions):
    pairs = SampledPairs(policy="base", completions=3, completion_tokens=20)
    config = preference.Config(init="base", pairs=pairs, losses=(preference.Term(loss),), reference=preference.Sync())
    (one,) = programs.programs(experiment(stages={"x": config}), mesh := sharding.make_mesh(MESHES[0]))
    assert one.tokens == 32 * completions * 49 and one.calls == 200
    held = estimate.argument_bytes(one)
    assert held["frozen"] == held["parameters"]  # the reference that follows
    with sharding.scope(mesh):
        assert one.function.lower(*one.args).as_text()


KINDS = {
    "rated": reward_model.Config(loss="ordinal_rating", pairs=Jsonl("rows"), completion_tokens=20, length=32),
    "steps": reward_model.Config(loss="process_bce", pairs=Jsonl("rows"), completion_tokens=20, length=32),
    "models": reward_model.Config(loss="k_wise", length=64, ensemble=Ensemble(members=3)),
    "heads": reward_model.Config(length=64, ensemble=Ensemble(members=3, of="heads")),
}


def test_reward_models_of_every_kind_can_be_planned():
    mesh = sharding.make_mesh(MESHES[0])
    stages = {name: dataclasses.replace(config, init="base") for name, config in KINDS.items()}
    pairs = SampledPairs(policy="base")
    stages |= {name: dataclasses.replace(stages[name], pairs=pairs) for name in ("models", "heads")}
    found = {one.stage: one for one in programs.programs(experiment(stages=stages), mesh)}
    for name, one in found.items():
        with sharding.scope(mesh):
            assert one.function.lower(*one.args).as_text(), name
    assert found["rated"].tokens == 32 * 32 and found["steps"].args[1].ends.shape == (32, 8)
    assert found["models"].args[1].tokens.shape == (32, 3, 4, 64) and found["heads"].tokens == 32 * 4 * 64
    sizes = {name: device_bytes(one.roles["parameters"]) for name, one in found.items()}
    assert 2.9 < sizes["models"] / sizes["steps"] <= 3 and sizes["heads"] < 1.1 * sizes["steps"]


def test_pretraining_is_known_and_another_stage_is_named():
    mesh = sharding.make_mesh(MESHES[0])
    (one,) = programs.programs(experiment(stages={"lm": pretrain.Config(batch_size=8, heldout_rows=8)}), mesh)
    assert one.name == "train"
    with pytest.raises(UserError, match=r"stages\.toy: plan knows pretrain, sft, .*, not toys"):
        programs.programs(experiment(stages={"toy": ToyStage()}), mesh)


def test_offline_stages_are_known():
    mesh = sharding.make_mesh(MESHES[1])
    sizes = {"batch_size": 64, "row_length": 40, "heldout_rows": 64, "evaluation_prompts": 100, "steps": 6}
    methods = {"ilql": Ilql(curve=(0.0, 1.0), beta=2.0), "weighted": Weighted()}
    stages = {name: offline.Config(method=method, **sizes) for name, method in methods.items()}
    found = programs.programs(experiment(ADAPTED, stages={**STAGES, **stages}), mesh)
    plan = {f"{one.stage}.{one.name}": one for one in found if one.stage in stages}
    assert {name: one.calls for name, one in plan.items()} == {
        "ilql.train": 6, "ilql.decode": 4 * 2, "weighted.train": 6, "weighted.decode": 2 * 2,  # 100 by 64, each policy
    }  # fmt: skip
    own = {name: device_bytes(one.roles["parameters"]) for name, one in plan.items() if "train" in name}
    assert own["ilql.train"] > own["weighted.train"]  # the heads too
    with sharding.scope(mesh):
        for one in plan.values():
            one.function.lower(*one.args)


def test_best_of_n_and_distillation_are_known():
    mesh = sharding.make_mesh(MESHES[1])
    sizes = {"batch_size": 64, "prompt_tokens": (2, 7), "completion_tokens": 20, "evaluation_prompts": 100}
    stages = {
        "best": best_of_n.Config(n=4, prompts=50, **sizes),
        "distill": distill.Config(student="base", teacher="sft", steps=6, num_microbatches=2, **sizes),
    }
    found = programs.programs(experiment(ADAPTED, stages={**STAGES, **stages}), mesh)
    plan = {f"{one.stage}.{one.name}": one for one in found if one.stage in stages}
    assert {name: one.calls for name, one in plan.items()} == {
        "best.decode": 4 + 7, "distill.train": 6, "distill.decode": 6 + 3 * 2,  # 200 and 400 completions by 64
    }  # fmt: skip
    with sharding.scope(mesh):
        for one in plan.values():
            one.function.lower(*one.args)


@pytest.mark.parametrize("follows", [None, preference.Sync()], ids=["stays", "follows"])
def test_the_references_pass_is_one_forward_of_all_pairs(follows):
    pairs = SampledPairs(policy="base", prompts=100, heldout_prompts=20, completions=2, completion_tokens=20)
    config = preference.Config(init="base", pairs=pairs, batch_size=16, length=32, steps=4, reference=follows)
    plan = programs.programs(experiment(stages={"dpo": config}), sharding.make_mesh(MeshConfig(data=8)))
    found = {one.name: one for one in plan}
    assert set(found) == ({"reference", "train"} if follows is None else {"train"})  # else it is read in each step
    if follows is not None:
        return
    read = found["reference"]
    assert (read.calls, read.tokens) == (8, 16 * 2 * 32)  # 120 prompts in batches of 16
    d, heads = SPEC.d_model, SPEC.n_heads * SPEC.head_dim
    layer = 4 * d * heads + 3 * d * SPEC.d_ff + 2 * 32 * heads  # projections, MLP, scores and values of 32 keys
    forward = 2 * read.tokens * (SPEC.n_layers * layer + d * SPEC.vocab_size)
    assert flops.count(read.function.trace(*read.args).jaxpr).total() == forward
    trained = found["train"]
    assert flops.count(trained.function.trace(*trained.args).jaxpr).total() >= 3 * forward * 0.98
