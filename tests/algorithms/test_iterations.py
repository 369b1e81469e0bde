"""Where roles lie and when rollouts are made changes no number but what a docstring says it does."""

import dataclasses
import gc
import json

import jax
import numpy as np
import pytest

from rlhf_jax import models, sharding
from rlhf_jax.algorithms import iterations, ppo, prompting
from rlhf_jax.algorithms.context import Context
from rlhf_jax.checkpoint import save_params
from rlhf_jax.data.sources import Jsonl
from rlhf_jax.interop.pretrained import Pretrained
from rlhf_jax.interop.tokenizers import train_sentencepiece
from rlhf_jax.kl import AdaptiveKL
from rlhf_jax.metrics import read_jsonl
from rlhf_jax.models import ModelSpec
from rlhf_jax.models.spec import Lora
from rlhf_jax.optim import Optimizer
from rlhf_jax.placement import Colocated, Disaggregated
from rlhf_jax.rewards.verifiers import PatternMatch
from rlhf_jax.sharding import MeshConfig
from tests.algorithms.stopping import check_resumption
from tests.compiling import no_compiling

pytestmark = pytest.mark.usefixtures("compile_quickly")

SPEC = ModelSpec(vocab_size=300, d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=32, max_len=16)
SPLIT = Disaggregated(sampling=MeshConfig(data=1, tensor=2), training=MeshConfig(data=-1, fsdp=2), ahead=0)
AHEAD = dataclasses.replace(SPLIT, ahead=1)
ALL = Colocated(("reference", "reward", "critic", "optimizers"))
SMOOTH = Optimizer(learning_rate=1e-2, eps=1e-3)  # else Adam makes steps of what is rounding
CONFIG = ppo.Config(
    policy="base",
    steps=4,
    batch_size=24,
    prompt_tokens=(1, 4),
    too_long="start",
    completion_tokens=4,
    epochs=1,
    minibatches=1,
    kl=AdaptiveKL(coef=0.1, target=1.0, horizon=200),
    optimizer=SMOOTH,
    critic_optimizer=SMOOTH,
    evaluation_prompts=4,
    exact_kl_rows=4,
    checkpoint_every=2,
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    words = ("a", "quiet", "film", "about", "seven", "old", "friends", "who", "never", "meet", "again")
    texts = [" ".join(words[(i // 5 + i * j) % 11] for j in range(1, 6)) for i in range(55)]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return Jsonl(path, heldout=0.1), train_sentencepiece(texts, vocab_size=300)


@pytest.fixture
def context(tmp_path, rows):
    """Contexts on a mesh, with a reward model; six of the devices, so that a batch divides over each sub-mesh."""

    def make(name="run", *, mesh=None, adapters=None):
        mesh = sharding.single_device_mesh() if mesh is None else sharding.make_mesh(mesh, jax.devices()[:6])
        spec = dataclasses.replace(SPEC, lora=adapters)
        params = sharding.unbox(models.init(SPEC, jax.random.key(0)))
        made = Context(tmp_path / name, 0, mesh, Pretrained(spec, params, rows[1]), rows[0])
        head = models.init_with_head(spec, jax.random.key(3), made.policy_params("base"))
        save_params(made.stage_dir("reward_model") / "params", sharding.unbox(head))
        return made

    return make


def start(context, config, scorer=None):
    """The stage's iterations, what the first begins with, and its batches."""
    tokenizer = context.tokenizer
    algorithm = ppo.Algorithm(config, context.spec, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    places = iterations.places(config.placement, context)
    frozen = iterations.frozen(places.sampling, policy=config.policy, reward=config.reward)
    state = ppo.initial_state(algorithm, places.training, "ppo")
    batches = prompting.prompt_batches(prompting.load_prompts(config, context, "ppo").train, config, context)
    run = iterations.Whole if config.placement == Colocated() else iterations.Phases
    return algorithm, run(algorithm, state, places, frozen, scorer), state, batches


def taken(context, config, scorer=None, *, steps=3):
    """Metrics and rollouts of some iterations, the last state, and whatever holds it."""
    _, run, state, batches = start(context, config, scorer)
    held, seen = run.first(state, batches), []
    for step in range(steps):
        with no_compiling() if step == 2 else jax.named_scope("first"):
            held, metrics, rollout = run(held, batches, last=step == steps - 1)
        seen.append(jax.device_get((metrics, rollout)))
    return seen, jax.device_get((held.policy.params, held.policy.step)), run, held


def agree(one, other):
    for (metrics, rollout), (other_metrics, other_rollout) in zip(one[0], other[0], strict=True):
        np.testing.assert_array_equal(rollout.tokens, other_rollout.tokens)
        for name, value in metrics.items():
            assert other_metrics[name] == pytest.approx(value, abs=1e-4), name
    for a, b in zip(*(jax.tree.leaves(run[1]) for run in (one, other)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.fixture
def config(rows):
    return dataclasses.replace(CONFIG, data=rows[0])


def test_sub_meshes_and_host_memory_take_the_iterations_of_one_mesh(context, config):
    config = dataclasses.replace(config, minibatches=2)
    whole = taken(context(), config)
    offloaded = taken(context(), dataclasses.replace(config, placement=ALL))
    agree(whole, offloaded)
    for role in ("reference", "reward"):
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(getattr(offloaded[2]._frozen, role))}
        assert kinds == {"pinned_host"}
    agree(whole, taken(context(mesh=MeshConfig()), dataclasses.replace(config, placement=SPLIT)))


@pytest.mark.slow
def test_a_function_scores_beside_the_updates_what_it_scores_before_them(context, config):
    config = dataclasses.replace(config, reward=PatternMatch("e"))

    def scorer(texts):
        return np.asarray([len(text.completion) for text in texts], np.float32)

    agree(
        taken(context(), config, scorer),
        taken(context(mesh=MeshConfig()), dataclasses.replace(config, placement=SPLIT), scorer),
    )


def test_who_is_idle_takes_no_memory_of_the_devices_while_a_policy_samples(context, config):
    placement = Colocated(("reference", "critic", "optimizers"))
    config = dataclasses.replace(config, reward=PatternMatch("e"), placement=placement)
    gc.collect()
    before = {id(x) for x in jax.live_arrays()}
    made, held = context(), {}

    def look(texts):
        live = [x for x in jax.live_arrays() if id(x) not in before and x.ndim]
        for kind in ("device", "pinned_host"):
            held[kind] = sum(x.nbytes for x in live if x.sharding.memory_kind == kind)
        raise InterruptedError

    _, run, state, batches = start(made, config, look)
    policy = sum(x.nbytes for x in jax.tree.leaves(state.policy.params))
    assert policy == sum(x.nbytes for x in jax.tree.leaves(made.model.params))
    with pytest.raises(InterruptedError):
        run(state, batches, last=False)
    rollouts = 6 * config.batch_size * (config.prompt_length + config.completion_tokens) * 4  # whatever of them
    assert (
        2 * policy <= held["device"] < 2 * policy + rollouts
    )  # the one that samples and the model that all began with
    assert 6 * policy <= held["pinned_host"] < 6.1 * policy  # reference, critic, and two moments of each that trains


def test_a_function_reads_texts_when_the_update_by_those_before_is_queued(context, config):
    config = dataclasses.replace(config, reward=PatternMatch("e"), placement=AHEAD)
    given_away = []

    def look(texts):
        """An update is given the parameters that it starts from: they are gone once it is queued."""
        given_away.append(parameter.is_deleted())
        return np.ones(len(texts), np.float32)

    _, run, state, batches = start(context(mesh=MeshConfig()), config, look)
    parameter = jax.tree.leaves(state.policy.params)[0]
    held = run.first(state, batches)
    held, metrics, _ = run(held, batches, last=False)
    assert given_away == [False, True]
    assert metrics["score"] == 1 and metrics["staleness"] == 0 and int(held.policy.step) == 1


def test_rollouts_are_those_of_the_policy_before_and_weighed_so(context, config):
    ahead = dataclasses.replace(config, placement=AHEAD)
    seen, (params, steps), _, _ = taken(context(mesh=MeshConfig()), ahead, steps=4)
    # The same on one device, one thing after the other: rollout k + 1 by the policy that iteration k starts from.
    algorithm, _, state, batches = start(one := context("one"), dataclasses.replace(ahead, placement=Colocated()))
    algorithm = ppo.Algorithm(ahead, SPEC, eos_id=algorithm.eos_id, pad_id=algorithm.pad_id)
    frozen = iterations.frozen(one, policy="base", reward="reward_model")
    sample, score, improve = map(jax.jit, (algorithm.sample, algorithm.score, algorithm.improve))

    def made(state, **which):
        writer = iterations.behaviour(state.policy, **which)
        return score(writer.params, frozen, sample(writer, frozen, next(batches)[0]))

    following = made(state)
    for k, (metrics, rollout) in enumerate(seen, start=1):
        now, following = following, made(state, ahead=True)
        state, wanted, _ = improve(state, frozen, *now)
        np.testing.assert_array_equal(rollout.tokens, now[0].tokens)
        for name, value in wanted.items():
            assert metrics[name] == pytest.approx(float(value), abs=1e-4), name
        assert metrics["staleness"] == (k > 1) and metrics["ratio_deviation"] < 1e-5
        assert (metrics["stale_kl"] > 1e-6) == (k > 1)
        weights = np.minimum(np.exp(np.float64(rollout.old_logps - rollout.logps)), AHEAD.max_weight)
        loss = -(weights * rollout.advantages)[rollout.completion_mask].mean()  # before the update the ratio is 1
        assert metrics["policy_loss"] == pytest.approx(loss, abs=1e-5)
    assert int(state.policy.step) == steps == 4
    for a, b in zip(*map(jax.tree.leaves, (params, state.policy.params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_only_adapters_move(context, config):
    adapters = Lora(rank=2, targets=("query", "value"))
    config = dataclasses.replace(config, placement=AHEAD)
    _, run, state, _ = start(context(mesh=MeshConfig(), adapters=adapters), config)
    frozen, own = run.readers(state)
    moved, base = (jax.tree_util.tree_leaves_with_path(tree) for tree in (own, frozen.base))
    assert all(path[-1].key.endswith(("_lora_a", "_lora_b")) for path, _ in moved)
    assert sum(leaf.size for _, leaf in moved) < sum(leaf.size for _, leaf in base) / 10
    sampling = {leaf.sharding.mesh for _, leaf in [*moved, *base]}
    assert len(sampling) == 1 and not sampling & {leaf.sharding.mesh for leaf in jax.tree.leaves(state.policy.params)}


def test_a_killed_run_with_rollouts_ahead_ends_where_an_unbroken_one_does(context, config, monkeypatch):
    config = dataclasses.replace(config, placement=AHEAD)
    whole, broken = (context(name, mesh=MeshConfig()) for name in ("whole", "broken"))
    check_resumption(config, whole, broken, monkeypatch, stop_after=3)
    one, other = (read_jsonl(made.workdir / "metrics.jsonl") for made in (whole, broken))
    assert [line["staleness"] for line in one] == [0, 1, 1, 1]
    for line in [*one, *other]:
        del line["seconds"], line["tokens_per_second"]
    assert one == other
