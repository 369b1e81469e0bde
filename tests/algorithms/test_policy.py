"""The policy stage: each method's gradient against its paper's formula, learning, kills, meshes, fields."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import config, inference, models, run, sharding
from rlhf_jax.algorithms import iterations, policy, prompting
from rlhf_jax.algorithms.context import Context
from rlhf_jax.algorithms.iterations import Behaviour, Whole
from rlhf_jax.algorithms.policy_methods import METHODS
from rlhf_jax.checkpoint import save_params
from rlhf_jax.data.sources import Jsonl
from rlhf_jax.interop.pretrained import Pretrained
from rlhf_jax.interop.tokenizers import train_sentencepiece
from rlhf_jax.kl import AdaptiveKL, FixedKL
from rlhf_jax.metrics import read_jsonl
from rlhf_jax.models import ModelSpec
from rlhf_jax.optim import Optimizer
from rlhf_jax.placement import Colocated, Disaggregated
from rlhf_jax.report.labels import LABELS
from rlhf_jax.rewards.shaping import OverlongPenalty, Shaping
from rlhf_jax.rewards.verifiers import PatternMatch
from rlhf_jax.sampling import Sampling
from rlhf_jax.sharding import MeshConfig, single_device_mesh
from rlhf_jax.train_step import compiled
from rlhf_jax.types import Rollout
from tests.algorithms.policy_formulas import FORMULAS
from tests.algorithms.stopping import check_resumption
from tests.compiling import no_compiling
from tests.meshes import mesh_of

pytestmark = pytest.mark.usefixtures("compile_quickly")

SPEC = ModelSpec(vocab_size=300, d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=32, max_len=16)
P, N, B, EOS = 5, 6, 8, 3  # columns of a prompt, tokens of a completion, completions
COMMON = {
    "policy": "base", "steps": 4, "batch_size": B, "prompt_tokens": (1, P - 1), "too_long": "start",
    "completion_tokens": N, "evaluation_prompts": 4, "exact_kl_rows": 4, "checkpoint_every": 2,
    "optimizer": Optimizer(learning_rate=1e-2, eps=1e-3),
}  # fmt: skip


def make(name, **fields):
    """A method at a small size; what it needs of rewards is a function."""
    own = {"reward": PatternMatch("e")} if METHODS[name].get("dynamic_sampling") else {}
    own |= {"overlong": OverlongPenalty(buffer=3)} if "overlong" in METHODS[name] else {}
    own |= {"group_size": 4} if METHODS[name].get("group_size", 8) == 8 else {}
    return policy.Config(**METHODS[name] | COMMON | own | fields)


def algorithm_of(config):
    return policy.Algorithm(config, SPEC, eos_id=EOS, pad_id=0)


@pytest.fixture(scope="module")
def params():
    return sharding.unbox(models.init(SPEC, jax.random.key(0)))


@pytest.fixture(scope="module")
def written(params):
    """A rollout by an older policy than the one that learns, with reference log-probs and scores; and the vjp."""
    rng = np.random.default_rng(0)
    lengths = np.array([6, 3, 1, 5, 6, 6, 2, 4])
    tokens = rng.integers(4, 300, (B, P + N)).astype(np.int32)
    mask = np.zeros((B, P + N), bool)
    for i, length in enumerate(lengths):
        mask[i, P : P + length] = True
        if i % 3:
            tokens[i, P + length - 1] = EOS
    tokens[np.arange(B)[:, None].repeat(P + N, 1) < 0] = 0
    prompt = np.arange(P + N) < P

    def logps(params):
        logits = models.logits(SPEC, params, tokens, mask | prompt)[:, P - 1 : -1]
        return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, P:, None], -1)[..., 0] * mask[:, P:]

    now, pull = jax.vjp(jax.jit(logps), params)
    other = [np.asarray(now) + rng.normal(0, size, now.shape) * mask[:, P:] for size in (0.3, 0.5)]
    pad = lambda x: jnp.pad(jnp.asarray(x, jnp.float32), ((0, 0), (P, 0)))  # noqa: E731
    rollout = Rollout(
        tokens=jnp.asarray(tokens), prompt_mask=jnp.asarray(np.broadcast_to(prompt, mask.shape)),
        completion_mask=jnp.asarray(mask), logps=pad(other[0]), ref_logps=pad(other[1]),
        scores=jnp.asarray([1.0, 0, 2.5, -1, 0.5, 0.5, 0.5, 0.5]),
    )  # fmt: skip
    return rollout, np.asarray(now, np.float64), *other, lengths, pull


@pytest.mark.parametrize("name", METHODS)
def test_the_gradient_is_that_of_the_papers_formula(name, written, params):
    rollout, now, old, ref, lengths, pull = written
    algorithm = algorithm_of(config := make(name))
    if name == "remax":
        rollout = rollout.replace(used=jnp.arange(B) % 2 == 1)
    rollout, metrics = algorithm.with_advantages(rollout, kl_coef=jnp.float32(config.kl.coef))
    hyper = {"clip_eps": config.clip_eps, "clip_eps_high": config.clip_eps_high, "kl_coef": config.kl.coef}
    hyper = {key: jnp.float32(value or 0) for key, value in hyper.items()}
    batch = rollout if name != "p3o" else jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:]), rollout)
    loss_fn = algorithm.policy_loss()

    def total(params):
        loss, found = loss_fn(params, batch, hyper, jax.random.key(0))
        return loss.value, found["policy_clipped"].value

    gradient, clipped = jax.jit(jax.grad(total, has_aux=True))(params)
    scores = np.asarray(rollout.scores, np.float64)

    def formula(now):
        rows = [[x[i, : lengths[i]] for i in range(B)] for x in (now, old, ref)]
        return FORMULAS[name](scores, *rows, lengths)

    (wanted,) = pull(jax.jit(jax.grad(formula))(jnp.asarray(now, jnp.float32)))
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 + 1e-4 * float(jnp.abs(b).max()))
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(wanted)) > 1e-3
    assert (clipped > 0) == (config.clip_eps is not None)  # the ratios are far enough for a clip to show
    assert metrics.get("equal_groups", 0) == {1: 0, 2: 0.5, 4: 0.5}[config.group_size]


def test_a_pair_that_was_made_ahead_is_weighed_by_both_of_its_ratios(written, params):
    config = make("p3o", placement=Disaggregated(MeshConfig(), MeshConfig(1), max_weight=2.0))
    algorithm = algorithm_of(config)
    scored = written[0].replace(scores=jnp.asarray([1.0, 0, 2.5, -1, 0.5, 1.5, 3, 0.5]))
    rollout, _ = algorithm.with_advantages(scored, kl_coef=jnp.float32(0.1))
    ratios = np.asarray([2.0, 0.5, 1.5, 1.0, 0.6, 0.8, 2.5, 1.5])  # of the policy before the update to the writer
    fresh = rollout.replace(old_logps=rollout.logps)
    stale = fresh.replace(logps=rollout.logps.at[:, P].add(-jnp.log(ratios)))
    loss_fn, hyper = algorithm.policy_loss(), {"clip_eps": jnp.float32(0.2), "kl_coef": jnp.float32(0.1)}

    def loss(params, rollout):  # 0 where nothing is clipped: what it pushes is its gradient
        return loss_fn(params, jax.tree.map(lambda x: x[None], rollout), hyper, jax.random.key(0))[0].value

    gradient = jax.jit(jax.grad(loss))
    for i, weight in zip(range(0, B, 2), (1.0, 1.5, 0.48, 2.0), strict=True):
        once, again = (gradient(params, jax.tree.map(lambda x, i=i: x[i : i + 2], one)) for one in (fresh, stale))
        for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(again), strict=True):
            np.testing.assert_allclose(b, weight * a, rtol=1e-3, atol=1e-6)
        assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(once)) > 1e-3


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Prompts, and a tokenizer of their words."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    words = ("a", "quiet", "film", "about", "seven", "old", "friends", "who", "never", "meet", "again")
    texts = [" ".join(words[(i // 5 + i * j) % 11] for j in range(1, 6)) for i in range(55)]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return Jsonl(path, heldout=0.1), train_sentencepiece(texts, vocab_size=300)


@pytest.fixture
def context(tmp_path, rows, params):
    def make(name="run", mesh=None):
        mesh = single_device_mesh() if mesh is None else mesh_of(mesh)
        return Context(tmp_path / name, 0, mesh, Pretrained(SPEC, params, rows[1]), rows[0])

    return make


def start(context, config, scorer=None):
    """The stage's algorithm, its iterations, its first state and its batches."""
    tokenizer = context.tokenizer
    algorithm = policy.Algorithm(config, SPEC, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    state = policy.initial_state(algorithm, context, "policy")
    frozen = iterations.frozen(context, policy="base", reward=config.reward)
    run = Whole(algorithm, state, iterations.Places(context, context), frozen, scorer)
    prompts = prompting.load_prompts(config, context, "policy").train
    return algorithm, run, state, frozen, prompting.prompt_batches(prompts, config, context)


def test_learns_and_reports_and_a_stopped_run_ends_where_an_unbroken_one_does(context, rows, monkeypatch, capfd):
    """DAPO's dynamic sampling takes a number of batches that only the rewards know: the cursor has it too."""
    fields = {"data": rows[0], "batch_size": 32, "steps": 8, "dynamic_sampling": 2, "overlong": None, "epochs": 3}
    config = make("dapo", **fields, kl=FixedKL(0.001), optimizer=Optimizer(2e-2))
    whole, broken = context("whole"), context("broken")
    check_resumption(config, whole, broken, monkeypatch, stop_after=3, stage=policy, name="policy")
    lines, other = ([*read_jsonl(made.workdir / "metrics.jsonl")] for made in (whole, broken))
    for line in [*lines, *other]:
        del line["seconds"], line["tokens_per_second"]
    assert lines == other and [line["step"] for line in lines] == list(range(1, 9))
    assert np.mean([line["score_drawn"] for line in lines[-3:]]) > lines[0]["score_drawn"] + 0.2
    assert max(line["draws"] for line in lines) > 1 and all(1 <= line["draws"] <= 3 for line in lines)
    assert all(line["ratio_deviation"] < 1e-5 for line in lines)
    assert {name for line in lines for name in line} - {"stage", "step"} <= LABELS.keys()
    assert "policy: k3 in the loss has the gradient of KL(reference‖policy) instead: biased" in capfd.readouterr().err
    samples = read_jsonl(whole.stage_dir("policy") / "samples.jsonl")
    assert [row["when"] for row in samples] == ["before"] * 4 + ["after"] * 4


def test_groups_of_equal_scores_are_replaced_and_the_rest_not_learnt_from(context, rows):
    config = make("dapo", data=rows[0], dynamic_sampling=2)
    asked = []
    said = [[1, 1, 1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 2, 2, 2, 2], [5, 5, 5, 5, 1, 1, 1, 1]]

    def scorer(texts):
        asked.append(texts)
        return np.asarray(said[(len(asked) - 1) % 3], np.float32)

    _, run, state, _, batches = start(context(), config, scorer)
    state, metrics, rollout = run(state, batches, last=False)
    assert len(asked) == 3 and metrics["draws"] == 3 and metrics["equal_groups"] == 0.5
    assert metrics["score_drawn"] == pytest.approx(np.mean(said))
    assert rollout.used.tolist() == [False] * 4 + [True] * 4 and not np.asarray(rollout.advantages[:4]).any()
    said[:] = [[1, 1, 1, 1, 0, 1, 0, 0], [0, 0, 2, 0, 2, 2, 2, 2], [9] * 8]
    with no_compiling():
        state, metrics, rollout = run(state, batches, last=False)
    assert len(asked) == 5 and metrics["draws"] == 2 and metrics["equal_groups"] == 0
    assert rollout.scores.tolist() == [0, 0, 2, 0, 0, 1, 0, 0] and rollout.group_ids.tolist() == [0] * 4 + [1] * 4
    texts = [text.completion for text in [*asked[4][:4], *asked[3][4:]]]
    decode = start(context(), config, scorer)[1]._context.tokenizer.decode
    mask, tokens = np.asarray(rollout.completion_mask), np.asarray(rollout.tokens)
    assert [decode(row[kept].tolist()) for row, kept in zip(tokens, mask, strict=True)] == texts
    assert asked[3][0].prompt == asked[3][3].prompt != asked[4][0].prompt


def test_groups_that_are_all_equal_move_nothing_and_are_counted(context, rows):
    config = make("grpo", data=rows[0], reward=PatternMatch("e"), kl=FixedKL(0.0), optimizer=Optimizer(1e-2))
    _, run, state, _, batches = start(context(), config, lambda texts: np.full(len(texts), 0.1, np.float32))
    before = jax.device_get(state.policy.params)
    state, metrics, rollout = run(state, batches, last=False)
    assert metrics["equal_groups"] == 1 and float(jnp.abs(rollout.advantages).max()) < 1e-3
    assert all(np.isfinite(float(value)) for value in metrics.values())
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state.policy.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_greedy_completion_is_the_baseline_and_not_learnt_from(context, rows):
    config = make("remax", data=rows[0], reward=PatternMatch("e"))
    algorithm, _, state, frozen, batches = start(context(), config)
    prompts = next(batches)[0]
    np.testing.assert_array_equal(prompts.tokens[::2], prompts.tokens[1::2])
    sample = jax.jit(algorithm.sample)
    one, two = (
        sample(Behaviour(state.policy.params, jax.random.key(i), state.policy.step), frozen, prompts) for i in (1, 2)
    )
    np.testing.assert_array_equal(one.tokens[::2], two.tokens[::2])  # whatever the key
    assert (np.asarray(one.tokens[1::2]) != np.asarray(two.tokens[1::2])).any() and one.used.tolist() == [
        False,
        True,
    ] * 4
    logits = models.logits(SPEC, frozen.policy(state.policy.params), one.tokens, one.mask)[:, P - 1 : -1]
    greedy = np.asarray(logits.argmax(-1))[::2]
    kept = np.asarray(one.completion_mask)[::2, P:]
    np.testing.assert_array_equal(greedy[kept], np.asarray(one.tokens)[::2, P:][kept])


def test_pairs_on_a_mesh_in_microbatches_take_the_iterations_of_one_device(context, rows):
    """P3O: what splits a batch must leave its pairs together."""

    def two_iterations(config, mesh=None):
        made, seen = context(str(mesh), mesh), []
        head = models.init_with_head(SPEC, jax.random.key(3), made.policy_params("base"))
        save_params(made.stage_dir("reward_model") / "params", sharding.unbox(head))
        algorithm, _, state, frozen, batches = start(made, config)
        with sharding.scope(made.mesh):
            step = compiled(algorithm.iteration, state, others=2)
            for _ in range(2):
                state, metrics, rollout = step(state, frozen, sharding.shard_batch(made.mesh, next(batches)[0]))
                seen.append(jax.device_get((metrics, rollout.tokens)))
        return seen, jax.device_get(state.policy.params)

    config = make("p3o", data=rows[0], batch_size=32, epochs=2, kl=AdaptiveKL(0.1, 1.0, 200))
    seen, params = two_iterations(config)
    other_seen, other_params = two_iterations(
        dataclasses.replace(config, num_microbatches=2), MeshConfig(data=2, fsdp=2, tensor=2)
    )
    for (metrics, tokens), (other_metrics, other_tokens) in zip(seen, other_seen, strict=True):
        np.testing.assert_array_equal(tokens, other_tokens)
        for name, value in metrics.items():
            assert other_metrics[name] == pytest.approx(value, abs=1e-4), name
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other_params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


BAD = [
    ("grpo", {"group_size": 1}, "group_size=1: baseline='group', scale='group' compares completions of one prompt: at"),
    ("rloo", {"group_size": 1}, "group_size=1: baseline='leave_one_out'"),
    ("p3o", {"group_size": 1}, "group_size=1: loss='p3o' compares"),
    ("p3o", {"group_size": 3, "batch_size": 12}, "group_size=3 must be even"),
    ("grpo", {"group_size": 3}, "batch_size=8 must divide by group_size=3"),
    ("p3o", {"minibatches": 8}, "batch_size=8 must divide by 2 × minibatches × num_microbatches = 16"),
    ("p3o", {"baseline": "group"}, "loss='p3o' compares scores itself"),
    ("rloo", {"scale": "group"}, "scale='group' goes with baseline='group', not 'leave_one_out'"),
    ("gspo", {"reducer": "token"}, "loss='gspo' is one of whole completions: reducer='sequence'"),
    ("cispo", {"clip_eps_high": None}, "clip_eps_high=None: loss='cispo'"),
    ("grpo", {"clip_eps": None}, "clip_eps=None: loss='ppo_clip' needs a range"),
    ("rloo", {"clip_eps": 0.2}, "clip_eps=0.2: loss='reinforce' has no such range"),
    ("grpo", {"kl_estimator": "k1"}, "kl_estimator='k1' in the loss has an expected gradient of 0"),
    ("grpo", {"overlong": OverlongPenalty(buffer=9)}, "overlong.buffer must be at most completion_tokens=6"),
    ("dapo", {"reward": "reward_model"}, "dynamic_sampling replaces groups of equal scores: it needs"),
    ("dapo", {"placement": Colocated(("reference",))}, r"dynamic_sampling needs placement=Colocated\(\)"),
    ("grpo", {"shaping": Shaping(whiten=True)}, "shaping.whiten is PPO's"),
    ("grpo", {"gamma": 0.9}, "gamma=0.9 is of rewards a token: credit='token', or 1"),
    ("p3o", {"learn_unfinished": False}, "learn_unfinished=False: loss='p3o' learns from pairs"),
    ("grpo", {"learn_unfinished": False, "sampling": Sampling(ends=False)}, "learn_unfinished=False learns from compl"),
    ("trpo", {"stop_at_kl": 0.1}, "stop_at_kl is no part of trust_region's step"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "message"), BAD)
def test_fields_that_do_not_go_together_are_named(name, fields, message):
    with pytest.raises(ValueError, match=message):
        make(name, **fields)


@pytest.mark.parametrize("name", ["sentiment_grpo", "sentiment_rloo", "arithmetic_dapo"])
def test_a_config_is_whole_and_its_methods_fields_are_flags(name, capsys):
    experiment = config.load_config(Path(__file__).parents[2] / "configs" / f"{name}.py")
    config.validate(experiment, 8)
    written = json.loads(json.dumps(config.to_dict(experiment)))
    assert config.from_dict(written, [*inference.MODELS, *run.STAGES]) == experiment
    stage = list(experiment.stages)[-1]
    flags = [f"--stages.{stage}.clip-eps-high", "0.3", f"--stages.{stage}.reducer", "token"]
    if name == "sentiment_rloo":
        with pytest.raises(SystemExit, match="2"):
            config.parse(experiment, flags)
        assert "stages.rloo: clip_eps_high=0.3: loss='reinforce' has no" in capsys.readouterr().err
    else:
        assert config.parse(experiment, flags).stages[stage].clip_eps_high == 0.3
