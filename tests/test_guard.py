"""Bad updates are left out, whole: overflows that really happen, and spikes against their definition in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import guard
from rlhf_jax.checkpoint import Checkpoints
from rlhf_jax.masking import token_mean
from rlhf_jax.optim import Optimizer
from rlhf_jax.train_step import compiled, create_state, make_train_step

pytestmark = pytest.mark.usefixtures("compile_quickly")

RNG = np.random.default_rng(0)


def batches(n, *, outliers=()):
    """Rows of a regression; an outlier's square is beyond float32."""
    draws = RNG.normal(size=(n, 8, 4)).astype(np.float32)
    rows = [{"x": draw[:, :3], "y": draw[:, 3]} for draw in draws]
    for index, scale in dict(outliers).items():
        rows[index]["y"][5] = scale
    return rows


def loss_fn(params, batch, hyper, key):
    return token_mean((batch["x"] @ params["w"] - batch["y"]) ** 2, jnp.ones(batch["y"].shape, bool)), {}


def train(optimizer, data, *, num_microbatches=1, dtype=jnp.float32):
    """States and metrics after each batch, the fresh state first."""
    tx = optimizer.make(len(data))
    params = {"w": jnp.array([0.5, -1.0, 2.0], dtype)}
    state = create_state(params, tx, {"learning_rate": optimizer.learning_rate}, jax.random.key(0))
    step = compiled(make_train_step(loss_fn, tx, num_microbatches=num_microbatches), state)
    states, seen = [jax.device_get(state.replace(key=None))], []
    for batch in data:
        state, metrics = step(state, batch)
        states.append(jax.device_get(state.replace(key=None)))
        seen.append({name: float(x) for name, x in metrics.items()})
    return states, seen


def by_hand(optimizer, data):
    """The parameters after AdamW on the batches that are not None, each at the schedule's share of its own place."""
    share, params = optimizer.share(len(data)), {"w": jnp.array([0.5, -1.0, 2.0])}
    gradient_of = jax.jit(jax.grad(lambda p, batch: loss_fn(p, batch, {}, None)[0].value))
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1.0, 0.9, 0.95, weight_decay=optimizer.weight_decay))
    state = adam.init(params)
    for place, batch in enumerate(data):
        if batch is not None:
            update, state = jax.jit(adam.update)(gradient_of(params, batch), state, params)
            scale = optimizer.learning_rate * share(place)
            params = {"w": params["w"] + scale * update["w"]}
    return params["w"]


@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_a_batch_that_overflows_is_left_out_and_its_step_counts(num_microbatches):
    data = batches(6, outliers={2: 1e30, 3: np.inf})
    optimizer = Optimizer(0.1, schedule="linear", weight_decay=0.1, bad_steps="skip")
    states, seen = train(optimizer, data, num_microbatches=num_microbatches)
    assert not np.isfinite(seen[2]["loss"]) and not np.isfinite(seen[3]["loss"])
    assert [one["skipped"] for one in seen] == [0, 0, 1, 2, 2, 2]
    assert [one["skipped_in_row"] for one in seen] == [0, 0, 1, 2, 0, 0] and not any(one["given_up"] for one in seen)
    for bad in (3, 4):
        assert states[bad].params["w"].tobytes() == states[2].params["w"].tobytes() and states[bad].step == bad
    kept = [None if i in (2, 3) else batch for i, batch in enumerate(data)]
    np.testing.assert_allclose(states[-1].params["w"], by_hand(optimizer, kept), rtol=1e-5)
    assert guard.figures(states[-1]) == {"skipped": 2}


def test_a_guard_that_sees_nothing_bad_changes_nothing():
    data = batches(5)
    plain, guarded = (train(Optimizer(0.1, **fields), data) for fields in ({}, {"bad_steps": "skip"}))
    assert plain[0][-1].params["w"].tobytes() == guarded[0][-1].params["w"].tobytes()
    assert [one["loss"] for one in plain[1]] == [one["loss"] for one in guarded[1]]
    assert "skipped" not in plain[1][0] and guard.figures(plain[0][-1]) == {}


