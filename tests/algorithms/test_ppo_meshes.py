"""PPO on every axis of a mesh, alone and in hybrids: the tokens, metrics and parameters of one device."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from rlhf_jax import models, sharding
from rlhf_jax.algorithms import iterations, ppo
from rlhf_jax.algorithms.context import Context
from rlhf_jax.algorithms.onpolicy import ValueHead
from rlhf_jax.checkpoint import save_params
from rlhf_jax.data.prompts import PromptBatch
from rlhf_jax.interop.pretrained import Pretrained
from rlhf_jax.models import ModelSpec
from rlhf_jax.models.spec import Experts
from rlhf_jax.optim import Optimizer
from rlhf_jax.plan import hlo
from rlhf_jax.train_step import compiled
from tests.meshes import DENSE, EXPERTS, STAGES_AND_LENGTHS, mesh_of, shapes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_quickly")]

SPEC = ModelSpec(
    vocab_size=92, d_model=32, n_layers=4, n_heads=4, n_kv_heads=4, head_dim=8, d_ff=104, max_len=32,
    scale_embedding=False,
)  # fmt: skip
MIXTURE = dataclasses.replace(SPEC, experts=Experts(4, 2, balance_coef=0.1))
MESHES = {**DENSE, "stages and lengths": STAGES_AND_LENGTHS, **EXPERTS}
# At the usual eps a gradient that is rounding alone makes as large a step as any other.
SMOOTH = Optimizer(3e-3, eps=1e-3)
CONFIG = ppo.Config(
    policy="base", critic=ValueHead("base"), reward="rm", batch_size=32, prompt_tokens=(2, 5), completion_tokens=9,
    epochs=2, minibatches=2, optimizer=SMOOTH, critic_optimizer=SMOOTH, exact_kl_rows=8,
)  # fmt: skip


def two_iterations(folder, spec, mesh):
    """Metrics and tokens of two iterations, the last parameters, and the compiled program."""
    params = sharding.unbox(models.init(spec, jax.random.key(0)))
    context = Context(folder, 0, mesh, Pretrained(spec, params, None), None)
    save_params(folder / "rm/params", sharding.unbox(models.init_with_head(spec, jax.random.key(3), params)))
    algorithm = ppo.Algorithm(CONFIG, spec, eos_id=3, pad_id=0)
    frozen = iterations.frozen(context, policy="base", reward="rm")
    state, seen = ppo.initial_state(algorithm, context, "ppo"), []
    tokens = np.random.default_rng(0).integers(4, 92, (2, 32, 6)).astype(np.int32)
    batches = [PromptBatch(rows, np.arange(6) >= np.arange(32)[:, None] % 4) for rows in tokens]
    step = compiled(algorithm.iteration, state, others=2)
    with sharding.scope(mesh):
        first, second = (sharding.shard_batch(mesh, batch) for batch in batches)
        program = step.lower(state, frozen, first).compile()
        for batch in (first, second):  # the second would be an error, had the state another layout than it came in
            state, metrics, rollout = program(state, frozen, batch)
            seen.append(jax.device_get((metrics, rollout.tokens)))
    return seen, jax.device_get((state.policy.params, state.critic.params)), hlo.parse(program.as_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    one = sharding.single_device_mesh()
    return {spec: two_iterations(tmp_path_factory.mktemp("one"), spec, one) for spec in (SPEC, MIXTURE)}


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_takes_the_iterations_of_one_device(name, alone, tmp_path):
    spec = MIXTURE if name in EXPERTS else SPEC
    seen, params, _ = alone[spec]
    other_seen, other_params, module = two_iterations(tmp_path, spec, mesh_of(MESHES[name]))
    for (metrics, tokens), (other_metrics, other_tokens) in zip(seen, other_seen, strict=True):
        np.testing.assert_array_equal(tokens, other_tokens)  # else one flipped sample would hide the comparison
        for metric, value in metrics.items():
            assert other_metrics[metric] == pytest.approx(value, abs=1e-4), metric
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other_params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    if MESHES[name].tensor > 1:  # no device has a whole kernel, the whole table or a row's whole logits
        assert not {spec.d_ff, spec.vocab_size} & set(itertools.chain.from_iterable(shapes(module)))
