"""Several processes against one: the same numbers, whatever happens to them on the way."""

import json
import re
import signal
import time

import numpy as np
import pytest

from rlhf_jax.data import preferences
from rlhf_jax.interop import load_pretrained
from rlhf_jax.metrics import read_jsonl
from tests.hosts.processes import CONFIG, Run, write_config

TIMES = ("seconds", "tokens_per_second")
LIMIT = 10  # seconds without a sign of life


def metrics(workdir):
    lines = read_jsonl(workdir / "metrics.jsonl")
    return {
        (line["stage"], line["step"], name): value
        for line in lines
        for name, value in line.items()
        if name not in (*TIMES, "stage", "step")
    }


def summary(workdir):
    return json.loads((workdir / "summary.json").read_text())


def check_equal(one, other):
    """The same metrics to 1e-4, texts in the same order, parameters to 1e-4, in two workdirs."""
    first, second = metrics(one), metrics(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert second[name] == pytest.approx(value, abs=1e-4, rel=1e-4), name
    for name, figures in summary(one).items():
        if isinstance(figures, dict) and name != "params_digest":
            assert summary(other)[name] == pytest.approx(figures, abs=1e-4, rel=1e-4), name
    rows = [read_jsonl(workdir / "ppo" / "samples.jsonl") for workdir in (one, other)]
    assert [row["prompt"] for row in rows[0]] == [row["prompt"] for row in rows[1]]
    for stage in ("sft", "ppo"):
        params = [load_pretrained(workdir / stage).params for workdir in (one, other)]
        for a, b in zip(*map(leaves, params), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


def leaves(tree):
    return [leaf for value in tree.values() for leaf in (leaves(value) if isinstance(value, dict) else [value])]


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path)


def test_two_processes_of_one_device_equal_one_process_of_two(config, tmp_path):
    """The three stages, PPO with a reward that is a function; a third run in the same folder finds it complete."""
    whole, parts = Run(config, tmp_path / "whole", 1, 2), Run(config, tmp_path / "parts", 2, 1)
    assert (whole.wait(), parts.wait()) == ([0], [0, 0]), whole.said() + parts.said()
    check_equal(whole.workdir, parts.workdir)
    assert parts.said()[1] == ""  # process 0 alone talks
    assert pairs(whole.workdir) == pairs(parts.workdir)
    again = Run(config, tmp_path / "parts", 2, 1)
    assert again.wait() == [0, 0] and "is complete" in again.said()[0]


def pairs(workdir):
    return {name: list(groups) for name, groups in preferences.read(workdir / "reward_model" / "data").items()}


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "number"), [(1, "KILL"), (0, "KILL"), (1, "STOP"), (0, "STOP")])
def test_a_process_that_dies_or_hangs_ends_the_others_and_the_run_goes_on(config, tmp_path, victim, number):
    whole = Run(config, tmp_path / "whole", 2, 1)
    assert whole.wait() == [0, 0], whole.said()
    run = Run(config, tmp_path / "broken", 2, 1, seconds=LIMIT)
    run.wait_for("ppo", 1)
    began = time.monotonic()
    run.processes[victim].send_signal(signal.Signals[f"SIG{number}"])
    code = run.processes[1 - victim].wait(timeout=20 * LIMIT)
    took, said = time.monotonic() - began, run.said()[1 - victim].splitlines()
    run.kill()
    assert code in (4, -signal.SIGABRT) and took < 4 * LIMIT
    errors = [line for line in said if "error" in line]
    assert len(errors) == 1 and said[-1] == errors[0] and "Traceback" not in "".join(said)
    assert re.search(rf"process {victim}\b.* since \d\d:\d\d:\d\d; the same command on all hosts goes on$", errors[0])
    again = Run(config, tmp_path / "broken", 2, 1)
    assert again.wait() == [0, 0], again.said()
    assert summary(run.workdir)["params_digest"] == summary(whole.workdir)["params_digest"]
    assert metrics(run.workdir) == metrics(whole.workdir)


@pytest.mark.slow
def test_sigterm_on_one_host_stops_all_at_one_step_and_any_number_of_processes_goes_on(config, tmp_path):
    whole = Run(config, tmp_path / "whole", 1, 2)
    run = Run(config, tmp_path / "run", 2, 1, "--stages.sft.checkpoint_every", "100")
    run.wait_for("sft", 1)
    run.processes[1].terminate()
    assert run.wait() == [143, 143], run.said()
    steps = [re.search(r"stopped after step (\d+) of 6, saved", text)[1] for text in run.said()]
    assert steps[0] == steps[1] and [p.name for p in (run.workdir / "sft/checkpoints").iterdir()] == [steps[0]]
    again = Run(config, tmp_path / "run", 1, 2, "--stages.sft.checkpoint_every", "100")
    assert (whole.wait(), again.wait()) == ([0], [0]), again.said()
    check_equal(whole.workdir, again.workdir)


@pytest.mark.slow
def test_four_processes_equal_one(config, tmp_path):
    whole, parts = Run(config, tmp_path / "whole", 1, 4), Run(config, tmp_path / "parts", 4, 1)
    assert (whole.wait(), parts.wait()) == ([0], [0] * 4), whole.said() + parts.said()
    check_equal(whole.workdir, parts.workdir)


@pytest.mark.slow
def test_what_differs_between_hosts_is_said(config, tmp_path):
    """Another config on one host; a second run in the folder of a first; both in one line of each process."""
    other = tmp_path / "other.py"
    other.write_text(CONFIG.replace("steps=6", "steps=7"))
    run = Run(config, tmp_path / "run", 2, 1, configs=[config, other])
    assert run.wait() == [2, 2]
    line = "not the run of process 0: stages.sft.steps: 6 there, 7 here; start all with one config, from one install"
    assert run.said() == [f"error: process 0 of 2: ended with process 1: {line}\n", f"error: process 1 of 2: {line}\n"]
    first = Run(config, tmp_path / "run", 2, 1)
    first.wait_for("sft", 1)
    second = Run(config, tmp_path / "run", 2, 1)
    assert second.wait() == [2, 2]
    assert all(f"another run works in {tmp_path / 'run'} (" in text for text in second.said())
    assert first.wait() == [0, 0]
