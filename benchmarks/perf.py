"""Where the processor's time goes in a turn of what `rlhf-jax bench` times, by its own samples: Linux's `perf record`.

    python benchmarks/perf.py [tiny:ppo small:ppo tiny:decode/batch ...]

Each in a process of its own, which has compiled and warmed up before the first sample; twenty seconds of turns each,
that samples make longer: a virtual machine's may take twice their time. Prints a table of shares, a column a turn, as
benchmarks/PROFILE.md has it.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import datetime
from pathlib import Path

SECONDS = 20.0
KINDS = {
    "products (YNN)": r"ynn::dot_",
    "products (oneDNN, Eigen)": r"gemm|gebp|dnnl::|TensorContraction|EvalParallelContext",
    "packing for products": r"pack|Pack|transpose|Transpose",
    "other kernels of YNN": r"^ynn::|ynn_|slinky::",
    "copies and clearing": r"memmove|memcpy|memset|CopyThunk|LiteralBase",
    "handing out work": r"Eigen::|ThreadPool|RunQueue|Thunk|tsl::|absl::|futex|pthread|EventCount|sched_yield",
}
"""Shares by what a sample's symbol matches, the first that does."""
LOOPS, GENERATED, KERNEL, REST = "loops that XLA compiles", "products (oneDNN, Eigen)", "the system", "the rest"
ROWS = (*KINDS, LOOPS, KERNEL, REST)

_SAMPLE = re.compile(r"\s*([0-9a-f]+)\s+(.*) \((.*)\)\s*$")
_MAP = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ \S+\s*(.*)")


def measured(job: Path) -> None:
    """In a process of its own: sample a job's turns and print shares as JSON."""
    from rlhf_jax import sharding
    from rlhf_jax.bench import ours
    from rlhf_jax.bench.tasks import TASKS
    from rlhf_jax.bench.work import Work
    from rlhf_jax.run import start_backend
    from rlhf_jax.sharding import MeshConfig

    told = json.loads(job.read_text())
    work = Work(**{name: told[name] for name in Work.__dataclass_fields__})
    start_backend(MeshConfig())
    with tempfile.TemporaryDirectory() as folder:
        context = ours._context(Path(folder), told)
        task, samples = TASKS[work.kind](work, context), Path(folder) / "perf.data"
        with sharding.scope(context.mesh):
            ours._timed(task.turn, ours.WARM)
            command = ["perf", "record", "-F", "999", "-o", str(samples), "-p", str(os.getpid())]
            recorder = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            time.sleep(1)
            began = time.monotonic()
            while time.monotonic() - began < SECONDS:
                ours._timed(task.turn, 1)
            recorder.send_signal(signal.SIGINT)
            recorder.wait()
        print(json.dumps(shares(samples)))


def shares(samples: Path) -> dict[str, float]:
    """Of each of ROWS its part of all samples of this process."""
    generated = [(int(low, 16), int(high, 16)) for low, high in _writable_code()]
    command = ["perf", "script", "-i", str(samples), "-F", "ip,sym,dso"]
    counts: Counter[str] = Counter()
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        match = _SAMPLE.match(line)
        if match is not None:
            counts[_kind(int(match[1], 16), match[2], match[3], generated)] += 1
    return {kind: counts[kind] / counts.total() for kind in ROWS}


def _kind(address: int, symbol: str, library: str, generated: list[tuple[int, int]]) -> str:
    if "kernel" in library:
        return KERNEL
    named = next((kind for kind, pattern in KINDS.items() if re.search(pattern, symbol)), None)
    if named is not None:
        return named
    if any(low <= address < high for low, high in generated):  # oneDNN writes its kernels so, XLA its loops otherwise
        return GENERATED
    return LOOPS if symbol == "[unknown]" and not library.endswith(".so") else REST


def _writable_code() -> list[tuple[str, str]]:
    """Ranges of this process's memory that is written and run."""
    maps = (_MAP.match(line) for line in Path("/proc/self/maps").read_text().splitlines())
    return [(one[1], one[2]) for one in maps if one is not None and one[3].startswith("rwx") and not one[4]]


def main(names: list[str]) -> None:
    """Print the table of some turns."""
    from rlhf_jax.bench import machine
    from rlhf_jax.bench.work import choose

    if shutil.which("perf") is None:
        sys.exit("error: there is no `perf` here; it comes with Linux's linux-perf or linux-tools")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            size, _, what = name.partition(":")
            (work,) = choose(size, what, accelerator=False)[:1]
            job = Path(folder) / "job.json"
            job.write_text(json.dumps(work.job(Path(folder) / "models", threads=2)))
            if not (Path(folder) / "models" / work.weights).exists():
                subprocess.run([sys.executable, "-m", "rlhf_jax.bench.weights", str(job)], check=True, stdout=2)
            command = [sys.executable, __file__, "--measure", str(job)]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[name] = json.loads(said.splitlines()[-1])
    print(f"By `python benchmarks/perf.py {' '.join(names)}` on {machine.device()}, {datetime.now():%F %R}.\n")
    print("| | " + " | ".join(found) + " |\n|---|" + "---:|" * len(found))
    for kind in ROWS:
        print(f"| {kind} | " + " | ".join(f"{one[kind]:.1%}" for one in found.values()) + " |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measured(Path(sys.argv[2]))
    else:
        main(sys.argv[1:] or ["tiny:ppo", "small:ppo", "tiny:decode/batch", "small:decode/batch"])
