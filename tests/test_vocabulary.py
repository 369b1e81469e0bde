"""The compiled programs: no logits in them, memory, what moves between devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax import logprobs
from tests.properties import assert_close
from tests.test_from_hidden import CAPPED, every, example, plain, sliced, value_and_grad


@pytest.mark.parametrize(
    ("name", "table"),
    [("logps", P()), ("entropy", P()), ("kl", P()), ("logps", P(None, "tensor")), ("logps", P("data", None))],
)
def test_sharded_over_devices(name, table):
    arrays, tokens = example((8, 3), d=8, v=12)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "tensor"))
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
    sharded = tuple(place(x, table if i % 2 else P("data")) for i, x in enumerate(arrays))
    actual = value_and_grad(sliced, name, place(tokens, P("data")), chunk=5)(sharded, CAPPED)
    assert_close(actual, value_and_grad(plain, name, tokens)(arrays, CAPPED), rtol=1e-5, atol=1e-5)


def test_an_unembedding_sharded_along_its_width_is_gathered_in_slices():
    arrays, tokens = example((8, 3), d=8, v=12)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows = NamedSharding(mesh, P("data"))
    value = jax.jit(lambda h, w, t: logprobs.from_hidden(h, w, t, chunk=6), in_shardings=(rows, rows, rows))
    program = value.lower(*arrays[:2], tokens).compile().as_text()
    assert "all-gather" in program and "f32[8,6]" in program and "f32[8,12]" not in program


def test_a_sharded_batch_stays_where_it_is():
    arrays, tokens = example((8, 3), v=12)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows, all_of_it = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    gradient = jax.grad(lambda h, w, t: logprobs.from_hidden(h, w, t, chunk=5).sum(), argnums=(0, 1))
    program = jax.jit(gradient, in_shardings=(rows, all_of_it, rows)).lower(*arrays[:2], tokens).compile().as_text()
    assert "all-reduce" in program  # of the unembedding's gradient
    assert "all-gather" not in program and "all-to-all" not in program


def shapes(jaxpr):
    """Of everything that a program computes, in its loops and calls, too."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from shapes(inner)


@every
def test_no_program_holds_logits(name):
    (lead, v, chunk), (arrays, tokens) = ((3, 4), 101, 10), example(v=101)

    def sizes(fn, **options):
        run = jax.value_and_grad(lambda arrays: fn(name, arrays, tokens, **options).sum())
        return [np.prod(shape) for shape in shapes(jax.make_jaxpr(run)(arrays).jaxpr)]

    assert max(sizes(plain)) == np.prod(lead) * v
    largest_in_use = max(np.prod(lead) * chunk, *(x.size for x in arrays))
    assert max(sizes(sliced, chunk=chunk)) == largest_in_use < np.prod(lead) * v


def temporary_bytes(fn, name, arrays, tokens, **options):
    run = jax.jit(jax.value_and_grad(lambda arrays: fn(name, arrays, tokens, **options).sum()))
    return run.lower(arrays).compile().memory_analysis().temp_size_in_bytes


@every
@pytest.mark.parametrize("tied", [False, True])
def test_memory_is_an_eighth_of_the_plain_path(name, tied):
    arrays, tokens = example((4, 64), d=32, v=8192)
    bytes_of_plain = temporary_bytes(plain, name, arrays, tokens)
    if tied:
        arrays = [x.T if i % 2 else x for i, x in enumerate(arrays)]
    assert temporary_bytes(sliced, name, arrays, tokens, chunk=256, tied=tied) <= bytes_of_plain / 8


@every
def test_memory_is_an_eighth_of_the_plain_path_at_full_size(name):
    spec = jax.ShapeDtypeStruct
    arrays = [spec(shape, jnp.float32) for shape in ((8, 512, 512), (512, 65_536)) * 2]
    tokens = np.zeros((8, 512), np.int32)
    bytes_of_plain = temporary_bytes(plain, name, arrays, tokens)
    assert temporary_bytes(sliced, name, arrays, tokens) <= bytes_of_plain / 8


def test_a_gradient_that_nobody_wants_costs_nothing():
    arrays, tokens = example((4, 64), d=32, v=8192)

    def flops(argnums):
        run = jax.jit(jax.grad(lambda *a: logprobs.from_hidden(*a, tokens, chunk=8192).sum(), argnums))
        return run.lower(*arrays[:2]).compile().cost_analysis()["flops"]

    product = 2 * 4 * 64 * 32 * 8192
    assert flops((0, 1)) - flops(0) > 0.9 * product
