"""What the machine can do, measured beside the work: products and bytes a second; and a process's memory."""

import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import hosts

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def matmul_rate() -> float:
    """FLOPs a second of a product of square matrices.

    They are float32 of width 1,024 on a CPU, XLA's or NumPy's if it is faster; bfloat16 of width 8,192 on an
    accelerator, where a smaller one is over before the next is there.
    """
    cpu = jax.default_backend() == "cpu"
    width, dtype = (1024, jnp.float32) if cpu else (8192, jnp.bfloat16)
    a, b = (jax.random.normal(jax.random.key(i), (width, width), dtype) for i in range(2))
    product = jax.jit(jnp.matmul)
    found = [_median(lambda: jax.block_until_ready(product(a, b)))]
    if cpu:
        x, y = np.asarray(a), np.asarray(b)
        found.append(_median(lambda: x @ y))
    return 2 * width**3 / min(found)


def copy_rate(size: int) -> float:
    """Bytes a second, read and written, of a copy of so many bytes."""
    array = jnp.ones(max(size, 4096) // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)  # a copy alone the compiler may leave out, or leave to a single core
    return 2 * array.nbytes / _median(lambda: jax.block_until_ready(copy(array)))


def _median(work: Callable[[], Any], seconds: float = 0.5) -> float:
    """Seconds of one turn, the median of those that fit in half a second, at least five."""
    for _ in range(2):
        work()
    taken: list[float] = []
    while len(taken) < 5 or sum(taken) < seconds:
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def forget_peak() -> None:
    """Begin anew to watch for the most memory, where Linux lets a process do so."""
    if _CLEAR.exists():
        _CLEAR.write_text("5")


def peak_memory() -> int:
    """The most bytes that this process has held: an accelerator's, else resident in the machine's memory."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is not None and jax.default_backend() != "cpu":
        return stats["peak_bytes_in_use"]
    if _STATUS.exists():
        return next(int(line.split()[1]) * 1024 for line in _STATUS.read_text().splitlines() if line[:5] == "VmHWM")
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device() -> str:
    """The accelerator's or the processor's name, and how many of it there are."""
    if jax.default_backend() != "cpu":
        return f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    return processor()


def processor() -> str:
    """The processor's name as Linux has it, and its cores; what Python knows elsewhere."""
    cpuinfo, name = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return f"{hosts.cores()} cores of {name}"
