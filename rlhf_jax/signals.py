"""Signals that end what holds nothing unsaved, wherever in the program they are heard."""

import _thread
import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_LATER = 0.01  # seconds in which a collection or a finaliser has ended


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM end what holds nothing that is not saved, as Ctrl-C does; a stage's `Loop` hears both by itself."""

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        raise KeyboardInterrupt(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, show = signal.signal(signal.SIGTERM, stop), sys.unraisablehook
    sys.unraisablehook = _said_again(show)
    try:
        yield
    finally:
        sys.unraisablehook = show
        signal.signal(signal.SIGTERM, before)


def _said_again(show: Callable[[Any], None]) -> Callable[[Any], None]:
    """A `sys.unraisablehook` for signals heard where nothing can be raised, such as in JAX's callback of each garbage
    collection: Python prints a traceback there and goes on as if nobody had asked it to stop.
    """

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if isinstance(error, KeyboardInterrupt):
            number = error.args[0] if error.args else signal.SIGINT
            threading.Timer(_LATER, _thread.interrupt_main, [number]).start()
        else:
            show(unraisable)

    return hook
