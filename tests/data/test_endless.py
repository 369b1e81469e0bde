"""Endless batches of sources: every row once an epoch, weights kept, shards of processes, resumed at any step."""

import json
import socket
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax import sharding
from rlhf_jax.data.pipeline import READ, by_part, endless, packed
from rlhf_jax.data.preference_batches import preference_batches
from rlhf_jax.data.preferences import PreferenceGroup
from rlhf_jax.data.prompts import prompt_batches
from rlhf_jax.data.reading import Mixed
from rlhf_jax.data.text import Row
from rlhf_jax.sharding import Shard


def groups(count, start=0):
    return [
        PreferenceGroup("", ("", ""), (2,), ((start + i,), (start + i, 3)), (), ((0, 1),), (0.0,), "file")
        for i in range(count)
    ]


def rows(count, start=100):
    return [Row([start + i] * (1 + i % 5), [True] * (1 + i % 5)) for i in range(count)]


def leaves(batch):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(batch)]


MAKERS = {
    "packed": lambda shard: packed(
        rows(30), lambda row, rng: row, pad_id=0, row_length=9, batch_size=12, seed=1, shard=shard
    ),
    "preferences": lambda shard: preference_batches(
        Mixed((groups(30), groups(9, 100)), (3.0, 1.0)),
        pad_id=0, batch_size=12, completions=2, length=4, seed=1, shard=shard,
    ),
    "prompts": lambda shard: prompt_batches(
        [[2, 10 + i] for i in range(30)], length=3, pad_id=0, batch_size=12, seed=1, shard=shard
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("count", [2, 3, 4, 12])
def test_processes_read_disjoint_rows_of_one_global_batch(kind, count):
    whole = MAKERS[kind](Shard())
    parts = [MAKERS[kind](Shard(index, count)) for index in range(count)]
    for _ in range(7):
        expected = leaves(next(whole))
        own = [leaves(next(part)) for part in parts]
        for number, leaf in enumerate(expected):
            assert all(len(mine[number]) == 12 // count for mine in own)
            np.testing.assert_array_equal(np.concatenate([mine[number] for mine in own]), leaf)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.integers(1, 40), st.integers(0, 5), st.sampled_from([1, 2, 4]))
def test_every_row_stands_once_in_each_epoch(rows_, seed, processes):
    source = list(range(rows_))
    dataset = endless(source, seed=seed)
    shares = [Shard(index, processes).rows(4) for index in range(processes)]
    batches = iter(dataset.batch(4, batch_fn=list).to_iter_dataset(READ))
    seen = []
    while len(seen) < 3 * rows_:
        batch = next(batches)
        seen += [row for share in shares for row in batch[share]]
    for epoch in range(3):
        assert sorted(seen[epoch * rows_ : (epoch + 1) * rows_]) == source


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 30), st.floats(0.05, 5)), min_size=1, max_size=4), st.integers(0, 3))
def test_weights_are_kept_and_parts_come_round_evenly(parts, seed):
    mixed = Mixed(tuple([(p, i) for i in range(size)] for p, (size, _) in enumerate(parts)), tuple(w for _, w in parts))
    drawn = [endless(mixed, seed=seed)[i] for i in range(400)]
    total = sum(mixed.weights)
    for part, weight in enumerate(mixed.weights):
        own = [row for row in drawn if row[0] == part]
        assert abs(len(own) - 400 * weight / total) <= len(parts)
        times = [own.count(row) for row in set(own)]
        assert max(times) - min(times) <= 1 and (len(own) < len(mixed.parts[part])) <= (max(times) == 1)


SHARDS = [Shard(), Shard(1, 3), Shard(3, 4)]


