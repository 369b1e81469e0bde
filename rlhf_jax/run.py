"""Running an experiment: its stages in order, in a workdir that any later session goes on from."""

import contextlib
import dataclasses
import fcntl
import hashlib
import math
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax._src.xla_bridge import backends_are_initialized  # has no public name
from jax.sharding import Mesh

from rlhf_jax import checkpoint, hosts, memory, models, records, sharding
from rlhf_jax.algorithms import (
    ai_feedback,
    best_of_n,
    compare,
    constitutional,
    distill,
    made_rows,
    offline,
    online_preference,
    policy,
    ppo,
    preference,
    pretrain,
    reward_model,
    sft,
)
from rlhf_jax.algorithms.context import Context, StageConfig, check_field
from rlhf_jax.algorithms.onpolicy import OnPolicyConfig
from rlhf_jax.cache import cache_dir
from rlhf_jax.config import (
    Experiment,
    check_inputs,
    check_stage_inputs,
    differences,
    to_dict,
    validate,
)
from rlhf_jax.errors import NonFiniteError, UserError
from rlhf_jax.interop.tokenizers import Tokenizer
from rlhf_jax.models import attention, lora
from rlhf_jax.provenance import provenance, versions
from rlhf_jax.records import read_json, say, set_aside, whole_json, write_json
from rlhf_jax.sampling import Sampling, stops
from rlhf_jax.sharding import MeshConfig
from rlhf_jax.signals import terminable
from rlhf_jax.types import Params

STAGES: dict[type, Callable[..., dict[str, Any]]] = {
    pretrain.Config: pretrain.train,
    sft.Config: sft.train,
    reward_model.Config: reward_model.train,
    preference.Config: preference.train,
    ppo.Config: ppo.train,
    constitutional.Config: constitutional.train,
    ai_feedback.Config: ai_feedback.train,
    policy.Config: policy.train,
    online_preference.Config: online_preference.train,
    best_of_n.Config: best_of_n.train,
    compare.Config: compare.train,
    distill.Config: distill.train,
    offline.Config: offline.train,
}
"""What trains each kind of stage."""

_LOCK = ".lock"
_PATIENCE = 60  # seconds until a host sees what another has written


