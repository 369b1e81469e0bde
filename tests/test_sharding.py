"""A mesh changes where numbers live, not what they are: every axis alone, and hybrids, beside one device."""

import dataclasses
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
from tests.meshes import DENSE, STAGES_AND_LENGTHS, mesh_of, shapes

pytestmark = pytest.mark.usefixtures("compile_quickly")

ROWS, LENGTH = 16, 11  # a length that four devices do not divide: it is padded to 12
V, D, L, F = 92, 56, 4, 104  # sizes that nothing else has, so that shapes in compiled text are known by them
SPEC = ModelSpec(
    vocab_size=V, d_model=D, n_layers=L, n_heads=4, n_kv_heads=4, head_dim=8, d_ff=F, max_len=16, qk_norm=True,
    window=5, local_layers=(True, False, False, True),
)  # fmt: skip
CUBE = make_mesh(DENSE["data × fsdp × tensor"])
BOXES = jax.eval_shape(lambda: models.init(SPEC, jax.random.key(0)))
MESHES = {"one": MeshConfig(data=1), "stages and lengths": STAGES_AND_LENGTHS, **DENSE}


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


@pytest.mark.parametrize("name", DENSE)
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


@pytest.mark.parametrize("name", DENSE)
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


def test_half_precision_passes_the_stages():
    """XLA's CPU compiler ends the process at a sum of bfloat16 over the stages: there must be none."""
    spec, mesh = dataclasses.replace(SPEC, dtype="bfloat16", remat="full"), mesh_of(MESHES["data × pipeline × tensor"])
    loss_fn, (_, state) = language_model_loss(spec), make_state(mesh)
    batch = sharding.shard_batch(mesh, next(batches(1)))

    def loss(params, batch):
        return loss_fn(params, batch, {}, jax.random.key(0))[0].value

    with sharding.scope(mesh):
        value, gradient = jax.jit(jax.value_and_grad(loss))(state.params, batch)
    _, _, (expected, _), one, _ = trained("one")
    np.testing.assert_allclose(value, expected, rtol=0.02)
    for a, b in zip(leaves(gradient), leaves(one), strict=True):
        assert np.linalg.norm(a - b) < 0.15 * np.linalg.norm(b)


def test_fsdp_sends_each_parameter_three_times():
    """Gathered forwards and backwards, its gradient summed: 3 (n − 1)/n of all bytes, within a tenth.

    The CPU's compiler sums with an all-reduce and keeps a slice, since no device holds the gradients of all layers
    (above); on other machines the two are a reduce-scatter, half the bytes.
    """
    mesh, n = mesh_of(MESHES["fsdp of 4"]), 4
    sent = collectives(trained("fsdp of 4")[-1], mesh)
    assert {one.axes for one in sent} == {("fsdp",)}
    total = sum(one.total * (0.5 if one.kind == "all-reduce" else 1) for one in sent)
    params = sum(4 * box.size for box in leaves(sharding.unbox(BOXES)))
    assert 0.9 * 3 * params * (n - 1) / n < total < 1.1 * 3 * params * (n - 1) / n


