"""A mesh changes where numbers live, not what they are: every axis alone, and hybrids, beside one device."""

import functools
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import models, sharding
from rlhf_jax.algorithms.reward_model import Config, pair_loss
from rlhf_jax.algorithms.supervised import language_model_loss
from rlhf_jax.data.pipeline import PackedBatch
from rlhf_jax.errors import UserError
from rlhf_jax.models import ModelSpec
from rlhf_jax.models.heads import box
from rlhf_jax.optim import Optimizer
from rlhf_jax.plan import hlo
from rlhf_jax.plan.collectives import collectives
from rlhf_jax.sharding import MeshConfig, make_mesh
from rlhf_jax.train_step import compiled, make_train_step, sharded_state
from rlhf_jax.types import PreferenceBatch
from tests.compiling import no_compiling
from tests.meshes import HYBRID, MESHES, mesh_of, shapes

pytestmark = pytest.mark.usefixtures("compile_quickly")

ROWS, LENGTH = 16, 11  # a length that four devices do not divide: it is padded to 12
V, D, L, F = 92, 56, 4, 104  # sizes that nothing else has, so that shapes in compiled text are known by them
SPEC = ModelSpec(
    vocab_size=V, d_model=D, n_layers=L, n_heads=4, n_kv_heads=4, head_dim=8, d_ff=F, max_len=16, qk_norm=True,
    window=5, local_layers=(True, False, False, True),
)  # fmt: skip
BOXES = jax.eval_shape(lambda: models.init(SPEC, jax.random.key(0)))
MESHES = {"one": MeshConfig(data=1), **{name: mesh for name, mesh in MESHES.items() if mesh.expert == 1}}


def batches(count=2):
    """Packed rows: two texts, then padding, of all lengths."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        tokens = rng.integers(0, V, (ROWS, LENGTH)).astype(np.int32)
        ends = np.sort(rng.integers(1, LENGTH + 1, (ROWS, 2, 1)), axis=1)
        at = np.arange(LENGTH)
        segments = np.where(at < ends[:, 0], 1, np.where(at < ends[:, 1], 2, 0)).astype(np.int32)
        yield PackedBatch(tokens, segments, (segments > 0) & (rng.random(tokens.shape) < 0.7))


def make_state(mesh, optimizer=None, master="float32"):
    optimizer = Optimizer(1e-3).make(3) if optimizer is None else optimizer
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) * 0.2, sharding.unbox(BOXES))
    boxed = partial(box, boxes=BOXES)
    state = sharded_state(mesh, boxed, params, optimizer, {"learning_rate": 1e-2}, jax.random.key(1), master=master)
    return optimizer, state


@functools.cache
def trained(name):
    """The layouts before two steps of descent, the state after them, their losses, the first gradient, the text."""
    mesh = mesh_of(MESHES[name])
    # The momentum after one step is its gradient.
    optimizer, state = make_state(mesh, optax.inject_hyperparams(optax.sgd)(learning_rate=1e-2, momentum=0.9))
    before = jax.tree.map(lambda x: (x.shape, x.sharding), state)
    step = compiled(make_train_step(language_model_loss(SPEC), optimizer), state)
    first, second = (sharding.shard_batch(mesh, batch) for batch in batches())
    with sharding.scope(mesh):
        program = step.lower(state, first).compile()
        state, metrics = program(state, first)
        gradient = jax.device_get(optax.tree.get(state.opt_state, "trace"))
        # The program takes what it gave: a layout that had changed would be an error here, and a second compilation.
        state, later = program(state, second)
    return before, state, [float(metrics["loss"]), float(later["loss"])], gradient, hlo.parse(program.as_text())


def leaves(tree):
    return jax.tree.leaves(tree)


@pytest.mark.parametrize("name", [name for name in MESHES if name != "one"])
def test_a_mesh_takes_the_steps_of_one_device(name):
    _, one, one_losses, one_gradient, _ = trained("one")
    before, state, losses, gradient, _ = trained(name)
    assert losses[0] != losses[1]
    np.testing.assert_allclose(losses, one_losses, atol=1e-5)
    for found, expected in ((gradient, one_gradient), (state.params, one.params)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
    layouts = jax.tree.map(lambda x: x.sharding, state.params)
    assert jax.tree.map(lambda x: x.sharding, optax.tree.get(state.opt_state, "trace")) == layouts
    assert jax.tree.map(lambda x: (x.shape, x.sharding), state) == before


@pytest.mark.parametrize("name", [name for name in MESHES if name != "one"])
def test_no_device_holds_what_the_rules_split(name):
    mesh, found = MESHES[name], shapes(trained(name)[-1])
    assert (D, V) in shapes(trained("one")[-1]) and (L, D, F) in shapes(trained("one")[-1])
    padded = LENGTH + -LENGTH % mesh.sequence
    rows = {(T, ROWS, V) for T in (LENGTH, padded)} | {(V, T * ROWS) for T in (LENGTH, padded)}
    assert not rows & found.keys()  # all logits
    if mesh.fsdp > 1 or mesh.tensor > 1 or mesh.pipeline > 1:
        assert (L, D, F) not in found  # a kernel of all layers, its moments, its gradients
    if mesh.tensor > 1:
        sizes = set(itertools.chain.from_iterable(found))
        assert V not in sizes and F not in sizes  # nor of a single layer, nor the logits of a single row
