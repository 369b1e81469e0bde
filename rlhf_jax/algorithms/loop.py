"""What every stage's loop shares: resuming, logging, checkpoints, signals, a stop at what is not finite."""

import math
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

import jax
from jaxtyping import Array

from rlhf_jax import checkpoint, hosts, lockstep, memory, sharding
from rlhf_jax.algorithms.context import Context
from rlhf_jax.errors import NonFiniteError, Stopped
from rlhf_jax.metrics import MetricsWriter, Progress
from rlhf_jax.types import Metrics, Params

_CAUSES = ("score", "reward", "loss")  # where they are not finite, the others only follow
_SPIKING = ("loss", "policy_loss", "value_loss", "grad_norm", "critic_grad_norm")


class Cursor(Protocol):
    """Where the data stands: a grain iterator, or anything with its two methods."""

    def get_state(self) -> dict[str, Any]:
        """A JSON-able position."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        ...


class Loop:
    """The steps of one stage, from its newest checkpoint on.

        with Loop(context, name, steps=config.steps, checkpoint_every=config.checkpoint_every) as loop:
            state = loop.restore(state, batches)
            for step in loop:
                state, metrics = train_step(state, next(batches))
                loop.record(state, metrics, tokens=...)

    Metrics are read one step late, so that the host prepares a step while the device computes the one before it.
    After SIGINT or SIGTERM the current step ends, a checkpoint is written, and `record` raises `Stopped`; of several
    processes it is the step after, in all of them, when one has had the signal. Process 0 alone writes metrics.
    """

    def __init__(self, context: Context, name: str, *, steps: int, checkpoint_every: int) -> None:
        self.name, self.steps = name, steps
        self._context, self._every = context, checkpoint_every
        self._checkpoints = checkpoint.Checkpoints(context.stage_dir(name) / "checkpoints")
        self._first = self._checkpoints.latest_step() or 0
        self._step = self._first
        self._cursor: Cursor | None = None
        self._pending: tuple[int, Metrics, list[tuple[float, int | Array]]] | None = None
        self._signal: int | None = None
        self._told: jax.Array | None = None
        self._times: deque[tuple[float, int | Array]] = deque(maxlen=11)

    def __enter__(self) -> Self:
        self._writer = None
        if hosts.is_writer():
            self._writer = MetricsWriter(
                self._context.workdir, self.name, resume_step=self._first + 1, wandb=self._context.wandb
            )
        self._progress = Progress(self.name, self.steps, start=self._first).__enter__()
        for line in self._checkpoints.damaged:
            self.note(f"{self.name}: {line}")
        if self._checkpoints.damaged and self._first == 0:
            self.note(f"{self.name}: no good checkpoint is left: the stage begins anew")
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._progress.__exit__(kind, error, trace)
        try:
            self._checkpoints.close()
        finally:
            if self._writer is not None:
                self._writer.close()
        if kind is None:
            self._asked()  # of several processes the next call gives what they have now
            stop = self._asked()
            if stop is not None:  # it came after the last step was recorded
                raise self._stopped(stop)

    def restore(self, state: Any, cursor: Cursor) -> Any:
        """The newest checkpoint's state, with the cursor set to where it stood; `state` itself where there is none."""
        self._cursor = cursor
        if self._first == 0:
            return state
        state, position = self._checkpoints.restore(state)
        cursor.set_state(position)
        self.note(f"{self.name}: goes on from step {self._first}")
        return state

    def __iter__(self) -> Iterator[int]:
        self._times.append((time.monotonic(), 0))
        while self._step < self.steps:
            self._step += 1
            yield self._step
        self._flush()

    def record(self, state: Any, metrics: Metrics, *, tokens: int | Array) -> None:
        """End a step: log the one before it, and save where a checkpoint is due; what is on a device is read then.

        Raises NonFiniteError, before anything is saved, where a metric is not finite and no update was left out for it,
        or where too many were; Stopped after a signal; UserError where the disk had no room for a checkpoint.
        """
        self._flush()
        self._checkpoints.check()
        # Over several steps: the host runs ahead of the device, by as much as a step, and falls back at an evaluation.
        self._times.append((time.monotonic(), tokens))
        self._pending = (self._step, metrics, list(self._times))
        last, stop = self._step == self.steps, self._asked()
        if last or self._step % self._every == 0 or stop is not None:
            self._flush()
            if self._writer is not None:
                self._writer.sync()  # no checkpoint is further than the metrics, even after a power cut
            assert self._cursor is not None
            self._checkpoints.save(self._step, state, self._cursor.get_state())
        if stop is not None:
            raise self._stopped(stop)

    def note(self, text: str) -> None:
        """Print a line above the progress bar."""
        self._progress.note(text)

    def _stopped(self, number: int) -> Stopped:
        text = f"{self.name}: stopped after step {self._step} of {self.steps}, saved; the same command goes on"
        return Stopped(text, number)

    def _flush(self) -> None:
        if self._pending is None:
            return
        step, metrics, ((began, _), *steps) = self._pending
        self._pending = None
        replica = lockstep.current()
        if step == self._first + 1 and (replica is None or replica.speaks):
            memory.give_back()  # what compiling it took
        rate = sum(int(tokens) for _, tokens in steps) / max(steps[-1][0] - began, 1e-9)
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        in_row, given_up = int(values.pop("skipped_in_row", 0)), values.pop("given_up", 0) > 0
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if given_up or (broken and not in_row):
            good = self._checkpoints.latest_step()
            kept = "there is no checkpoint yet" if good is None else f"the checkpoint of step {good} is kept"
            raise NonFiniteError(f"{self.name}: {_cause(values, broken, step, in_row)}; {kept}")
        values["tokens_per_second"] = rate
        if self._writer is not None:
            self._writer.write(step, values)
        self._progress.update(step, values)

    def _asked(self) -> int | None:
        """The signal to stop at: of several processes one that any of them had a call ago, so that all stop at once."""
        replica = lockstep.current()
        if replica is not None:
            return replica.group.asked
        if hosts.count() == 1:
            return self._signal
        told, self._told = self._told, sharding.largest_of_processes(self._signal or 0)
        return None if told is None else int(told) or None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._signal is not None:  # asked twice: at once, losing the current step alone
            raise KeyboardInterrupt(number)
        self._signal = number
        self.note(f"{self.name}: stopping after this step (again to stop at once)")


def _cause(values: dict[str, float], broken: list[str], step: int, in_row: int) -> str:
    """Why a stage stops at a step: what is not finite in it, else that it spikes, and how many steps before it did."""
    before = f", the last of {in_row} updates in a row that were left out" if in_row > 1 else ""
    if not broken:
        seen = "  ".join(f"{name} {values[name]:.4g}" for name in _SPIKING if name in values)
        return f"a spike at step {step} ({seen}){before}"
    cause = next((name for name in _CAUSES if name in broken), broken[0])
    more = f" ({len(broken) - 1} more are not finite)" if len(broken) > 1 else ""
    return f"{cause} is {values[cause]} at step {step}{more}{before}"


def finish(context: Context, name: str, params: Params) -> None:
    """Write a finished stage's parameters to `<stage>/params`, where later stages and other tools read them."""
    checkpoint.save_params(context.stage_dir(name) / "params", params)
