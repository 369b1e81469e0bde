"""FLOPs against hand counts and, where no loop hides them, XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models, sharding
from rlhf_jax.models import ModelSpec
from rlhf_jax.models.attention import Seen, attend
from rlhf_jax.plan import flops

A, B = jnp.ones((3, 5)), jnp.ones((5, 5))
ONE = 2 * 3 * 5 * 5  # a (3, 5) by (5, 5) product


def total(f, *args, **kwargs):
    return flops.count(jax.jit(f).trace(*args).jaxpr, **kwargs).total()


def test_products_of_every_shape():
    assert total(jnp.matmul, A, B) == ONE
    assert total(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), jnp.ones((7, 2, 3)), jnp.ones((7, 3, 4))) == 7 * 48
    assert total(jax.vmap(jnp.matmul, in_axes=(0, None)), jnp.ones((4, 3, 5)), B) == 4 * ONE
    assert total(lambda a: jnp.sin(a) + 1, A) == 0


def test_a_gradient_takes_two_more_products():
    assert total(jax.grad(lambda a, b: jnp.sum((a @ b) ** 2), argnums=(0, 1)), A, B) == 3 * ONE


def test_what_is_computed_again_counts_again():
    def chain(a, b):
        return jnp.sum(jnp.sin(jnp.sin(a @ b) @ b))

    plain = total(jax.grad(chain), A, B)
    again = total(jax.grad(jax.checkpoint(chain)), A, B)
    assert plain == 4 * ONE
    assert again == 6 * ONE


def test_loops_times_their_turns():
    def body(x, _):
        return jax.lax.scan(lambda y, _: (y @ B, None), x, None, length=4)[0], None

    assert total(lambda x: jax.lax.scan(body, x, None, length=7)[0], A) == 28 * ONE
    assert total(lambda x: jax.lax.fori_loop(0, 6, lambda i, y: y @ B, x), A) == 6 * ONE


def test_a_kernel_of_attention_counts_its_blocks_and_what_it_computes_again():
    """Two products forwards as plainly; backwards, in two kernels, seven for the four of plain ones."""
    spec = ModelSpec(n_heads=2, n_kv_heads=1, head_dim=64, attention="splash")
    q, k = jnp.ones((3, 1024, 2, 64)), jnp.ones((3, 1024, 1, 64))
    product, seen = 2 * 3 * 2 * 1024 * 1024 * 64, Seen(jnp.zeros(3, bool), None)
    assert total(lambda q, k, v: attend(spec, q, k, v, seen), q, k, k) == 2 * product
    backwards = total(jax.grad(lambda q, k, v: attend(spec, q, k, v, seen).sum(), argnums=(0, 1, 2)), q, k, k)
    assert backwards == pytest.approx(9 * product, rel=0.01)  # and the sums of outputs times their gradients


def test_a_loop_without_a_fixed_end_has_decode_steps():
    def decode(x):
        return jax.lax.while_loop(lambda c: (c[0] < 9) & jnp.any(c[1] > 0), lambda c: (c[0] + 1, c[1] @ B), (0, x))

    assert total(decode, A, decode_steps=9) == 9 * ONE
    with pytest.raises(ValueError, match="decode_steps"):
        total(decode, A)


def test_of_branches_the_dearest():
    assert total(lambda p, a: jax.lax.cond(p, lambda x: (x @ B) @ B, lambda x: x @ B, a), True, A) == 2 * ONE


def test_rows_of_experts():
    sizes = jnp.array([1, 2], jnp.int32)
    kernels = jnp.ones((2, 5, 6))
    assert total(lambda a: jax.lax.ragged_dot(a, kernels, sizes), A) == 2 * 3 * 5 * 6
    # towards the rows as much again, and towards the kernels
    forward_and_back = jax.value_and_grad(lambda a, k: jax.lax.ragged_dot(a, k, sizes).sum(), argnums=(0, 1))
    assert total(forward_and_back, A, kernels) in (3 * 2 * 3 * 5 * 6, 2 * 2 * 3 * 5 * 6)


def test_a_shard_map_counts_all_devices():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")
    f = jax.shard_map(lambda a, b: a @ b, mesh=mesh, in_specs=(spec, jax.sharding.PartitionSpec()), out_specs=spec)
    assert total(f, jnp.ones((16, 5)), B) == 2 * 16 * 5 * 5


def test_by_phase():
    def iteration(a):
        with jax.named_scope("sample"):
            a = jax.lax.scan(lambda x, _: (x @ B, None), a, None, length=3)[0]
        with jax.named_scope("update"):
            a = a @ B
        return a @ B

    counted = flops.count(jax.jit(iteration).trace(A).jaxpr, whole="iteration")
    assert counted == {"sample": 3 * ONE, "update": ONE, "iteration": ONE}


@pytest.mark.parametrize("gated", [True, False])
def test_a_model_of_one_layer_as_xla_counts_it(gated):
    # XLA takes a loop's body once, which for one layer is right; what is no product is under a hundredth.
    spec = ModelSpec(
        vocab_size=2048, d_model=256, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=64, d_ff=1024, gated=gated
    )
    params = sharding.unbox(models.init(spec, jax.random.key(0)))
    tokens = jnp.ones((4, 64), jnp.int32)
    traced = jax.jit(lambda params: models.logits(spec, params, tokens)).trace(params)
    ours = flops.count(traced.jaxpr).total()
    xla = traced.lower().compile().cost_analysis()["flops"]
    np.testing.assert_allclose(ours, xla, rtol=0.02)
    rows, d, h = 4 * 64, 256, 64
    projections = 2 * rows * d * h * (4 + 2 + 2 + 4)
    attention = 2 * 2 * 4 * 4 * 64 * 64 * h
    mlp = 2 * rows * d * 1024 * (3 if gated else 2)
    assert ours == projections + attention + mlp + 2 * rows * d * 2048
