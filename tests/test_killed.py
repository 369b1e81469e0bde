"""Real processes, killed with SIGKILL in every stage: the same command goes on and ends where an unbroken run does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_jax.metrics import read_jsonl

ROOT = Path(__file__).parents[1]
CONFIG = '''"""A run of seconds: a tiny model from nothing."""

from rlhf_jax.algorithms import ppo, reward_model, sft
from rlhf_jax.config import Experiment
from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.interop.pretrained import Scratch
from rlhf_jax.kl import AdaptiveKL
from rlhf_jax.models import ModelSpec


def get_config():
    spec = ModelSpec(vocab_size=512, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, d_ff=64, max_len=64)
    pairs = reward_model.SampledPairs(prompts=64, heldout_prompts=32, completion_tokens=16, batch_size=96)
    return Experiment(
        model=Scratch(spec),
        data=MovieReviews(),
        stages={
            "sft": sft.Config(steps=60, row_length=49, batch_size=16, heldout_rows=32, checkpoint_every=7),
            "reward_model": reward_model.Config(pairs=pairs, length=25, steps=60, batch_size=8, checkpoint_every=7),
            "ppo": ppo.Config(steps=40, batch_size=16, completion_tokens=16, kl=AdaptiveKL(), checkpoint_every=3,
                              evaluation_prompts=32, exact_kl_rows=8, epochs=2, minibatches=2),
        },
    )
'''


@pytest.fixture
def command(tmp_path):
    """The command for a workdir, and the environment that it runs in: one device, caches of the test's own."""
    config = tmp_path / "tiny.py"
    config.write_text(CONFIG)
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}

    def make(workdir):
        return [sys.executable, "-m", "rlhf_jax", "run", str(config), "--workdir", str(workdir)], env

    return make


def kill_in(stage, step, workdir, args, env):
    """Start the command, and kill it as soon as the stage has written its `step`th line."""
    process = subprocess.Popen(args, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and any(line["stage"] == stage and line["step"] >= step for line in read_jsonl(path)):
            process.send_signal(signal.SIGKILL)
            process.wait()
            return
        time.sleep(0.02)
    process.kill()
    process.wait()
    pytest.fail(f"{stage} never came to step {step}")


def test_a_run_killed_in_every_stage_ends_where_an_unbroken_one_does(command, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run(command(whole)[0], env=command(whole)[1], check=True, capture_output=True, timeout=300)
    for stage, step in (("sft", 11), ("reward_model", 24), ("ppo", 5)):
        kill_in(stage, step, broken, *command(broken))
    done = subprocess.run(command(broken)[0], env=command(broken)[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    summaries = [json.loads((workdir / "summary.json").read_text()) for workdir in (whole, broken)]
    for summary in summaries:
        assert summary.pop("seconds") > 0 and summary.pop("peak_memory_bytes") > 1e8
    assert summaries[0] == summaries[1]
    assert set(summaries[0]["params_digest"]) == {"sft", "reward_model", "ppo"}
    for stage, steps in (("sft", 60), ("reward_model", 60), ("ppo", 40)):
        lines = [line for line in read_jsonl(broken / "metrics.jsonl") if line["stage"] == stage]
        assert [line["step"] for line in lines] == list(range(1, steps + 1))
    rows = [(workdir / "ppo" / "samples.jsonl").read_text() for workdir in (whole, broken)]
    assert rows[0] == rows[1]
    again = subprocess.run(command(broken)[0], env=command(broken)[1], capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and "complete" in again.stderr
