"""Running an experiment: its stages in order, in a workdir that any later session goes on from."""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax import __version__, models, report, sharding
from rlhf_jax.algorithms import ppo, preference, pretrain, reward_model, sft
from rlhf_jax.algorithms.context import Context
from rlhf_jax.cache import cache_dir
from rlhf_jax.config import Experiment, check_inputs, differences, to_dict, validate
from rlhf_jax.errors import NonFiniteError, UserError
from rlhf_jax.files import write_whole
from rlhf_jax.models import lora
from rlhf_jax.sharding import MeshConfig
from rlhf_jax.types import Params

STAGES: dict[type, Callable[..., dict[str, Any]]] = {
    pretrain.Config: pretrain.train,
    sft.Config: sft.train,
    reward_model.Config: reward_model.train,
    preference.Config: preference.train,
    ppo.Config: ppo.train,
}
"""What trains each kind of stage."""

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "scikit-learn")
_SESSIONS = "sessions.json"


def run(experiment: Experiment, workdir: Path, command: list[str], *, began: float | None = None) -> dict[str, Any]:
    """Run every stage that is not finished yet; returns what summary.json holds.

    The summary's seconds count from `began`, a reading of time.monotonic(), or from this call.

    Raises UserError before anything is written where the experiment cannot run or the workdir belongs to another one.
    """
    began = time.monotonic() if began is None else began
    _check(experiment, workdir)
    config = to_dict(experiment)
    _check_workdir(workdir, config)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be made: {error.strerror}") from None
    with _locked(workdir):
        if _is_complete(workdir, experiment):
            say(f"{workdir} is complete: its figures are in summary.json and report.html")
        else:
            if not (workdir / "config.json").exists():
                _write_json(workdir / "config.json", {"experiment": config, **_provenance(command)})
            _train(experiment, workdir, began)
        if not (workdir / "report.html").exists():
            report.write(workdir)
        return _read_json(workdir / "summary.json")


def start_backend(mesh: MeshConfig) -> int:
    """Set what JAX reads when it starts, unless the user has set it; returns the number of devices.

    Compiled programs are kept in the user's cache folder. A mesh of fixed size gets as many devices on a CPU.
    """
    settings: Any = jax.config  # its attributes are made at run time
    if settings.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir("xla")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    flagged = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if mesh.fixed_devices > 1 and not flagged and settings.jax_num_cpu_devices < 1:
        with contextlib.suppress(RuntimeError):  # JAX has started: its devices are what they are
            jax.config.update("jax_num_cpu_devices", mesh.fixed_devices)
    return jax.device_count()


def params_digest(params: Params) -> str:
    """sha256 of names, types, shapes and bytes of parameters, in the order of the names."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    digest = hashlib.sha256()
    for name in sorted(named):
        array = np.asarray(named[name])
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def say(text: str) -> None:
    """A line for the user, on stderr: stdout is for what was asked for."""
    print(text, file=sys.stderr, flush=True)


def _check(experiment: Experiment, workdir: Path) -> None:
    """All that can be wrong before anything is compiled or written, but for what stands in the workdir."""
    validate(experiment, start_backend(experiment.mesh))
    check_inputs(experiment)
    for name, stage in experiment.stages.items():
        if type(stage) not in STAGES:
            known = ", ".join(cls.__module__.rpartition(".")[2] for cls in STAGES)
            raise UserError(f"stages.{name}: {type(stage).__name__} is no stage's Config; there are {known}")
    # The shapes of the parameters, without parameters.
    boxed = jax.eval_shape(lambda: models.init(experiment.model.spec, jax.random.key(0)))
    sharding.shardings(sharding.make_mesh(experiment.mesh), boxed)
    trained = jax.tree.leaves(lora.own(experiment.model.spec, boxed))
    _check_room(workdir, sum(math.prod(x.shape) * x.dtype.itemsize for x in trained), experiment)


def _check_room(workdir: Path, params_bytes: int, experiment: Experiment) -> None:
    """Raise UserError unless the disk has room for each stage's parameters and for a checkpoint, moments included."""
    folder = next(path for path in (workdir, *workdir.absolute().parents) if path.is_dir())
    needed, free = params_bytes * (len(experiment.stages) + 3), shutil.disk_usage(folder).free
    if free < needed and not _is_complete(workdir, experiment):
        raise UserError(
            f"--workdir {workdir}: no disk space: the run needs at least {needed / 1e6:.0f} MB, "
            f"{free / 1e6:.0f} MB are free"
        )


