"""Signals heard at bad moments."""

import gc
import signal
import sys
import time

import pytest

from rlhf_jax.signals import terminable


class Finalised:
    """Hears a signal as it is deleted."""

    def __init__(self, number):
        self.number = number

    def __del__(self):
        signal.raise_signal(self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_heard_where_nothing_can_be_raised_is_heard_again(number, capfd):
    heard = []

    def collected(phase, info):
        if not heard:
            heard.append(phase)
            signal.raise_signal(number)

    gc.callbacks.append(collected)
    try:
        with terminable():
            for of in (gc.collect, lambda: Finalised(number)):
                with pytest.raises(KeyboardInterrupt) as raised:
                    of()
                    time.sleep(10)
                assert raised.value.args in ((), (number,))
    finally:
        gc.callbacks.remove(collected)
    assert heard and "Traceback" not in capfd.readouterr().err


def test_other_errors_there_are_shown_and_handlers_are_as_before():
    shown, before = [], (signal.getsignal(signal.SIGTERM), sys.unraisablehook)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", shown.append)
        with terminable():
            Finalised("no number")
    assert [type(one.exc_value) for one in shown] == [TypeError]
    assert (signal.getsignal(signal.SIGTERM), sys.unraisablehook) == before
