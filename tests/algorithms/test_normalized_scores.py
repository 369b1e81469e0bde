"""Scores normalised by the moments of all so far: by value, on meshes, over a kill, with every kind of reward."""

import json

import jax
import numpy as np
import pytest

from rlhf_jax import models, sharding
from rlhf_jax.algorithms import iterations, online_preference, policy, ppo, prompting
from rlhf_jax.algorithms.context import Context
from rlhf_jax.algorithms.iterations import Whole
from rlhf_jax.algorithms.onpolicy import SharedTrunk, ValueHead
from rlhf_jax.algorithms.policy_methods import METHODS
from rlhf_jax.algorithms.policy_state import with_scores
from rlhf_jax.algorithms.replay import Replay
from rlhf_jax.algorithms.truncation import Truncation
from rlhf_jax.checkpoint import save_params
from rlhf_jax.data.sources import Jsonl
from rlhf_jax.interop.pretrained import Pretrained
from rlhf_jax.interop.tokenizers import train_sentencepiece
from rlhf_jax.kl import FixedKL
from rlhf_jax.metrics import read_jsonl
from rlhf_jax.models import ModelSpec
from rlhf_jax.normalizer import Moments
from rlhf_jax.optim import Optimizer
from rlhf_jax.placement import Disaggregated
from rlhf_jax.report.labels import LABELS
from rlhf_jax.rewards.shaping import EosPenalty, OverlongPenalty, Shaping
from rlhf_jax.rewards.verifiers import PatternMatch
from rlhf_jax.sharding import MeshConfig, single_device_mesh
from rlhf_jax.types import Rollout
from tests.algorithms.stopping import check_resumption
from tests.meshes import mesh_of

pytestmark = pytest.mark.usefixtures("compile_quickly")