@settings(deadline=None, derandomize=True, max_examples=20)
@given(st.sampled_from(sorted(MAKERS)), st.integers(0, 40), st.sampled_from(SHARDS), st.sampled_from(SHARDS))
def test_resuming_at_any_step_goes_on_bit_for_bit_with_any_number_of_processes(kind, steps, before, after):
    whole, first, second = (MAKERS[kind](shard) for shard in (Shard(), before, after))
    for _ in range(steps):
        next(whole), next(first)
    assert first.get_state() == whole.get_state()  # a place in the whole batches, which every process knows
    second.set_state(json.loads(json.dumps(first.get_state())))
    for _ in range(3):
        for a, b in zip(leaves(next(whole)), leaves(next(second)), strict=True):
            np.testing.assert_array_equal(a[after.rows(12)], b)


def test_seeds_repeat_and_differ_in_mixtures():
    mixed = Mixed((list(range(50)), list(range(100, 150))), (1.0, 1.0))
    a, b, c = ([endless(mixed, seed=seed)[i] for i in range(60)] for seed in (1, 1, 2))
    assert a == b != c
    order = [row % 100 for row in a]
    assert order[::2] != order[1::2]  # parts of one length are not shuffled alike


def test_parts_are_made_each_on_its_own():
    mixed = Mixed(([1, 2], [3]), (2.0, 1.0))
    assert by_part(mixed, lambda part: [10 * row for row in part]) == Mixed(([10, 20], [30]), (2.0, 1.0))
    assert by_part([1, 2], len) == 2


def test_one_process_reads_all():
    for shape in ((8, 1, 1, 1), (2, 2, 2, 1)):
        mesh = sharding.make_mesh(sharding.MeshConfig(*shape))
        assert sharding.process_shard(mesh) == Shard(0, 1)
        batch = np.arange(16).reshape(8, 2)
        np.testing.assert_array_equal(sharding.local_batch(mesh, batch), batch)
        assert sharding.local_batch(mesh, batch).sharding == sharding.shard_batch(mesh, batch).sharding


PROGRAM = """
    import os, sys
    index, port = int(sys.argv[1]), sys.argv[2]
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    import jax
    jax.config.update("jax_platforms", "cpu")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)
    import numpy as np
    from rlhf_jax import sharding
    from rlhf_jax.data.prompts import prompt_batches

    for shape in ((4, 1, 1, 1), (2, 1, 2, 1), (1, 2, 2, 1), (1, 1, 4, 1)):
        mesh = sharding.make_mesh(sharding.MeshConfig(*shape))
        shard = sharding.process_shard(mesh)
        prompts = [[2, 10 + i] for i in range(30)]
        options = {"length": 3, "pad_id": 0, "batch_size": 8, "seed": 1}
        own, whole = prompt_batches(prompts, **options, shard=shard), prompt_batches(prompts, **options)
        for _ in range(3):
            mine, everything = next(own), next(whole)
            batch = sharding.local_batch(mesh, mine)
            assert batch.tokens.shape == (8, 3) and len(mine.tokens) == 8 // shard.count
            for piece in batch.tokens.addressable_shards:
                np.testing.assert_array_equal(np.asarray(piece.data), everything.tokens[piece.index])
        print(shape, shard.index, shard.count, flush=True)
"""


def test_two_real_processes_hold_the_batch_of_one():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM)]
    both = [
        subprocess.Popen([*command, str(i), port], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    said = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    for index, (out, _) in enumerate(said):
        *apart, shared = out.splitlines()
        assert apart == [f"{shape} {index} 2" for shape in ("(4, 1, 1, 1)", "(2, 1, 2, 1)", "(1, 2, 2, 1)")]
        assert shared == "(1, 1, 4, 1) 0 1"  # each holds all rows, and a part of what is computed of them


@pytest.mark.parametrize("source", [rows(7), Mixed((rows(7), rows(5, 200)), (1.0, 3.0))], ids=["rows", "a mixture"])
def test_batches_of_one_row_are_the_rows_of_larger_ones(source):
    one, three = (iter(endless(source, seed=4).batch(n, batch_fn=list).to_iter_dataset(READ)) for n in (1, 3))
    assert [next(one)[0] for _ in range(30)] == [row for _ in range(10) for row in next(three)]
