"""Completions laid end to end: every token in its place, none twice, and updates that are those of padded rows."""

import dataclasses
import sys

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models, sharding
from rlhf_jax.algorithms import packing, policy, ppo
from rlhf_jax.algorithms.iterations import Frozen
from rlhf_jax.algorithms.packing import Packing
from rlhf_jax.algorithms.policy_methods import METHODS
from rlhf_jax.algorithms.policy_state import PolicyState
from rlhf_jax.models import ModelSpec
from rlhf_jax.optim import Optimizer
from rlhf_jax.rewards.ensemble import Combine, Ensemble, init
from rlhf_jax.rewards.verifiers import AnswerChecker
from rlhf_jax.sharding import MeshConfig
from rlhf_jax.train_step import create_state
from rlhf_jax.types import Rollout

pytestmark = pytest.mark.usefixtures("compile_quickly")

ROWS, PROMPT, NEW = 32, 5, 12
SPEC = ModelSpec(vocab_size=40, d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=24, max_len=32)
OPTIMIZER = Optimizer(learning_rate=1e-2, eps=1e-3)
SIZES = {
    "batch_size": ROWS,
    "prompt_tokens": (1, PROMPT - 1),
    "completion_tokens": NEW,
    "epochs": 2,
    "exact_kl_rows": 4,
    "optimizer": OPTIMIZER,
}


def rollout(seed=0) -> Rollout:
    """Prompts padded on the left, completions of a mean of a quarter of the limit."""
    rng = np.random.default_rng(seed)
    column = np.arange(PROMPT + NEW)
    prompt = (column >= rng.integers(0, PROMPT - 1, (ROWS, 1))) & (column < PROMPT)
    lengths = np.minimum(rng.geometric(0.3, (ROWS, 1)), NEW)
    completion = (column >= PROMPT) & (column < PROMPT + lengths)
    logps = np.where(completion, -2 - rng.random(completion.shape), 0).astype(np.float32)
    return Rollout(
        tokens=jnp.asarray(np.where(prompt | completion, rng.integers(2, 40, prompt.shape), 0), jnp.int32),
        prompt_mask=jnp.asarray(prompt),
        completion_mask=jnp.asarray(completion),
        logps=jnp.asarray(logps),
        ref_logps=jnp.asarray(np.where(completion, logps + 0.1 * rng.normal(size=logps.shape), 0), jnp.float32),
        scores=jnp.asarray(rng.normal(size=ROWS), jnp.float32),
        group_ids=jnp.arange(ROWS) // 4,
    )


@pytest.mark.parametrize("pairs", [False, True])
def test_every_token_has_a_place_of_its_own_and_pairs_stay_together(pairs):
    batch, config = rollout(), Packing(rows=2, fewer=(1,))
    batch = jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:]), batch) if pairs else batch
    count, part = packing.parts(config, batch, batch.completion_mask)
    size, seen, tokens = config.rows * config.length * (PROMPT + NEW), [], 0
    for i in range(int(count)):
        which, shapes = part(jnp.int32(i))
        one = shapes[which]
        inside = np.asarray(one.mask)
        places = np.asarray(one.placed)[inside]
        assert len(set(places)) == len(places) and places.max() < size
        assert (np.asarray(one.placed)[~inside] == size).all()
        assert places.max() < one.laid * config.length * (PROMPT + NEW)
        assert i == count - 1 or one.laid == config.rows
        assert (inside.any(-1) == (inside == np.asarray(batch.mask)).all(-1)).all()  # rows are whole
        if pairs:
            assert (inside.any(-1).all(-1) == inside.any(-1).any(-1)).all()
        seen.append(inside)
        tokens += len(places)
    np.testing.assert_array_equal(np.sum(seen, axis=0), batch.mask)
    assert tokens > 0.75 * int(count) * size  # little padding, of few rows


def test_rows_that_fill_a_part_to_the_last_token_are_whole():
    """0.7 · 30 is 21 but for its rounding, and three times that 63."""
    config, prompt, new = Packing(rows=3, length=1, completions=0.7), 9, 21
    config.check(prompt, new)
    column = np.zeros((3, 1)) + np.arange(prompt + new)
    batch = Rollout(
        tokens=jnp.asarray(np.random.default_rng(0).integers(2, 40, column.shape), jnp.int32),
        prompt_mask=jnp.asarray(column < prompt),
        completion_mask=jnp.asarray(column >= prompt),
    )
    count, part = packing.parts(config, batch, batch.completion_mask)
    params = sharding.unbox(models.init(SPEC, jax.random.key(0)))
    at = packing.read(config, SPEC, params, part(jnp.int32(0))[1][0], prompt=prompt)
    assert int(count) == 1
    np.testing.assert_array_equal(at.in_rows(at.tokens, prompt=prompt), batch.tokens[:, prompt:])


