"""A run that goes on on another mesh than the one that saved it takes the steps that it would have taken there."""

import os
import signal

import jax
import numpy as np
import pytest

from rlhf_jax.algorithms import sft, supervised
from rlhf_jax.errors import Stopped
from rlhf_jax.metrics import read_jsonl
from rlhf_jax.sharding import MeshConfig
from tests.algorithms.test_supervised import CONFIG, DATA


def test_eight_data_shards_then_fsdp_and_tensor_then_one_device(make_context, monkeypatch):
    config = sft.Config(steps=6, data=DATA, **{**CONFIG, "heldout_rows": 8, "evaluate_every": 6})
    record = supervised.Loop.record

    def stop_after_two(self, state, metrics, *, tokens):
        if self._step in (2, 4):
            os.kill(os.getpid(), signal.SIGTERM)
        record(self, state, metrics, tokens=tokens)

    sft.train(config, make_context("whole"), "sft")
    monkeypatch.setattr(supervised.Loop, "record", stop_after_two)
    for mesh in (MeshConfig(data=8), MeshConfig(fsdp=4, tensor=2)):
        with pytest.raises(Stopped):
            sft.train(config, make_context("broken", mesh=mesh), "sft")
    sft.train(config, make_context("broken"), "sft")
    whole, broken = (read_jsonl(make_context(name).workdir / "metrics.jsonl") for name in ("whole", "broken"))
    assert [line["step"] for line in broken] == [1, 2, 3, 4, 5, 6]
    for ours, theirs in zip(whole, broken, strict=True):
        np.testing.assert_allclose(theirs["loss"], ours["loss"], rtol=1e-6)
        np.testing.assert_allclose(theirs["grad_norm"], ours["grad_norm"], rtol=1e-5)


def test_without_a_good_checkpoint_a_stage_begins_anew_and_ends_the_same(make_context, capsys):
    config = sft.Config(steps=4, data=DATA, **{**CONFIG, "heldout_rows": 8, "checkpoint_every": 2})
    context = make_context()
    figures = sft.train(config, context, "sft")
    params = jax.device_get(context.policy_params("sft"))
    for step in ("2", "4"):
        (context.stage_dir("sft") / "checkpoints" / step / "cursor.json").write_text("{}")
    capsys.readouterr()
    assert sft.train(config, context, "sft") == figures
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" is damaged")[0] for line in said[:2]] == [f"sft: the checkpoint of step {n}" for n in (4, 2)]
    assert said[2] == "sft: no good checkpoint is left: the stage begins anew"
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(context.policy_params("sft")))
    assert [line["step"] for line in read_jsonl(context.workdir / "metrics.jsonl")] == [1, 2, 3, 4]
