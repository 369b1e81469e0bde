"""Stages whose parameters really overflow: bad updates are left out, counted, and too many in a row end the run."""

import dataclasses

import pytest

from rlhf_jax.algorithms import ppo, sft
from rlhf_jax.algorithms.context import Context
from rlhf_jax.errors import NonFiniteError
from rlhf_jax.interop.pretrained import Pretrained
from rlhf_jax.metrics import read_jsonl
from rlhf_jax.models.spec import Lora
from rlhf_jax.optim import Optimizer
from tests.algorithms.conftest import SPEC, put_stages

pytestmark = pytest.mark.usefixtures("compile_quickly")

ABSURD = Optimizer(learning_rate=1e38, clip_norm=1e30, bad_steps="skip", most_skipped=3)


def test_adapters_over_microbatches(make_context, pretrained):
    plain, spec = make_context(), dataclasses.replace(SPEC, lora=Lora(rank=2, targets=("query", "down")))
    model = Pretrained(spec, pretrained.params, pretrained.tokenizer)
    context = Context(plain.workdir, 0, plain.mesh, model, plain.data)
    config = sft.Config(
        steps=20, row_length=49, batch_size=8, heldout_rows=8, num_microbatches=2, optimizer=ABSURD, checkpoint_every=3
    )
    with pytest.raises(NonFiniteError) as caught:
        sft.train(config, context, "sft")
    lines = read_jsonl(context.workdir / "metrics.jsonl")
    first = next(line["step"] for line in lines if line["skipped"])
    assert [line["skipped"] for line in lines] == [0] * (first - 1) + [1, 2, 3]
    assert all(("loss" in line) == (line["step"] < first) for line in lines)
    said = (
        rf"sft: (loss|\w+) is (nan|inf) at step {first + 3}.*, the last of 4 updates in a row that were left out; the "
    )
    assert caught.match(said + "checkpoint of step 3 is kept")


def test_minibatches_of_ppo(make_context):
    context = make_context()
    put_stages(context)
    config = ppo.Config(
        steps=4, batch_size=16, completion_tokens=8, epochs=2, minibatches=2, evaluation_prompts=16, exact_kl_rows=4,
        optimizer=ABSURD,
    )  # fmt: skip
    with pytest.raises(NonFiniteError, match=r"ppo: \w+ is (nan|inf) at step \d.*the last of [4-8] updates in a row"):
        ppo.train(config, context, "ppo")
