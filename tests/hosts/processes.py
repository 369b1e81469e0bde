"""Runs of several real processes on this machine, of an experiment of seconds."""

import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "rlhf_jax", "run"]
CONFIG = '''"""A run of seconds: a tiny model from nothing, on labelled texts of a file."""

from pathlib import Path

from rlhf_jax.algorithms import ppo, preference, reward_model, sft
from rlhf_jax.algorithms.onpolicy import ValueHead
from rlhf_jax.config import Experiment
from rlhf_jax.data.sources import Jsonl
from rlhf_jax.interop.pretrained import Scratch
from rlhf_jax.models import ModelSpec
from rlhf_jax.optim import Optimizer
from rlhf_jax.placement import Disaggregated
from rlhf_jax.rewards.verifiers import PatternMatch
from rlhf_jax.sharding import MeshConfig

SPLIT = Disaggregated(sampling=MeshConfig(), training=MeshConfig(data=1, fsdp=4))

def get_config():
    spec = ModelSpec(vocab_size=320, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=32, max_len=64)
    # Adam's steps follow the sign of a gradient: a larger eps keeps those of rounding small.
    smooth = Optimizer(learning_rate=1e-3, eps=1e-3)
    pairs = reward_model.SampledPairs(prompts=16, heldout_prompts=8, completions=2, completion_tokens=12, batch_size=48)
    stages = {
        "sft": sft.Config(steps=12, row_length=49, batch_size=16, heldout_rows=32, evaluate_every=6,
                          checkpoint_every=2, optimizer=smooth),
        "reward_model": reward_model.Config(pairs=pairs, length=24, steps=4, batch_size=8, evaluate_every=2,
                                            checkpoint_every=2, optimizer=smooth),
        "ppo": ppo.Config(reward=PatternMatch("e"), critic=ValueHead(), steps=2, batch_size=16,
                          completion_tokens=8, checkpoint_every=1, evaluation_prompts=20, exact_kl_rows=8,
                          epochs=1, minibatches=2, optimizer=smooth, critic_optimizer=smooth),
        "apart": ppo.Config(reward="reward_model", steps=4, batch_size=16, completion_tokens=8, checkpoint_every=2,
                            evaluation_prompts=20, exact_kl_rows=8, epochs=1, minibatches=2, optimizer=smooth,
                            critic_optimizer=smooth, placement=SPLIT),
        "kto": preference.Config(pairs=pairs, losses=(preference.Term("kto"),), steps=4, batch_size=16, length=24,
                                 num_microbatches=2, evaluate_every=2, checkpoint_every=2, evaluation_prompts=20,
                                 optimizer=smooth),
    }
    data = Jsonl(Path(__file__).with_name("rows.jsonl"), heldout=0.4)
    return Experiment(model=Scratch(spec), data=data, stages={name: stages[name] for name in STAGES})
'''
TEXT = "a the film was so very good bad dull fine great story actor scene music long short end of with and"


def write_config(folder: Path, *stages: str) -> Path:
    """A config file with these of its stages, or all, and the rows that it names beside it."""
    words = TEXT.split()
    rows = [
        {"text": " ".join(words[(i * 7 + j * (3 + i % 11)) % len(words)] for j in range(12 + i % 9)), "label": i % 2}
        for i in range(240)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "tiny.py"
    path.write_text(f"{CONFIG}\n\nSTAGES = {stages or ('sft', 'reward_model', 'ppo')}\n")
    return path


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as tried:
        tried.bind(("localhost", 0))
        return tried.getsockname()[1]


_numbers = itertools.count()


class Run:
    """The processes of one run, each with `devices` devices of its own."""

    def __init__(
        self,
        config: Path,
        workdir: Path,
        count: int,
        devices: int,
        *flags: str,
        seconds: int = 60,
        configs: Sequence[Path] = (),
    ) -> None:
        """`configs` are the processes' own, where they have different ones."""
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(("XLA", "JAX"))}
        self.environment |= {
            "XDG_CACHE_HOME": str(workdir.with_name("cache")),
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }
        place = ["--coordinator_address", f"localhost:{free_port()}", "--num_processes", str(count)]
        place += ["--start_timeout", "120", "--peer_timeout", str(seconds)]
        self.workdir = workdir
        self._before = self._metrics()
        number = next(_numbers)
        self.logs = [workdir.with_name(f"{workdir.name}.{number}.{i}.log") for i in range(count)]
        self.processes = []
        for i, log in enumerate(self.logs):
            command = [*COMMAND, str(configs[i] if configs else config), "--workdir", str(workdir), *flags]
            command += [*place, "--process_id", str(i)] if count > 1 else []
            with log.open("w") as file:
                self.processes.append(subprocess.Popen(command, env=self.environment, stdout=file, stderr=file))

    def wait(self, timeout: float = 600) -> list[int]:
        """The exit codes, when all have ended."""
        deadline = time.monotonic() + timeout
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        finally:
            self.kill()

    def wait_for_a_step(self, timeout: float = 600) -> None:
        """Wait until the run has written a line of metrics of its own."""
        deadline = time.monotonic() + timeout
        while self._before.startswith(self._metrics()):
            running = all(process.poll() is None for process in self.processes)
            assert running and time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def _metrics(self) -> str:
        path = self.workdir / "metrics.jsonl"
        return path.read_text() if path.exists() else ""

    def said(self) -> list[str]:
        """What each process wrote."""
        return [log.read_text() for log in self.logs]

    def kill(self) -> None:
        """End what still runs."""
        for process in self.processes:
            process.kill()
            process.wait()
