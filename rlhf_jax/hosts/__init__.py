"""A run of several processes, on one host or on many: JAX's multi-controller runtime, and what the package adds to it.

Every process runs the same program. Process 0 alone writes files and talks to the user; where there is one process
everything here does nothing. A file system that all hosts share is assumed.
"""

from rlhf_jax.hosts.joining import Hosts, join
from rlhf_jax.hosts.peers import Parting
from rlhf_jax.hosts.together import by_rows, cores, count, fetch, from_writer, is_writer, wait

__all__ = ["Hosts", "Parting", "by_rows", "cores", "count", "fetch", "from_writer", "is_writer", "join", "wait"]
