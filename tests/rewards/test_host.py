"""Rewards run in a process of their own; whatever one does there, the run hears of it in one line with a prompt."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import Pipe
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.rewards import host
from rlhf_jax.rewards.host import HostReward, Texts
from rlhf_jax.rewards.python import PythonReward
from rlhf_jax.rewards.verifiers import AnswerChecker, PatternMatch

ROWS = [Texts(f"prompt number {i}", f"says {i}", {"answer": i, "tag": b"\xff"}) for i in range(10)]


def run(tmp_path, body, rows=ROWS, seconds=60.0):
    """The scores of a function with this body."""
    path = tmp_path / "mine.py"
    indented = "\n".join("    " + line for line in body.splitlines())
    path.write_text(f"import os, time\ncalls = []\n\ndef reward(prompts, completions, metadata):\n{indented}\n")
    with HostReward(PythonReward(path, seconds=seconds), "ppo") as reward:
        return reward(rows)


def fail(*args, **named):
    with pytest.raises(UserError) as caught:
        run(*args, **named)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("ppo: the reward PythonReward ")
    return message


def test_scores_are_those_of_the_function_in_the_rows_order(tmp_path):
    with HostReward(AnswerChecker(), "ppo") as reward:
        changed = [row._replace(completion="says 4") for row in ROWS]
        np.testing.assert_array_equal(reward(ROWS), np.ones(10, np.float32))
        np.testing.assert_array_equal(reward(changed), np.eye(10, dtype=np.float32)[4])
        assert reward([]).shape == (0,)
    body = "import numpy\nassert metadata[3]['tag'] == bytes([255])\nreturn numpy.array([len(p) for p in prompts])"
    np.testing.assert_array_equal(run(tmp_path, body), np.full(10, 15, np.float32))


def test_globals_stay_and_what_is_printed_is_no_answer(tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    body = "print('hello from the reward')\ncalls.append(1)\nreturn [float(len(calls))] * len(prompts)"
    path = tmp_path / "mine.py"
    run(tmp_path, body)
    with HostReward(PythonReward(path), "ppo") as reward:
        assert [reward(ROWS)[0] for _ in range(3)] == [1, 2, 3]
    out, err = capfd.readouterr()
    assert out == "" and err.count("hello from the reward") == 4


def test_a_signal_to_all_processes_is_the_runs_alone(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import os\ndef reward(p, c, m):\n    return [float(os.getpid())] * len(p)\n")
    with HostReward(PythonReward(path), "ppo") as reward:
        child = int(np.float64(reward(ROWS[:1])[0]))
        os.kill(child, signal.SIGTERM)
        assert int(np.float64(reward(ROWS[:1])[0])) == child


def test_a_process_whose_run_is_gone_ends_by_itself(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import time\ndef reward(p, c, m):\n    time.sleep(600)\n")
    ours, theirs = Pipe()
    command = [sys.executable, "-P", str(Path(host.__file__).with_name("worker.py")), str(theirs.fileno())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])
    ours.send((PythonReward(path, seconds=0.5), 60))
    assert ours.recv() == ("value", None)
    ours.send((["p"], ["c"], [{}]))
    assert process.wait(timeout=60) == -signal.SIGALRM


def test_dataclasses_of_the_file_find_their_names(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
        "@dataclass\nclass Weights:\n    length: float = 2.0\n\n"
        "def reward(p, c, m):\n    return [Weights().length] * len(p)\n"
    )
    with HostReward(PythonReward(path), "ppo") as reward:
        np.testing.assert_array_equal(reward(ROWS), np.full(len(ROWS), 2, np.float32))


def test_the_process_ends_with_the_reward(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import os\ndef reward(p, c, m):\n    return [float(os.getpid())] * len(p)\n")
    with HostReward(PythonReward(path), "ppo") as reward:
        child = int(np.float64(reward(ROWS[:1])[0]))
        assert child != os.getpid()
        os.kill(child, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("return [1 / (row['answer'] - 7) for row in metadata]", "raised ZeroDivisionError: division by zero (mine"),
        ("if 'prompt number 7' in prompts: raise SystemExit('a\\nb')\nreturn [0.0] * len(prompts)", "SystemExit: a b"),
        ("return [0.0 for row in metadata if row['answer'] != 7]", "returned 9 scores for 10 completions"),
        ("return [0.0] * len(prompts) + [1.0] * ('prompt number 7' in prompts)", "returned more than 10 scores for 10"),
        ("import itertools\nif 'prompt number 7' in prompts: return itertools.repeat(0.0)\nreturn [0.0] * len(prompts)",
         "returned more than 10 scores for 10"),
        ("return [float('nan') if '7' in p else 1.0 for p in prompts]", "returned nan"),
        ("return [10.0 ** 400 if '7' in p else 1.0 for p in prompts]", "raised OverflowError"),
        ("return [float('-inf') if '7' in p else 1.0 for p in prompts]", "returned -inf"),
        ("return ['good' if '7' in p else 1.0 for p in prompts]", "raised ValueError: could not convert string"),
        ("if 'prompt number 7' in prompts: return None\nreturn [0.0] * len(prompts)", "raised TypeError: 'NoneType'"),
        ("if 'prompt number 7' in prompts: os._exit(1)\nreturn [0.0] * len(prompts)", "ended its process"),
    ],
)  # fmt: skip
def test_a_reward_that_breaks_is_told_with_the_prompt_it_breaks_for(tmp_path, body, what):
    message = fail(tmp_path, body)
    assert what in message and message.endswith("; prompt: 'prompt number 7'")


def test_a_reward_that_fails_only_for_all_rows_together_names_the_first(tmp_path):
    message = fail(tmp_path, "assert len(prompts) < 10\nreturn [0.0] * len(prompts)")
    assert "raised AssertionError" in message and message.endswith("; prompt: 'prompt number 0'")


@pytest.mark.parametrize(
    "body",
    [
        "if 'prompt number 7' in prompts: time.sleep(600)\nreturn [0.0] * len(prompts)",
        "while 'prompt number 7' in prompts: pass\nreturn [0.0] * len(prompts)",
    ],
)
def test_a_reward_that_hangs_is_stopped_at_its_limit(tmp_path, body):
    began = time.monotonic()
    message = fail(tmp_path, body, seconds=2.0)
    assert "takes longer than seconds=2; prompt: 'prompt number 7'" in message
    assert time.monotonic() - began < 120  # not 600: eight starts of the process, on a busy machine


def test_a_pattern_that_backtracks_for_ever_is_stopped_too():
    rows = [Texts("fine", "b", {}), Texts("evil\nprompt " + "x" * 100, "a" * 60 + "c", {})]
    with HostReward(PatternMatch(r"(a|a)*b", seconds=2.0), "ppo") as reward:
        with pytest.raises(UserError, match=r"PatternMatch takes longer than seconds=2; prompt: 'evil prompt x+…'"):
            reward(rows)
        assert reward(rows[:1]) == 1.0  # a new process answers


def test_a_file_that_cannot_be_loaded_is_told(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import no_such_package\ndef reward(p, c, m): ...\n")
    with (
        HostReward(PythonReward(path), "ppo") as reward,
        pytest.raises(
            UserError, match=r"raised ModuleNotFoundError: No module named 'no_such_package' \(mine.py, line 1"
        ),
    ):
        reward(ROWS)


@pytest.mark.parametrize(
    ("text", "function", "message"),
    [
        (None, "reward", "reward.path: .*mine.py: No such file"),
        ("def reward(:", "reward", "reward.path: .*mine.py: not Python"),
        ("def one(p, c, m): ...\ndef two(p, c, m): ...", "reward", "no function 'reward'; its functions are one, two"),
        ("raise SystemExit", "reward", "no function 'reward'; it has none"),
    ],
)
def test_a_file_without_the_function_is_told_before_anything_runs(tmp_path, text, function, message):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        PythonReward(path, function).check_inputs()