def test_parameters_in_bfloat16_stay_as_they_were():
    states, _ = train(Optimizer(0.1, bad_steps="skip"), batches(3, outliers={1: 1e30}), dtype=jnp.bfloat16)
    assert states[1].params["w"].tobytes() == states[2].params["w"].tobytes() != states[3].params["w"].tobytes()


def expected_spikes(values, *, sigmas, window):
    """By the definition: above the mean of the last `window` that were taken, once there are half as many."""
    taken, spikes = [], []
    for value in values:
        recent = np.asarray(taken[-window:], np.float64)
        spike = len(taken) >= window // 2 and bool(value > recent.mean() + sigmas * recent.std())
        spikes.append(spike)
        taken += [] if spike else [value]
    return spikes


@pytest.mark.parametrize("watched", ["loss", "norm"])
def test_spikes_are_those_of_the_definition(watched):
    values = RNG.normal(loc=0.1, scale=0.05, size=60) ** 2 + 1  # of both signs of change, never negative
    values[[2, 20, 41, 42]] = [9, 1.5, 3, 3]  # the first comes before anything is known
    tx = guard.guarded(optax.sgd(1.0), sigmas=3.0, window=8, most=2)
    state, update = tx.init({"w": jnp.zeros(1)}), jax.jit(lambda g, s, loss: tx.update(g, s, loss=loss)[1])
    seen = []
    for value in values:
        loss, norm = (value, 1.0) if watched == "loss" else (-1.0, value)
        after = update({"w": jnp.full(1, norm)}, state, jnp.float32(loss))
        seen.append(int(after.skipped) > int(state.skipped))
        state = after
    assert seen == expected_spikes(values, sigmas=3.0, window=8)
    assert [seen[i] for i in (2, 20, 41, 42)] == [False, True, True, True]


def test_too_many_in_a_row_and_any_where_the_run_is_to_stop():
    data = batches(12, outliers={i: 1e30 for i in (3, 4, 5, 6)})
    _, seen = train(Optimizer(0.1, bad_steps="skip", most_skipped=3), data)
    assert [one["given_up"] for one in seen] == [0] * 6 + [1] + [0] * 5
    data = batches(12, outliers={7: 1e3})
    states, seen = train(Optimizer(0.1, spike_sigmas=6.0, spike_window=4), data)
    assert [one["given_up"] for one in seen] == [0] * 7 + [1] + [0] * 4
    assert states[8].params["w"].tobytes() == states[7].params["w"].tobytes()


def test_what_a_guard_knows_is_saved(tmp_path):
    tx = Optimizer(bad_steps="skip", spike_sigmas=3.0, spike_window=4).make(3)
    params, update = {"w": jnp.zeros(3)}, jax.jit(tx.update)
    fresh = jax.jit(tx.init)(params)
    state = fresh
    for value in (1.0, np.nan, 2.0):
        _, state = update({"w": np.full(3, value, np.float32)}, state, params, loss=np.float32(value))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    restored, _ = checkpoints.restore(fresh)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert guard.figures(restored) == {"skipped": 1}


def test_many_steps_as_one():
    metrics = {"loss": [1.0, jnp.nan, 4.0], "skipped": [4.0, 5.0, 5.0], "skipped_in_row": [0.0, 1.0, 0.0]}
    metrics = {name: jnp.array(x) for name, x in metrics.items()} | {"given_up": jnp.zeros(3)}
    over_steps = jax.jit(guard.over_steps)
    one = over_steps(metrics)
    assert one == {"loss": 2.5, "skipped": 5, "skipped_in_row": 1, "given_up": 0}
    assert guard.together(one, {"loss": 1.0}) == {"skipped": 5, "skipped_in_row": 1, "given_up": 0}
    assert guard.together(one, one)["skipped"] == 10 and guard.together({"loss": 1.0}) == {}
    none = over_steps({**metrics, "skipped_in_row": jnp.array([1.0, 2.0, 3.0])})
    assert jnp.isnan(none["loss"]) and none["skipped_in_row"] == 3
    assert guard.over_steps({"loss": jnp.array([1.0, 3.0])}) == {"loss": 2.0}


@pytest.mark.parametrize("field", [{"spike_sigmas": 0.0}, {"spike_window": 3}, {"most_skipped": 0}])
def test_fields_that_make_no_sense_are_refused_by_name(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        Optimizer(**field)
