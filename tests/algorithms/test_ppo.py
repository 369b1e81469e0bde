"""PPO: every quantity of an iteration against plain NumPy, the ratio, learning, kills, meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models, sharding
from rlhf_jax.algorithms import iterations, ppo, prompting
from rlhf_jax.checkpoint import save_params
from rlhf_jax.errors import NonFiniteError
from rlhf_jax.kl import AdaptiveKL, FixedKL
from rlhf_jax.metrics import read_jsonl
from rlhf_jax.optim import Optimizer
from rlhf_jax.rewards.shaping import EosPenalty, Shaping
from rlhf_jax.sampling import Sampling
from rlhf_jax.sharding import MeshConfig
from rlhf_jax.train_step import compiled
from tests.algorithms.conftest import SPEC, put_stages
from tests.algorithms.stopping import check_resumption
from tests.compiling import no_compiling

CONFIG = ppo.Config(
    steps=4,
    batch_size=32,
    completion_tokens=12,
    epochs=2,
    minibatches=2,
    kl=FixedKL(coef=0.1),
    optimizer=Optimizer(learning_rate=3e-3),
    critic_optimizer=Optimizer(learning_rate=3e-3),
    evaluation_prompts=40,
    exact_kl_rows=32,
    checkpoint_every=2,
)


def change(**fields):
    return dataclasses.replace(CONFIG, **fields)


def setup(context, config):
    """The algorithm, its first state, what is frozen, and a batch of prompts."""
    put_stages(context)
    tokenizer = context.tokenizer
    algorithm = ppo.Algorithm(config, context.spec, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    frozen = iterations.frozen(context, policy=config.policy, reward=config.reward)
    state = ppo.initial_state(algorithm, context, "ppo")
    prompts = next(prompting.prompt_batches(prompting.load_prompts(config, context, "ppo").train, config, context))[0]
    return algorithm, state, frozen, sharding.shard_batch(context.mesh, prompts)


def perturbed(params, size=0.02):
    """Other parameters of the same shapes, so that policy and reference differ."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + size * rng.normal(size=x.shape).astype(np.float32), params)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_an_iterations_arrays_are_those_of_the_definitions(temperature, make_context):
    config = change(sampling=Sampling(temperature=temperature), shaping=Shaping(eos_penalty=EosPenalty(score=-2.0)))
    context = make_context()
    algorithm, state, frozen, prompts = setup(context, config)
    frozen = frozen.replace(reference=perturbed(frozen.reference))
    # `iteration` gives the rollout back with all that was filled in, and its updates do not change it.
    _, metrics, rollout = jax.jit(algorithm.iteration)(state, frozen, prompts)
    r, p = jax.device_get(rollout), config.prompt_length
    mask = r.completion_mask
    assert not mask[:, :p].any() and mask[:, p].all()
    logits = [np.asarray(models.logits(SPEC, x, r.tokens, r.mask)) for x in (state.policy.params, frozen.reference)]
    shifted = [np.roll(log_softmax(x / temperature), 1, axis=1) for x in logits]
    logps, ref_logps = (np.take_along_axis(x, r.tokens[..., None], -1)[..., 0] * mask for x in shifted)
    np.testing.assert_allclose(r.logps, logps, atol=2e-5)
    np.testing.assert_allclose(r.ref_logps, ref_logps, atol=2e-5)
    exact = (np.exp(shifted[0]) * (shifted[0] - shifted[1])).sum(-1) * mask
    entropies = -(np.exp(shifted[0]) * shifted[0]).sum(-1) * mask
    assert metrics["seq_kl"] == pytest.approx((logps - ref_logps).sum(1).mean(), abs=1e-3)
    assert metrics["seq_kl_exact"] == pytest.approx(exact.sum(1).mean(), abs=1e-3)
    assert metrics["entropy"] == pytest.approx(entropies.sum() / mask.sum(), abs=1e-3)

    scores = np.asarray(models.score(SPEC, frozen.reward, r.tokens, r.mask))
    np.testing.assert_allclose(r.scores, scores, atol=1e-5)
    values = np.asarray(models.values(SPEC, state.critic.params, r.tokens, r.mask)) * mask
    np.testing.assert_allclose(r.values, values, atol=1e-5)
    has_ended = (r.tokens == context.tokenizer.eos_id).any(1)
    assert metrics["no_eos"] == pytest.approx(1 - has_ended.mean())
    for i in range(config.batch_size):
        kept = np.flatnonzero(mask[i])
        rewards = -0.1 * (logps - ref_logps)[i, kept]
        rewards[-1] += scores[i] if has_ended[i] else -2.0
        np.testing.assert_allclose(r.rewards[i, kept], rewards, atol=1e-4)
        v = np.append(values[i, kept], 0)
        deltas = rewards + v[1:] - v[:-1]
        advantages = [sum(0.95 ** (k - t) * deltas[k] for k in range(t, len(kept))) for t in range(len(kept))]
        np.testing.assert_allclose(r.returns[i, kept], advantages + v[:-1], atol=1e-4)
    whitened = r.advantages[mask]
    assert whitened.mean() == pytest.approx(0, abs=1e-5) and whitened.std() == pytest.approx(1, abs=1e-3)
    for array in (r.logps, r.ref_logps, r.values, r.rewards, r.advantages, r.returns):
        assert np.isfinite(array).all() and not array[~mask].any()


def test_the_ratio_is_one_before_the_first_update(make_context):
    algorithm, state, frozen, prompts = setup(make_context(), CONFIG)
    step = compiled(algorithm.iteration, state, others=2)
    for _ in range(3):
        state, metrics, _ = step(state, frozen, prompts)
        assert 0 <= metrics["ratio_deviation"] < 1e-5
        assert metrics["sampling_deviation"] < 1e-4
    with no_compiling():
        step(state, frozen, prompts)
    assert metrics["policy_clipped"] > 0 and metrics["approx_kl"] > 1e-5  # and it does move afterwards


