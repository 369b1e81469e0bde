"""Groups to arrays: every token in its place, absent completions and pairs masked, resumed within an epoch."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from rlhf_jax.data import preferences
from rlhf_jax.data.preference_batches import batch_groups, preference_batches
from rlhf_jax.data.preferences import PreferenceGroup

PAD = 0


def group(index, completions=2, prompt=2):
    pairs = tuple((j, i) for i in range(completions) for j in range(i + 1, completions))
    return PreferenceGroup(
        prompt="",
        completions=("x",) * completions,
        prompt_tokens=(2, *range(100, 100 + prompt)),
        completion_tokens=tuple((1_000 + index, *(3,) * (i + 1)) for i in range(completions)),
        scores=(),
        pairs=pairs,
        margins=tuple(float(1 + n) for n in range(len(pairs))),
        source="file",
    )


def batches(source, seed=0, batch_size=4):
    return preference_batches(source, pad_id=PAD, batch_size=batch_size, completions=3, length=8, seed=seed)


def test_a_batch_by_hand():
    batch = batch_groups([group(7), group(8, completions=3)], pad_id=PAD, completions=3, length=7)
    assert batch.tokens.dtype == np.int32 and batch.mask.dtype == bool and batch.margins.dtype == np.float32
    assert batch.tokens[0].tolist() == [[2, 100, 101, 1007, 3, 0, 0], [2, 100, 101, 1007, 3, 3, 0], [0] * 7]
    assert batch.mask.sum(-1).tolist() == [[5, 6, 0], [5, 6, 7]]
    assert batch.completion_mask[0].tolist() == [
        [False] * 3 + [True] * 2 + [False] * 2,
        [False] * 3 + [True] * 3 + [False],
        [False] * 7,
    ]
    assert batch.pairs.shape == (2, 3, 2)
    assert batch.pairs[0, 0].tolist() == [1, 0] and batch.weights[0].tolist() == [1, 0, 0]
    assert batch.pairs[1].tolist() == [[1, 0], [2, 0], [2, 1]] and batch.weights[1].tolist() == [1, 1, 1]
    assert batch.margins.tolist() == [[1, 0, 0], [1, 2, 3]] and batch.probabilities is None


def test_soft_labels_stand_beside_pairs_that_are_certain():
    soft = dataclasses.replace(group(8, completions=3), probabilities=(0.5, 0.75, 0.25))
    batch = batch_groups([group(7), soft], pad_id=PAD, completions=3, length=7, soft=True)
    assert batch.probabilities.dtype == np.float32
    assert batch.probabilities.tolist() == [[1, 1, 1], [0.5, 0.75, 0.25]]
    certain = next(
        preference_batches([group(7)] * 4, pad_id=PAD, batch_size=2, completions=3, length=8, seed=0, soft=True)
    )
    assert certain.probabilities.tolist() == [[1] * 3] * 2  # by the stage, not by the rows of a batch


@pytest.mark.parametrize("length", [2, 3, 4, 6, 12])
def test_a_long_row_keeps_its_completion_and_the_end_of_its_prompt(length):
    long = group(5, prompt=6)
    batch = batch_groups([long.cut(length)], pad_id=PAD, completions=2, length=length)
    longest, room = max(map(len, long.completion_tokens)), length - 1
    bos, *before = long.prompt_tokens
    kept_before = before[max(0, len(before) - max(0, room - longest)) :]
    for row, completion in enumerate(long.completion_tokens):
        assert batch.tokens[0, row][batch.mask[0, row]].tolist() == [bos, *kept_before, *completion[:room]]
        kept = batch.tokens[0, row][batch.completion_mask[0, row]].tolist()
        assert kept == list(completion[:room])
    assert (batch.completion_mask <= batch.mask).all() and (batch.tokens[~batch.mask] == PAD).all()


def test_an_epoch_has_every_group_once_and_each_is_shuffled_anew():
    source = [group(i) for i in range(12)]
    iterator = batches(source)
    epochs = [[int(t) for _ in range(3) for t in next(iterator).tokens[:, 0, 3] - 1_000] for _ in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != list(range(12))


def test_seeds_repeat_and_differ():
    source = [group(i) for i in range(12)]
    first, again, other = (next(batches(source, seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first.tokens, other.tokens)


@pytest.mark.parametrize("steps", [0, 1, 4, 11])
def test_resuming_goes_on_exactly(steps, tmp_path):
    preferences.write(tmp_path, {"train": [group(i, 2 + i % 2) for i in range(10)], "heldout": [group(0)]})
    source = preferences.read(tmp_path)["train"]
    first = batches(source)
    for _ in range(steps):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    second = batches(preferences.read(tmp_path)["train"])
    second.set_state(state)
    for _ in range(6):  # over the end of an epoch, which batches of 4 straddle
        jax.tree.map(np.testing.assert_array_equal, next(first), next(second))


def test_arrays_are_finite_and_pairs_point_at_completions():
    batch = next(batches([group(i, 2 + i % 2) for i in range(9)], batch_size=9))
    assert batch.pairs.shape == (9, math.comb(3, 2), 2)
    for i in range(9):
        there = batch.mask[i].any(-1)
        assert there[batch.pairs[i][batch.weights[i] > 0]].all()
    assert all(np.isfinite(array).all() for array in jax.tree.leaves(batch))
