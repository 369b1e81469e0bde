"""Several processes against one: the same numbers, whatever happens to them on the way."""

import json
import re
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from rlhf_jax import run
from rlhf_jax.config import load_config
from rlhf_jax.data import preferences
from rlhf_jax.interop import load_pretrained
from rlhf_jax.metrics import read_jsonl
from tests.hosts.processes import COMMAND, ROOT, Run, free_port, write_config

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


def check_equal(one, other, *, tolerance=1e-4, differing=0.0):
    """In two workdirs the same metrics and parameters to the tolerance, and the same prompts in the same order.

    `differing`: the share of the last samples that may, as a token of theirs was within rounding of another one.
    """
    first, second = metrics(one), metrics(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert second[name] == pytest.approx(value, abs=tolerance, rel=tolerance), name
    for name, figures in summary(one).items():
        if isinstance(figures, dict) and name != "params_digest":
            rough = tolerance + (differing if name == "ppo" else 0)
            assert summary(other)[name] == pytest.approx(figures, abs=rough, rel=rough), name
    for name in summary(one)["params_digest"]:
        params = [load_pretrained(workdir / name).params for workdir in (one, other)]
        for a, b in zip(*map(leaves, params), strict=True):
            np.testing.assert_allclose(a, b, atol=tolerance)
    for stage in (stage for stage in ("ppo", "apart") if (one / stage).is_dir()):
        rows = [read_jsonl(workdir / stage / "samples.jsonl") for workdir in (one, other)]
        assert [row["prompt"] for row in rows[0]] == [row["prompt"] for row in rows[1]]
        changed = [a["completion"] != b["completion"] for a, b in zip(*rows, strict=True)]
        assert np.mean(changed) <= differing
    if (one / "reward_model" / "data").is_dir():
        assert pairs(one) == pairs(other)


def leaves(tree):
    return [leaf for value in tree.values() for leaf in (leaves(value) if isinstance(value, dict) else [value])]


def pairs(workdir):
    return {name: list(groups) for name, groups in preferences.read(workdir / "reward_model" / "data").items()}


@pytest.mark.usefixtures("compile_quickly")
def test_two_processes_equal_one(tmp_path, monkeypatch):
    """Eight devices in both: supervised fine-tuning, and PPO with a reward that is a function of texts."""
    config = write_config(tmp_path, "sft", "ppo")
    parts = Run(config, tmp_path / "parts", 2, 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    run.run(load_config(config), tmp_path / "whole", ["test"])
    assert parts.wait() == [0, 0], parts.said()
    check_equal(tmp_path / "whole", parts.workdir)
    assert parts.said()[1] == ""  # process 0 alone talks


@pytest.mark.slow
def test_four_processes_equal_one_with_sampled_pairs_too(tmp_path):
    """And what is complete is found complete by two."""
    config = write_config(tmp_path)
    whole = Run(config, tmp_path / "whole", 1, 4)
    assert whole.wait() == [0], whole.said()
    parts = Run(config, tmp_path / "parts", 4, 1)
    assert parts.wait() == [0] * 4, parts.said()
    check_equal(whole.workdir, parts.workdir)
    again = Run(config, tmp_path / "parts", 2, 2)
    assert again.wait() == [0, 0] and "is complete" in again.said()[0] and again.said()[1] == ""


@pytest.mark.slow
def test_two_processes_read_a_reference_and_learn_from_thumbs_as_one(tmp_path):
    config = write_config(tmp_path, "sft", "kto")
    whole, parts = Run(config, tmp_path / "whole", 1, 4), Run(config, tmp_path / "parts", 2, 2)
    assert whole.wait() == [0], whole.said()
    assert parts.wait() == [0, 0], parts.said()
    check_equal(whole.workdir, parts.workdir)
    assert (parts.workdir / "kto" / "reference.npz").is_file()


@pytest.mark.slow
def test_roles_apart_on_the_devices_of_each_process_equal_those_of_one(tmp_path):
    """Sampling and scoring on half of each process's devices, with whole weights, of which the training's half has
    shards; rollouts ahead. A run that is stopped goes on with the rollout that it had.
    """
    config = write_config(tmp_path, "sft", "reward_model", "apart")
    whole = Run(config, tmp_path / "whole", 1, 8)
    assert whole.wait() == [0], whole.said()
    parts = Run(config, tmp_path / "parts", 2, 4)
    assert parts.wait() == [0, 0], parts.said()
    check_equal(whole.workdir, parts.workdir)
    checkpoints = parts.workdir / "apart" / "checkpoints"
    for path in (checkpoints / "4", parts.workdir / "apart" / "params"):
        shutil.rmtree(path)
    assert (checkpoints / "2").is_dir()
    again = Run(config, tmp_path / "parts", 4, 2)
    assert again.wait() == [0] * 4, again.said()
    check_equal(whole.workdir, again.workdir)
    sixes = [flag for stage in ("sft", "reward_model") for flag in (f"--stages.{stage}.batch_size", "12")]
    odd = Run(config, tmp_path / "odd", 3, 2, *sixes, "--stages.sft.heldout_rows", "24")
    assert odd.wait() == [2, 2, 2] and odd.said()[0].endswith(
        "stages.apart.placement.sampling: 2 devices are not the same number of each of the 3 processes; "
        "every host has a part of both sub-meshes\n"
    ), odd.said()


@pytest.mark.slow
def test_processes_that_die_or_hang_end_the_others_in_time_and_the_run_goes_on(tmp_path):
    """Each in turn, in one run, which ends with the parameters and metrics of an unbroken one."""
    config = write_config(tmp_path, "sft")
    whole = Run(config, tmp_path / "whole", 2, 1)
    assert whole.wait() == [0, 0], whole.said()
    for victim, name in ((1, "KILL"), (0, "KILL"), (1, "STOP"), (0, "STOP")):
        broken = Run(config, tmp_path / "broken", 2, 1, seconds=LIMIT)
        broken.wait_for_a_step()
        began = time.monotonic()
        broken.processes[victim].send_signal(signal.Signals[f"SIG{name}"])
        code, took = broken.processes[1 - victim].wait(timeout=20 * LIMIT), time.monotonic() - began
        broken.kill()
        said = broken.said()[1 - victim].splitlines()
        assert code == (-signal.SIGABRT if victim == 0 else 4), said
        assert took < 4 * LIMIT
        assert [line for line in said if "rror" in line] == said[-1:], said
        assert re.search(
            rf"process {victim}\b.* since \d\d:\d\d:\d\d; the same command on all hosts goes on$", said[-1]
        )
    again = Run(config, tmp_path / "broken", 2, 1)
    assert again.wait() == [0, 0], again.said()
    assert summary(again.workdir)["params_digest"] == summary(whole.workdir)["params_digest"]
    assert metrics(again.workdir) == metrics(whole.workdir)


@pytest.mark.slow
def test_sigterm_on_one_host_stops_all_at_one_step_and_any_number_of_processes_goes_on(tmp_path):
    config, seldom = write_config(tmp_path, "sft"), ("--stages.sft.checkpoint_every", "100")
    stopped = Run(config, tmp_path / "run", 2, 1, *seldom)
    stopped.wait_for_a_step()
    stopped.processes[1].terminate()
    assert stopped.wait() == [143, 143], stopped.said()
    steps = [re.search(r"stopped after step (\d+) of 12, saved", text)[1] for text in stopped.said()]
    assert steps[0] == steps[1] and (stopped.workdir / "sft" / "checkpoints" / steps[0]).is_dir()
    again = Run(config, tmp_path / "run", 1, 2, *seldom)
    assert again.wait() == [0], again.said()
    whole = Run(config, tmp_path / "whole", 1, 2, *seldom)
    assert whole.wait() == [0], whole.said()
    check_equal(whole.workdir, again.workdir)


@pytest.mark.slow
def test_what_differs_between_hosts_and_a_second_run_in_a_workdir_are_one_line(tmp_path):
    config, other = write_config(tmp_path, "sft"), tmp_path / "other.py"
    other.write_text(config.read_text().replace("steps=12", "steps=13"))
    mixed = Run(config, tmp_path / "run", 2, 1, configs=[config, other])
    assert mixed.wait() == [2, 2]
    line = "not the run of process 0: stages.sft.steps: 12 there, 13 here; start all with one config, from one install"
    assert mixed.said() == [
        f"error: process 0 of 2: ended with process 1: {line}\n",
        f"error: process 1 of 2: {line}\n",
    ]
    assert not mixed.workdir.exists()
    first = Run(config, tmp_path / "run", 2, 1, seconds=600)
    first.wait_for_a_step()
    first.processes[1].send_signal(signal.SIGSTOP)  # so that it is not at its end too early
    second = Run(config, tmp_path / "run", 2, 1)
    assert second.wait() == [2, 2]
    first.processes[1].send_signal(signal.SIGCONT)
    assert all(text.count("\n") == 1 and f"another run works in {first.workdir} (" in text for text in second.said())
    assert first.wait() == [0, 0]


@pytest.mark.slow
def test_the_ssh_launcher(tmp_path):
    """Its own command lines, run by a shell on this host in the place of ssh."""
    config, shell = write_config(tmp_path, "sft"), tmp_path / "shell"
    shell.write_text('#!/bin/bash\nshift\nexec bash -c "$*"\n')
    shell.chmod(0o755)
    env = {
        **Run(config, tmp_path / "none", 0, 1).environment,
        "HOSTS": "localhost localhost",
        "SSH": str(shell),
        "PORT": str(free_port()),
    }
    env["RLHF_JAX"] = " ".join(COMMAND[:-1])
    command = [ROOT / "experiments/launch/ssh.sh", str(config), "--workdir", str(tmp_path / "run")]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as launcher:
        path = tmp_path / "run" / "metrics.jsonl"
        while not (path.exists() and path.read_text().count("\n")):
            assert launcher.poll() is None
            time.sleep(0.1)
        launcher.terminate()
        said = launcher.communicate(timeout=600)[1]
    assert launcher.returncode == 143 and len(re.findall(r"process \d of 2: sft: stopped after step", said)) == 2, said


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_the_quickstart(tmp_path, count):
    """The three stages of the quickstart, a few steps of each, with an epsilon at which Adam steps by no rounding:
    at the usual one parameters part by so much that two of 10,000 tokens are drawn otherwise.
    """
    config = ROOT / "configs" / "quickstart.py"
    flags = ["--stages.sft.steps", "6", "--stages.reward_model.steps", "6", "--stages.ppo.steps", "2"]
    flags += ["--stages.reward_model.pairs.prompts", "64", "--stages.reward_model.pairs.snippets", "0"]
    flags += ["--stages.reward_model.pairs.heldout_prompts", "32", "--stages.sft.evaluate_every", "3"]
    for optimizer in ("sft.optimizer", "reward_model.optimizer", "ppo.optimizer", "ppo.critic_optimizer"):
        flags += [f"--stages.{optimizer}.eps", "1e-3"]
    parts = Run(config, tmp_path / "parts", count, 1, *flags)
    assert parts.wait(3600) == [0] * count, parts.said()
    whole = Run(config, tmp_path / "whole", 1, 1, *flags)
    assert whole.wait(3600) == [0], whole.said()
    check_equal(whole.workdir, parts.workdir, differing=0.02)
