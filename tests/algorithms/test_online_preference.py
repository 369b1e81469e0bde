"""Online DPO, IPO and XPO: gradients against the papers' formulas, ties, who writes what, judges, kills, meshes."""

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import inference, models, run, sharding
from rlhf_jax.algorithms import iterations, online_preference, policy, ppo, prompting
from rlhf_jax.algorithms.best_of_n import Config as BestOfN
from rlhf_jax.algorithms.context import Context
from rlhf_jax.algorithms.iterations import Whole
from rlhf_jax.algorithms.online_preference import METHODS, Config
from rlhf_jax.algorithms.preference_losses import Term
from rlhf_jax.algorithms.truncation import Truncation
from rlhf_jax.checkpoint import save_params
from rlhf_jax.config import Experiment, from_dict, to_dict, validate
from rlhf_jax.data.sources import Jsonl
from rlhf_jax.errors import UserError
from rlhf_jax.interop.pretrained import Bundled, Pretrained
from rlhf_jax.interop.tokenizers import train_sentencepiece
from rlhf_jax.kl import AdaptiveKL, FixedKL
from rlhf_jax.metrics import read_jsonl
from rlhf_jax.models import ModelSpec
from rlhf_jax.optim import Optimizer
from rlhf_jax.placement import Colocated
from rlhf_jax.report.labels import LABELS
from rlhf_jax.rewards.endpoint import Endpoint
from rlhf_jax.rewards.group_judge import GroupJudge, JudgeReward
from rlhf_jax.rewards.host import Texts
from rlhf_jax.rewards.judging import EndpointJudge, LocalJudge, Pair, Said
from rlhf_jax.rewards.local_judge import local_judge
from rlhf_jax.rewards.shaping import Shaping
from rlhf_jax.rewards.verifiers import PatternMatch
from rlhf_jax.sharding import MeshConfig, single_device_mesh
from rlhf_jax.train_step import compiled
from rlhf_jax.types import Rollout
from tests.algorithms.stopping import check_resumption
from tests.meshes import mesh_of
from tests.rewards.serving import Server

pytestmark = pytest.mark.usefixtures("compile_quickly")

SPEC = ModelSpec(vocab_size=320, d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=32, max_len=128)
P, N, B = 5, 6, 8  # columns of a prompt, tokens of a completion, completions
COMMON = {
    "policy": "base", "steps": 4, "batch_size": B, "prompt_tokens": (1, P - 1), "too_long": "start",
    "completion_tokens": N, "evaluation_prompts": 4, "exact_kl_rows": 4, "checkpoint_every": 2,
    "optimizer": Optimizer(learning_rate=1e-2, eps=1e-3),
}  # fmt: skip
TEMPLATE = "{principle}<{prompt}|{first}|{second}>"
BETA, ALPHA = 0.3, 0.05


def make(name="online_dpo", **fields):
    return Config(**METHODS[name] | COMMON | fields)


def algorithm_of(config):
    return online_preference.Algorithm(config, SPEC, eos_id=3, pad_id=0)


