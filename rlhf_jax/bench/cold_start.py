"""Seconds from a command to its first step, in a process of its own.

    python -m rlhf_jax.bench.cold_start JOB.json

The command is `rlhf-jax run configs/quickstart.py` in a new folder. Its compiled programs are kept in a new folder too,
or, for "cold/cached", in one that a run before has filled. The last line on stdout is the measurement.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rlhf_jax.bench import machine
from rlhf_jax.provenance import versions

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.py"
PATIENCE = 900
"""Seconds until a run without a first step is given up."""


def main(path: str) -> None:
    """Print the measurement of a job."""
    variant = json.loads(Path(path).read_text(encoding="utf-8"))["variant"]
    with tempfile.TemporaryDirectory(prefix="rlhf_jax_cold_") as folder:
        times = [
            seconds_to_first_step(Path(folder) / f"run{i}", Path(folder) / "xla")
            for i in range(1 if variant == "compiling" else 2)
        ]
    found = {"seconds": times[-1], "tokens": 0, "flops": 0, "device": machine.device(), "versions": versions()}
    print(json.dumps(found))


def seconds_to_first_step(workdir: Path, cache: Path) -> float:
    """From the start of the command to the first line of metrics.jsonl, which is there once the first step has ended.

    Raises RuntimeError, with what the run said last, where there is none.
    """
    command = [sys.executable, "-m", "rlhf_jax", "run", str(CONFIG), "--workdir", str(workdir)]
    metrics, log = workdir / "metrics.jsonl", workdir.with_suffix(".log")
    began = time.perf_counter()
    with log.open("wb") as said:
        environment = os.environ | keeping(cache)
        run = subprocess.Popen(command, stdout=said, stderr=said, env=environment, start_new_session=True)
        try:
            while not (metrics.exists() and metrics.stat().st_size):
                if run.poll() is not None or time.perf_counter() - began > PATIENCE:
                    last = log.read_text(errors="replace").strip().splitlines()[-1:]
                    raise RuntimeError(f"no first step: {' '.join(last)}")
                time.sleep(0.02)
            return time.perf_counter() - began
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
            run.wait()


def keeping(cache: Path) -> dict[str, str]:
    """The settings by which JAX keeps every compiled program in a folder."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


if __name__ == "__main__":
    main(sys.argv[1])
