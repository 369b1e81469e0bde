"""Memory that is freed stays with the process, as page faults show."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
from concurrent.futures import ThreadPoolExecutor
if sys.argv[1] != "default":
    from rlhf_jax.run import start_backend
    from rlhf_jax.sharding import MeshConfig
    start_backend(MeshConfig(), in_threads=sys.argv[1] == "in threads")
import jax, jax.numpy as jnp

more = jax.jit(lambda x: x + 1)
x = jnp.ones((2048, 4096))

def faults(calls):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        more(x).block_until_ready()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / calls

def least():
    return min(faults(3) for _ in range(10))

with ThreadPoolExecutor(1) as threads:
    print(threads.submit(least).result() if sys.argv[1] == "in threads" else least())
"""


def faults(how: str) -> float:
    """Pages that a call maps, at its best of ten times three: memory lies as it comes until all sizes have a place."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what malloc keeps is glibc's to say")
def test_the_buffers_of_a_program_are_mapped_once_not_at_each_call():
    assert faults("default") > 8000, "32 MiB, which a call returns, are 8,192 pages"
    assert faults("kept") < 800
    assert faults("in threads") < 800
