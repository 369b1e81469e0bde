"""Runs of a sweep in processes of their own: real ones, stopped, killed and broken."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_jax.config import load_config
from rlhf_jax.errors import NonFiniteError, Stopped
from rlhf_jax.hosts import cores
from rlhf_jax.metrics import read_jsonl
from rlhf_jax.sweep.crew import may_be_sent
from rlhf_jax.sweep.grid import settings
from rlhf_jax.sweep.worker import _sendable
from tests.faults import CONFIG, Faulty, at_step
from tests.toys import experiment

pytestmark = pytest.mark.skipif(cores() < 2, reason="a process a core")

STEPS = {"sft": 4, "ppo": 4}
IMPORTS = """from rlhf_jax.algorithms.onpolicy import ValueHead
from rlhf_jax.rewards.lexical import Length
"""
SHORT = (
    CONFIG.replace("steps=30", "steps=4")
    .replace("steps=20", "steps=4, reward=Length(target=5), critic=ValueHead()")
    .replace("every=4", "every=3")
    .replace("from rlhf_jax.kl", IMPORTS + "from rlhf_jax.kl")
)
COEFS = ("0.1", "1.0")
LABELS = [f"seed={seed},kl.coef={coef}" for coef in COEFS for seed in (0, 1)]


class Swept(Faulty):
    """The command of a sweep of two stages of the tiny run: two seeds of two prices of KL."""

    def __init__(self, folder):
        super().__init__(folder, *STEPS, config=SHORT, steps=STEPS)

    def command(self, workdir, *flags):
        varied = ["--seeds", "2", "--vary", f"stages.ppo.kl.coef={','.join(COEFS)}"]
        own = ["sweep", str(self.folder / "tiny.py"), "--to", str(workdir), *varied]
        return [sys.executable, "-m", "rlhf_jax", *own, *flags]

    def single(self, workdir, *flags):
        command = [*super().command(workdir), *flags]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    return Swept(tmp_path_factory.mktemp("swept"))


@pytest.fixture(scope="module")
def whole(swept):
    done = swept.run(swept.folder / "whole")
    assert done.returncode == 0, done.stderr
    assert f"{len(LABELS)} runs, {min(cores(), len(LABELS))} at a time" in done.stderr
    return swept.folder / "whole"


def same(swept, whole, broken):
    for label in LABELS:
        swept.check_same(whole / label, broken / label)
    assert (whole / "summary.json").read_bytes() == (broken / "summary.json").read_bytes()


def workers(folder):
    """Those of the sweep that writes into a folder, though it be dead itself: they hold the locks of its runs."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"rlhf_jax.sweep.worker" not in (process / "cmdline").read_bytes():
                continue
            held = [os.readlink(one) for one in (process / "fd").iterdir()]
        except OSError:  # it has ended
            continue
        if any(one.startswith(str(folder)) for one in held):
            found.append(int(process.name))
    return found


def test_each_run_is_what_it_would_be_by_itself(swept, whole):
    done = swept.single(swept.folder / "single", "--seed", "1", "--stages.ppo.kl.coef", "1.0")
    assert done.returncode == 0, done.stderr
    swept.check_same(swept.folder / "single", whole / LABELS[3])
    # What does not see the price is made once.
    assert (whole / LABELS[1] / "sft" / "summary.json").samefile(whole / LABELS[3] / "sft" / "summary.json")


def test_stopped_and_killed_it_goes_on_to_where_an_unbroken_one_ends(swept, whole):
    broken = swept.folder / "broken"
    code, said, _ = swept.end(broken, at_step(broken / LABELS[0], "sft", 2), signal.SIGTERM)
    assert code == 128 + signal.SIGTERM and "the same command goes on" in said and "Traceback" not in said
    assert workers(broken) == []
    code, said, _ = swept.end(broken, at_step(broken / LABELS[0], "ppo", 2), signal.SIGKILL)
    assert code == -signal.SIGKILL, said
    began = time.monotonic()
    while workers(broken):  # which have nobody to answer
        assert time.monotonic() - began < 20
        time.sleep(0.05)
    done = swept.run(broken)
    assert done.returncode == 0, done.stderr
    same(swept, whole, broken)


