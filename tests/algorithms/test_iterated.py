"""Iterated RLHF as stages: who writes for whom, what each reward model is trained on, and pairs of earlier stages."""

from pathlib import Path

import pytest

from rlhf_jax import sharding
from rlhf_jax.algorithms import ai_feedback, comparisons, policy, ppo, reward_model, sft
from rlhf_jax.algorithms.comparisons import SampledPairs
from rlhf_jax.algorithms.context import Context
from rlhf_jax.algorithms.iterated import iterated
from rlhf_jax.config import Experiment, from_dict, load_config, to_dict, validate
from rlhf_jax.data import preferences
from rlhf_jax.data.preferences import PreferenceGroup
from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.data.sources import FromStage, Jsonl, Mixture
from rlhf_jax.errors import UserError
from rlhf_jax.inference import MODELS
from rlhf_jax.interop.pretrained import Bundled, Pretrained
from rlhf_jax.rewards.judging import LocalJudge
from rlhf_jax.rewards.verifiers import PatternMatch
from rlhf_jax.run import STAGES
from tests.toys import SPEC

CONFIGS = Path(__file__).parents[2] / "configs"
ROWS = Jsonl("old.jsonl")


def experiment(stages):
    before = {"sft": sft.Config(), "reward_model": reward_model.Config()}
    return Experiment(model=Bundled(), data=MovieReviews(), seed=0, stages={**before, **stages})


@pytest.mark.parametrize("start", ["newest", "first"])
def test_each_reward_model_learns_all_pairs_so_far_and_each_policy_learns_from_the_newest(start):
    learn = ppo.Config(policy="sft", reward="reward_model", critic="reward_model", steps=7)
    stages = iterated(reward_model.Config(init="sft"), learn, rounds=3, start=start)
    assert list(stages) == ["learn_1", "reward_2", "learn_2", "reward_3", "learn_3"]
    pairs = [stages[f"reward_{i}"].pairs for i in (2, 3)]
    assert [one.policy for one in pairs] == ["learn_1", "learn_2"]
    assert [one.earlier for one in pairs] == [("reward_model",), ("reward_model", "reward_2")]
    learnt = [stages[f"learn_{i}"] for i in (1, 2, 3)]
    assert [one.reward for one in learnt] == [one.critic for one in learnt] == ["reward_model", "reward_2", "reward_3"]
    assert [one.policy for one in learnt] == (["sft", "learn_1", "learn_2"] if start == "newest" else ["sft"] * 3)
    assert {one.steps for one in learnt} == {7}
    whole = experiment(stages)
    validate(whole, 1)
    assert from_dict(to_dict(whole), [*MODELS, *STAGES]) == whole


def test_a_judges_pairs_of_all_rounds_stand_beside_the_first_rows():
    refresh = reward_model.Config(pairs=Mixture((ROWS, Jsonl("more.jsonl")), (2.0, 1.0)))
    feedback = ai_feedback.Config(judge=LocalJudge("sft", length=64))
    stages = iterated(refresh, policy.Config(policy="sft"), rounds=3, feedback=feedback)
    assert list(stages) == ["learn_1", "pairs_2", "reward_2", "learn_2", "pairs_3", "reward_3", "learn_3"]
    assert [stages[f"pairs_{i}"].policy for i in (2, 3)] == ["learn_1", "learn_2"]
    new = FromStage("pairs_2"), FromStage("pairs_3")
    assert stages["reward_3"].pairs == Mixture((ROWS, Jsonl("more.jsonl"), *new), (2.0, 1.0, 1.0, 1.0))
    validate(experiment(stages), 1)


@pytest.mark.parametrize(
    ("pairs", "reward", "feedback", "message"),
    [
        (SampledPairs(), PatternMatch("e"), None, "learn.reward: rounds refresh a reward model"),
        (ROWS, "reward_model", None, r"refresh.pairs: SampledPairs\(…\), or give feedback"),
        (SampledPairs(), "reward_model", ai_feedback.Config(), "refresh.pairs: the rows of a source, to which rounds"),
        (None, "reward_model", ai_feedback.Config(), "refresh.pairs: the rows of a source"),
    ],
)
def test_what_rounds_cannot_be_made_of_is_told(pairs, reward, feedback, message):
    with pytest.raises(ValueError, match=message):
        iterated(reward_model.Config(pairs=pairs), policy.Config(reward=reward), rounds=2, feedback=feedback)
    with pytest.raises(ValueError, match="rounds must lie in"):
        iterated(reward_model.Config(), policy.Config(), rounds=0)


