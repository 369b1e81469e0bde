import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.hosts import Hosts, joining, stderr_filter
from rlhf_jax.hosts.joining import Place
from tests.hosts.processes import free_port

PLACE = {"coordinator_address": "node1:8476", "num_processes": 4, "process_id": 3}


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    """Nothing of a cluster that the tests themselves may run in."""
    for name in ("SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri", "KUBERNETES_SERVICE_HOST", "JAX_COORDINATOR_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"process_id": None}, "--process_id missing: a process has all three flags, or none in a cluster"),
        ({"coordinator_address": None, "num_processes": None}, "--coordinator_address and --num_processes missing"),
        ({"process_id": 4}, "--process_id must be from 0 to 3, got 4"),
        ({"process_id": -1}, "--process_id must be from 0 to 3, got -1"),
        ({"num_processes": 0}, "--num_processes must be at least 1, got 0"),
        ({"coordinator_address": "node1"}, "--coordinator_address must be HOST:PORT, got 'node1'"),
        ({"coordinator_address": ":80"}, "--coordinator_address must be HOST:PORT"),
        ({"coordinator_address": "node1:99999"}, "--coordinator_address must be HOST:PORT"),
        ({"peer_timeout": 0}, "--peer_timeout must be at least 1"),
    ],
)
def test_flags_that_cannot_be(changes, message):
    with pytest.raises(UserError) as caught:
        Hosts(**{**PLACE, **changes})
    assert str(caught.value).startswith(message)


def test_one_process_alone_joins_nobody(monkeypatch):
    joining.join(Hosts())
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    joining.join(Hosts(num_processes=1))
    assert joining.peers._watch is None


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        (
            {"SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "gpu[07-09]", "SLURM_NTASKS": "24", "SLURM_PROCID": "9",
             "SLURM_LOCALID": "1"},
            Place(f"gpu07:{65535 - 4096 + 1 + 1}", 24, 9, [1]),
        ),
        (
            {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2",
             "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
            Place(f"10.96.0.1:{1531576320 // 4096 % 4096 + 65535 - 4096 + 1}", 2, 1, [0]),
        ),
        ({}, None),
    ],
    ids=["Slurm", "Open MPI", "none"],
)  # fmt: skip
def test_clusters_that_tell(variables, place, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert joining._detected(1) == place


def test_a_cluster_that_tells_half(monkeypatch):
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "1.0;tcp://10.96.0.1:34911")
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match=r"^a cluster, but not this process's place in it: .*; give it by --coord"):
        joining._detected(1)


def test_a_port_in_use_is_said_by_process_0():
    with socket.socket() as other:
        other.bind(("localhost", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError) as caught:
            joining.join(Hosts(f"localhost:{port}", 2, 0))
    assert str(caught.value).startswith(f"process 0 of 2: port {port} of localhost:{port} is not free")


@pytest.mark.parametrize("host", ["localhost", "no-such-host.invalid"])
def test_a_process_0_that_is_not_there_is_said_in_time(host):
    address, began = f"{host}:{free_port()}", time.monotonic()
    with pytest.raises(UserError) as caught:
        joining.join(Hosts(address, 2, 1, start_timeout=1))
    assert re.match(rf"process 1 of 2: no process 0 at {address} within 1 s \(.+\); start it there", str(caught.value))
    assert time.monotonic() - began < 10


FATAL = (
    b"F1121 17:35:03.730501    6073 client.h:80] Terminating process because the JAX distributed service detected "
    b"fatal errors. This most likely indicates that another task died; see the other task logs for more details. "
    b"absl::Status: %s\n"
    b"RPC: /xla.coordination.CoordinationService/%s\n*** Check failure stack trace: ***\n"
    b"    @     0x7ff6f8440634  absl::lts_20260107::log_internal::LogMessage::SendToLog()\n"
)


@pytest.mark.parametrize(
    ("status", "call", "said"),
    [
        (b"UNAVAILABLE: Socket closed", b"PollForError", r"process 0, at node1:8476, is gone since \d\d:\d\d:\d\d;"),
        (b"DEADLINE_EXCEEDED: Deadline Exceeded", b"Heartbeat",
         r"process 0, at node1:8476, has not answered for 60 s, since \d\d:\d\d:\d\d; the same command"),
        (b"DEADLINE_EXCEEDED: Deadline Exceeded", b"RegisterTask",
         r"not all processes came to node1:8476 within 300 s; the others' messages say why"),
    ],
)  # fmt: skip
def test_last_words_of_jax_become_one_line(status, call, said):
    """The C++ text as JAX 0.10.2 writes it, among lines of others, which pass."""
    text = (
        b"W1121 17:44:33.143209   14736 coordination_service.cc:185] [13] Using recoverable task feature.\n"
        b"[Gloo] Rank 1 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1\n"
        b"printed by a reward\nE1121 18:03:03.890121   19209 slow_operation_alarm.cc:73] Very slow compile?\n"
    ) + FATAL % (status, call)
    script = Path(stderr_filter.__file__)
    command = [sys.executable, "-ISs", str(script), "process 1 of 2", "node1:8476", "300", "60"]
    done = subprocess.run(command, input=text, capture_output=True, timeout=60)
    first, second, last = done.stderr.decode().splitlines()
    assert first == "printed by a reward" and second.endswith("Very slow compile?")
    assert re.match(rf"error: process 1 of 2: {said}", last) and done.stdout == b""
