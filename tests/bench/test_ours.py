"""The command from end to end: weights, a process, the table."""

import json
import os
import subprocess
import sys

import pytest

from rlhf_jax.bench.processes import ROOT


@pytest.mark.slow
def test_a_measurement_of_the_smallest_size(tmp_path):
    flags = ["--sizes", "tiny", "--what", "decode/1", "--peers", "none", "--pairs", "1", "--json"]
    command = [sys.executable, "-m", "rlhf_jax", "bench", *flags, "--workdir", str(tmp_path / "bench")]
    one_device = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=one_device, check=False)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1), done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    found = row["ours"]
    assert found["tokens_per_second"] == pytest.approx(128 / found["seconds"])  # no completion ends by itself
    assert found["share_of_limit"] > 0
    config = json.loads((tmp_path / "bench" / "models" / "tiny-full" / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (192, 4, 4096)
