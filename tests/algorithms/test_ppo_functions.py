"""PPO on rows of a file with rewards that are functions of texts: the same iterations as with a network."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.algorithms import iterations, onpolicy, ppo, prompting
from rlhf_jax.algorithms.onpolicy import ValueHead
from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.data.sources import Jsonl
from rlhf_jax.errors import UserError
from rlhf_jax.kl import FixedKL
from rlhf_jax.metrics import read_jsonl
from rlhf_jax.optim import Optimizer
from rlhf_jax.rewards.combined import Combined, Part
from rlhf_jax.rewards.mathematics import MathChecker
from rlhf_jax.rewards.python import PythonReward
from rlhf_jax.rewards.verifiers import AnswerChecker, PatternMatch
from rlhf_jax.sampling import Sampling
from tests.algorithms.conftest import SPEC, put_stages
from tests.algorithms.stopping import check_resumption
from tests.compiling import no_compiling

pytestmark = pytest.mark.usefixtures("compile_quickly")

FAST = Optimizer(learning_rate=3e-3)
CONFIG = ppo.Config(
    reward=PatternMatch("e"),
    critic=ValueHead(),
    steps=3,
    batch_size=16,
    prompt_tokens=(1, 20),
    too_long="start",
    completion_tokens=8,
    epochs=2,
    minibatches=2,
    kl=FixedKL(coef=0.01),
    optimizer=FAST,
    critic_optimizer=FAST,
    evaluation_prompts=8,
    exact_kl_rows=16,
    checkpoint_every=2,
)


def change(**fields):
    return dataclasses.replace(CONFIG, **fields)


@pytest.fixture
def rows(tmp_path):
    """Forty rows, the last four held out; every fifth has a prompt that is too long."""
    path = tmp_path / "rows.jsonl"
    lines = [
        {"prompt": f"The film number {i}" + " was long" * 12 * (i % 5 == 0), "answer": i, "of": {"i": i}}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Jsonl(path, heldout=0.1)


def setup(context, config):
    """The algorithm, its first state, what is frozen, and the batches."""
    put_stages(context)
    tokenizer = context.tokenizer
    algorithm = ppo.Algorithm(config, context.spec, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    frozen = iterations.frozen(context, policy=config.policy, reward=config.reward)
    batches = prompting.prompt_batches(prompting.load_prompts(config, context, "ppo").train, config, context)
    return algorithm, ppo.initial_state(algorithm, context, "ppo"), frozen, batches


def step_of(algorithm, state, frozen, context, scorer):
    """An iteration of (state, prompts, their rows)."""
    run = iterations.Whole(algorithm, state, iterations.Places(context, context), frozen, scorer)
    return lambda state, prompts, rows: run(state, iter([(prompts, rows)]), last=False)


def test_a_function_takes_the_iterations_of_the_network_that_says_the_same(make_context, rows):
    context = make_context()
    smooth = Optimizer(learning_rate=1e-3, eps=1e-3)  # else Adam makes steps of what is rounding
    both = {"data": rows, "optimizer": smooth, "critic_optimizer": smooth}
    config = change(reward="reward_model", critic="reward_model", **both)
    whole, state, frozen, batches = setup(context, config)
    by_host = ppo.Algorithm(change(**both), SPEC, eos_id=whole.eos_id, pad_id=whole.pad_id)
    tokenizer, asked = context.tokenizer, []

    def scorer(texts):
        """The network's score of the very tokens that the texts came from."""
        asked.extend(texts)
        return np.asarray(models.score(SPEC, frozen.reward, rollouts[-1].tokens, rollouts[-1].mask))

    rollouts = []
    one, two = (step_of(algorithm, state, frozen, context, by) for algorithm, by in ((whole, None), (by_host, scorer)))
    other = jax.tree.map(lambda x: x.copy(), state)
    compiled_sample = jax.jit(lambda state, *args: whole.sample(iterations.behaviour(state.policy), *args))
    for _ in range(2):
        prompts, of = next(batches)
        rollouts.append(compiled_sample(other, frozen, prompts))
        state, metrics, rollout = one(state, prompts, of)
        other, other_metrics, other_rollout = two(other, prompts, of)
        np.testing.assert_array_equal(rollout.tokens, other_rollout.tokens)
        for name, value in metrics.items():
            assert float(other_metrics[name]) == pytest.approx(float(value), abs=1e-5), name
        for text, row, tokens, mask in zip(asked[-16:], of, rollout.tokens, rollout.completion_mask, strict=True):
            assert (text.prompt, text.metadata) == (row.text, row.metadata)
            assert text.completion == tokenizer.decode(np.asarray(tokens)[np.asarray(mask)].tolist())
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_nothing_is_compiled_after_the_first_iteration(make_context, rows):
    context = make_context()
    algorithm, state, frozen, batches = setup(context, change(data=rows))
    iteration = step_of(algorithm, state, frozen, context, lambda texts: np.ones(len(texts), np.float32))
    state, _, _ = iteration(state, *next(batches))
    with no_compiling():
        _, metrics, _ = iteration(state, *next(batches))
    assert float(metrics["score"]) == 1.0


