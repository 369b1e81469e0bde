"""The process in which some runs of a sweep are made, one after another, with a share of the machine's cores.

It is started by `crew.Crew` with a connection, and gets a `Task` there again and again. It answers each with what has
ended the run, or None. It ends with the sweep: when the other end is closed.
"""

import _thread
import contextlib
import gc
import os
import pickle
import queue
import signal
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Self

import jax

from rlhf_jax import lockstep, run
from rlhf_jax.config import Experiment
from rlhf_jax.errors import Stopped, UserError
from rlhf_jax.records import say
from rlhf_jax.sweep.shared import take


@dataclass(frozen=True)
class Task:
    """A run, or what of it is not finished yet."""

    experiment: Experiment
    label: str
    folder: Path
    """The sweep's."""
    command: list[str]
    makers: Mapping[str, str]
    """Whose stages it takes, by the stages' names."""
    speaks: bool
    """Whether its progress is the one that is shown."""


class _Kept:
    """Keeps what its block raises, whatever it is."""

    error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        self.error = error
        return True


class Stop:
    """Says to stop after the step that the run is in; a second one at once."""


class Speak:
    """Says that the run's progress is the one that is shown, from its next stage on."""


class Worker:
    """One run after another, and beside them what the sweep says."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._tasks = connection, queue.SimpleQueue[Task]()
        self._name, self._stopped = lockstep.Name("", speaks=False), threading.Event()

    def work(self) -> None:
        """Make runs until the other end is closed; first it says what JAX's settings are there."""
        # Signals of a terminal and of a scheduler, who tell all processes, are the sweep's, which says so.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for name, value in self._connection.recv().items():
            if jax.config.values.get(name) != value:
                jax.config.update(name, value)
        lockstep.NAME.set(self._name)
        threading.Thread(target=self._listen, daemon=True).start()
        while True:
            self._connection.send(_sendable(self._ended_by(self._tasks.get())))
            jax.clear_caches()  # the next run's programs are its own
            gc.collect()
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # and so is the most memory that it takes

    def _listen(self) -> None:
        """Take what is told; at its end, which is that of the sweep, though it was killed, end the process."""
        with _Kept() as kept:
            while True:
                told = self._connection.recv()
                if isinstance(told, Stop):
                    self._stopped.set()
                    _thread.interrupt_main(signal.SIGTERM)  # heard where the run has a handler for it
                elif isinstance(told, Speak):
                    self._name.speaks = True
                else:
                    self._tasks.put(told)
        if not isinstance(kept.error, EOFError | OSError):
            traceback.print_exception(kept.error)
        os._exit(1)

    def _ended_by(self, task: Task) -> BaseException | None:
        """What has ended a run, if it did not finish."""
        folder, began = task.folder, time.monotonic()
        self._name.label, self._name.speaks = task.label, task.speaks

        def before(stage: str) -> None:
            if self._stopped.is_set():
                raise Stopped(f"{stage}: stopped before it", signal.SIGTERM)
            if stage in task.makers:
                take(folder / task.makers[stage], folder / task.label, stage)

        with _Kept() as kept:
            run.run(task.experiment, folder / task.label, task.command, began=began, before=before, draws=False)
        error = kept.error
        if isinstance(error, UserError):
            if not isinstance(error, Stopped):
                say(f"{error}; the other runs go on")
        elif error is not None and not isinstance(error, KeyboardInterrupt):  # the sweep raises it
            say(f"{type(error).__name__}: {error}; the other runs go on")
            error.add_note("".join(traceback.format_exception(error)))
        return error


def _sendable(error: BaseException | None) -> BaseException | None:
    """An error, or where it cannot be sent one that says what it says."""
    with _Kept() as kept:
        pickle.loads(pickle.dumps(error))
    if error is None or kept.error is None:
        return error
    return RuntimeError("".join(traceback.format_exception(error)))