@functools.cache
def pair_losses(name):
    config = Config(margin_scale=0.5, label_smoothing=0.1)
    boxes = jax.eval_shape(lambda: models.init_with_head(SPEC, jax.random.key(0)))
    params = sharding.unbox(jax.jit(lambda: models.init_with_head(SPEC, jax.random.key(0)))())
    rng, shape, mesh = np.random.default_rng(1), (ROWS // 2, 2, LENGTH), mesh_of(MESHES[name])
    mask = np.arange(LENGTH) < rng.integers(1, LENGTH + 1, (*shape[:2], 1))
    ones = np.ones((ROWS // 2, 1), np.float32)
    tokens, pairs = rng.integers(0, V, shape).astype(np.int32), np.tile([[[0, 1]]], (ROWS // 2, 1, 1)).astype(np.int32)
    batch = sharding.shard_batch(mesh, PreferenceBatch(tokens, mask, mask, pairs, ones, ones))
    params = jax.device_put(params, sharding.shardings(mesh, boxes))
    with sharding.scope(mesh):
        loss, metrics = jax.jit(pair_loss(SPEC, config))(params, batch, config.hyper, jax.random.key(0))
    return jax.device_get((loss.value, metrics["margin"].value))


@pytest.mark.parametrize("name", ["fsdp × sequence × tensor", "stages and lengths"])
def test_a_reward_models_loss_is_that_of_one_device(name):
    np.testing.assert_allclose(pair_losses(name), pair_losses("one"), atol=1e-5)


def test_bfloat16_masters_take_the_same_steps_on_a_mesh():
    ends = []
    for name in ("one", "data × fsdp × tensor"):
        mesh = mesh_of(MESHES[name])
        optimizer, state = make_state(mesh, master="bfloat16")
        step = compiled(make_train_step(language_model_loss(SPEC), optimizer, num_microbatches=2), state)
        first, *rest = (sharding.shard_batch(mesh, batch) for batch in batches(3))
        with sharding.scope(mesh):
            state, _ = step(state, first)
            with no_compiling():
                for batch in rest:
                    state, _ = step(state, batch)
        ends.append(state)
    types = {jax.tree_util.keystr(p): x.dtype for p, x in jax.tree_util.tree_leaves_with_path(ends[0].params)}
    assert {name for name, kind in types.items() if kind != jnp.bfloat16} == {n for n in types if "norm" in n}
    moments = optax.tree.get(ends[0].opt_state, "mu"), optax.tree.get(ends[0].opt_state, "nu")
    assert {x.dtype for x in jax.tree.leaves(moments)} == {jnp.dtype("float32")}
    one, many = (np.concatenate([np.ravel(np.asarray(x, np.float32)) for x in jax.tree.leaves(e.params)]) for e in ends)
    # The sums behind a gradient differ in their last bits, and so, now and then, does the side that is drawn.
    assert np.mean(one == many) > 0.99
    np.testing.assert_allclose(one, many, rtol=2**-6, atol=1e-4)


def shard(x) -> tuple[int, ...]:
    return x.addressable_shards[0].data.shape


def test_parameters_lie_as_the_table_says():
    params = trained("data × fsdp × tensor")[1].params
    attention, mlp = params["layers"]["attention"], params["layers"]["mlp"]
    assert shard(params["embedding"]) == (V // 2, D // 2)
    assert shard(attention["query"]) == shard(attention["key"]) == (L, D // 2, 4 // 2, 8)
    assert shard(attention["out"]) == (L, 4 // 2, 8, D // 2)
    assert shard(mlp["up"]) == (L, D // 2, F // 2) and shard(mlp["down"]) == (L, F // 2, D // 2)
    assert shard(params["final_norm"]["scale"]) == (D // 2,)
    params = trained("pipeline")[1].params
    assert {shard(x)[0] for x in leaves(params["layers"])} == {L // 4} and shard(params["embedding"]) == (V, D)


def test_muons_momenta_are_split_like_their_parameters():
    _, state = make_state(CUBE, Optimizer(1e-3, kind="muon").make(3))
    layouts = {path: x.sharding for path, x in jax.tree_util.tree_flatten_with_path(state.params)[0]}
    seen = set()
    for inner in optax.tree.get(state.opt_state, "inner_states").values():
        for path, x in jax.tree_util.tree_flatten_with_path(optax.tree.get(inner, "mu"))[0]:
            assert x.sharding == layouts[path]
            seen.add(path)
    assert seen == set(layouts)


def test_the_watch_on_compiling_sees_it():
    with pytest.raises(AssertionError), no_compiling():
        jax.jit(lambda x: x * 3 + 1)(jnp.ones(7))


def test_a_batch_is_split_over_data_and_fsdp():
    batch = sharding.shard_batch(CUBE, next(batches()))
    assert shard(batch.tokens) == (ROWS // 4, LENGTH) and batch.tokens.dtype == jnp.int32
    assert sharding.batch_shards(CUBE.shape) == 4


def test_activations_hold_to_the_batch_axes_inside_a_scope_alone():
    x = jnp.zeros((8, 6))
    assert sharding.constrain(x, "batch", None) is x
    with sharding.scope(CUBE):
        out = jax.jit(lambda x: sharding.constrain(x + 1, "batch", None))(x)
    assert shard(out) == (2, 6)


def test_layouts_of_shapes_are_the_same_inside_a_scope():
    boxed = jax.eval_shape(lambda key: models.init(ModelSpec(), key), jax.random.key(0))
    outside = sharding.shardings(CUBE, boxed)
    with sharding.scope(CUBE):
        assert sharding.shardings(CUBE, boxed) == outside


def test_mesh_sizes_are_filled_and_checked():
    one = dict.fromkeys(sharding.AXES, 1)
    assert MeshConfig().resolve(8) == one | {"data": 8}
    assert MeshConfig(fsdp=2, tensor=2).resolve(8) == one | {"data": 2, "fsdp": 2, "tensor": 2}
    assert MeshConfig(data=1, pipeline=-1, sequence=2).resolve(8) == one | {"pipeline": 4, "sequence": 2}
    assert MeshConfig(fsdp=4, tensor=2).fixed_devices == 8
    with pytest.raises(UserError, match=r"multiple of 3 devices, 8 found; .* must multiply to 1, 2, 4 or 8$"):
        MeshConfig(fsdp=3).resolve(8)
    with pytest.raises(UserError, match="asks for 4 devices, 8 found"):
        MeshConfig(data=4).resolve(8)
    with pytest.raises(UserError, match=r"pipeline_microbatches=6 must be a multiple of mesh\.pipeline=4"):
        MeshConfig(data=2, pipeline=-1, pipeline_microbatches=6).resolve(8)
    with pytest.raises(ValueError, match=r"mesh\.fsdp must be at least 1"):
        MeshConfig(fsdp=0)
    with pytest.raises(ValueError, match=r"mesh\.pipeline_microbatches must be at least 1"):
        MeshConfig(pipeline_microbatches=0)
    with pytest.raises(ValueError, match="only one axis"):
        MeshConfig(data=-1, fsdp=-1)


def test_a_mesh_takes_all_devices_or_the_first():
    assert make_mesh(MeshConfig(tensor=2)).shape == dict.fromkeys(sharding.AXES, 1) | {"data": 4, "tensor": 2}
    assert sharding.single_device_mesh().devices.flatten().tolist() == jax.devices()[:1]
    assert shard(jax.device_put(jnp.zeros((4, 2)), sharding.replicated(CUBE))) == (4, 2)


class Slice:
    """A device of one of two slices, as TPUs describe themselves."""

    platform = device_kind = "cpu"

    def __init__(self, number):
        self.id = self.process_index = number
        self.slice_index = number // 4


def test_slices_lie_along_the_data_axis_whatever_the_others_are():
    for within in ({"fsdp": 4}, {"pipeline": 2, "tensor": 2}, {"sequence": 4}, {"expert": 2, "fsdp": 2}):
        mesh = make_mesh(MeshConfig(**within), [Slice(number) for number in range(8)])
        assert [{device.slice_index for device in part.flat} for part in mesh.devices] == [{0}, {1}]
    with pytest.raises(UserError, match=r"mesh\.data=1 must be a multiple of the 2 slices"):
        make_mesh(MeshConfig(pipeline=8), [Slice(number) for number in range(8)])


TABLE = "the axis 'vocab' of embedding (92, 56)"


@pytest.mark.parametrize(
    ("mesh", "says"),
    [
        (MeshConfig(data=1, tensor=8), f"mesh.tensor=8 does not divide 92, {TABLE}; 1, 2, 4, 23, 46 or 92 would"),
        (MeshConfig(data=1, pipeline=3), "mesh.pipeline=3 does not divide 4, the axis 'layers' of layers/attention"),
        (MeshConfig(data=1, fsdp=5), "embedding (92, 56); 1, 2, 4, …, 28 or 56 would"),
    ],
)
def test_what_does_not_divide_is_named_with_what_would(mesh, says):
    with pytest.raises(UserError) as error:
        sharding.shardings(mesh_of(mesh), BOXES)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_rows_that_do_not_divide_into_what_passes_the_stages():
    rows, mesh = np.ones((6, 4), np.int32), mesh_of(MESHES["pipeline"])
    params = sharding.unbox(BOXES)
    message = "6 rows do not divide over the 1 batch shards of the mesh, data 1 × fsdp 1 × 4 parts that pass 4 pipeline"
    with sharding.scope(mesh), pytest.raises(UserError, match=f"{message} stages; 4 or 8 would"):
        jax.eval_shape(partial(models.hidden, SPEC), params, rows)
