"""What a stage may take of pairs that earlier stages make: said before anything runs."""

import pytest

from rlhf_jax.algorithms import ai_feedback, preference, reward_model, sft
from rlhf_jax.algorithms.preference_losses import Term
from rlhf_jax.config import Experiment, validate
from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.data.sources import FromStage, Jsonl, Mixture
from rlhf_jax.errors import UserError
from rlhf_jax.interop.pretrained import Bundled
from rlhf_jax.rewards.judging import LocalJudge

FEEDBACK = FromStage("feedback")


def experiment(learner):
    stages = {"sft": sft.Config(), "feedback": ai_feedback.Config(judge=LocalJudge(length=64)), "learner": learner}
    return Experiment(model=Bundled(), data=MovieReviews(), stages=stages)


@pytest.mark.parametrize(
    ("learner", "says"),
    [
        (
            preference.Config(pairs=FEEDBACK, losses=(Term("kto"),)),
            "and losses=kto takes no soft labels",
        ),
        (preference.Config(pairs=FEEDBACK, losses=(Term(), Term("aot"))), "and losses=aot takes no soft labels"),
        (
            preference.Config(pairs=Mixture((Jsonl("a.jsonl"), FEEDBACK), (1.0, 1.0)), losses=(Term("bco"),)),
            "and losses=bco takes no soft labels",
        ),
        (reward_model.Config(pairs=FEEDBACK, loss="k_wise"), "and loss=k_wise takes no soft labels"),
    ],
)
def test_a_judges_pairs_are_refused_before_they_are_paid_for(learner, says):
    with pytest.raises(
        UserError,
        match=rf"^stages.learner.pairs(.parts\[1\])?.stage: 'feedback' writes each pair with a prob.*{says}$",
    ):
        validate(experiment(learner), 1)


def test_all_parts_of_a_mixture_are_checked():
    wrong = Mixture((FromStage("nobody"), FEEDBACK), (1.0, 1.0))
    with pytest.raises(UserError, match=r"^stages.learner.pairs.parts\[0\].stage: .*nobody"):
        validate(experiment(preference.Config(pairs=wrong)), 1)
    labelled = Mixture((FEEDBACK, Jsonl("a.jsonl")), (1.0, 1.0))
    with pytest.raises(UserError, match=r"^stages.learner.pairs.parts\[0\].stage: 'feedback' writes"):
        validate(experiment(reward_model.Config(pairs=labelled, loss="k_wise")), 1)


def test_references_that_are_not_there_are_told_before_the_pairs_are_paid_for():
    learner = reward_model.Config(pairs=FEEDBACK, normalize_on="references")
    with pytest.raises(UserError, match=r"^stages.learner.normalize_on: 'references' are of the experiment's rows"):
        validate(experiment(learner), 1)
    rows = reward_model.Config(loss="k_wise", pairs=Jsonl("a.jsonl"), normalize_on=FEEDBACK)
    assert validate(experiment(rows), 1) is None  # there its rows are no labels


def test_the_others_take_them():
    for learner in (preference.Config(pairs=FEEDBACK), reward_model.Config(pairs=FEEDBACK)):
        assert validate(experiment(learner), 1) is None