@pytest.fixture(scope="module")
def params():
    return sharding.unbox(models.init(SPEC, jax.random.key(0)))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Prompts, and a tokenizer of their words."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    words = ("a", "quiet", "film", "about", "seven", "old", "friends", "who", "never", "meet", "again")
    texts = [" ".join(words[(i // 5 + i * j) % 11] for j in range(1, 6)) for i in range(55)]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return Jsonl(path, heldout=0.1), train_sentencepiece([*texts, *["Answer: A", "Answer: B"] * 20], vocab_size=320)


@pytest.fixture
def context(tmp_path, rows, params):
    def make(name="run", mesh=None):
        mesh = single_device_mesh() if mesh is None else mesh_of(mesh)
        made = Context(tmp_path / name, 0, mesh, Pretrained(SPEC, params, rows[1]), rows[0])
        head = models.init_with_head(SPEC, jax.random.key(3), made.policy_params("base"))
        save_params(made.stage_dir("reward_model") / "params", sharding.unbox(head))
        return made

    return make


def start(context, config, scorer=None):
    """The stage's algorithm, its iterations, its first state, what is frozen, and its batches."""
    tokenizer = context.tokenizer
    algorithm = online_preference.Algorithm(config, SPEC, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    state = online_preference.initial_state(algorithm, context, "online")
    frozen = iterations.frozen(context, policy="base", reward=config.reward)
    run = Whole(algorithm, state, iterations.Places(context, context), frozen, scorer)
    prompts = prompting.load_prompts(config, context, "online").train
    return algorithm, run, state, frozen, prompting.prompt_batches(prompts, config, context)


@pytest.fixture(scope="module")
def written(params):
    """A scored rollout of eight completions, the sums of their log-probs now, and the vjp of these."""
    rng = np.random.default_rng(0)
    lengths = np.array([6, 3, 1, 5, 6, 6, 2, 4])
    tokens, place = rng.integers(4, 300, (B, P + N)).astype(np.int32), np.arange(P + N)
    mask, prompt = (place >= P) & (place < P + lengths[:, None]), place < P

    def logps(params):
        logits = models.logits(SPEC, params, tokens, mask | prompt)[:, P - 1 : -1]
        return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, P:, None], -1)[..., 0] * mask[:, P:]

    now, pull = jax.vjp(jax.jit(logps), params)
    ref = np.asarray(now) + rng.normal(0, 0.5, now.shape) * mask[:, P:]
    pad = lambda x: jnp.pad(jnp.asarray(x, jnp.float32), ((0, 0), (P, 0)))  # noqa: E731
    rollout = Rollout(
        tokens=jnp.asarray(tokens), prompt_mask=jnp.asarray(np.broadcast_to(prompt, mask.shape)),
        completion_mask=jnp.asarray(mask), logps=pad(now), ref_logps=pad(ref),
        scores=jnp.asarray([1.0, 0, 0.5, 0.5, -1, 2.5, 0.1, -0.2]),
    )  # fmt: skip
    return rollout, now, ref.sum(-1), pull


def dpo(chosen, rejected):
    """Guo et al. 2024, section 3, with Rafailov et al. 2023, eq. 7."""
    return jnp.log1p(jnp.exp(-BETA * (chosen - rejected)))


def ipo(chosen, rejected):
    """Azar et al. 2023, eq. 17."""
    return (chosen - rejected - 1 / (2 * BETA)) ** 2


PAIRS = {2: [(0, 1), (5, 4), (6, 7)], 4: [(0, 1), (5, 4)]}  # (best, worst) by the scores above; 2 and 3 are a tie


@pytest.mark.parametrize(
    ("name", "fields", "loss"),
    [
        ("online_dpo", {}, dpo),
        ("online_ipo", {}, ipo),
        ("online_dpo", {"group_size": 4}, dpo),
        ("online_dpo", {"losses": (Term("dpo"), Term("ipo", weight=0.1, beta=BETA))}, lambda w, l: dpo(w, l) + 0.1 * ipo(w, l)),  # noqa: E501, E741
        ("xpo", {"optimism": ALPHA}, dpo),
    ],
)  # fmt: skip
def test_the_gradient_is_that_of_the_papers_formula(name, fields, loss, written, params):
    rollout, now, ref, pull = written
    algorithm = algorithm_of(config := make(name, kl=FixedKL(BETA), **fields))
    rollout, metrics = algorithm.with_advantages(rollout, kl_coef=jnp.float32(BETA))
    hyper = {"kl_coef": jnp.float32(BETA), "optimism": jnp.float32(config.optimism)}
    loss_fn, batch = algorithm.policy_loss(), algorithm.units(rollout)

    def total(params):
        loss, found = loss_fn(params, batch, hyper, jax.random.key(0))
        return loss.value, found

    gradient, found = jax.jit(jax.grad(total, has_aux=True))(params)
    pairs = PAIRS[config.group_size]

    def formula(now):
        sums = now.sum(-1)
        each = [loss(sums[w] - ref[w], sums[l] - ref[l]) for w, l in pairs]  # noqa: E741
        return sum(each) / len(pairs) + config.optimism * sum(sums[max(pair)] for pair in pairs) / len(pairs)

    (wanted,) = pull(jax.jit(jax.grad(formula))(now))
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 + 1e-4 * float(jnp.abs(b).max()))
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(wanted)) > 1e-3
    assert metrics["equal_groups"] == {2: 0.25, 4: 0}[config.group_size]
    margins = [BETA * float((now[w].sum() - ref[w]) - (now[l].sum() - ref[l])) for w, l in pairs]  # noqa: E741
    assert found["margin"].value == pytest.approx(np.mean(margins), abs=1e-5)
    assert found["accuracy"].value == pytest.approx(np.mean(np.greater(margins, 0)))


def test_completions_that_are_all_equally_good_move_nothing(context, rows):
    config = make(data=rows[0], reward=PatternMatch("e"), losses=(Term("ipo"),), epochs=2)
    _, run, state, _, batches = start(context(), config, lambda texts: np.full(len(texts), 0.1, np.float32))
    before = jax.device_get(state.policy.params)
    state, metrics, _ = run(state, batches, last=False)
    assert metrics["equal_groups"] == 1 and metrics["policy_loss"] == 0 and metrics["grad_norm"] == 0
    assert all(np.isfinite(float(value)) for value in metrics.values())
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.policy.params))


