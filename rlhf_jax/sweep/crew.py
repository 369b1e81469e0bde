"""The runs of a sweep over the cores of a machine: so many processes, each of which makes one run after another.

On a CPU a run keeps one and a half of two cores busy, and two that are held to a core each take less work together:
nothing is parted into pieces and put together again.
"""

import contextlib
import io
import os
import pickle
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import jax

from rlhf_jax.errors import UserError
from rlhf_jax.records import say
from rlhf_jax.sweep.grid import Setting
from rlhf_jax.sweep.shared import is_made
from rlhf_jax.sweep.worker import Speak, Stop, Task

_PATIENCE = 10  # seconds in which a process ends once it is let go, or told to at once
_MAIN = """import sys
from multiprocessing.connection import Connection
from rlhf_jax.sweep.worker import Worker
Worker(Connection(int(sys.argv[1]))).work()"""


class _Sent(pickle.Pickler):
    """Refuses what another process would not find: what a script, a notebook or a config file itself defines."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type | types.FunctionType):
            package = obj.__module__.partition(".")[0]
            if package == "__main__" or all(finder.find_spec(package, None) is None for finder in sys.meta_path):
                raise pickle.PicklingError(
                    f"{obj.__qualname__} is of {package}, which is no module that can be imported"
                )
        return NotImplemented


def may_be_sent(runs: Sequence[Setting]) -> bool:
    """Whether another process can read these."""
    try:
        _Sent(io.BytesIO()).dump([one.experiment for one in runs])
    except (pickle.PicklingError, AttributeError, TypeError, ValueError, NotImplementedError, RecursionError):
        return False
    return True


@dataclass
class _Worker:
    process: "subprocess.Popen[bytes]"
    connection: Connection
    cores: list[int]
    """That it is held to; none where the system cannot hold it."""
    run: Setting | None = None
    """What it makes now."""
    speaks: bool = False
    """Whether that run's progress is the one that is shown."""
    stops: int = 0
    """How often it was told to stop."""


class Crew:
    """Runs, and the processes that make them."""

    def __init__(
        self, runs: Sequence[Setting], owners: Mapping[str, Setting], folder: Path, command: list[str], *, number: int
    ) -> None:
        """`owners` have the stages that runs share made, by `Setting.share`; `number` is that of processes."""
        self.signal: int | None = None
        self._stops, self._late = 0, 0.0
        self._waiting, self._folder, self._command = list(runs), folder, command
        self._makers = {one.label: _makers(one, owners) for one in runs}
        self._number, self._idle, self._busy = number, list[_Worker](), list[_Worker]()
        self._failed: dict[str, BaseException] = {}
        self._died = set[str]()

    def stop(self, number: int) -> None:
        """By a signal: after the step that each run is in; asked twice, at once. `work` passes it on."""
        self.signal = number
        self._stops += 1
        self._late = time.monotonic() + _PATIENCE

    def work(self) -> dict[str, BaseException]:
        """Make all runs; what has ended those that did not finish, by their labels."""
        try:
            for share in _shares(self._number):
                self._idle.append(_started(share))
            while self._give():
                for connection in wait([worker.connection for worker in self._busy], timeout=0.5):
                    self._hear(next(worker for worker in self._busy if worker.connection is connection))
                if self._stops > 1 and time.monotonic() > self._late:  # in what hears no signal, such as a compilation
                    break
                self._say()
        finally:
            _let_go([*self._idle, *self._busy])
        return self._failed

    def _say(self) -> None:
        """Tell who is at work to stop, as often as it was asked, or that its progress is shown where nobody's is."""
        for worker in self._busy:
            while worker.stops < self._stops:
                _tell(worker, Stop())
                worker.stops += 1
        if self._busy and not any(worker.speaks for worker in self._busy):
            self._busy[0].speaks = True
            _tell(self._busy[0], Speak())

    def _give(self) -> bool:
        """Give those who have nothing to do a run that waits for nobody; whether anybody is at work."""
        while self._idle and self.signal is None:
            one = next(filter(self._is_ready, self._waiting), None)
            if one is None:
                break
            worker, label = self._idle.pop(0), one.label
            self._waiting.remove(one)
            worker.run, worker.speaks, worker.stops = one, not any(other.speaks for other in self._busy), 0
            self._busy.append(worker)
            _tell(worker, Task(one.experiment, label, self._folder, self._command, self._makers[label], worker.speaks))
        return bool(self._busy)

    def _is_ready(self, one: Setting) -> bool:
        """Whether who makes what it takes has done so, or has ended."""
        at_work = {worker.run.label for worker in self._busy if worker.run is not None}
        unfinished = at_work | {waiting.label for waiting in self._waiting}
        return all(
            is_made(self._folder / maker, stage) or maker not in unfinished
            for stage, maker in self._makers[one.label].items()
        )

    def _hear(self, worker: _Worker) -> None:
        """Take what a process answers; where it has died another one takes its place."""
        one, self._busy = worker.run, [other for other in self._busy if other is not worker]
        assert one is not None
        worker.run, worker.speaks = None, False
        try:
            error = worker.connection.recv()
            self._idle.append(worker)
        except (EOFError, OSError):
            code = worker.process.wait()
            by = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
            error = UserError(f"{self._folder / one.label}: its process {by}; the same command goes on")
            if self.signal is None:
                self._idle.append(_started(worker.cores))
                again = one.label not in self._died
                say(f"[{one.label}] {error}; {'it is tried once more' if again else 'the other runs go on'}")
                if again:
                    self._died.add(one.label)
                    self._waiting.insert(0, one)
                    return
        if error is not None:
            self._failed[one.label] = error


def _makers(one: Setting, owners: Mapping[str, Setting]) -> dict[str, str]:
    """Of the stages that a run does not make itself, whose they are."""
    makers = {stage: owners[one.share(stage)] for stage in one.experiment.stages}
    return {stage: maker.label for stage, maker in makers.items() if maker is not one}


def _shares(number: int) -> list[list[int]]:
    """The cores that this process may use, in so many parts."""
    cores = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
    return [cores[len(cores) * i // number : len(cores) * (i + 1) // number] for i in range(number)]


def _started(cores: list[int]) -> _Worker:
    """A process that finds the package where this one does, on a share of the cores."""
    ours, theirs = Pipe()
    paths = os.pathsep.join(map(os.path.abspath, sys.path))  # of a notebook's "" the folder that it is in
    environment = {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-P", "-c", _MAIN, str(theirs.fileno())]
    with theirs, _held_to(cores):
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=2,
            env=environment,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
    worker = _Worker(process, ours, cores)
    settings = {name: value for name, value in jax.config.values.items() if isinstance(value, bool | int | float | str)}
    _tell(worker, settings)
    return worker


@contextlib.contextmanager
def _held_to(cores: list[int]) -> Iterator[None]:
    """Hold what this thread starts to some cores; JAX has a thread for each that it finds."""
    if not cores or sys.platform != "linux":
        yield
        return
    all_of_them = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, all_of_them)


def _tell(worker: _Worker, message: Task | Stop | Speak | dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # that it has died is heard where it would answer
        worker.connection.send(message)


def _let_go(workers: Sequence[_Worker]) -> None:
    """End them: what is not saved is lost."""
    for worker in workers:
        worker.connection.close()
    for worker in workers:
        try:
            worker.process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()
