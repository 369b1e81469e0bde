"""Starting a run of several processes: found from the cluster that started them, or from three flags."""

import contextlib
import errno
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize asks, but without starting anything

from rlhf_jax.errors import UserError
from rlhf_jax.hosts import peers


@dataclass(frozen=True)
class Hosts:
    """Which of a run's processes this is: three flags, or none where Slurm, Open MPI, GKE or Cloud TPU tell."""

    coordinator_address: str | None = None
    """Host and port where process 0 waits for the others, such as node1:8476; the same on all of them."""
    num_processes: int | None = None
    """Processes of the run: one a host, or one a GPU. 1: alone, whatever the cluster says."""
    process_id: int | None = None
    """This process's number, from 0."""
    start_timeout: int = 300
    """Seconds within which all processes must have started."""
    peer_timeout: int = 60
    """Seconds without a sign of life of a process until the others end."""

    def __post_init__(self) -> None:
        for name in ("start_timeout", "peer_timeout"):
            if vars(self)[name] < 1:
                raise UserError(f"--{name} must be at least 1, got {vars(self)[name]}")
        place = {name: vars(self)[name] for name in ("coordinator_address", "num_processes", "process_id")}
        missing = [f"--{name}" for name, value in place.items() if value is None]
        if missing and len(missing) < 3 and place != {**dict.fromkeys(place), "num_processes": 1}:
            raise UserError(f"{' and '.join(missing)} missing: a process has all three flags, or none in a cluster")
        if missing:
            return
        assert self.coordinator_address is not None and self.num_processes is not None and self.process_id is not None
        host, colon, port = self.coordinator_address.rpartition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
            raise UserError(f"--coordinator_address must be HOST:PORT, got {self.coordinator_address!r}")
        if self.num_processes < 1:
            raise UserError(f"--num_processes must be at least 1, got {self.num_processes}")
        if not 0 <= self.process_id < self.num_processes:
            raise UserError(f"--process_id must be from 0 to {self.num_processes - 1}, got {self.process_id}")


class Place(NamedTuple):
    """A process's place among those of its run."""

    address: str
    count: int
    index: int
    devices: Sequence[int] | None
    """The numbers of its own devices where a cluster starts a process a GPU; none: all of the host's."""

    @property
    def name(self) -> str:
        """As messages call the process."""
        return f"process {self.index} of {self.count}"


def join(hosts: Hosts) -> None:
    """Join the run's other processes, before anything touches a device; where there are none nothing happens.

    Raises UserError for a port that is taken, a process 0 that cannot be reached in time, a number given twice. What
    JAX itself ends the process for (not all came in time, process 0 is gone) is one line on stderr, too: from here on
    `stderr_filter.py` stands between JAX's C++ and the user.
    """
    place = _given(hosts) or _detected(hosts.start_timeout)
    if place is None or place.count == 1:
        return
    began = time.monotonic()
    _check_port(place) if place.index == 0 else _reach(place, hosts.start_timeout)
    _filter_stderr(place, hosts)
    # Others live on when a process dies, so that `peers` can say which; and SIGTERM is the loop's, not JAX's.
    jax.config.update("jax_enable_recoverability", True)
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        place.address,
        place.count,
        place.index,
        local_device_ids=place.devices,
        cluster_detection_method="deactivate",
        initialization_timeout=max(1, round(hosts.start_timeout - (time.monotonic() - began))),
        heartbeat_timeout_seconds=hosts.peer_timeout,
        shutdown_timeout_seconds=hosts.peer_timeout,
    )
    peers.watch(hosts.peer_timeout)


def _given(hosts: Hosts) -> Place | None:
    """The place that the flags say."""
    if hosts.num_processes == 1:
        return Place("", 1, 0, None)
    if hosts.coordinator_address is None or hosts.num_processes is None or hosts.process_id is None:
        return None
    return Place(hosts.coordinator_address, hosts.num_processes, hosts.process_id, None)


def _detected(seconds: int) -> Place | None:
    """The place that JAX's own detection of clusters finds; None outside of them."""
    try:
        address, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, seconds
        )
    except (RuntimeError, LookupError, ValueError, OSError) as error:
        raise UserError(
            f"a cluster, but not this process's place in it: {' '.join(str(error).split())}; give it by "
            "--coordinator_address, --num_processes and --process_id, or --num_processes 1 for a run of its own"
        ) from None
    return None if address is None or count is None or index is None else Place(address, count, index, devices)


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _check_port(place: Place) -> None:
    """Raise UserError where process 0 cannot listen: JAX's own answer is a crash."""
    port = _split(place.address)[1]
    for family, anywhere in ((socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")):
        with contextlib.suppress(OSError), socket.socket(family) as tried:  # a host without IPv6 has the other
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind((anywhere, port))
            except OSError as error:
                if error.errno in (errno.EADDRINUSE, errno.EACCES):
                    raise UserError(
                        f"{place.name}: port {port} of {place.address} is not free ({error.strerror}); give all "
                        "processes another --coordinator_address"
                    ) from None


def _reach(place: Place, seconds: int) -> None:
    """Wait until process 0 listens; raises UserError where it does not in time."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(_split(place.address), timeout=5).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > deadline:
            raise UserError(
                f"{place.name}: no process 0 at {place.address} within {seconds} s ({reason}); start it there, or "
                "correct --coordinator_address"
            )
        time.sleep(0.2)


def _filter_stderr(place: Place, hosts: Hosts) -> None:
    """Let what C++ and child processes write pass through `stderr_filter.py`; Python keeps the stderr that there is."""
    sys.stdout.flush()
    ours = os.dup(2)
    told = [place.name, place.address, str(hosts.start_timeout), str(hosts.peer_timeout)]
    script = Path(__file__).with_name("stderr_filter.py")
    # In a session of its own: Ctrl-C must not end it before its reader's last line.
    command = [sys.executable, "-ISs", str(script), *told]
    filtered = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=ours, stderr=ours, start_new_session=True)
    assert filtered.stdin is not None
    for number in (1, 2):  # gloo writes to stdout
        os.dup2(filtered.stdin.fileno(), number)
    filtered.stdin.close()
    sys.stderr = os.fdopen(ours, "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")
