"""Running a sweep: its runs in step or over processes, each in a workdir of its own, and what they share made once.

DIR/sweep.json                       what is swept
DIR/seed=0,kl.coef=0.05/…            an ordinary workdir a run
DIR/summary.json, DIR/report.html    figures and curves over seeds
"""

import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import jax

from rlhf_jax import hosts
from rlhf_jax import run as single
from rlhf_jax.config import Experiment, differences
from rlhf_jax.errors import NonFiniteError, Stopped, UserError
from rlhf_jax.files import write_whole
from rlhf_jax.lockstep import Group, Replica, beside
from rlhf_jax.mesh import MeshConfig, divisors, one_of
from rlhf_jax.records import read_json, say, write_json
from rlhf_jax.replicas import Groups
from rlhf_jax.sweep.crew import Crew, may_be_sent
from rlhf_jax.sweep.grid import Setting, described, groups, settings
from rlhf_jax.sweep.leveling import level
from rlhf_jax.sweep.page import render
from rlhf_jax.sweep.shared import is_made, take
from rlhf_jax.sweep.summary import summarise

SWEEP = "sweep.json"


def sweep(
    experiment: Experiment,
    seeds: int,
    varied: Sequence[str],
    folder: Path,
    command: list[str],
    *,
    vmapped: bool | None = None,
) -> dict[str, Any]:
    """Run all that is not finished yet; returns what DIR/summary.json holds.

    `vmapped`: compiled calls are made for all runs at once (`jax.vmap`), or in turns, by programs that are compiled
    once for each group of `mesh.replica`; None: at once but on CPUs, where turns are faster. On a CPU that is a single
    device, turns are those of whole runs over processes, one a core (`crew`).

    Raises UserError before anything is written where something cannot run; at the end, the figures of the others
    written, where a run has failed; Stopped after a signal.
    """
    if experiment.wandb:
        raise UserError("wandb: a process sends one run at a time there; leave it False, a sweep writes files alone")
    runs = settings(experiment, seeds, varied)
    split, vmapped = _split(experiment.mesh, runs, vmapped)
    processes = 1 if vmapped else _processes(experiment.mesh, runs)
    for one in {json.dumps(one.values): one for one in runs}.values():
        _checked(one, folder, split)
    _claim(folder, described(experiment, seeds, runs))
    with single.held(folder):
        if processes > 1:
            failed = _run_over_cores(runs, folder, command, processes)
        else:
            failed = _run_groups(runs, folder, command, split, vmapped=vmapped)
        summary = summarise(runs, folder)
        write_json(folder / "summary.json", summary)
        write_whole(folder / "report.html", render(folder, runs))
    say(f"{folder / 'summary.json'} and {folder / 'report.html'} are written")
    _raise_failures(failed, len(runs))
    return summary


def _processes(mesh: MeshConfig, runs: Sequence[Setting]) -> int:
    """How many make the runs: one a core where all have the CPU to themselves, as one device, and can be sent."""
    whole = jax.default_backend() == "cpu" and jax.device_count() == mesh.fixed_devices == hosts.count() == 1
    return min(hosts.cores(), len(runs)) if whole and may_be_sent(runs) else 1


def _owners(runs: Sequence[Setting]) -> dict[str, Setting]:
    """Who makes the stages that runs share: the first of them."""
    owners: dict[str, Setting] = {}
    for one in runs:
        for stage in one.experiment.stages:
            owners.setdefault(one.share(stage), one)
    return owners


def _run_over_cores(
    runs: Sequence[Setting], folder: Path, command: list[str], processes: int
) -> dict[str, BaseException]:
    """Run all, each in one of some processes; what has ended those that did not finish, by their labels."""
    say(f"{folder}: {len(runs)} runs, {processes} at a time, each with its share of the cores")
    crew = Crew(runs, _owners(runs), folder, command, number=processes)
    with _signals([crew]):
        failed = crew.work()
    return _mendable(failed, crew.signal, folder)


def _run_groups(
    runs: Sequence[Setting], folder: Path, command: list[str], split: Groups | None, *, vmapped: bool
) -> dict[str, BaseException]:
    """Run all, a group after another; what has ended those that did not finish, by their labels."""
    owners, failed = _owners(runs), dict[str, BaseException]()
    for number, some in enumerate(groups(runs), start=1):
        said = f"runs {len(some)} of {len(runs)}" if len(some) < len(runs) else f"{len(runs)} runs"
        say(f"{folder}: group {number}: {said}, {'at once' if vmapped else 'in turns'}")
        if vmapped and not (folder / "summary.json").exists():  # the session before did not end by itself
            level(some, folder, owners)
        failed |= _run_group(some, folder, owners, command, split, vmapped=vmapped)
    return failed


