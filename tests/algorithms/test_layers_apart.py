"""Steps that follow each other with each layer's parameters apart: the same as of stacked ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models, sharding
from rlhf_jax.algorithms import policy, policy_state, ppo
from rlhf_jax.algorithms.iterations import Frozen
from rlhf_jax.algorithms.policy_methods import METHODS
from rlhf_jax.algorithms.policy_state import PolicyState
from rlhf_jax.models import ModelSpec, stacking
from rlhf_jax.models.spec import Experts, Lora
from rlhf_jax.optim import Optimizer
from rlhf_jax.rewards.verifiers import AnswerChecker
from rlhf_jax.sharding import MeshConfig
from rlhf_jax.train_step import create_state
from rlhf_jax.types import Rollout

pytestmark = pytest.mark.usefixtures("compile_quickly")

ROWS, PROMPT, NEW = 16, 3, 6
LOOPED = ModelSpec(vocab_size=40, d_model=16, n_layers=3, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=24, max_len=16)
UNROLLED = dataclasses.replace(LOOPED, unroll=3)
ADAM = Optimizer(learning_rate=1e-2, eps=1e-3, weight_decay=0.1, clip_norm=0.05)
SIZES = {
    "batch_size": ROWS,
    "prompt_tokens": (1, PROMPT - 1),
    "completion_tokens": NEW,
    "epochs": 2,
    "minibatches": 2,
    "exact_kl_rows": 4,
    "optimizer": ADAM,
}


def rollout() -> Rollout:
    rng = np.random.default_rng(0)
    column = np.zeros((ROWS, 1)) + np.arange(PROMPT + NEW)
    completion = (column >= PROMPT) & (column < PROMPT + rng.integers(1, NEW + 1, (ROWS, 1)))
    logps = np.where(completion, -2 - rng.random(completion.shape), 0).astype(np.float32)
    return Rollout(
        tokens=jnp.asarray(rng.integers(2, 40, column.shape), jnp.int32),
        prompt_mask=jnp.asarray(column < PROMPT),
        completion_mask=jnp.asarray(completion),
        logps=jnp.asarray(logps),
        ref_logps=jnp.asarray(logps),
        scores=jnp.asarray(rng.normal(size=ROWS), jnp.float32),
        group_ids=jnp.arange(ROWS) // 4,
    )


def grpo(spec):
    config = policy.Config(**{**METHODS["grpo"], **SIZES, "reward": AnswerChecker()})
    learner = policy.Algorithm(config, spec, eos_id=1, pad_id=0)
    hyper = {"clip_eps": 0.2, "clip_eps_high": 0.2, "entropy_coef": 0.0, "kl_coef": 0.1, "learning_rate": 1e-2}
    params = sharding.unbox(models.init(spec, jax.random.key(0)))
    own = create_state(params, learner.policy_optimizer, hyper, jax.random.key(1))
    return learner, PolicyState(own, config.kl.init(), None, None)


def with_critic(spec):
    config = ppo.Config(**SIZES, critic_optimizer=ADAM)
    learner = ppo.Algorithm(config, spec, eos_id=1, pad_id=0)
    hyper = {"clip_eps": 0.2, "entropy_coef": 0.0, "value_clip": 0.2, "learning_rate": 1e-2}
    params = sharding.unbox(models.init(spec, jax.random.key(0)))
    own = create_state(params, learner.policy_optimizer, hyper, jax.random.key(1))
    critic = create_state(
        sharding.unbox(models.init_with_head(spec, jax.random.key(3))),
        learner.critic_optimizer,
        hyper,
        jax.random.key(2),
    )
    return learner, ppo.State(policy=own, average=None, critic=critic, kl=config.kl.init(), moments=None, older=None)


def improved(made, spec, mesh=None):
    learner, state = made(spec)
    frozen, metrics = Frozen(reference={}, reward={}, base={}, head_base={}), {"seq_kl": jnp.float32(0.0)}

    def run(rows):
        return learner.improve(state, frozen, rows, metrics)[:2]

    if mesh is None:
        return jax.device_get(jax.jit(run)(rollout()))
    with sharding.scope(mesh):
        return jax.device_get(jax.jit(run)(sharding.shard_batch(mesh, jax.device_get(rollout()))))


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("made", [grpo, with_critic])
def test_updates_are_those_of_stacked_layers(made, monkeypatch):
    parted, apart = [], stacking.apart
    monkeypatch.setattr(stacking, "apart", lambda state: parted.append(1) or apart(state))
    assert policy_state.may_lie_apart(made(UNROLLED)[0], ADAM)
    assert not policy_state.may_lie_apart(made(LOOPED)[0], ADAM)
    expected = improved(made, LOOPED)
    assert not parted
    same(improved(made, UNROLLED), expected)
    assert parted
    same(improved(made, UNROLLED, sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))), expected)


def test_what_is_apart_is_put_together_as_it_was():
    state = with_critic(UNROLLED)[1]
    there = stacking.apart(state)
    assert len(there.policy.params["layers"]) == 3
    assert there.policy.params["layers"][1]["mlp"]["up"].shape == (16, 24)
    held = lambda x: (x.policy.params, x.policy.opt_state, x.critic.params)  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, held(stacking.together(there)), held(state))


def test_what_reads_stacks_keeps_them(monkeypatch):
    assert stacking.may_lie_apart(UNROLLED)
    fields = ({"remat": "full"}, {"experts": Experts(number=2, per_token=1)}, {"lora": Lora()}, {"unroll": 1})
    assert not any(stacking.may_lie_apart(dataclasses.replace(UNROLLED, **changed)) for changed in fields)
    learner = grpo(UNROLLED)[0]
    assert not policy_state.may_lie_apart(learner, ADAM, Optimizer(kind="muon"))
    assert not policy_state.may_lie_apart(learner, Optimizer(master="bfloat16"))
    monkeypatch.setattr(stacking, "platform", lambda: "gpu")  # whose memory they would take
    assert not stacking.may_lie_apart(UNROLLED)
