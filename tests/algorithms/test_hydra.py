"""Adapters through the stages: every network is its own adapters over one frozen base, which no stage changes."""

import dataclasses

import jax
import numpy as np
import pytest

from rlhf_jax import models, sharding
from rlhf_jax.algorithms import iterations, ppo, reward_model, sft
from rlhf_jax.algorithms.comparisons import SampledPairs
from rlhf_jax.algorithms.context import Context
from rlhf_jax.algorithms.onpolicy import ValueHead
from rlhf_jax.checkpoint import save_params
from rlhf_jax.interop.pretrained import Pretrained
from rlhf_jax.models import lora
from rlhf_jax.models.spec import Lora
from rlhf_jax.optim import Optimizer
from rlhf_jax.rewards.verifiers import PatternMatch
from tests.algorithms.conftest import SPEC

pytestmark = pytest.mark.usefixtures("compile_quickly")

HYDRA = dataclasses.replace(SPEC, lora=Lora(rank=2, targets=("query", "value", "down")))
FAST = Optimizer(learning_rate=1e-2)
PAIRS = SampledPairs(prompts=24, heldout_prompts=12, completions=2, completion_tokens=12, batch_size=48)
PPO = ppo.Config(
    policy="base",
    steps=3,
    batch_size=16,
    completion_tokens=12,
    epochs=1,
    minibatches=2,
    evaluation_prompts=16,
    exact_kl_rows=4,
    optimizer=FAST,
    critic_optimizer=FAST,
)


@pytest.fixture
def context(make_context, pretrained):
    plain = make_context("hydra")
    model = Pretrained(HYDRA, pretrained.params, pretrained.tokenizer)
    return Context(plain.workdir, 0, plain.mesh, model, plain.data)


def sizes(tree):
    return sum(x.size for x in jax.tree.leaves(tree) if x.ndim)


def test_three_stages_train_adapters_over_one_base(context):
    figures = sft.train(
        sft.Config(steps=3, row_length=49, batch_size=8, heldout_rows=8, optimizer=FAST), context, "sft"
    )
    assert figures["heldout_loss"] > 0
    own = context.policy_params("sft")
    assert sizes(own) < 0.1 * sizes(context.base)
    assert any(np.abs(x).max() > 0 for name, x in jax.tree_util.tree_leaves_with_path(own) if "lora_b" in str(name))
    config = reward_model.Config(pairs=PAIRS, length=24, steps=3, batch_size=8, optimizer=FAST)
    reward_model.train(config, context, "reward_model")
    assert set(context.head_params("reward_model")) == {"trunk", "head"}
    figures = ppo.train(PPO, context, "ppo")
    assert figures["ratio_deviation"] < 1e-5 and figures["seq_kl"] != 0
    rows = np.asarray([[2, 5, 9, 11]])
    before, after = (models.logits(HYDRA, context.policy(name), rows) for name in ("base", "ppo"))
    assert np.abs(before - after).max() > 1e-3
    np.testing.assert_array_equal(before, models.logits(SPEC, context.model.params, rows))


def test_ppo_holds_the_base_once_and_moments_for_what_trains(context):
    head = models.init_with_head(HYDRA, jax.random.key(0), context.policy_params("base"))
    save_params(context.stage_dir("reward_model") / "params", sharding.unbox(head))
    tokenizer = context.tokenizer
    algorithm = ppo.Algorithm(PPO, HYDRA, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    state = ppo.initial_state(algorithm, context, "ppo")
    frozen = iterations.frozen(context, policy="base", reward="reward_model")
    assert frozen.reference == {}  # the base itself, its adapters off
    adapters, trunk = sizes(lora.own(HYDRA, state.policy.params)), sizes(context.base)
    assert sizes(state.policy.params) == adapters and sizes(state.policy.opt_state) == 2 * adapters
    arrays = (state.policy.params, state.policy.opt_state, state.critic.params, state.critic.opt_state, frozen)
    held = {id(x): x.nbytes for x in jax.tree.leaves(arrays)}  # head_base and base are one
    everything = 4 * trunk * (4 + 2 * 2)  # four networks, two of them with two moments, float32
    assert sum(held.values()) < 0.35 * everything


def test_a_new_critic_and_a_reward_that_is_a_function_need_no_stage_before_them(context):
    config = dataclasses.replace(PPO, reward=PatternMatch("a"), critic=ValueHead("base"))
    assert config.requires() == {}
    tokenizer = context.tokenizer
    algorithm = ppo.Algorithm(config, HYDRA, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    state = ppo.initial_state(algorithm, context, "ppo")
    assert sizes(state.critic.params) == sizes(state.policy.params) + SPEC.d_model
    figures = ppo.train(config, context, "ppo")
    assert 0 <= figures["score_before"] <= 1 and figures["gold_after"] > 0 and figures["seq_kl"] != 0
