"""ILQL where the right answer is known: shortest ways through a graph, learnt from random walks (Snell et al. 2022 and
trlx use the like). Imitation of the best walks starts from lucky places; values join pieces of different walks.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from rlhf_jax import models, sharding
from rlhf_jax.algorithms.context import Context
from rlhf_jax.algorithms.offline_ilql import Ilql
from rlhf_jax.algorithms.offline_methods import Filtered
from rlhf_jax.algorithms.offline_rows import ScoredRow, batch_rows
from rlhf_jax.algorithms.supervised import SupervisedConfig
from rlhf_jax.data.encoding import Learnt
from rlhf_jax.data.preference_batches import batches
from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.interop.pretrained import Pretrained
from rlhf_jax.models import ModelSpec
from rlhf_jax.optim import Optimizer
from rlhf_jax.sampling import Sampling, generate

PAD, EOS, BOS, FIRST = 0, 1, 2, 4  # node i is token FIRST + i; node 0 is where walks are to come
NODES, LONGEST = 10, 8
SPEC = ModelSpec(
    vocab_size=FIRST + NODES, d_model=32, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=16, d_ff=64, max_len=16
)


def graph(rng):
    edges = rng.random((NODES, NODES)) < 0.22
    edges[np.arange(NODES), (np.arange(NODES) - 1) % NODES] = True  # so that 0 can be reached from anywhere
    np.fill_diagonal(edges, False)
    return edges


def shortest(edges):
    hops = np.full(NODES, np.inf)
    hops[0] = 0
    for _ in range(NODES):
        hops[1:] = [1 + hops[edges[i]].min() for i in range(1, NODES)]
    return hops


def score(edges, start, way):
    """Minus the hops; −10 for a way that leaves the graph or does not arrive."""
    for hop, (a, b) in enumerate(zip([start, *way], way, strict=False), start=1):
        if b < 0 or not edges[a, b]:
            return -10.0
        if b == 0:
            return -float(hop)
    return -10.0


def walks(edges, rng, count):
    rows = []
    for _ in range(count):
        at = start = int(rng.integers(1, NODES))
        way = []
        while at and len(way) < LONGEST:
            at = int(rng.choice(np.flatnonzero(edges[at])))
            way.append(at)
        tokens = (BOS, FIRST + start, *(FIRST + node for node in way), *[EOS] * (at == 0))
        counted = (False, False, *[True] * (len(tokens) - 2))
        rows.append(ScoredRow(Learnt(tokens, counted), score(edges, start, way)))
    return rows


@pytest.fixture(scope="module")
def context():
    params = sharding.unbox(models.init(SPEC, jax.random.key(0)))
    return Context(Path(), 0, sharding.single_device_mesh(), Pretrained(SPEC, params, None), MovieReviews())


def learnt(method, rows, context, steps):
    optimizer = Optimizer(learning_rate=3e-3, schedule="linear")
    config = SupervisedConfig(steps=steps, batch_size=64, row_length=12, heldout_rows=64, optimizer=optimizer)
    state, step = method.start(config, context, "walks", context.policy_params("base"))
    numbers = method.fit(rows)(rows)
    some = [dataclasses.replace(row, score=float(x)) for row, x in zip(rows, numbers, strict=True) if x == x]
    drawn = batches(some, lambda part: batch_rows(part, pad_id=PAD, length=12), batch_size=64, seed=0)
    for _ in range(steps):
        state, metrics = step(state, jax.tree.map(np.asarray, next(drawn)), {})
    return method.policies(state, {}), metrics


def mean_score(policy, edges):
    starts = np.repeat(np.arange(1, NODES), 30)
    prompts = np.stack([np.full_like(starts, BOS), FIRST + starts], axis=1).astype(np.int32)
    fixed = {"max_new_tokens": LONGEST + 1, "sampling": Sampling(), "eos_id": EOS, "pad_id": PAD}
    rollout = generate(SPEC, policy, prompts, np.ones_like(prompts, bool), jax.random.key(5), **fixed)
    ways = [
        [int(token) - FIRST for token in tokens[mask] if token != EOS]
        for tokens, mask in zip(np.asarray(rollout.tokens), np.asarray(rollout.completion_mask), strict=True)
    ]
    return float(np.mean([score(edges, int(start), way) for start, way in zip(starts, ways, strict=True)]))


def test_ilql_finds_the_shortest_ways_and_beats_filtered_cloning(context):
    rng = np.random.default_rng(0)
    edges = graph(rng)
    rows, best = walks(edges, rng, 1000), -float(shortest(edges)[1:].mean())
    filtered, _ = learnt(Filtered(top=0.25), rows, context, 150)
    method = Ilql(tau=0.9, cql_coef=0.01, target_share=0.1, beta=16.0, curve=(0.0,))
    perturbed, metrics = learnt(method, rows, context, 250)
    cloned, behaviour, found = (mean_score(policy, edges) for policy in (filtered[0.0], *perturbed.values()))
    random = float(np.mean([row.score for row in rows]))
    print(best, found, cloned, behaviour, random, metrics)
    assert abs(behaviour - random) < 0.6  # the plain policy walks as the data do
    assert found > best - 0.1  # of the shortest ways almost all
    assert found > cloned + 0.3 and cloned > behaviour
