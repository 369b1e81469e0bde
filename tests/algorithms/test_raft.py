"""RAFT and ReST as stages: who samples for whom, who learns what."""

from pathlib import Path

import pytest

from rlhf_jax.algorithms import ai_feedback, best_of_n, ppo, reward_model, sft
from rlhf_jax.algorithms.iterated import iterated
from rlhf_jax.algorithms.raft import raft, rest
from rlhf_jax.config import Experiment, from_dict, load_config, to_dict, validate
from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.data.sources import FromStage, Jsonl
from rlhf_jax.errors import UserError
from rlhf_jax.inference import MODELS
from rlhf_jax.interop.pretrained import Bundled
from rlhf_jax.rewards.judging import LocalJudge
from rlhf_jax.run import STAGES

CONFIGS = Path(__file__).parents[2] / "configs"
SAMPLE, LEARN = best_of_n.Config(n=8, keep=1, batch_size=64), sft.Config(steps=5)


def experiment(stages):
    before = {"sft": sft.Config(), "reward_model": reward_model.Config()}
    return Experiment(model=Bundled(), data=MovieReviews(), seed=0, stages={**before, **stages})


def test_each_round_of_raft_samples_and_teaches_the_policy_of_the_one_before():
    stages = raft(SAMPLE, LEARN, rounds=3)
    assert [stages[f"sample_{i}"].policy for i in (1, 2, 3)] == ["sft", "learn_1", "learn_2"]
    assert [stages[f"learn_{i}"].init for i in (1, 2, 3)] == ["sft", "learn_1", "learn_2"]
    assert [stages[f"learn_{i}"].data for i in (1, 2, 3)] == [FromStage(f"sample_{i}") for i in (1, 2, 3)]
    assert {stages[f"sample_{i}"].keep for i in (1, 2, 3)} == {1}
    validate(experiment(stages), 1)


def test_rest_learns_of_one_set_of_rows_from_rising_thresholds_on():
    stages = rest(SAMPLE, LEARN, thresholds=(0.0, 0.5, 1.0), rounds=2)
    assert list(stages) == [
        *("grow_1", "improve_1_1", "improve_1_2", "improve_1_3"),
        *("grow_2", "improve_2_1", "improve_2_2", "improve_2_3"),
    ]
    assert stages["grow_1"].keep == 8 and stages["grow_2"].policy == "improve_1_3"
    assert [stages[f"improve_1_{i}"].init for i in (1, 2, 3)] == ["sft", "improve_1_1", "improve_1_2"]
    assert [stages[f"improve_2_{i}"].data.least for i in (1, 2, 3)] == [{"score": x} for x in (0.0, 0.5, 1.0)]
    whole = experiment(stages)
    validate(whole, 1)
    assert from_dict(to_dict(whole), [*MODELS, *STAGES]) == whole


def test_two_of_each_stand_side_by_side_by_their_names():
    refresh, learn = reward_model.Config(), ppo.Config(policy="sft", reward="reward_model", critic="reward_model")
    feedback, rows = ai_feedback.Config(judge=LocalJudge(length=64)), reward_model.Config(pairs=Jsonl("old.jsonl"))
    made = {
        "": raft(SAMPLE, LEARN, rounds=2),
        "b": raft(SAMPLE, LEARN, rounds=2, name="b"),
        "c": rest(SAMPLE, LEARN, thresholds=(0.0, 1.0), rounds=2),
        "d": rest(SAMPLE, LEARN, thresholds=(0.0, 1.0), rounds=2, name="d"),
        "e": iterated(refresh, learn, rounds=3, name="e"),
        "f": iterated(rows, learn, rounds=3, feedback=feedback, name="f"),
    }
    stages = {name: stage for some in made.values() for name, stage in some.items()}
    assert len(stages) == sum(map(len, made.values())) == 4 + 4 + 6 + 6 + 5 + 7
    assert list(made["d"])[:2] == ["d_grow_1", "d_improve_1_1"] and stages["d_grow_2"].policy == "d_improve_1_2"
    assert stages["b_learn_2"].init == "b_learn_1" and stages["b_learn_2"].data == FromStage("b_sample_2")
    assert stages["e_reward_3"].pairs.earlier == ("reward_model", "e_reward_2")
    assert stages["e_learn_3"].policy == "e_learn_2" and stages["e_learn_3"].critic == "e_reward_3"
    assert stages["f_reward_3"].pairs.parts[1:] == (FromStage("f_pairs_2"), FromStage("f_pairs_3"))
    validate(experiment(stages), 1)


@pytest.mark.parametrize("thresholds", [(), (1.0, 0.5), (0.5, 0.5)])
def test_thresholds_that_do_not_rise_are_refused(thresholds):
    with pytest.raises(ValueError, match="thresholds must rise"):
        rest(SAMPLE, LEARN, thresholds=thresholds)


def test_a_policy_that_is_not_there_is_named():
    stages = raft(best_of_n.Config(policy="stf"), LEARN, rounds=1)
    with pytest.raises(UserError, match=r"stages.sample_1.policy: there is no stage 'stf'; did you mean 'sft'"):
        validate(experiment(stages), 1)


@pytest.mark.parametrize("name", ["sentiment_best_of_n", "sentiment_raft"])
def test_the_configs_are_whole_and_their_first_stages_the_quickstarts(name):
    whole, quick = (load_config(CONFIGS / f"{one}.py") for one in (name, "quickstart"))
    validate(whole, 1)
    assert [whole.stages[stage] for stage in ("sft", "reward_model")] == list(quick.stages.values())[:2]
    assert from_dict(to_dict(whole), [*MODELS, *STAGES]) == whole
