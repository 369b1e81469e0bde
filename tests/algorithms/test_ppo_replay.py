"""Older rollouts: what is kept of them, and the loss on them, written by hand."""

import dataclasses

import jax
import numpy as np
import pytest

from rlhf_jax import models, sharding
from rlhf_jax.algorithms import iterations, ppo, replay
from rlhf_jax.algorithms.context import Context
from rlhf_jax.algorithms.iterations import Frozen
from rlhf_jax.algorithms.onpolicy import ValueHead
from rlhf_jax.algorithms.replay import Replay
from rlhf_jax.checkpoint import save_params
from rlhf_jax.data.prompts import PromptBatch
from rlhf_jax.interop.pretrained import Pretrained
from rlhf_jax.kl import FixedKL
from rlhf_jax.models import ModelSpec
from rlhf_jax.optim import Optimizer
from rlhf_jax.placement import Disaggregated
from rlhf_jax.sampling import ended
from rlhf_jax.sharding import MeshConfig

pytestmark = pytest.mark.usefixtures("compile_quickly")

SPEC = ModelSpec(vocab_size=40, d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=32, max_len=32)
CONFIG = ppo.Config(
    policy="base", critic=ValueHead("base"), reward="rm", batch_size=8, prompt_tokens=(2, 3), completion_tokens=5,
    epochs=1, minibatches=1, optimizer=Optimizer(0.05, clip_norm=9.0), critic_optimizer=Optimizer(0.01),
    kl=FixedKL(0.1), exact_kl_rows=4, replay=Replay(rollouts=2, max_weight=1.2),
)  # fmt: skip
P = CONFIG.prompt_length
SCORED = {"seq_kl": jax.numpy.float32(0)}  # what an update reads of the scoring's metrics


@pytest.fixture(scope="module")
def iterated(tmp_path_factory):
    """States before each of three iterations and after them, their metrics and rollouts, and the reference."""
    folder = tmp_path_factory.mktemp("replay")
    params = sharding.unbox(models.init(SPEC, jax.random.key(0)))
    context = Context(folder, 0, sharding.single_device_mesh(), Pretrained(SPEC, params, None), None)
    save_params(folder / "rm/params", sharding.unbox(models.init_with_head(SPEC, jax.random.key(3), params)))
    algorithm = ppo.Algorithm(CONFIG, SPEC, eos_id=3, pad_id=0)
    state, frozen = ppo.initial_state(algorithm, context, "ppo"), iterations.frozen(context, policy="base", reward="rm")
    states, seen, step = [state], [], jax.jit(algorithm.iteration)
    for i in range(3):
        tokens = np.random.default_rng(i).integers(4, 40, (8, P)).astype(np.int32)
        state, metrics, rollout = step(state, frozen, PromptBatch(tokens, np.ones((8, P), bool)))
        states.append(state)
        seen.append(jax.device_get((metrics, rollout)))
    return jax.device_get([s.replace(policy=s.policy.params, critic=s.critic.params) for s in states]), seen


