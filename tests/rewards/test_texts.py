"""Rewards that read words, mathematics, and sums of rewards: by hand, and in the process that they run in."""

import math
import signal
import threading
import time

import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.rewards import lexical
from rlhf_jax.rewards.combined import Combined, Part
from rlhf_jax.rewards.host import HostReward, Texts
from rlhf_jax.rewards.lexical import Length, Rouge, Vader
from rlhf_jax.rewards.mathematics import MathChecker
from rlhf_jax.rewards.python import PythonReward
from rlhf_jax.rewards.verifiers import AnswerChecker, PatternMatch


def one(reward, completion, prompt="", **row):
    reward.check_inputs()
    reward.check_row(row)
    [score] = reward([prompt], [completion], [row])
    return score


@pytest.mark.parametrize(
    ("named", "score"),
    [
        ({"kind": "rouge1"}, 2 * (4 / 5) * (4 / 6) / (4 / 5 + 4 / 6)),  # the, cats and sat, on
        ({"kind": "rouge1", "measure": "precision"}, 4 / 5),
        ({"kind": "rouge1", "measure": "recall", "stem": False}, 3 / 6),
        ({"kind": "rouge2", "measure": "recall"}, 2 / 5),  # the cat, sat on
        ({"kind": "rougeL", "measure": "recall"}, 4 / 6),
    ],
)
def test_rouge_counts_what_is_common(named, score):
    reward = Rouge(**named)
    assert one(reward, "The cats happily sat on", reference="the cat sat on a mat") == pytest.approx(score)
    assert one(reward, "", reference="the cat") == 0


def test_vader_reads_prompt_and_completion():
    assert one(Vader(), " a great film.", "This is") > 0.5 > -0.5 > one(Vader(), " a horrible film.", "This is")
    # (s / sqrt(s² + 15)) of the one word's rating in the lexicon, 3.1
    assert one(Vader(), "great") == pytest.approx(3.1 / math.sqrt(3.1**2 + 15), abs=1e-4)


def test_length_is_best_at_its_target():
    assert [one(Length(4), "a " * n) for n in (0, 2, 4, 6, 12)] == [0, 0.5, 1, 0.5, -1]
    assert one(Length(4, unit="characters"), "ab c") == 1


@pytest.mark.parametrize(
    ("answer", "said", "is_right"),
    [
        ("x^2+2x+1", r"so it is \boxed{(x+1)^2}", True),
        ("x^2+2x+1", r"so it is \boxed{(x-1)^2}", False),
        (r"\frac{\sqrt{3}}{2}", r"the sine is $\frac{\sqrt{3}}{2}$.", True),
        (r"\frac{1}{2}", "The answer is 0.5", True),
        (r"\{1, 2\}", r"$\{2,1\}$", True),
        ("7", "there are 8", False),
        (7, "there are 7", True),
        ("7", "", False),
    ],
)
def test_mathematics_is_compared_as_such(answer, said, is_right):
    assert one(MathChecker(), said, answer=answer) == is_right


def test_in_a_process_of_their_own_an_answer_without_end_is_wrong_and_no_fault():
    endless = r"\boxed{\sum_{i=1}^{10^{10}} \sin(i)^{i}} \boxed{100000!!!}"
    rows = [Texts("p", said, {"answer": "4"}) for said in ("2+2=4", endless, "it is 4")]
    with HostReward(MathChecker(seconds_each=1), "ppo") as reward:
        np.testing.assert_array_equal(reward(rows), [1, 0, 1])
        assert reward.metrics() == {"reward_timeouts": 1}
        np.testing.assert_array_equal(reward(rows[:1]), [1])
        assert reward.metrics() == reward.metrics() == {"reward_timeouts": 0}


