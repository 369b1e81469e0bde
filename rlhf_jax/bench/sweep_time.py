"""Seconds of runs that differ in their seeds: one after another, each a process of its own, or in one sweep.

    python -m rlhf_jax.bench.sweep_time JOB.json

Both are the quickstart at a fifth of its steps, from commands that find all their programs compiled: a first turn,
which is not timed, fills the folder where these are kept. The last line on stdout is the measurement.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rlhf_jax.bench import machine
from rlhf_jax.bench.cold_start import CONFIG, keeping
from rlhf_jax.provenance import versions

SEEDS = 8
STEPS = {"sft.steps": 20, "reward_model.steps": 140, "reward_model.pairs.prompts": 240, "ppo.steps": 4}
FLAGS = [part for name, value in STEPS.items() for part in (f"--stages.{name}", str(value))]


def main(path: str) -> None:
    """Print the measurement of a job."""
    variant = json.loads(Path(path).read_text(encoding="utf-8"))["variant"]
    with tempfile.TemporaryDirectory(prefix="rlhf_jax_sweep_") as folder:
        runs, cache = {"apart": apart, "together": together}[variant], Path(folder) / "xla"
        runs(Path(folder) / "first", cache, 1 if variant == "apart" else SEEDS)
        began = time.perf_counter()
        runs(Path(folder) / "timed", cache, SEEDS)
        seconds = time.perf_counter() - began
    found = {"seconds": seconds, "tokens": 0, "flops": 0, "device": machine.device(), "versions": versions()}
    print(json.dumps(found))


def apart(folder: Path, cache: Path, seeds: int) -> None:
    """A run a seed, one after another."""
    for seed in range(seeds):
        _command(["run", str(CONFIG), *FLAGS, "--seed", str(seed), "--workdir", str(folder / str(seed))], cache)


def together(folder: Path, cache: Path, seeds: int) -> None:
    """All in one sweep."""
    _command(["sweep", str(CONFIG), *FLAGS, "--seeds", str(seeds), "--to", str(folder)], cache)


def _command(arguments: Sequence[str], cache: Path) -> None:
    command = [sys.executable, "-m", "rlhf_jax", *arguments]
    subprocess.run(command, env=os.environ | keeping(cache), stdout=sys.stderr, check=True)


if __name__ == "__main__":
    main(sys.argv[1])