def _split(mesh: MeshConfig, runs: Sequence[Setting], vmapped: bool | None) -> tuple[Groups | None, bool]:
    """The groups of devices that the runs are split over, if any, and whether calls are made at once.

    UserError where runs or devices do not divide so.
    """
    devices = single.start_backend(mesh, in_threads=True)
    vmapped = jax.default_backend() != "cpu" if vmapped is None else vmapped
    if mesh.replica == 1:
        return None, vmapped
    for some in groups(runs):
        if len(some) % mesh.replica:
            raise UserError(
                f"mesh.replica={mesh.replica} does not divide {len(some)}, the runs that go together (seeds × "
                f"combinations of fractions); {one_of(divisors(len(some)))} would"
            )
    return Groups(mesh, jax.devices()[:devices]), vmapped


def _checked(one: Setting, folder: Path, split: Groups | None) -> None:
    try:
        single.check(one.experiment, folder / one.label, None if split is None else split.meshes[0])
    except UserError as error:
        values = ", ".join(f"{path}={value}" for path, value in one.values.items())
        raise UserError(f"{error} (--vary {values})" if values else str(error)) from None


def _claim(folder: Path, this: Mapping[str, Any]) -> None:
    """Make the folder this sweep's; UserError where it is another's."""
    path = folder / SWEEP
    if path.exists():
        found = differences(read_json(path), this)
        moved = [line for line in found if line.startswith("experiment.mesh.")]
        changed = [line for line in found if line not in moved]
        if moved:  # what is saved can be read onto any
            say(f"{folder} was begun on another mesh: {'; '.join(moved)}")
        if changed:
            raise UserError(f"{folder} is of another sweep: {'; '.join(changed)}. Choose another --to, or those values")
        return
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--to {folder} is a file, not a folder")
    if folder.is_dir() and any(not inside.name.startswith(".") for inside in folder.iterdir()):
        raise UserError(f"--to {folder} holds files and no sweep; choose an empty or a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--to {folder} cannot be made: {error.strerror}") from None
    write_json(path, dict(this))


def _run_group(
    runs: Sequence[Setting],
    folder: Path,
    owners: Mapping[str, Setting],
    command: list[str],
    split: Groups | None,
    *,
    vmapped: bool,
) -> dict[str, BaseException]:
    """Run some in step; what has ended those that did not finish, by their labels."""
    meshes = [None] if split is None else split.meshes
    # Neighbours, of which each makes a stage that others share, are on different groups.
    replicas = {Replica(one.label, number % len(meshes)): one for number, one in enumerate(runs)}
    # In turns each group of devices goes at its own pace.
    parts = [list(replicas)[home :: len(meshes)] for home in range(1 if vmapped else len(meshes))]
    crews = [Group(list(replicas) if vmapped else part, vmapped=vmapped, spread=split) for part in parts]
    by_label = {replica.label: replica for replica in replicas}

    def work(replica: Replica) -> None:
        one = replicas[replica]

        def before(stage: str) -> None:
            replica.enter(list(one.experiment.stages).index(stage))
            owner = owners[one.share(stage)]
            if owner is not one:
                _share(replica, by_label.get(owner.label), folder / owner.label, folder / one.label, stage)

        try:
            began = time.monotonic()
            mesh = meshes[replica.home]
            single.run(one.experiment, folder / one.label, command, began=began, before=before, draws=False, mesh=mesh)
        except Stopped:
            raise
        except UserError as error:
            say(f"{error}; the other runs go on")
            raise

    with _signals(crews):
        outcomes = beside(crews, work)
    if vmapped:
        (group,) = crews
        say(f"{folder}: of {group.counts.total()} compiled calls {group.counts['mapped']} were made at once")
    failed = {replica.label: error for replica, error in outcomes.items() if error is not None}
    return _mendable(failed, crews[0].signal, folder)


def _mendable(failed: dict[str, BaseException], signaled: int | None, folder: Path) -> dict[str, BaseException]:
    """What has ended runs, where a user can mend it; raises what is else, and Stopped after a signal."""
    for error in failed.values():
        if not isinstance(error, UserError | KeyboardInterrupt):
            raise error
    if signaled is not None:
        raise Stopped(f"{folder}: stopped; the same command goes on from what is saved", signaled)
    return failed


def _share(replica: Replica, owner: Replica | None, source: Path, workdir: Path, stage: str) -> None:
    """Wait for a stage of another run that is the same in this one, and take what it has written."""
    if is_made(workdir, stage):
        return
    if owner is not None:
        replica.group.wait_until(replica, lambda: is_made(source, stage) or owner not in owner.group.running)
    if replica.group.signal is not None and not is_made(source, stage):
        raise Stopped(f"{stage}: stopped before it", replica.group.signal)
    take(source, workdir, stage)


@contextlib.contextmanager
def _signals(groups: Sequence[Group | Crew]) -> Iterator[None]:
    """Let SIGINT and SIGTERM stop all after the step that they are in; a second one at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        print("stopping after this step (again to stop at once)", file=sys.stderr, flush=True)
        for group in groups:
            group.stop(number)

    handlers = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _raise_failures(failed: Mapping[str, BaseException], count: int) -> None:
    if not failed:
        return
    kind = NonFiniteError if any(isinstance(error, NonFiniteError) for error in failed.values()) else UserError
    raise kind(f"{len(failed)} of {count} runs did not finish, as said above: {'; '.join(failed)}")
