"""A value head on the policy's own trunk, beside models read apart and losses written by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models, sharding
from rlhf_jax.algorithms import iterations, ppo
from rlhf_jax.algorithms.consolidation import Consolidation
from rlhf_jax.algorithms.context import Context
from rlhf_jax.algorithms.onpolicy import SharedTrunk
from rlhf_jax.algorithms.replay import Replay
from rlhf_jax.algorithms.truncation import Truncation
from rlhf_jax.checkpoint import save_params
from rlhf_jax.data.prompts import PromptBatch
from rlhf_jax.interop.pretrained import Pretrained
from rlhf_jax.models import ModelSpec
from rlhf_jax.models.spec import Lora
from rlhf_jax.optim import Optimizer
from rlhf_jax.placement import Colocated, Disaggregated
from rlhf_jax.rewards.verifiers import PatternMatch
from rlhf_jax.rewards.with_network import NetworkPart
from rlhf_jax.sampling import Sampling
from rlhf_jax.sharding import MeshConfig
from rlhf_jax.train_step import compiled
from tests.algorithms.conftest import put_stages
from tests.algorithms.stopping import check_resumption

pytestmark = pytest.mark.usefixtures("compile_quickly")

SPEC = ModelSpec(vocab_size=92, d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=32, max_len=32)
SMOOTH = Optimizer(3e-3, eps=1e-3)  # else a gradient that is rounding alone makes as large a step as any other
CONFIG = ppo.Config(
    policy="base", critic=SharedTrunk(value_coef=0.3), reward="rm", batch_size=16, prompt_tokens=(2, 5),
    completion_tokens=6, epochs=1, minibatches=2, optimizer=SMOOTH, exact_kl_rows=4,
)  # fmt: skip


def start(folder, config, *, spec=SPEC, mesh=None):
    """The algorithm, a state whose head is not 0, what is frozen, and a batch of prompts."""
    mesh = sharding.single_device_mesh() if mesh is None else mesh
    params = sharding.unbox(models.init(dataclasses.replace(spec, lora=None), jax.random.key(0)))
    context = Context(folder, 0, mesh, Pretrained(spec, params, None), None)
    own = context.policy_params("base")
    save_params(folder / "rm/params", sharding.unbox(models.init_with_head(spec, jax.random.key(3), own)))
    algorithm = ppo.Algorithm(config, spec, eos_id=3, pad_id=0)
    state = ppo.initial_state(algorithm, context, "ppo")
    assert not any(x.any() for x in jax.tree.leaves(state.policy.params["head"]))
    kernel = 0.3 * np.random.default_rng(1).normal(size=16).astype(np.float32)
    kernel = sharding.put(kernel, state.policy.params["head"]["kernel"].sharding)
    head = {**state.policy.params["head"], "kernel": kernel}
    policy = dataclasses.replace(state.policy, params={**state.policy.params, "head": head})
    tokens = np.random.default_rng(0).integers(4, 92, (16, 6)).astype(np.int32)
    batch = PromptBatch(tokens, np.arange(6) >= np.arange(16)[:, None] % 4)
    frozen = iterations.frozen(context, policy="base", reward="rm")
    return algorithm, state.replace(policy=policy), frozen, sharding.shard_batch(mesh, batch)


def test_values_and_loss_are_those_of_two_networks_of_equal_weights(tmp_path):
    algorithm, state, frozen, prompts = start(tmp_path, CONFIG)
    _, metrics, r = jax.device_get(jax.jit(algorithm.iteration)(state, frozen, prompts))
    trunk = {name: part for name, part in state.policy.params.items() if name != "head"}
    values = models.values(SPEC, {"trunk": trunk, "head": state.policy.params["head"]}, r.tokens, r.mask)
    np.testing.assert_allclose(r.values, values * r.completion_mask, atol=1e-5)
    assert np.abs(r.values).max() > 0.1 and metrics["ratio_deviation"] < 1e-5
    assert metrics["value_loss"] > 0 and "critic_grad_norm" not in metrics

    loss_fn, key = algorithm.policy_loss(), jax.random.key(0)
    mask, old_values = r.completion_mask, r.values + 0.3  # so that some are clipped

    def by_hand(params):
        logits = models.logits(SPEC, params, r.tokens, r.mask)
        logps = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), r.tokens[:, 1:, None], -1)[..., 0]
        ratio = jnp.exp(jnp.pad(logps, ((0, 0), (1, 0))) - r.logps)
        surrogate = -jnp.minimum(ratio * r.advantages, jnp.clip(ratio, 0.8, 1.2) * r.advantages)
        v = models.values(SPEC, {"trunk": params, "head": params["head"]}, r.tokens, r.mask)
        near = old_values + jnp.clip(v - old_values, -0.2, 0.2)
        error = jnp.maximum((v - r.returns) ** 2, (near - r.returns) ** 2) / 2
        return jnp.where(mask, surrogate + 0.3 * error, 0).sum() / mask.sum()

    batch = r.replace(values=old_values * mask)

    def whole(params):
        loss, metrics = loss_fn(params, batch, state.policy.hyper, key)
        return loss.value, metrics["value_clipped"].value

    (loss, clipped), grads = jax.jit(jax.value_and_grad(whole, has_aux=True))(state.policy.params)
    wanted, wanted_grads = jax.jit(jax.value_and_grad(by_hand))(state.policy.params)
    assert float(loss) == pytest.approx(float(wanted), abs=1e-5)
    assert 0 < clipped < 1
    for a, b in zip(*map(jax.tree.leaves, (grads, wanted_grads)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)

    def passes(config, params):
        """How often a loss goes through the layers."""
        algorithm = ppo.Algorithm(config, SPEC, eos_id=3, pad_id=0)
        traced = jax.make_jaxpr(lambda params: algorithm.policy_loss()(params, batch, state.policy.hyper, key)[0])
        return str(traced(params)).count(" rsqrt ")  # of each norm

    apart = dataclasses.replace(CONFIG, critic="rm")
    assert passes(CONFIG, state.policy.params) == passes(apart, trunk) > 0


def two_iterations(folder, mesh=None):
    """Of adapters and a head, with a rollout replayed."""
    config = dataclasses.replace(CONFIG, replay=Replay(rollouts=1))
    adapted = dataclasses.replace(SPEC, lora=Lora(rank=2, targets=("query", "value")))
    algorithm, state, frozen, prompts = start(folder, config, spec=adapted, mesh=mesh)
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(state.policy.params)}
    assert names == {f"{x}_lora_{y}" for x in ("query", "value") for y in "ab"} | {"kernel", "bias"}
    assert "head" not in state.final and state.critic is None
    step, seen = compiled(algorithm.iteration, state, others=2), []
    with sharding.scope(sharding.single_device_mesh() if mesh is None else mesh):
        for _ in range(2):
            state, metrics, rollout = step(state, frozen, prompts)
            seen.append(jax.device_get((metrics, rollout.tokens)))
    return seen, jax.device_get(state.policy.params)


@pytest.mark.slow
def test_a_mesh_takes_the_iterations_of_one_device(tmp_path):
    seen, params = two_iterations(tmp_path / "one")
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    other_seen, other_params = two_iterations(tmp_path / "many", mesh)
    for (metrics, tokens), (other_metrics, other_tokens) in zip(seen, other_seen, strict=True):
        np.testing.assert_array_equal(tokens, other_tokens)
        for name, value in metrics.items():
            assert other_metrics[name] == pytest.approx(value, abs=1e-4), name
    assert seen[1][0]["stale_kl"] > 1e-9 and seen[1][0]["staleness"] == 1  # half is new, half two steps old
    for a, b in zip(*map(jax.tree.leaves, (params, other_params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_stopped_run_with_every_detail_ends_where_an_unbroken_one_does(make_context, monkeypatch):
    whole, broken = make_context("whole"), make_context("broken")
    for context in (whole, broken):
        put_stages(context)
    config = ppo.Config(
        steps=4, batch_size=8, prompt_tokens=(2, 6), completion_tokens=6, epochs=1, minibatches=2, exact_kl_rows=4,
        evaluation_prompts=8, checkpoint_every=2, optimizer=Optimizer(1e-3), critic=SharedTrunk(), average=0.5,
        replay=Replay(rollouts=2), ewc=Consolidation(texts=4, row_length=12), truncate=Truncation("e", after=1),
        sampling=Sampling(ends=False), reward=PatternMatch("e"), network=NetworkPart(weight=0.1),
    )  # fmt: skip
    check_resumption(config, whole, broken, monkeypatch, stop_after=3)
    assert config.requires() == {"policy": ("sft", "policy"), "network.stage": ("reward_model", "scorer")}
    assert "head" not in whole.policy_params("ppo")
    assert (broken.stage_dir("ppo") / "fisher" / "digests.json").is_file()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"critic_optimizer": SMOOTH}, "critic_optimizer is for a critic of its own"),
        ({"placement": Disaggregated(MeshConfig(), MeshConfig(1))}, "critic=SharedTrunk.* placement must be Colocated"),
        ({"placement": Colocated(("critic",))}, "'critic' has nothing on the devices here; these have: reference, rew"),
        ({"critic": SharedTrunk, "value_coef": 0.0}, r"critic.value_coef must lie in \(0, inf\), got 0"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        if "value_coef" in fields:
            SharedTrunk(value_coef=fields["value_coef"])
        dataclasses.replace(CONFIG, **fields)
