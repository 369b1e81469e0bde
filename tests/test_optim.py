"""Schedules in numbers; clipping, AdamW and Muon against optax on plain arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import muon

from rlhf_jax import models
from rlhf_jax.models import ModelSpec
from rlhf_jax.optim import Optimizer

pytestmark = pytest.mark.usefixtures("compile_quickly")

RNG = np.random.default_rng(0)
SHAPES = {
    "embedding": (16, 8),
    "final_norm": {"scale": (8,)},
    "layers": {
        "attention": {
            "query": (2, 8, 2, 6),
            "value": (2, 8, 1, 6),
            "out": (2, 2, 6, 8),
            "query_norm": {"scale": (2, 6)},
        },
        "mlp": {"gate": (2, 8, 24), "down": (2, 24, 8)},
        "mlp_norm": {"scale": (2, 8)},
    },
}


def random_like(shapes):
    return jax.tree.map(lambda s: RNG.normal(size=s).astype(np.float32), shapes, is_leaf=lambda s: isinstance(s, tuple))


def run(optimizer, params, gradients):
    """The parameters after a step for each gradient."""

    @jax.jit
    def step(gradient, state, params):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(optimizer.init)(params)
    for gradient in gradients:
        params, state = step(gradient, state, params)
    return params


def steps(optimizer: Optimizer, total: int) -> list[float]:
    return [float(optimizer.share(total)(step)) for step in range(total + 1)]


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (Optimizer(), [1, 1, 1, 1, 1]),
        (Optimizer(schedule="linear"), [1, 0.75, 0.5, 0.25, 0]),
        (Optimizer(schedule="linear", final_share=0.2), [1, 0.8, 0.6, 0.4, 0.2]),
        (Optimizer(schedule="cosine"), [1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 0]),
        (Optimizer(warmup_steps=3), [0.25, 0.5, 0.75, 1, 1]),
        (Optimizer(schedule="linear", warmup_steps=1), [0.5, 1, 2 / 3, 1 / 3, 0]),
    ],
)
def test_schedules_as_shares_of_the_peak(optimizer, expected):
    np.testing.assert_allclose(steps(optimizer, 4), expected, atol=1e-6)


def test_a_stage_shorter_than_its_warm_up_still_moves():
    np.testing.assert_allclose(steps(Optimizer(warmup_steps=5, schedule="cosine"), 2), [1 / 6, 2 / 6, 3 / 6], rtol=1e-6)


def test_adamw_is_optax_adamw_after_clipping_times_the_schedule():
    params, gradients = random_like(SHAPES), [random_like(SHAPES) for _ in range(3)]
    optimizer = Optimizer(1e-2, schedule="linear", b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.1, clip_norm=0.5)
    schedule = optax.linear_schedule(1e-2, 0, 5)
    plain = optax.adamw(schedule, 0.8, 0.9, 1e-6, weight_decay=0.1)
    clip = jax.jit(lambda gradient: optax.tree.scale(0.5 / optax.tree.norm(gradient), gradient))
    clipped = [clip(gradient) for gradient in gradients]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        run(optimizer.make(5), params, gradients),
        run(plain, params, clipped),
    )


def test_tensorflows_adam_is_its_formula():
    params, gradients = random_like(SHAPES), [random_like(SHAPES) for _ in range(3)]
    made = Optimizer(learning_rate=0.01, b1=0.8, b2=0.9, eps=0.5, eps_form="tensorflow", clip_norm=1e9)
    first, second, wanted = *(jax.tree.map(np.zeros_like, params) for _ in range(2)), params
    for t, gradient in enumerate(gradients, start=1):
        first = jax.tree.map(lambda m, g: 0.8 * m + 0.2 * g, first, gradient)
        second = jax.tree.map(lambda v, g: 0.9 * v + 0.1 * g**2, second, gradient)
        rate = 0.01 * np.sqrt(1 - 0.9**t) / (1 - 0.8**t)
        wanted = jax.tree.map(lambda p, m, v, rate=rate: p - rate * m / (np.sqrt(v) + 0.5), wanted, first, second)
    for a, b in zip(*map(jax.tree.leaves, (run(made.make(3), params, gradients), wanted)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    with pytest.raises(ValueError, match=r"optimizer.eps_form='tensorflow' is Adam's"):
        Optimizer(kind="muon", eps_form="tensorflow")


def test_a_small_gradient_is_not_clipped():
    params, gradient = {"w": jnp.zeros(4)}, {"w": jnp.full(4, 0.01)}
    loose, tight = (Optimizer(eps=1.0, clip_norm=norm).make(1) for norm in (1e6, 1.0))
    np.testing.assert_array_equal(run(loose, params, [gradient])["w"], run(tight, params, [gradient])["w"])


def as_matrices(tree):
    """Each layer's matrix by itself: {"attention/query/0": [rows, columns], …}."""
    layers, inputs = tree["layers"], {"out": 2}
    return {
        f"{block}/{name}/{i}": np.reshape(layer, (np.prod(layer.shape[: inputs.get(name, 1)]), -1))
        for block in ("attention", "mlp")
        for name, x in layers[block].items()
        if not isinstance(x, dict)
        for i, layer in enumerate(x)
    }


