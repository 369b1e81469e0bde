"""Counts what is really compiled."""

import contextlib

import jax


@contextlib.contextmanager
def no_compiling():
    """Fails if anything inside is compiled."""
    seen = []

    def listen(event, duration, **kwargs):
        if event.endswith("backend_compile_duration"):
            seen.append(kwargs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert seen == []