def by_hand(state, rollouts):
    """Of each token of the newest rollout and of older ones: the policy's and the critic's loss before a step, its
    weight, and the row that it stands in.
    """
    advantages, weights, rows = [], [], []
    for r in rollouts:
        logits = np.asarray(models.logits(SPEC, state.policy, r.tokens, r.mask), np.float64)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        values = np.asarray(models.values(SPEC, state.critic, r.tokens, r.mask), np.float64)
        for i in range(8):
            kept = np.flatnonzero(r.completion_mask[i])
            now = logits[i, kept - 1, r.tokens[i, kept]]
            rewards = -0.1 * (r.logps - r.ref_logps)[i, kept].astype(np.float64)
            rewards[-1] += r.scores[i]
            v = np.append(values[i, kept], 0)
            deltas = rewards + v[1:] - v[:-1]
            n = len(kept)
            advantages += [sum(0.95 ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]
            weights += np.minimum(np.exp(now - r.logps[i, kept]), 1.2).tolist()
            rows += [i] * n
    a, w = np.asarray(advantages), np.asarray(weights)
    whitened = (a - a.mean()) / np.sqrt(a.var() + 1e-8)
    return -w * whitened, a**2 / 2, w, np.asarray(rows)  # returns are values plus advantages


def test_the_loss_is_that_of_weighed_tokens_of_all_rollouts(iterated):
    states, seen = iterated
    for k in range(3):
        metrics, behind = seen[k][0], [rollout for _, rollout in seen[max(0, k - 2) : k + 1]]
        policy_loss, value_loss, weights, _ = by_hand(states[k], behind)
        assert metrics["policy_loss"] == pytest.approx(policy_loss.mean(), abs=2e-5), k
        assert metrics["value_loss"] == pytest.approx(value_loss.mean(), rel=1e-4), k
        assert metrics["weights_cut"] == pytest.approx((weights >= 1.2).mean(), abs=1e-6)
        assert metrics["staleness"] == pytest.approx(k / 2) and metrics["ratio_deviation"] < 1e-5
        assert metrics["reward"] == pytest.approx(seen[k][1].rewards.sum(-1).mean(), abs=1e-5)  # of the newest alone
    assert 0 < seen[2][0]["weights_cut"] < 1 and len(seen[2][1].tokens) == 8


def shortened(rollout, seed):
    """The same with completions of several lengths, so that a mean over minibatches' means is not that over tokens."""
    kept = np.arange(rollout.tokens.shape[1]) < P + np.random.default_rng(seed).integers(1, 6, (8, 1))
    names = ("completion_mask", "logps", "ref_logps")
    return rollout.replace(**{name: vars(rollout)[name] * kept for name in names}, old_logps=None)


def test_completions_that_a_stop_string_ended_stay_so(iterated):
    _, seen = iterated
    newest, older = (rollout.replace(used=np.ones(8, bool), stopped=np.zeros(8, bool)) for _, rollout in seen[:2])
    newest = newest.replace(stopped=np.arange(8) % 2 == 0)
    both = replay.joined(newest, older)
    np.testing.assert_array_equal(both.stopped, [*newest.stopped, *older.stopped])
    assert ended(both, 3)[:8][newest.stopped].all() and not ended(both.replace(stopped=None), 3)[:8].all()
    assert not replay.joined(newest.replace(stopped=None), older).stopped.any()


def test_each_minibatch_holds_the_same_rows_of_every_rollout(iterated, tmp_path):
    """Steps too small to move anything: the loss of each is that of its own rows, of the newest rollout and older."""
    (_, before, *_), seen = iterated
    params = jax.tree.map(jax.numpy.asarray, (before.policy, before.critic))
    context = Context(tmp_path, 0, sharding.single_device_mesh(), Pretrained(SPEC, params[0], None), None)
    save_params(tmp_path / "rm/params", params[1])
    still = Optimizer(1e-30)
    config = dataclasses.replace(
        CONFIG, critic="rm", minibatches=4, optimizer=still, critic_optimizer=still, replay=Replay(1, max_weight=1.2)
    )
    algorithm = ppo.Algorithm(config, SPEC, eos_id=3, pad_id=0)
    state = ppo.initial_state(algorithm, context, "ppo")
    newest, older = (shortened(rollout, seed) for seed, (_, rollout) in enumerate((seen[1], seen[0])))
    state = state.replace(older=jax.tree.map(lambda x: x[:8], replay.joined(older, state.older)))
    rows = np.asarray(algorithm.minibatch_rows(jax.random.fold_in(state.policy.step_key(), 1)))
    assert sorted(rows.reshape(-1)) == list(range(8)) and rows.shape == (4, 2)
    update = jax.jit(lambda state, rollout: algorithm.improve(state, Frozen({}, {}, {}, {}), rollout, SCORED))
    _, metrics, _ = update(state, newest)
    policy_loss, value_loss, weights, owners = by_hand(before, [newest, older])
    parts = [np.isin(owners, some) for some in rows]
    assert metrics["policy_loss"] == pytest.approx(np.mean([policy_loss[own].mean() for own in parts]), abs=2e-5)
    assert metrics["value_loss"] == pytest.approx(np.mean([value_loss[own].mean() for own in parts]), rel=1e-4)
    assert abs(np.mean([policy_loss[own].mean() for own in parts]) - policy_loss.mean()) > 1e-3  # another mean than all
    assert weights.std() > 0.01


def test_what_is_kept_is_what_was_written(iterated):
    states, seen = iterated
    for k in range(3):
        older = states[k + 1].older
        assert older.used.tolist() == [True] * 8 + [k > 0] * 8
        for place, (_, rollout) in enumerate(reversed(seen[max(0, k - 1) : k + 1])):
            for name in ("tokens", "completion_mask", "logps", "ref_logps", "scores", "written_at"):
                kept = vars(older)[name][8 * place : 8 * place + 8]
                np.testing.assert_array_equal(kept, vars(rollout)[name])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rollouts": 0}, r"replay.rollouts must lie in \[1, inf\), got 0"),
        ({"max_weight": 0.5}, r"replay.max_weight must lie in \[1, inf\), got 0.5"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Replay(**fields)
    with pytest.raises(ValueError, match=r"replay weighs rollouts .* placement.ahead must be 0"):
        dataclasses.replace(CONFIG, placement=Disaggregated(MeshConfig(), MeshConfig(1)))