SPEC = ModelSpec(vocab_size=300, d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=32, max_len=16)
SMOOTH = Optimizer(learning_rate=1e-2, eps=1e-3)  # else Adam makes steps of what is rounding
COMMON = {
    "policy": "base", "steps": 4, "batch_size": 16, "prompt_tokens": (1, 4), "too_long": "start", "epochs": 1,
    "minibatches": 1, "completion_tokens": 6, "evaluation_prompts": 4, "exact_kl_rows": 4, "checkpoint_every": 2,
    "optimizer": SMOOTH, "kl": FixedKL(0.0),
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Prompts, and a tokenizer of their words."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    words = ("a", "quiet", "film", "about", "seven", "old", "friends", "who", "never", "meet", "again")
    texts = [" ".join(words[(i // 5 + i * j) % 11] for j in range(1, 6)) for i in range(55)]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return Jsonl(path, heldout=0.1), train_sentencepiece(texts, vocab_size=300)


@pytest.fixture
def context(tmp_path, rows):
    """Contexts, with a reward model whose scores are far from mean 0 and variance 1."""

    def make(name="run", mesh=None):
        mesh = single_device_mesh() if mesh is None else mesh
        params = sharding.unbox(models.init(SPEC, jax.random.key(0)))
        made = Context(tmp_path / name, 0, mesh, Pretrained(SPEC, params, rows[1]), rows[0])
        network = sharding.unbox(models.init_with_head(SPEC, jax.random.key(3), made.policy_params("base")))
        network["head"]["kernel"] *= 5
        network["head"]["bias"] += 20
        save_params(made.stage_dir("rm") / "params", network)
        return made

    return make


def make(name, rows, **fields):
    """A stage's module and its config: PPO, online DPO, or a method of the policy stage."""
    fields = {**COMMON, "data": rows[0], **fields}
    if name == "ppo":
        return ppo, ppo.Config(**{"critic": SharedTrunk(), **fields})
    if name == "online_preference":
        return online_preference, online_preference.Config(**{**fields, "kl": FixedKL(0.1)})
    return policy, policy.Config(**METHODS[name] | fields)


def iterated(context, stage, config, count, scorer=None):
    """Raw scores, which of them were the policy's own, rewards, metrics and states of some iterations."""
    tokenizer, places = context.tokenizer, iterations.places(config.placement, context)
    algorithm = stage.Algorithm(config, SPEC, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    state = stage.initial_state(algorithm, places.training, "stage")
    frozen = algorithm.frozen(places.sampling, "stage")
    run = (Whole if places.training is places.sampling else iterations.Phases)(algorithm, state, places, frozen, scorer)
    batches = prompting.prompt_batches(prompting.load_prompts(config, context, "stage").train, config, context)
    held, seen = run.first(state, batches), []
    for i in range(count):
        held, metrics, rollout = run(held, batches, last=i == count - 1)
        inner = held.state if isinstance(held, iterations.Ahead) else held
        seen.append(jax.device_get((rollout, metrics, inner.moments)))
    return seen


def test_scores_that_are_not_finite_are_no_part_of_the_moments():
    """One row's would make every later iteration's so."""
    empty = np.zeros((4, 2), bool)
    rows = Rollout(np.zeros((4, 2), np.int32), empty, empty, scores=np.float32([1, np.nan, 3, np.inf]))
    moments, metrics = with_scores(Moments(), rows)
    assert (moments.count, metrics["running_mean"], metrics["running_std"]) == (2, 2, 1)
    moments, _ = with_scores(Moments(), rows.replace(used=np.array([False, True, True, True])))
    assert (moments.count, moments.mean) == (1, 3)


def normalised(drawn, how, own=slice(None)):
    """NumPy's, in float64: each iteration's scores by the moments of all up to it."""
    found, so_far = [], []
    for scores in np.asarray(drawn, np.float64):
        so_far.extend(scores[own])
        found.append((scores - np.mean(so_far) * (how == "mean_std")) / np.std(so_far))
    return found, np.mean(so_far), np.std(so_far)


@pytest.mark.parametrize(
    ("how", "name", "own"), [("std", "rloo", slice(None)), ("mean_std", "remax", slice(1, None, 2))]
)
def test_rewards_are_those_of_all_scores_so_far_of_completions_that_are_learnt_from(how, name, own, context, rows):
    """A function's scores, of another unit in each iteration; ReMax's greedy completions are a baseline alone."""
    drawn = [np.random.default_rng(i).normal(10 * i, 1 + i, 16).astype(np.float32) for i in range(3)]
    said = iter(drawn)
    stage, config = make(name, rows, reward=PatternMatch("e"), shaping=Shaping(normalize=how))
    seen = iterated(context(), stage, config, 3, lambda texts: next(said))
    expected, mean, std = normalised(drawn, how, own)
    for (rollout, metrics, moments), scores in zip(seen, expected, strict=True):
        np.testing.assert_allclose(rollout.rewards.sum(-1), scores, rtol=2e-5, atol=2e-5)
        assert metrics["reward"] == pytest.approx(scores[own].mean(), abs=2e-5)
        assert (metrics["running_mean"], moments.count % len(scores[own])) == (moments.mean, 0)
    assert (moments.count, metrics["running_mean"], metrics["running_std"]) == (
        3 * len(scores[own]),
        pytest.approx(mean, rel=1e-5),
        pytest.approx(std, rel=1e-5),
    )


def test_older_rollouts_are_read_anew_on_the_scale_of_the_day_and_counted_once(context, rows):
    drawn = [np.random.default_rng(i).normal(3 * i, 1 + i, 16).astype(np.float32) for i in range(3)]
    said = iter(drawn)
    fields = {"critic": ValueHead("base"), "replay": Replay(1), "reward": PatternMatch("e"), "gamma": 1.0, "lam": 1.0}
    shaping, before = Shaping(normalize="mean_std", clip=1.5), []
    stage, config = make("ppo", rows, **fields, shaping=shaping, whiten_advantages=False)

    class Seen(ppo.Algorithm):
        def with_advantages(self, rollout, **given):
            jax.debug.callback(lambda *x: before.append(x), self.shaped(rollout, given["moments"]), rollout.used)
            return super().with_advantages(rollout, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "Algorithm", Seen)
        seen = iterated(context(), stage, config, 3, lambda texts: next(said))
    expected, *_ = normalised(drawn, "mean_std")
    for i, ((rollout, *_), (shaped, used)) in enumerate(zip(seen, before, strict=True)):
        np.testing.assert_allclose(rollout.rewards.sum(-1), np.clip(expected[i], -1.5, 1.5), atol=2e-5)
        assert np.asarray(used).tolist() == [True] * 16 + [i > 0] * 16
        if i:
            so_far = np.concatenate(drawn[: i + 1]).astype(np.float64)
            again = np.clip((drawn[i - 1] - so_far.mean()) / so_far.std(), -1.5, 1.5)
            np.testing.assert_allclose(shaped[16:], again, atol=2e-5)
    assert [moments.count for *_, moments in seen] == [16, 32, 48]


@pytest.mark.parametrize("name", ["ppo", "rloo"])
def test_a_networks_scores_are_the_same_on_a_mesh(name, context, rows):
    stage, config = make(name, rows, reward="rm", shaping=Shaping(normalize="mean_std"))
    one = iterated(context("one"), stage, config, 3)
    other = iterated(context("other", mesh_of(MeshConfig(data=2, fsdp=2, tensor=2))), stage, config, 3)
    expected, mean, std = normalised([rollout.scores for rollout, *_ in one], "mean_std")
    assert abs(mean) > 5 and not 0.5 < std < 2  # else nothing would be seen
    for (rollout, metrics, _), (same, same_metrics, _), scores in zip(one, other, expected, strict=True):
        np.testing.assert_allclose(rollout.rewards.sum(-1), scores, atol=1e-4)
        np.testing.assert_array_equal(rollout.tokens, same.tokens)
        np.testing.assert_allclose(rollout.rewards, same.rewards, atol=1e-4)
        for metric, value in metrics.items():
            assert same_metrics[metric] == pytest.approx(value, abs=1e-4), metric


def test_a_pairs_reference_completions_are_no_part_of_the_moments(context, rows):
    drawn = [np.random.default_rng(i).normal(4, 3, 16).astype(np.float32) for i in range(2)]
    said = iter(drawn)
    shaping = Shaping(normalize="mean_std", clip=1.0)
    fields = {"second": "reference", "reward": PatternMatch("e"), "shaping": shaping}
    stage, config = make("online_preference", rows, **fields)
    seen = iterated(context(), stage, config, 2, lambda texts: next(said))
    expected, *_ = normalised(drawn, "mean_std", slice(None, None, 2))
    for (rollout, *_), scores in zip(seen, expected, strict=True):
        np.testing.assert_allclose(rollout.scores, np.clip(scores, -1, 1), atol=2e-5)


def test_rollouts_made_ahead_are_counted_when_they_are_learnt_from(context, rows):
    placement = Disaggregated(sampling=MeshConfig(data=1, tensor=2), training=MeshConfig(data=-1, fsdp=2), ahead=1)
    fields = {"critic": ValueHead("base"), "reward": "rm", "placement": placement}
    stage, config = make("ppo", rows, **fields, shaping=Shaping(normalize="std"))
    seen = iterated(context(mesh=sharding.make_mesh(MeshConfig(), jax.devices()[:6])), stage, config, 3)
    expected, *_ = normalised([rollout.scores for rollout, *_ in seen], "std")
    for (rollout, _, moments), scores, count in zip(seen, expected, (16, 32, 48), strict=True):
        np.testing.assert_allclose(rollout.rewards.sum(-1), scores, atol=1e-4)
        assert moments.count == count


@pytest.mark.parametrize(("name", "reward"), [("ppo", "rm"), ("rloo", PatternMatch("e"))])
def test_a_stopped_run_goes_on_with_its_moments(name, reward, context, rows, monkeypatch):
    """They are in the checkpoint: begun anew, the third iteration's rewards, and the parameters, would be others."""
    stage, config = make(name, rows, reward=reward, shaping=Shaping(normalize="mean_std"))
    whole, broken = context("whole"), context("broken")
    check_resumption(config, whole, broken, monkeypatch, stop_after=3, stage=stage, name="policy")
    lines, other = ([*read_jsonl(made.workdir / "metrics.jsonl")] for made in (whole, broken))
    for line in [*lines, *other]:
        del line["seconds"], line["tokens_per_second"]
    assert lines == other and lines[-1]["running_mean"] != lines[1]["running_mean"]
    assert {name for line in lines for name in line} - {"stage", "step"} <= LABELS.keys()


FINE = [
    ("rloo", {}),
    ("grpo", {"kl_in": "reward", "kl_estimator": "k1", "kl": FixedKL(0.1)}),
    ("grpo", {"overlong": OverlongPenalty(2)}),
    ("grpo", {"truncate": Truncation(".", after=2)}),
    ("grpo", {"shaping": Shaping(normalize="std", eos_penalty=EosPenalty())}),
    ("online_preference", {"shaping": Shaping(normalize="std", clip=1.0)}),
]


def test_what_would_change_nothing_is_refused(rows):
    given = {"reward": "rm", "shaping": Shaping(normalize="mean_std")}
    for name, fields in FINE:
        make(name, rows, **given | fields)
    with pytest.raises(ValueError, match=r"shaping.normalize='mean_std': scale='group' divides .*: 'none'$"):
        make("grpo", rows, **given)
    with pytest.raises(ValueError, match=r"shaping.normalize='mean_std': scale='batch' divides"):
        make("reinforce_plus_plus", rows, **given)  # there is no price on KL
    with pytest.raises(ValueError, match=r"shaping.normalize='mean_std' leaves the order of scores .*: 'none'$"):
        make("online_preference", rows, **given)