@pytest.mark.parametrize("times", [1, 2])
def test_a_process_that_dies_takes_its_run_alone_and_that_is_tried_again(swept, whole, times):
    broken, killed = swept.folder / f"died{times}", []
    lock = broken / LABELS[3] / ".lock"

    def moment(seconds):
        del seconds
        said = lock.read_text() if lock.exists() else ""
        holder = int(said.split("process ")[1].split(",")[0]) if said.endswith("\n") else None
        if holder is not None and holder not in killed and len(killed) < times:
            killed.append(holder)
            os.kill(holder, signal.SIGKILL)
        return False

    code, said, _ = swept.end(broken, moment)
    died = f"{broken / LABELS[3]}: its process was ended by SIGKILL; the same command goes on"
    assert len(killed) == times and f"{died}; it is tried once more" in said and "Traceback" not in said
    if times == 2:
        assert code == 2 and f"{died}; the other runs go on" in said and "1 of 4 runs did not finish" in said
        done = swept.run(broken)
        assert done.returncode == 0, done.stderr
    else:
        assert code == 0, said
    same(swept, whole, broken)


def test_stopped_before_its_first_step_nothing_is_begun(swept):
    folder = swept.folder / "early"
    code, said, seconds = swept.end(folder, lambda _: (folder / LABELS[0] / ".lock").exists(), signal.SIGTERM)
    assert code == 128 + signal.SIGTERM and "the same command goes on" in said and "Traceback" not in said
    assert seconds < 60 and workers(folder) == [] and not list(folder.glob("*/sft/summary.json"))


def test_a_signal_that_all_processes_hear_stops_them_once(swept):
    folder = swept.folder / "all"
    begun, told = at_step(folder / LABELS[0], "sft", 1), []

    def moment(seconds):
        if begun(seconds) and not told:
            told.extend(workers(folder))
            for process in told:  # as a scheduler does
                os.kill(process, signal.SIGTERM)
            return True
        return False

    code, said, _ = swept.end(folder, moment, signal.SIGTERM)
    assert told and code == 128 + signal.SIGTERM and "Traceback" not in said
    last = [read_jsonl(one)[-1] for one in folder.glob("seed=*/metrics.jsonl")]
    for line, one in zip(last, folder.glob("seed=*/metrics.jsonl"), strict=True):  # each has saved the step it was in
        assert (one.parent / line["stage"] / "checkpoints" / str(line["step"])).is_dir() or line["step"] == 4


def test_what_ends_a_run_is_told_and_the_others_go_on(swept):
    varied = ["--stages.ppo.optimizer.bad-steps", "stop", "--vary", "stages.ppo.optimizer.learning_rate=0.001,1e30"]
    command = [*Faulty.command(swept, swept.folder / "broken"), *varied]
    command = [*command[:3], "sweep", command[4], "--to", str(swept.folder / "nan"), *command[7:]]
    done = subprocess.run(command, env=swept.env, capture_output=True, text=True, timeout=900)
    assert done.returncode == NonFiniteError.exit_code, done.stderr
    assert "1 of 2 runs did not finish" in done.stderr and "; the other runs go on" in done.stderr
    assert "Traceback" not in done.stderr
    assert (swept.folder / "nan" / "summary.json").exists()


OWN = """from dataclasses import dataclass

from tests.toys import experiment


@dataclass(frozen=True)
class Own:
    size: int = 1


def get_config():
    return experiment(model=Own())
"""


def test_what_a_script_or_a_config_itself_defines_is_not_sent(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    own = load_config(tmp_path / "own.py")
    runs = settings(experiment(), 2, [])
    assert may_be_sent(runs)
    assert not may_be_sent([replace(runs[0], experiment=own)])
    assert not may_be_sent([replace(runs[0], experiment=replace(own, model=lambda: 0))])
    monkeypatch.setattr(type(own.model), "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "Own", type(own.model), raising=False)
    assert not may_be_sent([replace(runs[0], experiment=own)])


class Odd(Exception):
    """One that cannot be made anew from its arguments."""

    def __init__(self, first, second):
        super().__init__(f"{first} {second}")


def test_errors_arrive_as_what_they_are_or_as_what_they_say():
    stopped = _sendable(Stopped("saved", signal.SIGTERM))
    assert isinstance(stopped, Stopped) and str(stopped) == "saved" and stopped.exit_code == 143
    odd = _sendable(Odd("one", "two"))
    assert type(odd) is RuntimeError and "Odd: one two" in str(odd)
