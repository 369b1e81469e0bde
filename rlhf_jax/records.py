"""What a run says, and its records beside checkpoints and metrics: JSON files, one of them of what it has cost."""

import contextlib
import json
import platform
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_jax import digests, hosts, lockstep
from rlhf_jax.errors import UserError
from rlhf_jax.files import write_whole

_SESSIONS = "sessions.json"


def say(text: str) -> None:
    """A line for the user, on stderr: stdout is for what was asked for."""
    name = lockstep.name()
    if name is not None:
        text = f"[{name.label}] {text}"
    if hosts.is_writer():
        print(text, file=sys.stderr, flush=True)


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file holds; UserError where it holds none."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return found


def whole_json(path: Path) -> dict[str, Any] | None:
    """What a file that can be made again holds; None where there is none, or where it is damaged and set aside."""
    try:
        return read_json(path) if path.exists() else None
    except UserError as error:
        set_aside(path, str(error))
        return None


def set_aside(path: Path, wrong: str) -> None:
    """Keep what is damaged under another name, and say so."""
    if path.exists():
        say(f"{path}, now {digests.set_aside(path).name}: {wrong}; it is made again")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """A file that is there whole or not at all."""
    write_whole(path, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def session(workdir: Path, began: float) -> Iterator[dict[str, float]]:
    """Add this session's seconds, and its memory if it is the largest, to those before it; however it ends.

    What is given are the seconds of each stage so far, for `timed` to add to.
    """
    path, nothing = workdir / _SESSIONS, {"seconds": 0.0, "peak_memory_bytes": 0, "stage_seconds": {}}
    before = nothing | (hosts.from_writer(lambda: whole_json(path)) or {})
    stage_seconds = dict(before["stage_seconds"])
    try:
        yield stage_seconds
    finally:
        seconds = round(before["seconds"] + time.monotonic() - began, 1)
        if hosts.is_writer() and workdir.is_dir():  # not, where somebody removed it under the run
            peak = max(_peak_memory(), before["peak_memory_bytes"])
            write_json(path, {"seconds": seconds, "peak_memory_bytes": peak, "stage_seconds": stage_seconds})


@contextlib.contextmanager
def timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    """Add the seconds inside to a stage's."""
    began = time.monotonic()
    try:
        yield
    finally:
        seconds[stage] = round(seconds.get(stage, 0.0) + time.monotonic() - began, 1)


def costs(workdir: Path) -> dict[str, Any]:
    """The seconds and the memory of all sessions, as they stand in summary.json."""
    found = read_json(workdir / _SESSIONS)
    return {name: found[name] for name in ("seconds", "peak_memory_bytes")}


def _peak_memory() -> int:
    """The most memory that this process or a child of it has held, in bytes."""
    unit = 1 if platform.system() == "Darwin" else 1024
    own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    status = Path("/proc/self/status")
    if status.exists():  # Linux counts in ru_maxrss what the parent held before it started this process
        own = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return max(own, children) * unit
