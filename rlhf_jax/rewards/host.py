"""Rewards that are functions of texts, and the guard around them: a limit of time, and checks of what they return."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from multiprocessing import Pipe
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from jaxtyping import Float

from rlhf_jax import hosts
from rlhf_jax.errors import UserError
from rlhf_jax.rewards.combined import Combined, Single

HostFunction = Single | Combined
"""The rewards that a config may name; a new one is a frozen dataclass with the methods of `RewardFunction`."""


_LARGEST = float(np.finfo(np.float32).max)
_PATIENCE = 300  # seconds on the clock until a reward is loaded


class RewardFunction(Protocol):
    """A reward as a function of texts."""

    @property
    def seconds(self) -> float:
        """Longest time that a batch may take."""
        ...

    @property
    def counted(self) -> tuple[str, ...]:
        """Names of metrics that its calls count beside the scores, see `verifiers.Counted`."""
        ...

    def prepare(self) -> None:
        """Load what the first call needs, outside its time; called once in the process that the reward runs in."""
        ...

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Sequence[float]:
        """One finite score a completion; of each row metadata has the other fields. Where it counts, a `Counted`."""
        ...

    def check_inputs(self) -> None:
        """Raise UserError for a file or a package that is missing."""
        ...

    def check_row(self, row: Mapping[str, Any]) -> None:
        """Raise ValueError for a row that lacks what the reward reads of it."""
        ...


class Texts(NamedTuple):
    """A prompt, its completion and its row's other fields."""

    prompt: str
    completion: str
    metadata: Mapping[str, Any]


class _Fault(Exception):
    """What is wrong with a reward's answer to some rows."""


class HostReward:
    """A reward function in a process of its own, `with` which it ends.

        with HostReward(AnswerChecker(), "ppo") as reward:
            scores = reward(rows)

    A call raises UserError, one line that names a prompt, where the function raises, takes longer than its `seconds`,
    ends its process, or returns anything but one finite number a completion. The prompt is one for which it fails
    alone, found by halving the rows; where it fails for all of them only together, it is the first. Every process of
    the run calls it with all rows; each scores its share of them.
    """

    def __init__(self, reward: RewardFunction, name: str) -> None:
        """`name` is the stage's, for messages."""
        self._reward, self._name = reward, f"{name}: the reward {type(reward).__name__}"
        self._process: subprocess.Popen[bytes] | None = None
        self._counts = Counter[str]()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def __call__(self, rows: Sequence[Texts]) -> Float[np.ndarray, " n"]:
        """One score a row, float32."""
        return hosts.by_rows(self._scores, rows)

    def metrics(self) -> dict[str, Any]:
        """What the function has counted, in all processes, since it was last asked; every process asks at once."""
        counts, self._counts = self._counts, Counter[str]()
        everyone = range(hosts.count())
        return {
            name: float(hosts.by_rows(partial(_of_each, counts[name]), everyone).sum()) for name in self._reward.counted
        }

    def _scores(self, rows: Sequence[Texts]) -> Float[np.ndarray, " n"]:
        if not rows:
            return np.zeros(0, np.float32)
        try:
            return self._ask(rows, self._reward.seconds)
        except _Fault as fault:
            prompt = " ".join(self._culprit(rows).prompt.split())
            shown = prompt if len(prompt) <= 80 else prompt[:79] + "…"
            raise UserError(f"{self._name} {fault}; prompt: {shown!r}") from None

    def _ask(self, rows: Sequence[Texts], seconds: float) -> np.ndarray:
        if self._process is None:
            self._start()
            self._exchange((self._reward, _PATIENCE), _PATIENCE, f"is not ready after {_PATIENCE} seconds")
        late = f"takes longer than seconds={self._reward.seconds:g}"
        value, counts = self._exchange(tuple(zip(*rows, strict=True)), seconds, late)
        self._counts.update(counts)
        if len(value) != len(rows):
            count = len(value) if len(value) < len(rows) else f"more than {len(rows)}"
            raise _Fault(f"returned {count} scores for {len(rows)} completions")
        broken = [score for score in value if not abs(score) <= _LARGEST]
        if broken:
            raise _Fault(f"returned {broken[0]}")
        return np.asarray(value, np.float32)

    def _exchange(self, request: Any, seconds: float, late: str) -> Any:
        """Send something, and wait so long for the answer."""
        try:
            self._connection.send(request)
            if not self._connection.poll(seconds):
                self._stop()
                raise _Fault(late)
            kind, value = self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._stop()
            raise _Fault("ended its process") from None
        if kind == "error":
            raise _Fault(f"raised {value}")
        return value

    def _culprit(self, rows: Sequence[Texts]) -> Texts:
        """A row for which the reward fails alone; each part gets its share of the time."""
        a_row = self._reward.seconds / len(rows)
        while len(rows) > 1:
            half = len(rows) // 2
            for part in (rows[:half], rows[half:]):
                try:
                    self._ask(part, max(1.0, a_row * len(part)))
                except _Fault:
                    rows = part
                    break
            else:
                break
        return rows[0]

    def _start(self) -> None:
        """Start the process, which finds the package where this one does and leaves the accelerators alone."""
        self._connection, theirs = Pipe()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "JAX_PLATFORMS": "cpu"}
        # -P: the file's own folder has modules with names of packages. What the function prints goes to stderr, at once
        # (-u): the process is killed at the end.
        command = [sys.executable, "-u", "-P", str(Path(__file__).with_name("worker.py")), str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=2, env=environment, pass_fds=[theirs.fileno()]
            )

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            self._connection.close()


def _of_each(value: float, rows: Sequence[Any]) -> Float[np.ndarray, " n"]:
    return np.full(len(rows), value, np.float32)
