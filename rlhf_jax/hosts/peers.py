"""A watch on the other processes of a run: when one has failed, died or hangs, this one ends, with a line that says so.

Who lives is the word of JAX's coordination service, which hears of each process many times within the limit. Without
the watch a process would wait in a collective for ever.
"""

import contextlib
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn

import jax
from jax._src.distributed import global_state  # neither liveness nor the key-value store has a public name

from rlhf_jax.errors import Stopped, UserError
from rlhf_jax.hosts import together

LOST = 4
"""The exit code where another process is gone."""

_PROCESSES, _FAILED = "rlhf_jax/process/", "rlhf_jax/failed/"
_GRACE = 2  # seconds in which a process may find the error by itself that another has found
_PARTING = 10  # seconds that process 0 waits for the others to leave, since they end hard when it goes first


class _Watch(threading.Thread):
    """Asks who lives, and what has failed, many times within the limit of `seconds`."""

    def __init__(self, seconds: int) -> None:
        super().__init__(daemon=True)
        self.seconds = seconds
        self.index, self.count = global_state.process_id, global_state.num_processes
        self.name = f"process {self.index} of {self.count}"
        self.leaving, self.alone = threading.Event(), threading.Event()

    def run(self) -> None:
        client, everyone = _client(), list(range(self.count))
        first: dict[int, int] = {}
        heard = time.time()
        while True:
            try:
                live = client.get_live_nodes(everyone)  # waits for those that live, until they are taken for dead
                failed = dict(client.key_value_dir_get(_FAILED))
            except jax.errors.JaxRuntimeError:  # process 0 is gone: JAX ends this process itself
                return
            first = first or live
            lost = [i for i in everyone if i not in live or live[i] != first.get(i)]
            if self.leaving.is_set():
                if set(live) == {self.index}:
                    self.alone.set()
                    return
            elif failed and not self.leaving.wait(_GRACE):
                key, line = min(failed.items())
                index, code = key.removeprefix(_FAILED).split("/")
                self._end(f"ended with process {index}: {line}", int(code))
            elif lost and not failed:
                since = time.strftime("%H:%M:%S", time.localtime(heard))
                who = " and ".join(map(_called, lost))
                self._end(f"no sign of {who} since {since}; the same command on all hosts goes on", LOST)
            else:
                heard = time.time()
            time.sleep(min(1.0, self.seconds / 10))

    def _end(self, line: str, code: int) -> None:
        """End this process, whose main thread may wait in C++ for ever."""
        self.leaving.set()
        print(f"error: {self.name}: {line}", file=sys.stderr, flush=True)
        threading.Thread(target=self.part, args=(code,)).start()  # this one sees the others go

    def part(self, code: int) -> NoReturn:
        """End at once; process 0 when the others have gone."""
        try:
            if self.index == 0:
                self.alone.wait(_PARTING)
            else:
                jax.distributed.shutdown()
        finally:
            os._exit(code)


_watch: _Watch | None = None


def watch(seconds: int) -> None:
    """Begin to watch; raises UserError where a process of this number has been there before."""
    global _watch
    index = global_state.process_id
    here = f"{socket.gethostname()}, process id {os.getpid()}"
    try:
        _client().key_value_set(f"{_PROCESSES}{index}", here)
    except jax.errors.JaxRuntimeError:
        line = f"{_called(index)} has that number; each has its own, and a new run begins when the last has ended"
        _client().key_value_set(f"{_FAILED}{index}/2", line)
        raise UserError(f"--process_id {index}: {line}") from None
    # Orbax's threads and logger tell of a lost peer, too, at length, before the watch does; their errors are raised.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    others = threading.excepthook
    threading.excepthook = lambda args: None if _may_be_anothers(args.exc_value) else others(args)
    _watch = _Watch(seconds)
    _watch.start()


class Parting:
    """Around a run: `with` it its processes part in order, or this one tells the others, and the user, why it ends."""

    def __init__(self, explain: Callable[[BaseException], tuple[str, int] | None]) -> None:
        """`explain` gives an error's line and exit code, None for what is to be seen with its traceback."""
        self._explain = explain

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if _watch is None:
            return
        if error is None or isinstance(error, Stopped):  # all stop at one step
            _leave(_watch)
        if error is None:
            return
        if isinstance(error, Stopped):
            print(f"error: {_watch.name}: {error}", file=sys.stderr)
            sys.exit(error.exit_code)
        known = self._explain(error)
        if known is None:
            if _may_be_anothers(error):
                time.sleep(2 * _watch.seconds)  # the watch says which process it was, and ends this one
            if not _watch.leaving.is_set():
                traceback.print_exception(error)
        _fail(_watch, *(known or (f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", 1)))


def _leave(watch: _Watch) -> None:
    """Part at the end of a run; process 0, without which the others cannot be, goes last."""
    together.wait()
    watch.leaving.set()
    if watch.index == 0:
        watch.alone.wait(_PARTING)
    jax.distributed.shutdown()
    watch.join(_PARTING)  # Python must not end while a thread is in C++


def _fail(watch: _Watch, line: str, code: int) -> None:
    if not watch.leaving.is_set():
        watch.leaving.set()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _client().key_value_set(f"{_FAILED}{watch.index}/{code}", line)
        print(f"error: {watch.name}: {line}", file=sys.stderr, flush=True)
    watch.part(code)


def _may_be_anothers(error: BaseException | None) -> bool:
    """Whether an error may come of another process's end."""
    return isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)


def _called(index: int) -> str:
    """A process with the host that it is on."""
    try:
        return f"process {index} ({_client().key_value_try_get(f'{_PROCESSES}{index}')})"
    except jax.errors.JaxRuntimeError:
        return f"process {index}"


def _client() -> Any:
    return global_state.client
