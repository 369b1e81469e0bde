"""Running an experiment: its stages in order, in a workdir that any later session goes on from."""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax import report, sharding
from rlhf_jax.algorithms import ppo, pretrain, reward_model, sft
from rlhf_jax.algorithms.context import Context
from rlhf_jax.cache import cache_dir
from rlhf_jax.config import Experiment, differences, to_dict, validate
from rlhf_jax.errors import UserError
from rlhf_jax.sharding import MeshConfig
from rlhf_jax.types import Params

STAGES: dict[type, Callable[..., dict[str, Any]]] = {
    pretrain.Config: pretrain.train,
    sft.Config: sft.train,
    reward_model.Config: reward_model.train,
    ppo.Config: ppo.train,
}
"""What trains each kind of stage."""

# Where it runs and who watches may change between sessions; what it computes may not.
_FREE_FIELDS = ("mesh.", "wandb:")

_PACKAGES = ("rlhf_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "scikit-learn")


def run(experiment: Experiment, workdir: Path, command: list[str]) -> dict[str, Any]:
    """Run every stage that is not finished yet; returns what summary.json holds.

    Raises UserError before anything is written where the experiment cannot run or the workdir belongs to another one.
    """
    validate(experiment, start_backend(experiment.mesh))
    config = to_dict(experiment)
    _check_workdir(workdir, config)
    workdir.mkdir(parents=True, exist_ok=True)
    with _locked(workdir):
        if (workdir / "summary.json").exists():
            say(f"{workdir} is complete; its figures are in summary.json and report.html")
            return json.loads((workdir / "summary.json").read_text(encoding="utf-8"))
        _write_json(workdir / "config.json", {"experiment": config, **_provenance(command)})
        with _session(workdir):
            context = Context(
                workdir=workdir,
                seed=experiment.seed,
                mesh=sharding.make_mesh(experiment.mesh),
                model=experiment.model.load(data=experiment.data, workdir=workdir, seed=experiment.seed),
                data=experiment.data,
                wandb=experiment.wandb,
            )
            for name, stage in experiment.stages.items():
                _run_stage(name, stage, context)
        return _finish(experiment, context)


def start_backend(mesh: MeshConfig) -> int:
    """Set what JAX reads when it starts, unless the user has set it; returns the number of devices.

    Compiled programs are kept in the user's cache folder. A mesh of fixed size gets as many devices on a CPU.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir("xla")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    flagged = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if mesh.fixed_devices > 1 and not flagged and jax.config.jax_num_cpu_devices < 1:
        with contextlib.suppress(RuntimeError):  # JAX has started: its devices are what they are
            jax.config.update("jax_num_cpu_devices", mesh.fixed_devices)
    return jax.device_count()


def params_digest(params: Params) -> str:
    """sha256 of names, types, shapes and bytes of parameters."""
    digest = hashlib.sha256()
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    for name in sorted(leaves):
        array = np.asarray(leaves[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def say(text: str) -> None:
    """A line for the user, on stderr: stdout is for what was asked for."""
    print(text, file=sys.stderr, flush=True)


def _run_stage(name: str, stage: Any, context: Context) -> None:
    done = context.stage_dir(name) / "summary.json"
    if done.exists():
        say(f"{name}: finished before")
        return
    summary = STAGES[type(stage)](stage, context, name)
    _write_json(done, summary)
    figures = "  ".join(f"{key} {value:.4g}" for key, value in summary.items())
    say(f"{name}: {figures}")


def _finish(experiment: Experiment, context: Context) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    digests: dict[str, str] = {}
    for name, stage in experiment.stages.items():
        summary[name] = json.loads((context.stage_dir(name) / "summary.json").read_text(encoding="utf-8"))
        load = context.head_params if stage.produces == "reward" else context.policy_params
        digests[name] = params_digest(load(name))
    summary |= json.loads((context.workdir / _SESSIONS).read_text(encoding="utf-8"))
    summary["params_digest"] = digests
    _write_json(context.workdir / "summary.json", summary)
    page = report.write(context.workdir)
    say(f"{context.workdir / 'summary.json'} and {page} are written")
    return summary


def _check_workdir(workdir: Path, config: dict[str, Any]) -> None:
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {workdir} is a file, not a folder")
    path = workdir / "config.json"
    if not path.exists():
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))["experiment"]
    except (ValueError, KeyError):
        raise UserError(f"{path} is damaged; move {workdir} away, or choose another --workdir") from None
    changed = [line for line in differences(there, config) if not line.startswith(_FREE_FIELDS)]
    if changed:
        raise UserError(
            f"{workdir} was made by another config: {'; '.join(changed)}; choose another --workdir, or these fields"
        )


@contextlib.contextmanager
def _locked(workdir: Path) -> Iterator[None]:
    """One run a workdir; the system lets go of the lock when a process dies."""
    with (workdir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run works in {workdir}; wait for it, or choose another --workdir") from None
        yield


_SESSIONS = "sessions.json"


@contextlib.contextmanager
def _session(workdir: Path) -> Iterator[None]:
    """Add this session's seconds, and its memory if it is the largest, to those before it; however it ends."""
    path, start = workdir / _SESSIONS, time.monotonic()
    before = {"seconds": 0.0, "peak_memory_bytes": 0}
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
    try:
        yield
    finally:
        unit = 1 if platform.system() == "Darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        seconds = round(before["seconds"] + time.monotonic() - start, 1)
        _write_json(path, {"seconds": seconds, "peak_memory_bytes": max(peak, before["peak_memory_bytes"])})


def _provenance(command: list[str]) -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"versions": versions, "commit": _commit(), "command": command}


def _commit() -> str | None:
    """The commit of the code that runs, where it runs from a checkout; "+" after it where files differ from it."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
        if commit.returncode:
            return None
        changes = ["git", "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(changes, cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
