"""What a measuring process repeats: that it runs, what it counts, and that a peer draws the same rows."""

import runpy
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from rlhf_jax import models, sharding
from rlhf_jax.algorithms.context import Context
from rlhf_jax.bench import ours, processes, tasks
from rlhf_jax.bench.work import SIZES, Work
from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.interop import Pretrained
from tests.toys import SPEC

SPEC = replace(
    SPEC, scale_embedding=False, tied=False, n_layers=2
)  # of a single layer, which is unrolled, some is left out
PPO = Work("tiny", "ppo", rows=4, prompt=4, completion=4, turns=1, epochs=2, minibatches=2)

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture
def context(tmp_path):
    params = sharding.unbox(models.init(SPEC, jax.random.key(0)))
    return Context(tmp_path, 0, sharding.single_device_mesh(), Pretrained(SPEC, params, None), MovieReviews())


def forward(rows, length, *, read):
    """FLOPs of a pass by hand: projections, gated block, scores and mixture; `read` tokens reach the vocabulary."""
    s, tokens = SPEC, rows * length
    width = s.n_heads * s.head_dim
    block = 2 * s.d_model * (4 * width + 3 * s.d_ff)
    attention = 4 * length * width
    return tokens * s.n_layers * (block + attention) + read * 2 * s.d_model * s.vocab_size


def test_flops_of_a_step_are_those_of_three_passes(context):
    work = Work("tiny", "sft", rows=4, prompt=16, completion=0, turns=1)
    assert tasks.sft_task(work, context).flops == pytest.approx(3 * forward(4, 16, read=64), rel=0.02)


def test_flops_of_a_reward_model_are_without_the_vocabulary(context):
    work = Work("tiny", "rm", rows=4, prompt=8, completion=8, turns=1)
    assert tasks.rm_task(work, context).flops == pytest.approx(3 * forward(8, 16, read=0), rel=0.02)


def test_an_iteration_samples_scores_and_updates(context):
    task = tasks.ppo_task(PPO, context)
    passes = forward(4, 8, read=16)
    trunk = forward(4, 8, read=0)
    # Of a rollout: its own log-probs, the reference's, reward, values; the ratio's check on a minibatch; then two
    # passes over it of policy and critic, forward and backward. Sampling is a pass, with the whole cache at each token.
    scored = 2 * passes + 2 * trunk + passes / 2
    least = scored + 2 * 3 * (passes + trunk)
    assert least < task.flops < least + 2 * passes
    assert task.updates is not None
    with sharding.scope(context.mesh):
        found = ours.measure(task, PPO.turns)
    assert found["tokens"] == int(found["tokens"])
    assert 4 <= found["tokens"] <= 16
    assert found["update_flops"] == pytest.approx(trunk + passes / 2 + 6 * (passes + trunk), rel=0.02)
    assert found["update_seconds"] > 0
    assert found["matmul_rate"] > 1e8
    assert found["peak_bytes"] > 1e7


@pytest.mark.parametrize("size", SIZES)
def test_short_completions_of_every_size_are_packed(size):
    rows, prompt, completion, turns = SIZES[size].rows["ppo"]
    packing = tasks.short(Work(size, "ppo/natural", rows, prompt, completion, turns, minibatches=4))["packing"]
    packing.check(prompt, completion)
    assert packing.rows < rows / 4 and packing.fewer


def test_decoding_reads_weights_and_cache(context):
    work = Work("tiny", "decode/batch", rows=3, prompt=4, completion=6, turns=1)
    params = context.model.params
    entries = sum(x.size for name, part in params.items() if name != "embedding" for x in jax.tree.leaves(part))
    cache = 2 * 3 * (4 + 3) * SPEC.n_layers * SPEC.n_kv_heads * SPEC.head_dim
    assert tasks.step_bytes(work, params, context) == 4 * (entries + cache)


def test_peers_draw_the_same_rows(tmp_path, monkeypatch):
    work = Work("tiny", "sft", rows=2, prompt=5, completion=0, turns=1)
    script = Path(processes.ROOT) / "benchmarks" / "peers" / "common.py"
    drawn = runpy.run_path(str(script))["tokens"]
    told = {**work.job(tmp_path, threads=1), "length": work.length}
    assert drawn(told, 6) == tasks.tokens(work, told["vocab"], 6).tolist()
