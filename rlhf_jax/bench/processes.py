"""Measurements as processes of their own, one at a time, each kept in a file: what is there is not measured again."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_jax import hosts
from rlhf_jax.bench.work import SIZES, Work
from rlhf_jax.errors import UserError
from rlhf_jax.metrics import Progress
from rlhf_jax.records import read_json, whole_json, write_json

ROOT = Path(__file__).parents[2]
"""The checkout, whose `benchmarks` has the other libraries' side."""
PEERS: dict[str, dict[str, str]] = {
    "trl": {"sft": "trl", "rm": "trl", "dpo": "trl", "decode": "trl", "ppo": "trl_ppo", "grpo": "trl"},
    "tunix": {"sft": "tunix", "dpo": "tunix", "decode": "tunix", "ppo": "tunix"},
}
"""Of each library the kinds of work that its script measures, and the environment that it runs in."""
LACKING = {
    ("tunix", "rm"): "google-tunix has no trainer of reward models",
    ("tunix", "grpo"): "google-tunix's GRPO takes functions of texts, not a network's scores",
}
"""What a library has no like of, but for cold starts, which are ours alone."""


@dataclass(frozen=True)
class Measurement:
    """One process's share: a side of a pair."""

    work: Work
    """The row that it is for."""
    side: str
    """ours, or a name of `PEERS`."""
    pair: int
    """From 0."""

    @property
    def key(self) -> str:
        """The name of its file."""
        return f"{self.done.size}_{self.done.what.replace('/', '-')}_{self.side}_{self.pair}"

    @property
    def done(self) -> Work:
        """What its process does."""
        return self.work if self.side == "ours" else self.work.of_peers


@dataclass(frozen=True)
class Bench:
    """All measurements of a table."""

    works: Sequence[Work]
    """Its rows."""
    peers: Sequence[str]
    """The libraries beside."""
    pairs: int
    """How often each side is measured."""
    workdir: Path
    """Where measurements, jobs, logs and models are kept."""
    venvs: Path
    """Where the libraries' environments are."""
    limit: float
    """Seconds that a process may take."""

    def measurements(self) -> list[Measurement]:
        """In the order in which they are made: pair after pair, the sides of each in turn."""
        sides = ("ours", *self.peers)
        turns = [
            Measurement(work, side, pair)
            for pair in range(self.pairs)
            for work in self.works
            for side in sides
            if pair < work.pairs(self.pairs) and (side == "ours" or work.kind in PEERS[side])
        ]
        return list({one.key: one for one in turns}.values())

    def found(self, one: Measurement) -> dict[str, Any] | None:
        """What a process has printed, or {"error"}; None where it has not run."""
        return whole_json(self._path(one))

    def run(self) -> None:
        """Make the measurements that are missing, those that failed among them; of what fails again one is tried."""
        self._claim()
        turns, failed = self.measurements(), set()
        with Progress("bench", len(turns)) as progress:
            for done, one in enumerate(turns, start=1):
                there, what = self.found(one), (one.side, one.done)
                if what not in failed and (there is None or "error" in there):
                    result = self._measured(one)
                    write_json(self._path(one), result)
                    said = result.get("error") or f"{result['seconds']:.3g} s a turn"
                    progress.note(f"{one.done.size} {one.done.what} {one.side}, pair {one.pair + 1}: {said}")
                    if "error" in result:
                        failed.add(what)
                progress.update(done, {})

    def _path(self, one: Measurement) -> Path:
        return self.workdir / "measurements" / f"{one.key}.json"

    def _claim(self) -> None:
        """The folder is this code's: figures of two versions never stand in one table."""
        path, sources = self.workdir / "bench.json", _digest()
        if not path.exists():
            if self.workdir.is_dir() and any(self.workdir.iterdir()):
                raise UserError(
                    f"--workdir {self.workdir} holds files and no benchmark; choose an empty or a new folder"
                )
            write_json(path, {"sources": sources})
        elif read_json(path).get("sources") != sources:
            raise UserError(f"--workdir {self.workdir}: its figures are of other source files; choose another folder")

    def _measured(self, one: Measurement) -> dict[str, Any]:
        work = one.done
        job = self.workdir / "jobs" / f"{work.size}_{work.what.replace('/', '-')}.json"
        write_json(job, work.job(self.workdir / "models", threads=hosts.cores()))
        if work.size in SIZES:
            model = self.workdir / "models" / work.weights
            if not model.exists():
                made = self._process([sys.executable, "-m", "rlhf_jax.bench.weights", str(job)], "weights", _own())
                if "error" in made:
                    return {"error": f"weights: {made['error']}"}
        if one.side == "ours":
            module = {"cold": "cold_start", "sweep": "sweep_time"}.get(work.kind, "ours")
            return self._process([sys.executable, "-m", f"rlhf_jax.bench.{module}", str(job)], one.key, _own())
        python = self.venvs / PEERS[one.side][work.kind] / "bin" / "python"
        script = ROOT / "benchmarks" / "peers" / f"{one.side}_side.py"
        if not script.exists():
            return {"error": f"{script} is not there: other libraries are measured from a checkout"}
        if not python.exists():
            return {"error": f"no {python}: python benchmarks/make_venvs.py makes it"}
        return self._process([str(python), str(script), str(job)], one.key, _theirs())

    def _process(self, command: list[str], name: str, environment: dict[str, str]) -> dict[str, Any]:
        """The JSON object in the last line that a process prints; {"error"} where there is none."""
        log = self.workdir / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as errors:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, env=environment, start_new_session=True
            )
            try:
                out, _ = process.communicate(timeout=self.limit)
            except subprocess.TimeoutExpired:
                return {"error": f"over --limit {self.limit:g} seconds"}
            finally:
                _end(process)
        lines = out.decode(errors="replace").strip().splitlines()
        try:
            return json.loads(lines[-1]) | {"at": time.strftime("%Y-%m-%d %H:%M")}
        except (IndexError, ValueError, TypeError):
            return {"error": _reason(log, process.returncode)}


def _end(process: subprocess.Popen) -> None:
    """End a process and what it has started, however it is."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _reason(log: Path, code: int) -> str:
    """A line of a log on why a process printed no measurement."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else f"exit code {code}")
    return said if code >= 0 else f"ended by signal {-code}"


def _own() -> dict[str, str]:
    """An environment in which this package is found."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def _theirs() -> dict[str, str]:
    """An environment without what is for this package's Python alone."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def _digest() -> str:
    """Of this package's sources and of the peers' scripts."""
    digest = hashlib.sha256()
    for folder in (ROOT / "rlhf_jax", ROOT / "benchmarks" / "peers"):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
