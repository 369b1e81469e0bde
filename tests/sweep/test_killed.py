"""A sweep killed at random moments: the same command ends where one that was never killed does, bit for bit."""

import random
import signal
import sys

import pytest

from rlhf_jax.metrics import read_jsonl
from tests.faults import CONFIG, Faulty

STEPS = {"sft": 6, "reward_model": 6, "ppo": 4}
SHORT = CONFIG.replace("steps=30", "steps=6").replace("steps=20", "steps=4").replace("every=4", "every=2")
LABELS = [f"seed={seed},kl.coef={coef}" for coef in (0.1, 1.0) for seed in (0, 1)]


class Swept(Faulty):
    """The command of a sweep of the tiny run: two seeds of two prices of KL."""

    def __init__(self, folder, calls):
        super().__init__(folder, *STEPS, config=SHORT, steps=STEPS)
        self.calls = calls

    def command(self, workdir, *flags):
        varied = ["--seeds", "2", "--vary", "stages.ppo.kl.coef=0.1,1.0", "--calls", self.calls]
        own = ["sweep", str(self.folder / "tiny.py"), "--to", str(workdir), *varied]
        return [sys.executable, "-m", "rlhf_jax", *own, *flags]


def lines_of(folder):
    """How many lines of steps all runs have written."""
    return sum(len(read_jsonl(path)) for path in folder.glob("seed=*/metrics.jsonl"))


def after(folder, lines, more):
    """So many seconds after there are so many lines: between steps, in one, or in a save."""
    seen = []

    def moment(seconds):
        if not seen and lines_of(folder) >= lines:
            seen.append(seconds)
        return bool(seen) and seconds >= seen[0] + more

    return moment


@pytest.mark.slow
@pytest.mark.parametrize("calls", ["vmap", "turns"])
def test_killed_at_random_moments_it_ends_where_one_that_was_not_does(tmp_path, calls):
    swept, draw = Swept(tmp_path, calls), random.Random(calls)
    done = swept.run(tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    broken, whole = tmp_path / "broken", lines_of(tmp_path / "whole")
    assert whole == sum(STEPS.values()) * len(LABELS)
    for part in (0.1, 0.4, 0.7, 0.95):
        code, said, _ = swept.end(broken, after(broken, part * whole, draw.uniform(0, 0.5)))
        assert code == -signal.SIGKILL, said
    done = swept.run(broken)
    assert done.returncode == 0, done.stderr
    for label in LABELS:
        swept.check_same(tmp_path / "whole" / label, broken / label)
    assert (tmp_path / "whole" / "summary.json").read_bytes() == (broken / "summary.json").read_bytes()