def test_the_reference_writes_the_second_of_each_pair_of_xpo(context, rows):
    """Its log-probs are those of the reference's sampler; what is reported of completions is of the policy's alone."""
    made = context()
    config = make("xpo", data=rows[0], reward="reward_model")
    algorithm, _, state, frozen, batches = start(made, config)
    other = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(7), x.shape), state.policy.params)
    writer = iterations.behaviour(dataclasses.replace(state.policy, params=other))
    prompts = next(batches)[0]
    np.testing.assert_array_equal(prompts.tokens[::2], prompts.tokens[1::2])
    rollout = jax.jit(algorithm.sample)(writer, frozen, prompts)
    scored, metrics = jax.jit(algorithm.score)(other, frozen, rollout)
    sampled, policy, reference = (np.asarray(x.logps if i < 2 else x.ref_logps) for i, x in
                                  enumerate((rollout, scored, scored)))  # fmt: skip
    np.testing.assert_allclose(sampled[::2], policy[::2], atol=1e-5)
    np.testing.assert_allclose(sampled[1::2], reference[1::2], atol=1e-5)
    assert np.abs(sampled[1::2] - policy[1::2]).max() > 0.1 and metrics["sampling_deviation"] < 1e-4
    assert metrics["seq_kl"] == pytest.approx((policy - reference)[::2].sum(-1).mean(), abs=1e-4)
    assert metrics["score"] == pytest.approx(np.asarray(scored.scores)[::2].mean(), abs=1e-5)
    assert state.policy.hyper["optimism"] == np.float32(1e-5)  # α, which METHODS["xpo"] sets
    assert config.own_rows == slice(None, None, 2) and make(data=rows[0]).own_rows == slice(None)
    _, fine = algorithm.with_advantages(scored, kl_coef=jax.numpy.float32(0.1))
    bad = scored.replace(scores=scored.scores.at[1].set(np.nan))  # the reference's, which no other metric reads
    _, told = algorithm.with_advantages(bad, kl_coef=jax.numpy.float32(0.1))
    assert np.isfinite(fine["equal_groups"]) and np.isnan(told["equal_groups"])


def test_learns_and_reports_and_a_stopped_run_ends_where_an_unbroken_one_does(context, rows, monkeypatch):
    fields = {"data": rows[0], "batch_size": 32, "steps": 8, "group_size": 4, "minibatches": 2, "epochs": 2}
    config = make(**fields, reward=PatternMatch("e"), kl=AdaptiveKL(0.05, 1.0, 200), optimizer=Optimizer(3e-2))
    whole, broken = context("whole"), context("broken")
    check_resumption(config, whole, broken, monkeypatch, stop_after=3, stage=online_preference, name="online")
    lines, other = ([*read_jsonl(made.workdir / "metrics.jsonl")] for made in (whole, broken))
    for line in [*lines, *other]:
        del line["seconds"], line["tokens_per_second"]
    assert lines == other and [line["step"] for line in lines] == list(range(1, 9))
    assert np.mean([line["score"] for line in lines[-3:]]) > lines[0]["score"] + 0.15
    assert lines[0]["kl_coef"] != lines[-1]["kl_coef"] and lines[0]["ratio_deviation"] < 1e-5
    assert {name for line in lines for name in line} - {"stage", "step"} <= LABELS.keys()
    tied = online_preference.tied_groups(config, whole, "online")
    assert tied == round(8 * sum(line["equal_groups"] for line in lines)) > 0


