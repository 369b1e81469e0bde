"""The process in which rewards that are functions run, so that one that hangs or dies takes nothing with it.

It is started by `host.HostReward` with the number of a file descriptor, gets a pickled reward there and the time to
prepare it, then (prompts, completions, metadata) again and again; it answers each with ("value", ([float, …], counts))
or ("error", text).
"""

import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rlhf_jax.rewards.verifiers import Counted

_GRACE = 5.0  # seconds


class _Told:
    """Keeps what its block raises, whatever it is, as a line with the place: the run hears of it and stops."""

    line = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if error is not None:
            frames = traceback.extract_tb(trace)
            place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if len(frames) > 1 else ""
            self.line = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place}"
        return True


def answer(act: Callable[[], Any]) -> tuple[str, Any]:
    """What an act returns, or the error."""
    value = None
    with _Told() as told:
        value = act()
    return ("error", told.line) if told.line else ("value", value)


def within(seconds: float, act: Callable[[], Any]) -> tuple[str, Any]:
    """The answer; a while after the limit, which the run keeps, this process ends by itself: the run may be gone."""
    signal.setitimer(signal.ITIMER_REAL, seconds + _GRACE)
    told = answer(act)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return told


def scores(reward: Any, request: tuple[Any, Any, Any]) -> tuple[list[float], dict[str, int]]:
    """What the reward returns and counts; of a sequence that is too long, or endless, one number more than was asked
    for.
    """
    said = reward(*request)
    counts = said.counts if isinstance(said, Counted) else {}
    return [float(score) for score in islice(said, len(request[0]) + 1)], counts


def main(connection: Connection) -> None:
    """Answer until the other end is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C and a scheduler's end are the run's, which ends its step
        signal.signal(number, signal.SIG_IGN)
    try:
        reward, patience = connection.recv()
        connection.send(within(patience, reward.prepare))
        while True:
            request = connection.recv()
            connection.send(within(reward.seconds, partial(scores, reward, request)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
