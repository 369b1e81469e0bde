"""Rows that take turns: every completion as it is without, by a script and by a model, and what they cost."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models, sharding
from rlhf_jax.models import Cache, ModelSpec
from rlhf_jax.sampling import Sampling, Turns, generate
from rlhf_jax.sampling.prefill import Prefilled
from rlhf_jax.sampling.turns import Drawn, in_turn
from rlhf_jax.sharding import MeshConfig

pytestmark = pytest.mark.usefixtures("compile_quickly")

EOS, LENGTH = 1, 48
SPEC = ModelSpec(vocab_size=48, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48, max_len=64)


def geometric(rows: int) -> np.ndarray:
    """Lengths of a mean of about a quarter of the limit."""
    return np.minimum(np.random.default_rng(0).geometric(4 / LENGTH, rows), LENGTH)


def scripted(turns: Turns, lengths: np.ndarray):
    """What `in_turn` makes of rows that end where a script says; and the rows of each step."""
    rows, widths = len(lengths), []
    cache = Cache(
        keys=jnp.zeros((1, rows, 1, 1, 1)),
        values=jnp.zeros((1, rows, 1, 1, 1)),
        positions=jnp.zeros((rows, 1), jnp.int32),
        mask=jnp.ones((rows, 1), bool),
        length=jnp.ones((), jnp.int32),
    )
    before = Prefilled(jnp.zeros((rows, 1), jnp.int32), jnp.ones((rows, 1), bool), jnp.arange(rows)[:, None] / 1, cache)

    def step(state, alive, t, row, cache):
        jax.debug.callback(lambda width: widths.append(int(width)), alive.shape[0])
        token = jnp.where(t == jnp.asarray(lengths)[row] - 1, EOS, 100 * row + t + 2)
        drawn = Drawn(jnp.where(alive, token, 0), jnp.where(alive, state[:, 0] + t / 64, 0), None, None)
        return drawn, token == EOS, state, cache

    like = Drawn(jnp.int32(0), jnp.float32(0), None, None)
    drawn, mask = jax.jit(lambda: in_turn(turns, step, before, like, copies=1, length=LENGTH))()
    jax.effects_barrier()
    return (drawn.tokens, mask, drawn.logps), widths


@pytest.mark.parametrize("turns", [Turns(8, 0), Turns(32, 2), Turns(64, 3, 0.5), Turns(4, 1, 0.0)], ids=str)
def test_every_row_is_written_where_it_belongs(turns):
    lengths = geometric(50)
    (tokens, mask, logps), _ = scripted(turns, lengths)
    t, row = np.arange(LENGTH)[None], np.arange(50)[:, None]
    own = t < lengths[:, None]
    np.testing.assert_array_equal(mask, own)
    np.testing.assert_array_equal(
        tokens, np.where(own, np.where((t == lengths[:, None] - 1), EOS, 100 * row + t + 2), 0)
    )
    np.testing.assert_array_equal(logps, np.where(own, row + t / 64, 0).astype(np.float32))


def test_skewed_lengths_cost_little_more_than_their_tokens():
    lengths = geometric(512)
    _, widths = scripted(Turns(64, 2), lengths)
    assert sum(widths) <= 1.25 * lengths.sum()
    assert 512 * lengths.max() > 3.5 * lengths.sum()  # what all at once would


def test_replicas_take_each_step_together_and_write_what_each_would_alone(params):
    """Under vmap, as in a sweep: with one place in the ring for all, so that no cache is chosen at a token."""
    keys = jax.random.split(jax.random.key(7), 3)
    prompts = jnp.asarray(np.random.default_rng(0).integers(3, 48, (24, 6)))

    def program(key):
        return generate(
            *(SPEC, params, prompts, jnp.ones_like(prompts, bool), key),
            max_new_tokens=16,
            sampling=Sampling(temperature=1.3),
            eos_id=EOS,
            pad_id=0,
            turns=Turns(8, 1),
        )

    mapped = jax.jit(jax.vmap(program))(keys)
    for number, key in enumerate(keys):
        alone = jax.jit(program)(key)
        np.testing.assert_array_equal(mapped.tokens[number], alone.tokens)
        np.testing.assert_array_equal(mapped.completion_mask[number], alone.completion_mask)
        np.testing.assert_allclose(mapped.logps[number], alone.logps, atol=1e-5)
    loops = list(_loops(jax.make_jaxpr(jax.vmap(program))(keys).jaxpr))
    assert len(loops) == 4  # two widths, each with one loop inside another
    # A condition of each replica's own would make of the place in the ring one of each, too.
    assert all(any(out.aval.shape == () for out in loop.outvars) for loop in loops)


def _loops(jaxpr):
    """All of a program's loops of unknown length, with those inside others."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "while":
            yield equation
        for value in equation.params.values():
            if isinstance(value, jax.extend.core.ClosedJaxpr | jax.extend.core.Jaxpr):
                yield from _loops(value.jaxpr if isinstance(value, jax.extend.core.ClosedJaxpr) else value)


