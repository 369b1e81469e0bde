"""PPO's details: texts beside rollouts, a moving average, the papers' presets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.algorithms import iterations, ppo, pretraining_mix, prompting
from rlhf_jax.algorithms.onpolicy import ValueHead
from rlhf_jax.algorithms.ppo_presets import PRESETS
from rlhf_jax.algorithms.pretraining_mix import PretrainingMix
from rlhf_jax.kl import AdaptiveKL, FixedKL
from rlhf_jax.optim import Optimizer
from rlhf_jax.placement import Colocated
from rlhf_jax.rewards.verifiers import PatternMatch
from tests.algorithms.conftest import SPEC, put_stages

pytestmark = pytest.mark.usefixtures("compile_quickly")

CONFIG = ppo.Config(
    steps=2, batch_size=8, completion_tokens=6, epochs=1, minibatches=2, exact_kl_rows=4, evaluation_prompts=4,
    optimizer=Optimizer(1e-3), critic=ValueHead(), reward=PatternMatch("e"),
    ptx=PretrainingMix(coef=0.5, batch_size=4, row_length=16, rows=6), average=0.75,
)  # fmt: skip


def setup(context, config):
    put_stages(context)
    algorithm = ppo.Algorithm(config, SPEC, eos_id=context.tokenizer.eos_id, pad_id=context.tokenizer.pad_id)
    batches = prompting.prompt_batches(prompting.load_prompts(config, context, "ppo").train, config, context)
    return algorithm, ppo.initial_state(algorithm, context, "ppo"), algorithm.frozen(context), next(batches)[0]


def test_texts_are_learnt_beside_rollouts_and_the_average_follows(make_context):
    algorithm, state, frozen, prompts = setup(make_context(), CONFIG)
    rollout = jax.jit(algorithm.sample)(iterations.behaviour(state.policy), frozen, prompts)
    rollout = rollout.replace(scores=jnp.arange(8.0))
    new, metrics, scored = jax.jit(algorithm.learn)(state, frozen, rollout)
    assert jax.tree.leaves(frozen.texts)[0].shape == (6, 16)

    # A minibatch's gradient is that of the two means, by hand, whatever the microbatches.
    batch = jax.tree.map(lambda x: x[:4], scored)
    count = float(batch.completion_mask.sum())
    mixed = pretraining_mix.mixed(CONFIG.ptx, batch, jnp.float32(count), frozen.texts, jax.random.key(1))
    texts = jax.device_get(mixed.texts)
    loss_fn, hyper = algorithm.policy_loss(), state.policy.hyper

    def by_hand(params):
        logits = models.logits(SPEC, params, texts.tokens, texts.segment_ids > 0)
        assert (texts.segment_ids <= 1).all()  # a row holds one text here: no segment hides another
        logps = jax.nn.log_softmax(logits[:, :-1])
        each = -jnp.take_along_axis(logps, texts.tokens[:, 1:, None], -1)[..., 0]
        kept = texts.loss_mask[:, 1:]
        policy = loss_fn(params, batch, hyper, jax.random.key(0))[0].value
        return policy + 0.5 * (each * kept).sum() / kept.sum()

    wanted = jax.jit(jax.grad(by_hand))(state.policy.params)
    both = pretraining_mix.with_texts(loss_fn, SPEC, CONFIG.ptx)

    def in_parts(params):
        halves = [jax.tree.map(lambda x, i=i: x[i::2], mixed) for i in (0, 1)]
        one, other = (both(params, half, hyper, jax.random.key(0))[0] for half in halves)
        return (one + other).value

    for a, b in zip(*map(jax.tree.leaves, (jax.jit(jax.grad(in_parts))(state.policy.params), wanted)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert 0 < metrics["ptx_loss"] < 2 * np.log(SPEC.vocab_size)

    for old, now, mean in zip(*map(jax.tree.leaves, (state.policy.params, new.policy.params, new.final)), strict=True):
        np.testing.assert_allclose(mean, 0.75 * old + 0.25 * now, atol=1e-6)
    assert new.final is not new.policy.params


def test_the_same_seed_holds_the_same_texts(make_context):
    context = make_context()
    one, other = (jax.device_get(pretraining_mix.held(CONFIG.ptx, context)) for _ in range(2))
    np.testing.assert_array_equal(one.tokens, other.tokens)
    shapes = pretraining_mix.shapes(CONFIG.ptx)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(one)] == [(x.shape, x.dtype) for x in jax.tree.leaves(shapes)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ptx": PretrainingMix(batch_size=5), "num_microbatches": 2}, "ptx.batch_size=5 must divide by num_microb"),
        ({"placement": Colocated(("reference",))}, r"ptx needs placement=Colocated\(\) without offload"),
        ({"average": 1.0}, r"average must lie in \(0, 1\), got 1"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **fields)


def test_presets_have_the_papers_details():
    """The figures of PAPERS.md, read from the configs."""
    made = {name: ppo.Config(**fields) for name, fields in PRESETS.items()}
    ziegler, stiennon, instruct = (made[name] for name in ("ziegler2019", "nplus", "instructgpt"))
    assert ziegler.kl == AdaptiveKL(0.15, 6.0, 10_000) and ziegler.shaping.whiten and ziegler.whiten_advantages
    assert (ziegler.completion_tokens, ziegler.sampling.temperature, ziegler.batch_size) == (24, 0.7, 512)
    assert (ziegler.epochs, ziegler.minibatches, ziegler.optimizer.learning_rate) == (4, 1, 1e-5)
    adam = ziegler.optimizer
    assert (adam.eps, adam.eps_form, adam.schedule) == (1e-5, "tensorflow", "linear")
    assert (stiennon.kl, stiennon.completion_tokens, stiennon.optimizer.learning_rate) == (FixedKL(0.05), 53, 3e-6)
    assert (stiennon.shaping.eos_penalty.how, stiennon.shaping.eos_penalty.score) == ("replace", -1.0)
    assert stiennon.critic == "reward_model" and not stiennon.shaping.whiten and stiennon.epochs == 4
    assert (stiennon.sampling.temperature, stiennon.evaluation_sampling.temperature) == (0.7, 0.01)
    assert (instruct.kl, instruct.ptx.coef, instruct.average) == (FixedKL(0.02), 27.8, 0.992)
    assert instruct.ptx.batch_size * instruct.minibatches == 8 * instruct.batch_size and instruct.epochs == 1
    assert instruct.steps * instruct.batch_size == 256_000
    assert {config.gamma for config in made.values()} == {1.0} and made["stiennon2020"] == stiennon