def test_a_mesh_in_microbatches_takes_the_iterations_of_one_device(context, rows):
    def two_iterations(config, mesh=None):
        made, seen = context(str(mesh), mesh), []
        algorithm, _, state, frozen, batches = start(made, config)
        with sharding.scope(made.mesh):
            step = compiled(algorithm.iteration, state, others=2)
            for _ in range(2):
                state, metrics, rollout = step(state, frozen, sharding.shard_batch(made.mesh, next(batches)[0]))
                seen.append(jax.device_get((metrics, rollout.tokens)))
        return seen, jax.device_get(state.policy.params)

    config = make("xpo", data=rows[0], batch_size=32, epochs=2, optimism=0.01)
    seen, params = two_iterations(config)
    other_seen, other_params = two_iterations(
        dataclasses.replace(config, num_microbatches=2), MeshConfig(data=2, fsdp=2, tensor=2)
    )
    for (metrics, tokens), (other_metrics, other_tokens) in zip(seen, other_seen, strict=True):
        np.testing.assert_array_equal(tokens, other_tokens)
        for name, value in metrics.items():
            assert other_metrics[name] == pytest.approx(value, abs=1e-4), name
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), params, other_params)


def test_a_judge_scores_a_completion_by_all_others_of_its_group():
    """P(first) of each pair is that of both orders; what it says of no letter counts a half."""
    values = {"good": 3.0, "fair": 1.0, "bad": 0.0, "mute": 0.0}
    asked = []

    def ask(pairs):
        asked.extend(pair.question(TEMPLATE) for pair in pairs)
        gaps = [values[pair.first] - values[pair.second] for pair in pairs]
        likes_a = [1 / (1 + math.exp(-gap - 1)) for gap in gaps]  # it minds the order
        return [
            Said(None if "mute" in (pair.first, pair.second) else p, is_cut="good" in (pair.first, pair.second))
            for pair, p in zip(pairs, likes_a, strict=True)
        ]

    judge = GroupJudge(JudgeReward(LocalJudge(template=TEMPLATE), principle="fine?"), ask, size=3)
    rows = [Texts("p", text, {}) for text in ("bad", "good", "fair", "mute", "fair", "bad")]
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731

    def better(a, b):
        gap = values[a] - values[b]
        return 0.5 if "mute" in (a, b) else (sigmoid(gap + 1) + sigmoid(gap - 1)) / 2

    wanted = []
    for group in (("bad", "good", "fair"), ("mute", "fair", "bad")):
        wanted += [np.mean([better(a, b) for b in group if b != a]) for a in group]
    np.testing.assert_allclose(judge(rows), wanted, atol=1e-6)
    assert len(asked) == 12 and asked[:2] == ["fine?<p|bad|good>", "fine?<p|good|bad>"]
    assert judge.metrics() == {"judge_unread": 4 / 12, "judge_cut": 4 / 12} and judge.metrics() == {}
    same = [Texts("p", text, {}) for text in ("fair", "fair", "mute")]  # the first two are not asked about
    np.testing.assert_allclose(judge(same), [0.5, 0.5, 0.5])
    assert len(asked) == 16 and judge.metrics() == {"judge_unread": 1, "judge_cut": 0}