def updated(algorithm, config, state, mesh=None):
    learner = algorithm(config, SPEC, eos_id=1, pad_id=0)
    frozen = Frozen(reference={}, reward={}, base={}, head_base={})
    metrics = {"seq_kl": jnp.float32(0.0)}

    def run(rows):
        return learner.improve(state(learner), frozen, rows, metrics)[:2]

    if mesh is None:
        return jax.device_get(jax.jit(run)(rollout()))
    with sharding.scope(mesh):
        return jax.device_get(jax.jit(run)(sharding.shard_batch(mesh, jax.device_get(rollout()))))


def networks(*, head=False):
    params = sharding.unbox(models.init(SPEC, jax.random.key(0)))
    value_head = {"kernel": jnp.full((SPEC.d_model,), 0.1), "bias": jnp.zeros(())}
    return {**params, "head": value_head} if head else params


def same(found, expected):
    state, metrics = found
    for a, b in zip(jax.tree.leaves(state.policy.params), jax.tree.leaves(expected[0].policy.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    for name, value in expected[1].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


def of_policy(method, **fields):
    config = policy.Config(**{**METHODS[method], **SIZES, "reward": AnswerChecker(), "minibatches": 2, **fields})
    hyper = {"clip_eps": 0.2, "clip_eps_high": 0.2, "entropy_coef": 0.1, "kl_coef": 0.1, "learning_rate": 1e-2}

    def state(learner):
        own = create_state(networks(), learner.policy_optimizer, hyper, jax.random.key(1))
        return PolicyState(own, config.kl.init(), None, None)

    return policy.Algorithm, config, state


@pytest.mark.parametrize("method", ["grpo", "gspo", "p3o", "dr_grpo"])
def test_updates_are_those_of_padded_rows(method):
    plain = updated(*of_policy(method, entropy_coef=0.1))
    same(updated(*of_policy(method, entropy_coef=0.1, packing=Packing(rows=3, fewer=(1, 2)))), plain)


@pytest.mark.parametrize("shared", [False, True])
def test_updates_of_policy_and_critic_are_those_of_padded_rows(shared):
    def of_ppo(**fields):
        critic = ppo.SharedTrunk(value_coef=0.5) if shared else "reward_model"
        more = {} if shared else {"critic_optimizer": OPTIMIZER}
        config = ppo.Config(**{**SIZES, "critic": critic, "minibatches": 2, "entropy_coef": 0.1, **more, **fields})
        hyper = {"clip_eps": 0.2, "entropy_coef": 0.1, "value_clip": 0.2, "value_coef": 0.5, "learning_rate": 1e-2}

        def state(learner):
            own = create_state(networks(head=shared), learner.policy_optimizer, hyper, jax.random.key(1))
            other = {
                "trunk": {k: v for k, v in networks().items() if k != "unembedding"},
                "head": networks(head=True)["head"],
            }
            critic = None if shared else create_state(other, learner.critic_optimizer, hyper, jax.random.key(2))
            return ppo.State(policy=own, average=None, critic=critic, kl=config.kl.init(), moments=None, older=None)

        return ppo.Algorithm, config, state

    def with_values(learner):
        class Valued(learner):
            def with_advantages(self, rollout, **kept):
                values = jnp.where(rollout.completion_mask, 0.1, 0.0) if rollout.values is None else rollout.values
                return super().with_advantages(rollout.replace(values=values), **kept)

        return Valued

    plain = of_ppo()
    packed = of_ppo(packing=Packing(rows=4, fewer=(2,), length=1 if shared else 2, completions=0.5))
    expected, found = (updated(with_values(a), c, s) for a, c, s in (plain, packed))
    same(found, expected)
    if not shared:
        for a, b in zip(*(jax.tree.leaves(x[0].critic.params) for x in (found, expected)), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)


def scored(fields, *, own, ensemble=None, mesh=None):
    """What a rollout's scoring says, by random networks."""
    config = ppo.Config(**{**SIZES, "minibatches": 2, **fields})
    learner = ppo.Algorithm(config, SPEC, eos_id=1, pad_id=0)
    reference = sharding.unbox(models.init(SPEC, jax.random.key(3)))
    one = lambda key: models.init_with_head(SPEC, key)  # noqa: E731
    keys = jax.random.split(jax.random.key(4), 1 if ensemble is None else ensemble.members)
    reward = sharding.unbox(one(keys[0]) if ensemble is None else init(one, keys, ensemble))
    frozen = Frozen(reference=reference, reward=reward, base={}, head_base={}, ensemble=ensemble)
    critic = sharding.unbox(models.init_with_head(SPEC, jax.random.key(5)))
    rows = rollout()
    cut = rows.completion_mask & (jnp.arange(PROMPT + NEW) < PROMPT + 3)
    rows = rows.replace(scores=None, ref_logps=None, read_mask=cut)  # the reward reads three tokens at most

    def run(rows):
        rows, metrics = learner.score(own, frozen, rows)
        if rows.values is None:
            state = ppo.State(policy=None, average=None, critic=Critic(critic), kl=None, moments=None, older=None)
            rows = learner.with_values(rows, state, frozen)
        return (rows.logps, rows.ref_logps, rows.values, rows.scores), metrics

    if mesh is None:
        return jax.device_get(jax.jit(run)(rows))
    with sharding.scope(mesh):
        return jax.device_get(jax.jit(run)(sharding.shard_batch(mesh, jax.device_get(rows))))


@flax.struct.dataclass
class Critic:
    params: dict


SCORINGS = {
    "a network": {"own": networks()},
    "values of the policy's trunk": {"own": networks(head=True)},
    "models": {"own": networks(), "ensemble": Ensemble(members=3, combine=Combine("uwo"))},
    "heads": {"own": networks(), "ensemble": Ensemble(members=2, of="heads", combine=Combine("wco"))},
    "shards": {"own": networks(), "mesh": MeshConfig(data=2, fsdp=2, tensor=2)},
}


@pytest.mark.parametrize("case", SCORINGS)
def test_scores_are_those_of_padded_rows(case):
    how = dict(SCORINGS[case])
    mesh = sharding.make_mesh(how.pop("mesh")) if "mesh" in how else None
    arrays, metrics = scored({}, **how)
    assert all(np.abs(x).max() > 0.1 for x in arrays)
    found, found_metrics = scored({"packing": Packing(rows=4, fewer=(1, 3), completions=0.5)}, **how, mesh=mesh)
    for a, b in zip(found, arrays, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert found_metrics.keys() == metrics.keys()
    assert ("uncertainty" in metrics) == ("ensemble" in how)
    for name, value in metrics.items():
        np.testing.assert_allclose(found_metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_each_shard_lays_its_own_rows():
    plain = updated(*of_policy("grpo"))
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    same(updated(*of_policy("grpo", packing=Packing(rows=2, fewer=(1,))), mesh=mesh), plain)


def test_the_last_layer_computes_what_is_read_alone_and_gives_the_same(monkeypatch):
    plain = updated(*of_policy("grpo"))
    monkeypatch.setattr(sys.modules[__name__], "SPEC", dataclasses.replace(SPEC, unroll=SPEC.n_layers))
    same(updated(*of_policy("grpo", packing=Packing(rows=4, fewer=(2,), completions=0.5))), plain)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    same(updated(*of_policy("grpo", packing=Packing(rows=2)), mesh=mesh), plain)


def test_a_part_has_no_more_rows_and_completions_than_it_has_room_for():
    batch, t = rollout(), PROMPT + NEW
    roomy, tight = (
        packing.parts(Packing(rows=4, fewer=(1, 2), completions=share), batch, batch.completion_mask)
        for share in (1.0, 0.2)
    )
    assert tight.count > roomy.count
    for config, share in ((roomy, 1.0), (tight, 0.2)):
        for i in range(int(config.count)):
            which, shapes = config.part(jnp.int32(i))
            one = shapes[which]
            fits = [
                int(one.placed[one.mask].max()) < shape.laid * 2 * t
                and int(one.completion_mask.sum()) <= share * shape.laid * 2 * t
                for shape in shapes
            ]
            assert fits.index(True) == which  # the smallest that does


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"length": 0}, "packing.length"),
        ({"rows": 0}, "packing.rows"),
        ({"rows": 4, "fewer": (4,)}, r"packing\.fewer=\(4,\) must be numbers from 1 to below packing.rows=4"),
        ({"completions": 0.0}, "packing.completions"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        Packing(**fields)


def test_a_row_must_hold_the_longest_completions_that_stay_together():
    with pytest.raises(ValueError, match="less than 1 of completion_tokens"):
        of_policy("grpo", packing=Packing(rows=1, length=1, completions=0.3))
    with pytest.raises(ValueError, match="less than 2 of completion_tokens"):
        of_policy("p3o", packing=Packing(rows=1, completions=0.5))
    with pytest.raises(ValueError, match=r"packing\.length=1 must be at least 2: pairs are laid together"):
        of_policy("p3o", packing=Packing(length=1))


def test_a_step_that_does_not_pack_is_not_told_to():
    with pytest.raises(ValueError, match="packing is no part of trust_region's step"):
        of_policy("trpo", packing=Packing(), epochs=1, minibatches=1)