def test_muon_is_optax_muon_on_each_layers_matrix_and_adam_elsewhere():
    params, gradients = random_like(SHAPES), [random_like(SHAPES) for _ in range(2)]
    optimizer = Optimizer(2e-2, kind="muon", b1=0.8, b2=0.9, weight_decay=0.1, clip_norm=1e9, adam_share=0.25)
    after = run(optimizer.make(2), params, gradients)
    expected = run(muon(2e-2, weight_decay=0.1), as_matrices(params), [as_matrices(g) for g in gradients])
    assert set(expected) == set(as_matrices(after)) and len(expected) == 10
    for name, matrix in as_matrices(after).items():
        np.testing.assert_allclose(matrix, expected[name], atol=2e-5, err_msg=name)

    def others(tree):
        layers = tree["layers"]
        norms = [layers["attention"]["query_norm"], layers["mlp_norm"]]
        return [tree["embedding"], tree["final_norm"], *norms]

    adam = optax.adamw(5e-3, 0.8, 0.9, weight_decay=0.0, nesterov=True)  # as optax.contrib.muon has it
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        others(after),
        run(adam, others(params), [others(g) for g in gradients]),
    )


def test_muon_takes_all_of_a_models_matrices_and_no_more():
    spec = ModelSpec(vocab_size=8, d_model=8, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=8, qk_norm=True)
    params = jax.eval_shape(lambda: models.init_with_head(spec, jax.random.key(0)))
    state = jax.eval_shape(Optimizer(kind="muon").make(1).init, params)
    labels = {"muon": set(), "adam": set()}
    for label, inner in optax.tree.get(state, "inner_states").items():
        for path, _ in jax.tree_util.tree_flatten_with_path(optax.tree.get(inner, "mu"))[0]:
            labels[label].add("/".join(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)))
    block = "trunk/layers"
    matrices = {f"{block}/attention/{name}" for name in ("query", "key", "value", "out")}
    assert labels["muon"] == matrices | {f"{block}/mlp/{name}" for name in ("gate", "up", "down")}
    assert {"trunk/embedding", "head/kernel", "head/bias", f"{block}/attention/query_norm/scale"} <= labels["adam"]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_learning_rate_is_a_number_in_the_state(kind):
    optimizer = Optimizer(1e-2, kind=kind).make(1)
    params, gradient = random_like(SHAPES), random_like(SHAPES)
    state = jax.jit(optimizer.init)(params)
    assert state.hyperparams["learning_rate"] == np.float32(1e-2)

    def update(rate):
        changed = state._replace(hyperparams={"learning_rate": rate})
        return optimizer.update(gradient, changed, params)[0]

    both = jax.device_get(jax.jit(jax.vmap(update))(jnp.array([1e-2, 2e-2])))
    one, two = (jax.tree.map(lambda x, i=i: x[i], both) for i in (0, 1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(2 * a, b, rtol=1e-4, atol=1e-7), one, two)


def test_epsilon_is_heard_by_both_kinds():
    params, gradient = {"embedding": jnp.zeros(4)}, {"embedding": jnp.full(4, 1e-3)}
    for kind in ("adamw", "muon"):
        small, large = (run(Optimizer(kind=kind, eps=e).make(1), params, [gradient])["embedding"] for e in (1e-8, 1.0))
        assert np.abs(large).max() < 0.01 * np.abs(small).max()


@pytest.mark.parametrize(
    "field",
    [
        {"learning_rate": 0.0},
        {"learning_rate": float("inf")},
        {"clip_norm": 0.0},
        {"warmup_steps": -1},
        {"b1": 1.0},
        {"b2": 2.0},
        {"eps": -1.0},
        {"final_share": -3.0},
        {"weight_decay": float("nan")},
        {"adam_share": 0.0},
    ],
)
def test_fields_that_make_no_sense_are_refused_by_name(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        Optimizer(**field)