def served(body):
    """An endpoint that prefers the completion with more letters e: of each question P(A) is 0.9 or 0.1, or a half."""
    _, first, second = re.search(r"<(.*)\|(.*)\|(.*)>", body["messages"][0]["content"], re.DOTALL).groups()
    lead = first.count("e") - second.count("e")
    p = 0.5 + 0.4 * np.sign(lead)
    tops = [{"token": "A", "logprob": math.log(p)}, {"token": "B", "logprob": math.log(1 - p)}]
    choice = {"message": {"content": "A"}, "logprobs": {"content": [{"token": "A", "top_logprobs": tops}]}}
    return {"choices": [choice], "usage": {"prompt_tokens": 20, "completion_tokens": 1}}


def test_an_endpoint_judges_pairs_and_goes_away_and_the_run_goes_on(context, rows):
    """OAIF: the judge's answers before it went away are not asked for again."""
    fields = {"data": rows[0], "batch_size": 16, "steps": 6, "optimizer": Optimizer(2e-2), "kl": FixedKL(0.05)}

    def trained(server, made):
        endpoint = Endpoint(server.url, "judge-1", retries=0, parallel=1)
        config = make(**fields, reward=JudgeReward(EndpointJudge(endpoint, template=TEMPLATE)))
        return online_preference.train(config, made, "online")

    with Server(*[served] * 40, (503, "down")) as server:
        with pytest.raises(UserError, match=r"answers 503: down, 1 times in a row.*the same command goes on"):
            trained(server, context("broken"))
        refused = len(server.asked) - 40
        server.script[:] = [served]
        figures = trained(server, context("broken"))
        bodies = [json.dumps(body) for _, _, body in server.asked]
        assert len(bodies) - refused == len(set(bodies)) == figures["judge_requests"]
    samples = read_jsonl(context("broken").stage_dir("online") / "samples.jsonl")
    lines = [line["completion"].count("e") for line in samples]
    leads = np.subtract(lines[4:], lines[:4])  # the same prompts, after and before
    assert figures["win_rate"] == pytest.approx(np.mean(0.5 + 0.4 * np.sign(leads)), abs=1e-6)
    assert 0.1 <= figures["win_rate_low"] <= figures["win_rate"] <= figures["win_rate_high"] <= 0.9
    assert figures["pairs_tied"] > 0 and "score_after" not in figures
    assert figures.keys() - {"steps"} <= {f"{name}{when}" for name in LABELS for when in ("", "_before", "_after")}


def test_a_model_of_the_run_judges_and_a_group_method_may_learn_from_it(context, rows):
    """GRPO of four completions a prompt, whose scores are win rates: each pair's two add up to one."""
    judge = JudgeReward(LocalJudge("base", template=TEMPLATE, length=100, batch_size=8))
    config = policy.Config(**COMMON, group_size=4, data=rows[0], reward=judge)
    figures = policy.train(dataclasses.replace(config, steps=1), context(), "grpo")
    assert 0 < figures["win_rate"] < 1
    [line] = read_jsonl(context().workdir / "metrics.jsonl")
    assert line["score"] == pytest.approx(0.5, abs=1e-6)
    assert line["judge_unread"] == figures["judge_unread"] == 0 and line["judge_cut"] == figures["judge_cut"] == 0


def test_a_question_that_is_too_long_loses_the_start_of_its_prompt_and_stops_no_run(params, rows):
    """What is judged then is the question about the prompt's end; without any prompt too long, it is not read."""
    tokenizer, mesh = rows[1], single_device_mesh()
    judges = [
        local_judge(LocalJudge("base", TEMPLATE, length, 2), SPEC, mesh, tokenizer, params) for length in (60, 100)
    ]
    words = " ".join(["a quiet film about seven old friends"] * 6)
    whole = Pair("fine?", words, "never meet", "meet again")
    bare = len(tokenizer.encode(whole._replace(prompt="").question(TEMPLATE) + "\n\nAnswer:")) + 1
    [cut] = judges[0]([whole])
    kept = tokenizer.encode(words)[-(60 - bare) :]
    wanted = [judges[1]([whole._replace(prompt=tokenizer.decode(kept[i:]))])[0] for i in range(4)]
    assert cut.is_cut and not wanted[0].is_cut and any(cut.a == pytest.approx(one.a, abs=1e-6) for one in wanted)
    long = whole._replace(first=words, second=words)
    assert judges[0]([long, whole, long]) == [Said(None, True), cut, Said(None, True)]