def test_learns_and_reports(make_context):
    context = make_context()
    put_stages(context)
    figures = ppo.train(change(steps=12, kl=FixedKL(coef=0.01)), context, "ppo")
    lines = read_jsonl(context.workdir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert np.mean([line["score"] for line in lines[-3:]]) > np.mean([line["score"] for line in lines[:3]]) + 0.1
    assert figures["score_after"] > figures["score_before"] + 0.1
    assert figures["seq_kl"] > 0 and 0 <= figures["ratio_deviation"] < 1e-5
    assert 0 < figures["sampling_deviation"] < 1e-4
    wanted = {"score", "gold", "kl", "seq_kl", "seq_kl_exact", "entropy", "ratio_deviation", "sampling_deviation",
              "policy_clipped", "value_clipped", "explained_variance", "length", "no_eos",
              "tokens_per_second"}  # fmt: skip
    assert all(wanted <= line.keys() for line in lines)
    rows = read_jsonl(context.stage_dir("ppo") / "samples.jsonl")
    before, after = rows[:40], rows[40:]
    assert [row["prompt"] for row in before] == [row["prompt"] for row in after]
    assert {row["when"] for row in before} == {"before"} and {row["when"] for row in after} == {"after"}
    assert max(abs(row["kl"]) for row in before) < 1e-3


def test_a_stopped_run_ends_where_an_unbroken_one_does(make_context, monkeypatch):
    whole, broken = make_context("whole"), make_context("broken")
    for context in (whole, broken):
        put_stages(context)
    check_resumption(change(kl=AdaptiveKL(coef=0.1, target=1.0, horizon=100)), whole, broken, monkeypatch, stop_after=3)


def test_microbatches_on_a_mesh_take_the_same_iterations(make_context):
    """`test_ppo_meshes.py` has all meshes."""
    config = change(batch_size=64)

    def two_iterations(config, mesh=None):
        context = make_context(mesh=mesh)
        algorithm, state, frozen, prompts = setup(context, config)
        step, seen = compiled(algorithm.iteration, state, others=2), []
        with sharding.scope(context.mesh):
            for _ in range(2):
                state, metrics, rollout = step(state, frozen, prompts)
                seen.append(jax.device_get((metrics, rollout.tokens)))
        return seen, jax.device_get((state.policy.params, state.critic.params))

    seen, params = two_iterations(config)
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    other_seen, other_params = two_iterations(dataclasses.replace(config, num_microbatches=4), mesh)
    for (metrics, tokens), (other_metrics, other_tokens) in zip(seen, other_seen, strict=True):
        np.testing.assert_array_equal(tokens, other_tokens)  # else one flipped sample would hide the comparison
        for name, value in metrics.items():
            assert other_metrics[name] == pytest.approx(value, abs=1e-4), name
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other_params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_updates_stop_at_a_kl(make_context):
    stopping = change(stop_at_kl=1e-9, epochs=4)
    algorithm, state, frozen, prompts = setup(make_context(), stopping)
    new, metrics, _ = compiled(algorithm.iteration, state, others=2)(state, frozen, prompts)
    assert int(new.policy.step) == 1  # the first minibatch sees no KL yet; all later ones are not applied
    assert int(new.critic.step) == 8 and metrics["skipped_updates"] == pytest.approx(7 / 8)


def test_a_bonus_keeps_the_entropy_up(make_context):
    results = []
    for coef in (0.0, 0.5):
        algorithm, state, frozen, prompts = setup(make_context(), change(entropy_coef=coef))
        frozen = frozen.replace(reward=jax.tree.map(jnp.zeros_like, frozen.reward))
        step = compiled(algorithm.iteration, state, others=2)
        for _ in range(4):
            state, metrics, _ = step(state, frozen, prompts)
        results.append(float(metrics["entropy"]))
    assert results[1] > results[0]


def test_a_reward_that_is_not_finite_names_the_step(make_context):
    context = make_context()
    put_stages(context)
    params = context.head_params("reward_model")
    params["head"]["bias"] = jnp.full_like(params["head"]["bias"], jnp.nan)
    save_params(context.stage_dir("reward_model") / "params", params)
    with pytest.raises(NonFiniteError, match=r"ppo: score is nan at step 1 \(\d+ more .*; there is no checkpoint yet"):
        ppo.train(CONFIG, context, "ppo")


def test_a_reward_that_breaks_later_keeps_the_last_good_checkpoint(make_context):
    context = make_context()
    put_stages(context)
    ppo.train(change(steps=2, checkpoint_every=2), context, "ppo")
    params = context.head_params("reward_model")
    params["head"]["bias"] = jnp.full_like(params["head"]["bias"], jnp.inf)
    save_params(context.stage_dir("reward_model") / "params", params)
    with pytest.raises(NonFiniteError, match=r"ppo: score is inf at step 3 .*; the checkpoint of step 2 is kept"):
        ppo.train(change(steps=4, checkpoint_every=2), context, "ppo")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 30}, r"batch_size=30 must divide by minibatches × num_microbatches = 2 × 2 = 4"),
        ({"exact_kl_rows": 64}, "exact_kl_rows=64 must be at most batch_size=32"),
        ({"kl": AdaptiveKL(horizon=6)}, "kl.horizon=6 must be over a fifth of batch_size=32"),
        ({"gamma": 1.5}, r"gamma must lie in \[0, 1\], got 1.5"),
        ({"prompt_tokens": (8, 2)}, r"prompt_tokens must be \(fewest, most\)"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        change(num_microbatches=2, **fields)
