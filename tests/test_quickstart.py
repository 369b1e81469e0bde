"""The quickstart's own stages on four virtual devices: the first steps are those of one device."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_jax.metrics import read_jsonl

ROOT = Path(__file__).parents[1]
SHORT = {
    "sft": ["steps=3", "heldout_rows=32"],
    "reward_model": [
        "steps=3",
        "pairs.prompts=40",
        "pairs.heldout_prompts=8",
        "pairs.snippets=8",
        "pairs.batch_size=64",
    ],
    "ppo": ["steps=3", "batch_size=32", "evaluation_prompts=32"],
}
TIMES = ("seconds", "tokens_per_second")


def command(config, workdir, *flags):
    shortened = [f"--stages.{stage}.{field}" for stage, fields in SHORT.items() for field in fields]
    shortened = [part for flag in shortened for part in flag.split("=")]
    return [sys.executable, "-m", "rlhf_jax", "run", str(config), "--workdir", str(workdir), *shortened, *flags]


def lines(workdir, stage):
    return [line for line in read_jsonl(workdir / "metrics.jsonl") if line["stage"] == stage]


@pytest.mark.slow
def test_four_devices_take_the_steps_of_one(tmp_path):
    """Each stage on four devices starts from what the one-device run left: its data and parameters."""
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    env |= {"PYTHONPATH": str(ROOT)}
    config, one = ROOT / "configs" / "quickstart.py", tmp_path / "one"
    subprocess.run(command(config, one), env=env, check=True, capture_output=True, timeout=600)
    for index, stage in enumerate(SHORT):
        four = tmp_path / f"four_{stage}"
        shutil.copytree(one, four)
        (four / "summary.json").unlink()
        for later in list(SHORT)[index:]:
            shutil.rmtree(four / later)
        if stage == "reward_model":
            shutil.copytree(one / stage / "data", four / stage / "data")
        subprocess.run(command(config, four, "--mesh.fsdp", "4"), env=env, check=True, capture_output=True, timeout=600)
        pairs = list(zip(lines(one, stage), lines(four, stage), strict=True))
        assert len(pairs) == 3
        for ours, theirs in pairs:
            assert ours.keys() == theirs.keys()
            for name in ours.keys() - {"stage", *TIMES}:
                assert theirs[name] == pytest.approx(ours[name], abs=1e-4), (stage, ours["step"], name)