def test_what_a_tokenizer_lacks_is_told_before_a_stage_begins(rows):
    """By the run, once the model is there: a letter, a full stop, room for two whole completions."""
    tokenizer, questions = rows[1], JudgeReward(LocalJudge("base", TEMPLATE, length=30))
    make(reward=JudgeReward(LocalJudge("base", TEMPLATE, length=100))).check_tokenizer(tokenizer)
    asked = len(tokenizer.encode(f"{questions.principle}<||>\n\nAnswer:")) + 1
    short = (
        rf"^stages.online.reward.judge.length=30 must hold a question of {asked} tokens.*: at least {asked + 2 * N}$"
    )
    told = {
        short: make(reward=questions),
        r"^stages.online.truncate.at: no token of the vocabulary is 'ß!'$": make(truncate=Truncation("ß!", after=2)),
    }
    for message, stage in told.items():
        whole = Experiment(model=Bundled(), data=rows[0], stages={"online": stage})
        with pytest.raises(UserError, match=message):
            run.check_tokenizer(whole, tokenizer)
    plain = train_sentencepiece(["ab ba"] * 40, vocab_size=264)
    with pytest.raises(UserError, match=r"^reward.judge: the tokenizer has no token of its own for the answer 'A'"):
        make(reward=questions).check_tokenizer(plain)


BAD = [
    ({"group_size": 1}, "group_size"),
    ({"group_size": 3}, "batch_size=8 must divide by group_size × minibatches × num_microbatches = 3 × 1 × 1"),
    ({"minibatches": 8}, "batch_size=8 must divide by group_size × minibatches × num_microbatches = 2 × 8 × 1"),
    ({"losses": ()}, "losses: at least one, and each once, got none"),
    ({"losses": (Term("dpo"), Term("dpo"))}, "losses: at least one, and each once, got dpo, dpo"),
    ({"losses": (Term("kto"),)}, "losses: each must be one of single pairs, which kto, bco, aot"),
    ({"losses": (Term("aot"),)}, "losses: each must be one of single pairs"),
    ({"group_size": 4, "optimism": 0.1}, "group_size=4: second='reference' and optimism are of pairs"),
    ({"second": "reference", "placement": Colocated(("reference",))}, "second='reference' needs placement=Colocated"),
    ({"kl": FixedKL(0.0)}, "kl.coef=0.0 is the losses' β: it must be over 0"),
    (
        {"kl": AdaptiveKL(0.05, 1.0, 200), "losses": (Term("dpo", beta=0.2),)},
        "kl: AdaptiveKL moves the losses' β, and each of losses has its own or none: FixedKL, or beta=None",
    ),
    ({"gamma": 0.9}, "gamma=0.9 is of rewards a token"),
    ({"shaping": Shaping(whiten=True)}, "shaping.whiten is PPO's"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_fields_that_do_not_go_together_are_named(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**fields)


@pytest.mark.parametrize("config", [ppo.Config, BestOfN])
def test_a_judge_is_refused_where_one_completion_is_scored(config):
    with pytest.raises(ValueError, match="reward: a judge compares completions of one prompt"):
        config(reward=JudgeReward())


def test_a_config_with_a_judge_is_read_back_and_its_model_must_be_there():
    stage = make("xpo", data=Jsonl("rows.jsonl"), reward=JudgeReward(LocalJudge("tutor", length=4000)))
    whole = Experiment(model=Bundled(), data=Jsonl("rows.jsonl"), stages={"online": stage})
    assert from_dict(to_dict(whole), [*inference.MODELS, *run.STAGES]) == whole
    with pytest.raises(UserError, match=r"stages.online.reward.judge.model: there is no stage 'tutor'"):
        validate(whole, 1)
    base = dataclasses.replace(stage, reward=JudgeReward(LocalJudge("base", length=4000)))
    with pytest.raises(UserError, match=r"stages.online.reward.judge.length: 4000 tokens, more than the model's cont"):
        validate(dataclasses.replace(whole, stages={"online": base}), 1)
