"""What the scripts beside it share; it runs in the peers' own environments, where rlhf_jax is not installed.

A script is called as  PYTHON SCRIPT JOB.json  and prints its measurement as the last line on stdout, one JSON object.
"""

import importlib.metadata
import json
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np

WARM = 2
"""Turns before those that are timed."""
BATCHES = 4
"""Different batches of rows that there are."""
SLOW = 1e-9
"""A learning rate that leaves the policy, and with it the lengths of its completions, as they are."""


def job() -> dict:
    """What this process is to measure; as many threads as it says, for whatever library reads the variables."""
    told = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(told["threads"])
    return told | {"length": told["prompt"] + told["completion"]}


def tokens(told: dict, count: int) -> list[list[int]]:
    """Rows of random tokens after BOS: the same as rlhf_jax.bench.tasks draws."""
    _, bos, eos = told["ends"]
    rows = np.random.default_rng(0).integers(eos + 1, told["vocab"], (count, told["length"]))
    rows[:, 0] = bos
    return rows.tolist()


class Clock:
    """Seconds of turns: the first `WARM` are let go, and memory is watched anew after them."""

    def __init__(self) -> None:
        self.ends, self.warm_peak = [], 0

    def tick(self) -> None:
        """A turn has ended."""
        if len(self.ends) == WARM - 1:
            self.warm_peak = peak_memory()
            forget_peak()
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Of one turn."""
        timed = self.ends[WARM - 1 :]
        return (timed[-1] - timed[0]) / (len(timed) - 1)


def forget_peak() -> None:
    """Begin anew to watch for the most memory, where Linux lets a process do so."""
    if os.path.exists("/proc/self/clear_refs"):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """The most bytes resident in the machine's memory."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line[:5] == "VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def report(clock: Clock, *, tokens: float, flops: int, peak: int, packages: tuple[str, ...]) -> None:
    """Print the measurement."""
    found = {
        "seconds": clock.seconds,
        "tokens": tokens,
        "flops": flops,
        "peak_bytes": peak,
        "peak_bytes_compiling": clock.warm_peak,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    print(json.dumps(found), flush=True)
