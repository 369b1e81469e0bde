"""An on-policy run that a signal stops and the same call goes on with, beside an unbroken one."""

import os
import signal

import jax
import numpy as np
import pytest

from rlhf_jax.algorithms import onpolicy, ppo
from rlhf_jax.errors import Stopped


def check_resumption(config, whole, broken, monkeypatch, *, stop_after, stage=ppo, name="ppo"):
    """Train in the context `whole` at once and in `broken` with a SIGTERM in a step; both must end the same."""
    expected = stage.train(config, whole, name)
    record = onpolicy.Loop.record

    def interrupt(self, state, metrics, *, tokens):
        if self._step == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        record(self, state, metrics, tokens=tokens)

    monkeypatch.setattr(onpolicy.Loop, "record", interrupt)
    with pytest.raises(Stopped):
        stage.train(config, broken, name)
    monkeypatch.setattr(onpolicy.Loop, "record", record)
    assert stage.train(config, broken, name) == expected
    for a, b in zip(*(jax.tree.leaves(context.policy_params(name)) for context in (whole, broken)), strict=True):
        np.testing.assert_array_equal(a, b)