def test_a_new_critic_says_nothing_at_first_and_then_learns(make_context, rows):
    context = make_context()
    algorithm, state, frozen, batches = setup(context, change(data=rows))
    trunk = context.policy_params("sft")
    for a, b in zip(jax.tree.leaves(state.critic.params["trunk"]), jax.tree.leaves(trunk), strict=True):
        np.testing.assert_array_equal(a, b)
    iteration = step_of(algorithm, state, frozen, context, lambda texts: np.ones(len(texts), np.float32))
    state, _, rollout = iteration(state, *next(batches))
    assert not np.asarray(rollout.values).any() and np.asarray(rollout.scores).tolist() == [1.0] * 16
    values = [iteration(state, *next(batches))[2].values.sum()]
    assert values[0] > 0  # towards the score of 1


def test_learns_what_a_function_rewards_and_says_what_became_of_the_rows(make_context, rows, tmp_path, capfd):
    path = tmp_path / "mine.py"
    path.write_text(
        "def reward(prompts, completions, metadata):\n"
        "    assert all(row['of']['i'] == row['answer'] for row in metadata)\n"
        "    return [text.count('e') for text in completions]\n"
    )
    context = make_context()
    put_stages(context)
    reward = Combined((Part(PythonReward(path)), Part(MathChecker(), weight=0.0)))
    config = change(data=rows, reward=reward, steps=12, evaluation_sampling=Sampling(temperature=0.5))
    figures = ppo.train(config, context, "ppo")
    assert figures["score_after"] > figures["score_before"] + 0.2
    assert [figures[f"rows_{name}"] for name in ("train", "heldout", "cut", "dropped")] == [36, 4, 8, 0]
    assert not {"gold_before", "vader_after"} & figures.keys() and figures["seq_kl"] > 0
    assert "ppo: 36 rows to train on, 4 held out; 8 cut to length" in capfd.readouterr().err
    lines, samples = (
        read_jsonl(p) for p in (context.workdir / "metrics.jsonl", context.stage_dir("ppo") / "samples.jsonl")
    )
    assert len(lines) == 12 and "gold" not in lines[0] and {line["reward_timeouts"] for line in lines} == {0}
    assert all(line["score"] == line["completion"].count("e") for line in samples)
    assert len(samples) == 8  # four held-out rows, before and after
    assert max(abs(line["kl"]) for line in samples[:4]) < 1e-3  # the reference's own, at the temperature of training


def test_a_stopped_run_with_a_function_ends_where_an_unbroken_one_does(make_context, rows, monkeypatch):
    whole, broken = make_context("whole"), make_context("broken")
    for context in (whole, broken):
        put_stages(context)
    check_resumption(change(data=rows), whole, broken, monkeypatch, stop_after=1)


def test_a_reward_that_breaks_stops_the_run_in_a_line_and_keeps_its_checkpoint(make_context, rows, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "calls = []\ndef reward(prompts, completions, metadata):\n    calls.append(1)\n"
        "    return [1 / (3 - min(len(calls), 3)) for prompt in prompts]\n"
    )
    context = make_context()
    put_stages(context)
    with pytest.raises(UserError, match=r"^ppo: the reward PythonReward raised ZeroDivisionError: .*; prompt: '"):
        ppo.train(change(data=rows, reward=PythonReward(path), steps=4), context, "ppo")
    assert onpolicy.Loop(context, "ppo", steps=4, checkpoint_every=2)._first == 2


def test_prompts_that_are_all_too_long_are_told(make_context, rows):
    context = make_context()
    put_stages(context)
    with pytest.raises(UserError, match=r"rows.jsonl: no row to train on is left that has 0 to 3 tokens"):
        ppo.train(change(data=rows, too_long="drop", prompt_tokens=(1, 2)), context, "ppo")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"reward": AnswerChecker("label")},
            r"reward.answer: the row has no field 'label', but 'answer', 'of'; prompt: 'The",
        ),
        (
            {"reward": AnswerChecker(), "data": None},
            "reward.answer: the row has no field 'answer', but none; prompt: ''",
        ),
        ({"reward": PythonReward(Path("no_such_file.py"))}, "reward.path: no_such_file.py: No such file or directory"),
    ],
)
def test_rows_that_a_reward_cannot_read_are_told_before_anything_runs(rows, fields, message):
    with pytest.raises(UserError, match=message):
        change(**{"data": rows, **fields}).check_inputs(MovieReviews())


def test_what_a_stage_requires_follows_its_reward_and_critic():
    assert CONFIG.requires() == {"policy": ("sft", "policy"), "critic.trunk": ("sft", "policy")}
    assert change(policy="base", critic=ValueHead("base")).requires() == {}
    both = change(reward="rm", critic="rm").requires()
    assert both == {"policy": ("sft", "policy"), "reward": ("rm", "scorer"), "critic": ("rm", "reward")}
    with pytest.raises(ValueError, match="as_chat: openings of reviews are no conversations"):
        change(as_chat=True)