def run(
    experiment: Experiment,
    workdir: Path,
    command: list[str],
    *,
    began: float | None = None,
    before: Callable[[str], None] = lambda stage: None,
    draws: bool = True,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Run every stage that is not finished yet, or whose files are damaged; returns what summary.json holds.

    The summary's seconds count from `began`, a reading of time.monotonic(), or from this call. `before` is called with
    each stage's name before it is looked at; with `draws` False there is no report.html until `rlhf-jax report`.
    `mesh` is that of a part of the devices, of the experiment's axes; None: all of them.

    Every process of the run calls it, and process 0 writes. Raises UserError before anything is written where the
    experiment cannot run, is another one in another process, or the workdir belongs to another one.
    """
    began = time.monotonic() if began is None else began
    check(experiment, workdir, mesh)
    config = to_dict(experiment)
    _check_agreement({**config, "versions": versions()})
    with _locked(workdir, config) if hosts.is_writer() else contextlib.nullcontext(), terminable():
        _check_shared(workdir)
        if hosts.from_writer(lambda: _is_complete(workdir, experiment)) and all(
            [_is_finished(workdir / name, stage) for name, stage in experiment.stages.items()]
        ):
            say(f"{workdir} is complete: its figures are in summary.json and report.html")
        else:
            if hosts.is_writer() and not (workdir / "config.json").exists():
                write_json(workdir / "config.json", {"experiment": config, **provenance(command)})
            _train(experiment, workdir, began, before, mesh)
        return hosts.from_writer(lambda: _summary(workdir, draws=draws))


def start_backend(mesh: MeshConfig, *, in_threads: bool = False) -> int:
    """Set what JAX reads when it starts; returns the number of devices.

    Compiled programs are kept in the user's cache folder, unless the user has named another. A mesh of fixed size gets
    as many devices on a CPU, each process its part of them, unless a flag says how many. Memory that is freed stays
    with the process. Where a process has one CPU device for itself, programs run in the thread that calls them, and ask
    there for large pieces; `in_threads` says that this will not be the main one.
    """
    settings: Any = jax.config  # its attributes are made at run time
    flagged = (
        "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "") or settings.jax_num_cpu_devices > 0
    )
    alone = not flagged and mesh.fixed_devices == 1 and hosts.count() == 1
    in_main = not in_threads and threading.current_thread() is threading.main_thread()
    if alone and in_main and not backends_are_initialized():
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    memory.keep_freed(one_pool=not in_main or jax.config.read("jax_cpu_enable_async_dispatch"))
    if settings.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir("xla")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if mesh.fixed_devices > 1 and not flagged:
        with contextlib.suppress(RuntimeError):  # JAX has started: its devices are what they are
            jax.config.update("jax_num_cpu_devices", max(1, mesh.fixed_devices // hosts.count()))
    return jax.device_count()


def params_digest(params: Params) -> str:
    """sha256 of names, types, shapes and bytes of parameters, in the order of the names."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    digest = hashlib.sha256()
    for name in sorted(named):
        array = named[name]
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        # A layer at a time, where other processes hold parts: the whole of it may be more than a device's memory.
        is_here = not isinstance(array, jax.Array) or array.is_fully_addressable or not array.ndim
        for part in (array,) if is_here else array:
            digest.update(hosts.fetch(part).tobytes())
    return digest.hexdigest()


def check(experiment: Experiment, workdir: Path, mesh: Mesh | None = None) -> None:
    """Raise UserError, before anything is compiled or written, for all that can be wrong but what is in the workdir."""
    devices = start_backend(experiment.mesh)
    validate(experiment, devices if mesh is None else mesh.size)
    check_inputs(experiment)
    for name, stage in experiment.stages.items():
        if type(stage) not in STAGES:
            known = ", ".join(cls.__module__.rpartition(".")[2] for cls in STAGES)
            raise UserError(f"stages.{name}: {type(stage).__name__} is no stage's Config; there are {known}")
    # The shapes of the parameters, without parameters.
    boxed = jax.eval_shape(lambda: models.init(experiment.model.spec, jax.random.key(0)))
    mesh = mesh or sharding.make_mesh(experiment.mesh)
    attention.check(experiment.model.spec, mesh.devices.flat[0].platform)
    sharding.shardings(mesh, boxed)
    for name, stage in experiment.stages.items():
        if isinstance(stage, OnPolicyConfig):
            _check_sub_meshes(name, stage, mesh, boxed)
    trained = jax.tree.leaves(lora.own(experiment.model.spec, boxed))
    if not (workdir / "summary.json").exists():
        stored = sum(stage.stored() for stage in experiment.stages.values())
        checkpoint.check_room(workdir, int(stored * sum(4 * math.prod(x.shape) for x in trained)))


def _check_sub_meshes(name: str, stage: OnPolicyConfig, mesh: Mesh, boxed: Params) -> None:
    """Raise UserError where a stage's roles cannot lie as its placement says."""
    try:
        for field, sub_mesh in stage.placement.meshes(mesh)._asdict().items():
            if sub_mesh is not mesh:  # which has been checked
                check_field(field, partial(sharding.shardings, sub_mesh, boxed))
    except UserError as error:
        raise UserError(f"stages.{name}.placement.{error}") from None


def _check_agreement(here: dict[str, Any]) -> None:
    """Raise UserError in a process whose experiment or packages are not those of process 0."""
    changed = differences(hosts.from_writer(lambda: here), here)
    if changed:
        raise UserError(f"not the run of process 0: {'; '.join(changed)}; start all with one config, from one install")
    hosts.wait()  # nothing is written before all agree


def _check_workdir(workdir: Path, config: dict[str, Any]) -> None:
    """Raise UserError unless the folder is this experiment's, on whatever mesh, or new."""
    path = workdir / "config.json"
    if not path.exists():
        if workdir.is_dir() and any(not inside.name.startswith(".") for inside in workdir.iterdir()):
            raise UserError(f"--workdir {workdir} holds files and no run; choose an empty or a new folder")
        if workdir.exists() and not workdir.is_dir():
            raise UserError(f"--workdir {workdir} is a file, not a folder")
        return
    there = read_json(path).get("experiment")
    if not isinstance(there, dict):
        raise UserError(f"{path} is damaged: it has no 'experiment'; choose another --workdir")
    found = differences(there, config)
    moved = [line for line in found if line.startswith("mesh.")]
    changed = [line for line in found if line not in moved]
    if changed:
        raise UserError(
            f"{workdir} was made by another config: {'; '.join(changed)}. Choose another --workdir, or those values"
        )
    if moved:  # what is saved can be read onto any
        say(f"{workdir} was begun on another mesh: {'; '.join(moved)}")


def _is_complete(workdir: Path, experiment: Experiment) -> bool:
    return set(experiment.stages) <= set(whole_json(workdir / "summary.json") or ())


def _train(
    experiment: Experiment, workdir: Path, began: float, before: Callable[[str], None], mesh: Mesh | None
) -> None:
    with records.session(workdir, began) as stage_seconds:
        mesh = mesh or sharding.make_mesh(experiment.mesh)
        context = Context(
            workdir=workdir,
            seed=experiment.seed,
            mesh=mesh,
            model=experiment.model.load(data=experiment.data, workdir=workdir, seed=experiment.seed, mesh=mesh),
            data=experiment.data,
            wandb=experiment.wandb,
            ensembles=reward_model.ensembles(experiment.stages),
        )
        check_tokenizer(experiment, context.model.tokenizer)
        for name, stage in experiment.stages.items():
            before(name)
            with records.timed(name, stage_seconds):
                _run_stage(name, stage, context)
        files = {name: workdir / name / "summary.json" for name in experiment.stages}
        summary = hosts.from_writer(lambda: {name: read_json(path) for name, path in files.items()})
        digests = {}
        for name, stage in experiment.stages.items():
            digests[name] = _digest(name, stage, context)
    if hosts.is_writer():
        write_json(workdir / "summary.json", {**summary, **records.costs(workdir), "params_digest": digests})
        (workdir / "report.html").unlink(missing_ok=True)  # that of an earlier session


def check_tokenizer(experiment: Experiment, tokenizer: Tokenizer | None) -> None:
    """Raise UserError, one line that names the stage's field, for what a stage misses in the tokenizer."""
    if tokenizer is None:
        return
    for name, stage in experiment.stages.items():
        try:
            stage.check_tokenizer(tokenizer)
        except UserError as error:
            raise UserError(f"stages.{name}.{error}") from None
        for path, sampling in _samplings(stage).items():
            try:
                stops(sampling.stop, tokenizer)
            except UserError as error:
                raise UserError(f"stages.{name}.{path}{str(error).removeprefix('sampling')}") from None


def _samplings(stage: Any) -> dict[str, Sampling]:
    """How a stage draws, by field; that of the pairs that it has judged, too."""
    parts = {name: vars(value) for name, value in vars(stage).items() if dataclasses.is_dataclass(value)}
    inner = {f"{name}.{part}": value for name, own in parts.items() for part, value in own.items()}
    return {name: value for name, value in (vars(stage) | inner).items() if isinstance(value, Sampling)}


def _summary(workdir: Path, *, draws: bool) -> dict[str, Any]:
    """What summary.json holds; the report is drawn where it is missing."""
    if draws and not (workdir / "report.html").exists():
        from rlhf_jax import report  # with matplotlib, which the first step need not wait for

        say(f"{workdir / 'summary.json'} and {report.write(workdir)} are written")
    return read_json(workdir / "summary.json")


def _run_stage(name: str, stage: Any, context: Context) -> None:
    if _is_finished(context.stage_dir(name), stage):
        say(f"{name}: finished before")
        return
    if made_rows.named_stages(stage):
        stage = made_rows.resolved(stage, context.workdir)
        check_stage_inputs(name, stage, context.data)
    summary = STAGES[type(stage)](stage, context, name)
    for key, value in summary.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise NonFiniteError(f"{name}: {key} is {value} at the end; its checkpoints are kept")
    if hosts.is_writer():
        write_json(context.stage_dir(name) / "summary.json", summary)
    say(f"{name}: " + "  ".join(f"{key} {_figure(value)}" for key, value in summary.items()))


def _digest(name: str, stage: StageConfig, context: Context) -> str:
    if stage.produces == "rows":
        return made_rows.digest(context.stage_dir(name) / made_rows.FOLDER)
    return params_digest((context.policy_params if stage.produces == "policy" else context.head_params)(name))


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _is_finished(stage_dir: Path, stage: StageConfig) -> bool:
    """Whether a stage has its summary, and its parameters or rows as they were written; what is damaged is set aside.

    Such a stage runs again: from its last checkpoint, which has all its steps, where that is good.
    """
    if hosts.from_writer(lambda: whole_json(stage_dir / "summary.json")) is None:
        return False
    folders = [made_rows.FOLDER if stage.produces == "rows" else "params"]
    if isinstance(stage, offline.Config) and stage.has_heads:
        folders.append(offline.HEADS)
    found = {folder: checkpoint.damage(stage_dir / folder) for folder in folders}
    wrong = {folder: said for folder, said in found.items() if said is not None}
    for folder, said in wrong.items():
        hosts.from_writer(lambda folder=folder, said=said: set_aside(stage_dir / folder, said))
    return not wrong


@contextlib.contextmanager
def _locked(workdir: Path, config: dict[str, Any]) -> Iterator[None]:
    """The workdir, made where it is missing and `held`; not there again where the run is refused before its stages."""
    _check_workdir(workdir, config)
    is_new = not workdir.exists()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be made: {error.strerror}") from None
    with held(workdir):
        try:
            yield
        except UserError:
            if is_new and not any((workdir / name).exists() for name in config["stages"]):
                # Or it would be the refused config's, and no mended one could run in it.
                shutil.rmtree(workdir, ignore_errors=True)
            raise


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """A folder held against other runs; the system lets go when a process dies.

    Between hosts it holds where their file system has flock (NFS 4, Lustre with -o flock, GPFS).
    """
    with (workdir / _LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = (workdir / _LOCK).read_text().strip()
            raise UserError(
                f"another run works in {workdir} ({holder}); wait for it, or choose another --workdir"
            ) from None
        except OSError as error:
            say(f"{workdir} cannot be locked ({error.strerror}): nothing keeps a second run out of it")
        file.truncate(0)
        file.write(f"{socket.gethostname()}, process {os.getpid()}, since {time.strftime('%F %T')}\n")
        file.flush()
        yield


def _check_shared(workdir: Path) -> None:
    """Raise UserError in a process that does not see process 0's folder."""
    there = hosts.from_writer((workdir / _LOCK).read_text)
    for _ in range(_PATIENCE):
        with contextlib.suppress(OSError):
            if (workdir / _LOCK).read_text() == there:
                return
        time.sleep(1)
    raise UserError(f"--workdir {workdir} is not the folder of process 0: all hosts must share it by a file system")
