"""Ensembles: a member is a run of its own seed, heads share a trunk, rules combine, kills are survived."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest

from rlhf_jax import models, sharding
from rlhf_jax.algorithms import iterations, onpolicy, ppo, reward_data, reward_model, sft
from rlhf_jax.algorithms.reward_losses import of_heads, pair_loss
from rlhf_jax.checkpoint import save_params
from rlhf_jax.config import Experiment, validate
from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.data.sources import Jsonl
from rlhf_jax.errors import Stopped, UserError
from rlhf_jax.interop.pretrained import Bundled
from rlhf_jax.rewards import ensemble as ensembles
from rlhf_jax.rewards.ensemble import Combine, Ensemble
from rlhf_jax.rewards.network import RewardNetwork
from rlhf_jax.rewards.verifiers import PatternMatch
from rlhf_jax.sharding import Shard
from rlhf_jax.types import Rollout
from tests.algorithms.conftest import SPEC
from tests.algorithms.test_reward_kinds import ranked
from tests.algorithms.test_reward_model import CONFIG

pytestmark = pytest.mark.usefixtures("compile_quickly")
TWO = Ensemble(members=2)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(ranked(i, 3)) + "\n" for i in range(30)))
    fields = {**CONFIG, "steps": 4, "evaluate_every": 4, "checkpoint_every": 4, "completion_tokens": 12}
    return reward_model.Config(init="base", loss="k_wise", pairs=Jsonl(path, heldout=0.2), normalize="none", **fields)


def holding(context, ensemble=TWO):
    return dataclasses.replace(context, ensembles={"rm": ensemble})


def test_a_member_is_a_run_of_its_own_seed_and_survives_a_kill(config, make_context, monkeypatch):
    together = holding(make_context("together"))
    several = dataclasses.replace(config, ensemble=TWO)
    record = reward_model.Loop.record

    def stop_after_two(self, state, metrics, *, tokens):
        if self._step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        record(self, state, metrics, tokens=tokens)

    figures = reward_model.train(several, together, "rm")
    params = jax.device_get(together.head_params("rm"))
    monkeypatch.setattr(reward_model.Loop, "record", stop_after_two)
    broken = holding(make_context("broken"))
    with pytest.raises(Stopped):
        reward_model.train(several, broken, "rm")
    monkeypatch.setattr(reward_model.Loop, "record", record)
    assert reward_model.train(several, broken, "rm") == figures
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(broken.head_params("rm")))

    each = []
    for seed in (0, 1):
        alone = make_context(f"alone{seed}", seed=seed)
        each.append(reward_model.train(config, alone, "rm")["accuracy"])
        own = jax.device_get(alone.head_params("rm"))
        jax.tree.map(lambda a, b, i=seed: np.testing.assert_allclose(a, b[i], atol=1e-5), own, params)
    evaluation = json.loads((together.stage_dir("rm") / "evaluation.json").read_text())
    assert evaluation["members"] == each and figures["members_accuracy"] == pytest.approx(np.mean(each))
    assert figures["uncertainty"] > 0
    network = RewardNetwork(SPEC, together.mesh, length=24, pad_id=0, ensemble=TWO)
    data = reward_data.load(several, together, "rm")
    scores = network.members(together.network("rm"), data.heldout_rows)
    np.testing.assert_allclose(scores.mean(0), evaluation["scores"], atol=1e-5)
    assert figures["uncertainty"] == pytest.approx(scores.std(0).mean(), rel=1e-4)


@pytest.mark.parametrize("bootstrap", [False, True])
def test_heads_on_one_trunk_have_the_mean_of_their_losses(bootstrap, config, make_context):
    ensemble = Ensemble(members=3, of="heads", bootstrap=bootstrap)
    config = dataclasses.replace(config, loss="bradley_terry", ensemble=ensemble)
    context = holding(make_context(), ensemble)
    data = reward_data.load(config, context, "rm")
    batch = next(reward_data.batches(config, context, "rm", data, Shard()))
    state, _ = reward_model.start(config, context, "rm")
    heads = state.params["head"]
    assert heads["kernel"].shape == (3, SPEC.d_model) and state.params["trunk"]["embedding"].ndim == 2
    one = pair_loss(SPEC, config)
    loss_fn = jax.jit(of_heads(one, own_rows=bootstrap))
    loss, _ = loss_fn(state.params, batch, {}, jax.random.key(0))
    own = jax.jit(one)
    losses = []
    for i in range(3):
        part = jax.tree.map(lambda x, i=i: x[:, i], batch) if bootstrap else batch
        params = {"trunk": state.params["trunk"], "head": jax.tree.map(lambda x, i=i: x[i], heads)}
        losses.append(own(params, part, {}, jax.random.key(0))[0])
    assert float(loss.total) == pytest.approx(sum(float(one.total) for one in losses), rel=1e-5)
    assert float(loss.count) == sum(float(one.count) for one in losses)
    if bootstrap:  # each its own sample of the rows
        assert not np.array_equal(batch.tokens[:, 0], batch.tokens[:, 1])
        seen = {group.prompt for group in data.train}
        assert {context.tokenizer.decode(row[row > 2].tolist())[:6] for row in batch.tokens[:, 0, 0]} <= {
            context.tokenizer.decode(list(group.rows()[0][1:]))[:6] for group in data.train
        } and len(seen) == 24


def test_rules_are_those_of_coste_et_al():
    scores = np.array([[1.0, 4.0], [3.0, 4.0], [2.0, 1.0]], np.float32)
    assert Combine()(scores).tolist() == [2, 3]
    assert Combine("wco")(scores).tolist() == [1, 1]
    np.testing.assert_allclose(Combine("uwo", 0.5)(scores), [2 - 0.5 * 2 / 3, 3 - 0.5 * 2], rtol=1e-6)


@pytest.mark.parametrize("of", ["models", "heads"])
def test_the_reward_of_an_ensemble_is_its_members_combined(of):
    ensemble = Ensemble(members=2, of=of, combine=Combine("uwo", 0.3))
    keys = jax.random.split(jax.random.key(0), 2)
    boxed = ensembles.init(lambda key: models.init_with_head(SPEC, key), keys, ensemble)
    params = sharding.unbox(boxed)
    rows = np.random.default_rng(0).integers(3, 500, (5, 9))
    mask = np.arange(9) < np.array([[9], [4], [1], [7], [9]])
    read = jax.jit(lambda params: ensembles.reward(SPEC, params, ensemble, rows, mask))(params)
    score = jax.jit(lambda params: models.score(SPEC, params, rows, mask))
    alone = []
    for i, key in enumerate(keys):
        own = sharding.unbox(models.init_with_head(SPEC, key))
        if of == "heads":
            own["trunk"] = params["trunk"]
        alone.append(np.asarray(score(own)))
        np.testing.assert_array_equal(own["head"]["kernel"], params["head"]["kernel"][i])
    np.testing.assert_allclose(read["score"], np.mean(alone, 0) - 0.3 * np.var(alone, 0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(read["uncertainty"], np.std(alone, 0), rtol=1e-4, atol=1e-5)


def test_ppo_reads_an_ensemble_and_says_how_far_its_members_differ(make_context):
    ensemble = Ensemble(members=2, combine=Combine("wco"))
    context, rng = holding(make_context(), ensemble), np.random.default_rng(0)
    trunk = context.policy_params("base")
    keys = jax.random.split(jax.random.key(0), 2)
    boxed = ensembles.init(lambda key: models.init_with_head(SPEC, key, trunk), keys, ensemble)
    save_params(context.stage_dir("rm") / "params", sharding.unbox(boxed))
    config = ppo.Config(policy="base", reward="rm", critic=onpolicy.ValueHead("base"), prompt_tokens=(2, 4),
                        completion_tokens=7, batch_size=8, minibatches=1, exact_kl_rows=8)  # fmt: skip
    algorithm = ppo.Algorithm(config, SPEC, eos_id=1, pad_id=0)
    frozen = iterations.frozen(context, policy="base", reward="rm", combine=config.combine)
    tokens, places = rng.integers(3, 500, (8, 12)), np.broadcast_to(np.arange(12), (8, 12))
    rollout = Rollout(tokens, places < 5, places >= 5, logps=np.zeros((8, 12), np.float32))
    scored, metrics = jax.jit(algorithm.score)(trunk, frozen, rollout)
    network = RewardNetwork(SPEC, context.mesh, length=24, pad_id=0, ensemble=ensemble)
    scores = network.members(context.network("rm"), tokens.tolist())
    np.testing.assert_allclose(scored.scores, scores.min(0), atol=1e-5)
    assert float(metrics["uncertainty"]) == pytest.approx(scores.std(0).mean(), rel=1e-4) and scores.std(0).min() > 0


def test_a_stage_says_how_and_its_reader_may_say_otherwise(make_context, monkeypatch):
    context = holding(make_context())
    monkeypatch.setattr(type(context), "head_params", lambda self, source: {})
    frozen = iterations.frozen(context, policy="base", reward="rm")
    assert frozen.ensemble == TWO
    worst = iterations.frozen(context, policy="base", reward="rm", combine=Combine("wco"))
    assert worst.ensemble == dataclasses.replace(TWO, combine=Combine("wco"))
    assert iterations.frozen(context, policy="base", reward="other").ensemble is None


def test_an_ensemble_scores_but_is_no_critic():
    stages = {"sft": sft.Config(), "rm": reward_model.Config(ensemble=TWO)}
    value = onpolicy.ValueHead("sft")

    def check(**fields):
        experiment = Experiment(Bundled(), MovieReviews(), {**stages, "ppo": ppo.Config(reward="rm", **fields)})
        validate(experiment, 1)

    check(critic=value)
    check(critic=value, combine=Combine("wco"))
    with pytest.raises(UserError, match=r"stages\.ppo\.critic: needs .* makes a reward; 'rm' makes an ensemble"):
        check(critic="rm")
    stages["rm"] = reward_model.Config()
    with pytest.raises(UserError, match=r"stages\.ppo\.reward: needs .* makes an ensemble; 'rm' makes a reward"):
        check(critic="rm", combine=Combine("wco"))
    with pytest.raises(ValueError, match="combine is for a reward that is an ensemble, not a function of texts"):
        ppo.Config(reward=PatternMatch("x"), combine=Combine("wco"))
