"""One measurement of this package, in a process of its own.

    python -m rlhf_jax.bench.ours JOB.json

The last line on stdout is the measurement, one JSON object.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax

from rlhf_jax import memory, sharding
from rlhf_jax.algorithms.context import Context
from rlhf_jax.bench import machine
from rlhf_jax.bench.tasks import TASKS, Task
from rlhf_jax.bench.work import Work
from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.interop import FromPretrained
from rlhf_jax.models.spec import Lora
from rlhf_jax.provenance import versions
from rlhf_jax.run import start_backend
from rlhf_jax.sharding import MeshConfig

WARM = 2
"""Turns before those that are timed: one compiles, and one finds buffers as it leaves them."""


def main(path: str) -> None:
    """Print the measurement of a job."""
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    work = Work(**{field.name: job[field.name] for field in fields(Work)})
    start_backend(MeshConfig())
    with tempfile.TemporaryDirectory(prefix="rlhf_jax_bench_") as folder:
        context = _context(Path(folder), job)
        task = TASKS[work.kind](work, context)
        jax.clear_caches()  # what counting its FLOPs took
        with sharding.scope(context.mesh):
            print(json.dumps(measure(task, work.turns)))


def measure(task: Task, turns: int) -> dict[str, Any]:
    """Seconds of a turn and what it did in them, memory, and what the machine could do just then."""
    _timed(task.turn, 1)
    compiling = machine.peak_memory()
    memory.give_back()  # as a stage does after its first step
    _timed(task.turn, WARM - 1)
    machine.forget_peak()
    seconds, learnt = _timed(task.turn, turns)
    found = {
        "seconds": seconds,
        "tokens": learnt / turns,
        "flops": task.flops,
        "peak_bytes": machine.peak_memory(),
        "peak_bytes_compiling": compiling,
        "matmul_rate": machine.matmul_rate(),
        "device": machine.device(),
        "versions": versions(),
    }
    if task.steps:
        rate = machine.copy_rate(task.step_bytes)
        by_bytes, by_flops = task.steps * task.step_bytes / rate, task.flops / found["matmul_rate"]
        found |= {"copy_rate": rate, "limit_seconds": max(by_bytes, by_flops)}
    if task.updates is not None:
        update, flops = task.updates()
        _timed(lambda: (update(), 0), WARM)
        found |= {"update_seconds": _timed(lambda: (update(), 0), turns)[0], "update_flops": flops}
    return found


def _timed(turn: Callable[[], tuple[Any, int]], turns: int) -> tuple[float, int]:
    """Seconds of one of so many turns, queued one behind the other as a stage does, and the tokens of all."""
    learnt, last = 0, None
    began = time.perf_counter()
    for _ in range(turns):
        last, some = turn()
        learnt += some
    jax.block_until_ready(last)
    return (time.perf_counter() - began) / turns, learnt


def _context(workdir: Path, job: dict[str, Any]) -> Context:
    """A stage's surroundings: one device, the job's model, all layers unrolled where that is fastest."""
    mesh = sharding.make_mesh(MeshConfig())
    layers = FromPretrained(job["model"]).spec.n_layers
    model = FromPretrained(
        job["model"],
        compute=job["precision"],
        unroll=layers if jax.default_backend() == "cpu" else 1,
        lora=Lora() if job["variant"] == "hydra" else None,
    )
    data = MovieReviews()
    return Context(workdir, job["seed"], mesh, model.load(data=data, workdir=workdir, seed=job["seed"]), data)


if __name__ == "__main__":
    main(sys.argv[1])