def test_pairs_of_a_stage_that_is_no_reward_model_are_refused():
    stages = {"again": reward_model.Config(pairs=SampledPairs(earlier=("reward_model", "sft")))}
    with pytest.raises(UserError, match=r"stages.again.pairs.earlier\[1\]: needs a stage that makes a reward"):
        validate(experiment(stages), 1)


def test_earlier_pairs_that_will_not_be_there_are_told_before_anything_runs():
    sampled, of_file = reward_model.Config(pairs=SampledPairs(heldout_prompts=50)), reward_model.Config(pairs=ROWS)
    for pairs, first, message in (
        (SampledPairs(earlier=("reward_model", "first")), of_file, r"pairs.earlier\[1\]: 'first' samples no pairs"),
        (
            SampledPairs(earlier=("first",), heldout_prompts=60),
            sampled,
            "pairs.heldout_prompts=60: 'first' holds 50 out",
        ),
    ):
        with pytest.raises(UserError, match=f"stages.again.{message}"):
            validate(experiment({"first": first, "again": reward_model.Config(pairs=pairs)}), 1)


def groups(word, count, completions=2):
    tokens = tuple((i + 3,) * 4 for i in range(completions))
    judged = tuple((0, i) for i in range(1, completions))
    texts = tuple(f"{word} {i}" for i in range(completions))
    scores, margins = tuple(float(i) for i in range(completions)), (1.0,) * len(judged)
    return [
        PreferenceGroup(f"{word} {n}", texts, (1, 2), tokens, scores, judged, margins, "sampled") for n in range(count)
    ]


def test_a_stage_trains_on_the_pairs_of_earlier_ones_and_is_evaluated_on_its_own(tmp_path):
    context = Context(tmp_path, 0, sharding.single_device_mesh(), Pretrained(SPEC, {}, None), MovieReviews())
    for name, completions in (("first", 4), ("second", 3), ("own", 2)):
        made = groups(name, 3, completions)
        preferences.write(context.stage_dir(name) / "data", {"train": made[:2], "heldout": made[2:]})
    pairs = SampledPairs(completions=2, heldout_prompts=1, earlier=("first", "second"))
    found = comparisons.sample(pairs, context, "own")
    assert [group.prompt for group in found.train] == ["first 0", "first 1", "second 0", "second 1", "own 0", "own 1"]
    assert [group.prompt for group in found.heldout] == ["own 2"]
    assert (found.completions, found.pairs, found.counts.train) == (4, 6, 6)
    with pytest.raises(UserError, match=r"stages.own.pairs.earlier: 'first' has rows of 6 tokens; .* have 5"):
        short = SampledPairs(earlier=("first",), heldout_prompts=1, prompt_tokens=(1, 2), completion_tokens=2)
        comparisons.sample(short, context, "own")
    with pytest.raises(UserError, match=r"stages.own.pairs.heldout_prompts=2: 'first' holds 1 out"):
        comparisons.sample(SampledPairs(earlier=("first",), heldout_prompts=2), context, "own")
    with pytest.raises(
        UserError, match=r"earlier: .*third/data, the pairs of 'third', is not there: remove .*third/su"
    ):
        comparisons.sample(SampledPairs(earlier=("third",)), context, "own")
    record = next((tmp_path / "second" / "data").rglob("*train*array_record*"))
    record.write_bytes(record.read_bytes()[:-9])
    for told in ("bytes, not .* set aside as .*", "is not there"):  # and the same again, where nothing was done
        with pytest.raises(
            UserError, match=rf"stages.own.pairs.earlier: .*{told}: remove .*second/summary.json and run"
        ):
            comparisons.sample(pairs, context, "own")


@pytest.mark.parametrize(
    "name",
    ["sentiment_online_dpo", "sentiment_iterated", "sentiment_raft", "sentiment_best_of_n", "sentiment_distill"],
)
def test_the_configs_are_whole_and_their_first_stages_the_quickstarts(name):
    whole, quick = (load_config(CONFIGS / f"{one}.py") for one in (name, "quickstart"))
    validate(whole, 1)
    assert [whole.stages[stage] for stage in ("sft", "reward_model")] == list(quick.stages.values())[:2]
    assert from_dict(to_dict(whole), [*MODELS, *STAGES]) == whole