def completions(params, *, rows=24, same=3, mesh=None, spec=SPEC, **options):
    rng = np.random.default_rng(0)
    prompts = np.repeat(rng.integers(3, 48, (rows // same, 6)), same, axis=0)
    mask = np.arange(6) >= np.repeat(rng.integers(0, 5, (rows // same, 1)), same, axis=0)

    def program(params, prompts, mask):
        return generate(
            *(spec, params, prompts, mask, jax.random.key(5)),
            max_new_tokens=16,
            sampling=Sampling(temperature=1.3),
            eos_id=EOS,
            pad_id=0,
            **options,
        )

    if mesh is None:
        return jax.device_get(jax.jit(program)(params, prompts, mask))
    with sharding.scope(mesh):
        return jax.device_get(jax.jit(program)(params, *sharding.shard_batch(mesh, (prompts, mask))))


@pytest.fixture(scope="module")
def params():
    """Of a model that often ends early: EOS has several times the share of another token."""
    tree = sharding.unbox(models.init(SPEC, jax.random.key(0)))
    tree["embedding"] = tree["embedding"].at[EOS].multiply(4.0)
    return tree


LOCAL = ModelSpec(**{**vars(SPEC), "window": 5, "local_layers": (True, False), "attention_softcap": 20.0})


@pytest.mark.parametrize(
    ("spec", "options"),
    [(SPEC, {"copies": 3}), (SPEC, {"turns": Turns(8, 1)}), (LOCAL, {"turns": Turns(8, 0, 0.5), "copies": 3})],
    ids=["prompts once", "turns", "both, with windows"],
)
def test_completions_are_those_without(params, spec, options):
    greedy = np.arange(24) % 3 == 0
    plain, other = (
        completions(params, spec=spec, greedy=greedy),
        completions(params, spec=spec, greedy=greedy, **options),
    )
    assert 1 <= plain.completion_mask.sum(-1).min() < 8 < plain.completion_mask.sum(-1).max()
    for name in ("tokens", "prompt_mask", "completion_mask"):
        np.testing.assert_array_equal(getattr(other, name), getattr(plain, name))
    np.testing.assert_allclose(other.logps, plain.logps, atol=1e-4)


@pytest.mark.parametrize(
    ("mesh", "slots"), [(MeshConfig(data=2, fsdp=2, tensor=2), 16), (MeshConfig(data=1, fsdp=2, sequence=4), 4)]
)
def test_completions_on_a_mesh_are_those_on_one_device(params, mesh, slots):
    plain = completions(params, rows=48)
    other = completions(params, rows=48, mesh=sharding.make_mesh(mesh), turns=Turns(slots, 1), copies=3)
    np.testing.assert_array_equal(other.tokens, plain.tokens)
    np.testing.assert_allclose(other.logps, plain.logps, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"slots": 0}, "turns.slots"), ({"slots": 12, "halvings": 3}, "divide"), ({"refill": 1.5}, "turns.refill")],
)
def test_turns_that_make_no_sense_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        Turns(**fields)