def test_a_process_that_waits_for_a_processor_gives_the_same_scores():
    """The right answers stay right while the process stands still for longer than seconds_each, again and again."""
    rows = [Texts("p", rf"\boxed{{(x+{i})^2+y}}", {"answer": f"x^2+{2 * i}x+{i * i}+y"}) for i in range(1, 61)]
    with HostReward(Combined((Part(MathChecker(seconds_each=1)),)), "ppo") as reward:
        np.testing.assert_array_equal(reward(rows[:1]), [1])
        process, done = reward._process, threading.Event()

        def disturb():
            while not done.wait(0.1):
                process.send_signal(signal.SIGSTOP)
                time.sleep(1.3)
                process.send_signal(signal.SIGCONT)

        other = threading.Thread(target=disturb)
        other.start()
        try:
            np.testing.assert_array_equal(reward(rows), np.ones(60))
        finally:
            done.set()
            other.join()
        assert reward.metrics() == {"reward_timeouts": 0}


@pytest.mark.parametrize("answer", ["", "$", r"\boxed{}"])
def test_an_answer_in_which_there_is_nothing_to_compare_is_refused(answer):
    with pytest.raises(ValueError, match=r"reward.answer: the row's 'answer' holds no mathematical answer: '"):
        MathChecker().check_row({"answer": answer})
    MathChecker().check_row({"answer": r"\frac{1}{2}"})


def test_a_sum_of_rewards_is_normalised_clipped_and_weighed(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def reward(p, c, m):\n    return [float(row['own']) for row in m]\n")
    parts = (
        Part(AnswerChecker()),
        Part(PatternMatch("####"), weight=0.25),
        Part(PythonReward(file), weight=-2.0, mean=1.0, std=2.0, clip=3.0),
    )
    rows = [Texts("p", "#### 4", {"answer": 4, "own": 5.0}), Texts("p", "5", {"answer": 4, "own": -11.0})]
    with HostReward(Combined(parts), "ppo") as reward:
        np.testing.assert_allclose(reward(rows), [1 + 0.25 - 2 * 2, -2 * -3])
        with pytest.raises(UserError, match=r"Combined raised ValueError: PythonReward returned nan.*prompt: 'q'"):
            reward([*rows, Texts("q", "5", {"answer": 4, "own": math.nan})])
    assert Combined(parts).seconds == sum(part.reward.seconds for part in parts)


def test_what_is_missing_is_one_line(monkeypatch):
    both = Combined((Part(AnswerChecker()), Part(Rouge("summary"))))
    with pytest.raises(ValueError, match=r"reward.reference: the row has no text 'summary'; its other fields: 'ans"):
        both.check_row({"answer": 3})
    with pytest.raises(ValueError, match=r"reward.answer: the row has no field 'answer'; its other fields: none"):
        MathChecker().check_row({})
    with pytest.raises(UserError, match=r"reward.path: none.py: No such file"):
        Combined((Part(PythonReward("none.py")),)).check_inputs()
    monkeypatch.setattr(lexical, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="reward=Rouge needs the package rouge-score: pip install rouge-score"):
        both.check_inputs()
    with pytest.raises(UserError, match="reward=MathChecker needs the package math-verify"):
        MathChecker().check_inputs()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Combined(()), "reward.parts: at least one is needed"),
        (lambda: Part(Vader(), weight=math.nan), "reward.parts.weight must be finite, got nan"),
        (lambda: Part(Vader(), std=0.0), "reward.parts.std must be over 0 and finite, got 0.0"),
        (lambda: Part(Vader(), clip=-1.0), "reward.parts.clip must be over 0 and finite, got -1.0"),
        (lambda: Length(0), "reward.target must be at least 1, got 0"),
        (lambda: MathChecker(seconds_each=0), "reward.seconds_each must be at least 1, got 0"),
        (lambda: Vader(seconds=0.0), "reward.seconds must be over 0 and finite, got 0.0"),
    ],
)
def test_fields_that_cannot_be(make, said):
    with pytest.raises(ValueError, match=said):
        make()