def _check_workdir(workdir: Path, config: dict[str, Any]) -> None:
    """Raise UserError unless the folder is this experiment's, or new."""
    path = workdir / "config.json"
    if not path.exists():
        if workdir.is_dir() and any(not inside.name.startswith(".") for inside in workdir.iterdir()):
            raise UserError(f"--workdir {workdir} holds files and no run; choose an empty or a new folder")
        if workdir.exists() and not workdir.is_dir():
            raise UserError(f"--workdir {workdir} is a file, not a folder")
        return
    there = _read_json(path).get("experiment")
    if not isinstance(there, dict):
        raise UserError(f"{path} is damaged: it has no 'experiment'; choose another --workdir")
    changed = differences(there, config)
    if changed:
        raise UserError(
            f"{workdir} was made by another config: {'; '.join(changed)}. Choose another --workdir, or those values"
        )


def _is_complete(workdir: Path, experiment: Experiment) -> bool:
    path = workdir / "summary.json"
    return path.exists() and set(experiment.stages) <= set(_read_json(path))


def _train(experiment: Experiment, workdir: Path, began: float) -> None:
    with _session(workdir, began):
        mesh = sharding.make_mesh(experiment.mesh)
        context = Context(
            workdir=workdir,
            seed=experiment.seed,
            mesh=mesh,
            model=experiment.model.load(data=experiment.data, workdir=workdir, seed=experiment.seed, mesh=mesh),
            data=experiment.data,
            wandb=experiment.wandb,
        )
        for name, stage in experiment.stages.items():
            _run_stage(name, stage, context)
        summary: dict[str, Any] = {name: _read_json(_done(context, name)) for name in experiment.stages}
        digests = {}
        for name, stage in experiment.stages.items():
            load = context.head_params if stage.produces == "reward" else context.policy_params
            digests[name] = params_digest(load(name))
    _write_json(workdir / "summary.json", {**summary, **_read_json(workdir / _SESSIONS), "params_digest": digests})
    say(f"{workdir / 'summary.json'} and {report.write(workdir)} are written")


def _run_stage(name: str, stage: Any, context: Context) -> None:
    if _done(context, name).exists():
        say(f"{name}: finished before")
        return
    summary = STAGES[type(stage)](stage, context, name)
    for key, value in summary.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise NonFiniteError(f"{name}: {key} is {value} at the end; its checkpoints are kept")
    _write_json(_done(context, name), summary)
    say(f"{name}: " + "  ".join(f"{key} {_figure(value)}" for key, value in summary.items()))


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _done(context: Context, name: str) -> Path:
    """A stage's own summary, which says that it is finished."""
    return context.stage_dir(name) / "summary.json"


@contextlib.contextmanager
def _locked(workdir: Path) -> Iterator[None]:
    """One run a workdir; the system lets go of the lock when a process dies."""
    with (workdir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run works in {workdir}; wait for it, or choose another --workdir") from None
        yield


@contextlib.contextmanager
def _session(workdir: Path, began: float) -> Iterator[None]:
    """Add this session's seconds, and its memory if it is the largest, to those before it; however it ends."""
    path = workdir / _SESSIONS
    before = _read_json(path) if path.exists() else {"seconds": 0.0, "peak_memory_bytes": 0}
    try:
        yield
    finally:
        seconds = round(before["seconds"] + time.monotonic() - began, 1)
        if workdir.is_dir():  # not, where somebody removed it under the run
            peak = max(_peak_memory(), before["peak_memory_bytes"])
            _write_json(path, {"seconds": seconds, "peak_memory_bytes": peak})


def _peak_memory() -> int:
    """The most memory that this process or a child of it has held, in bytes."""
    unit = 1 if platform.system() == "Darwin" else 1024
    own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    status = Path("/proc/self/status")
    if status.exists():  # Linux counts in ru_maxrss what the parent held before it started this process
        own = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return max(own, children) * unit


def _provenance(command: list[str]) -> dict[str, Any]:
    versions = {"rlhf_jax": __version__, "python": platform.python_version()}
    versions |= {package: importlib.metadata.version(package) for package in _PACKAGES}
    return {"versions": versions, "commit": _commit(), "command": command}


def _commit() -> str | None:
    """The commit of the checkout that the package is run or was installed from; "+" after it where files differ.

    An installed package is of the checkout in the current folder if all its sources are the same.
    """
    here = Path(__file__).parent
    for folder in (here, Path.cwd() / here.name):
        try:
            if _sources(folder) == _sources(here) and _git(folder, "ls-files", "__init__.py"):
                return _git(folder, "rev-parse", "HEAD") + ("+" if _git(folder, "status", "--porcelain", ".") else "")
        except (OSError, subprocess.SubprocessError):
            continue
    return None


def _sources(package: Path) -> dict[str, bytes]:
    return {str(path.relative_to(package)): path.read_bytes() for path in package.rglob("*.py")}


def _git(folder: Path, *args: str) -> str:
    command = ["git", *args]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return found


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_whole(path, json.dumps(value, indent=2) + "\n")
