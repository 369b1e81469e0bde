"""One optimiser step: gradients of a loss, accumulated over microbatches, clipped and applied."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rlhf_jax import guard, lockstep, sharding
from rlhf_jax.models import lora
from rlhf_jax.models.spec import DType
from rlhf_jax.numerics import as_float, stochastic_round
from rlhf_jax.types import Batch, Hyper, Key, LossFn, Mean, Metrics, Params, TrainState

_NO_BASE: Params = {}
_ROUNDING = 2**31 - 1  # of the step's keys: no microbatch has this index

Step = Callable[..., tuple[TrainState, dict[str, Any]]]
"""(state, batch, base) -> (state, metrics); a loop adds floats to these."""


class Parts(NamedTuple):
    """A batch in parts, of which one is computed after the other."""

    count: jax.Array | int
    part: Callable[[jax.Array], tuple[jax.Array | int, Sequence[Batch]]]
    """A part by its number, in each of the shapes that the first may be computed in, and which of these fits."""

    def summed(self, fn: Callable[[Batch, jax.Array], Any]) -> Any:
        """The sum of fn(part, its number): the first in the shape that fits, of its own program; others in the last."""

        def one(index: jax.Array) -> Any:
            which, shapes = self.part(index)
            if len(shapes) == 1:
                return fn(shapes[0], index)
            return jax.lax.switch(which, [partial(fn, shape, index) for shape in shapes])

        def later(index: jax.Array, sums: Any) -> Any:
            return jax.tree.map(jnp.add, sums, fn(self.part(index)[1][-1], index))

        if isinstance(self.count, jax.Array):  # seldom more than one: there is nothing to clear and to add to
            return jax.lax.fori_loop(1, self.count, later, one(jnp.int32(0)))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, jnp.int32(0)))
        return jax.lax.fori_loop(0, self.count, later, zeros)


InParts = Callable[[Batch], Parts]
"""A batch to its parts."""


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    num_microbatches: int = 1,
    parts: InParts | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Build (state, batch, base={}) -> (state, metrics) from a loss that returns an undivided `Mean` and a dict.

    The batch's rows are split into `num_microbatches`, or as `parts` says, into as many as it says then; totals and
    counts add up before the one division, so the result does not depend on the split. Metrics hold the loss, the loss's
    own metrics, `grad_norm` before clipping, and what an optimiser that leaves updates out counts (guard.counters).
    Gradients add up and updates are computed in float32; a parameter that is kept in bfloat16 is then rounded at
    random, by a key of the state's.
    `base` are frozen parameters: the loss reads `lora.merge(base, state.params)`, and the latter alone are trained.
    """
    guarding = optax.with_extra_args_support(optimizer)

    def total(params: Params, base: Params, batch: Batch, hyper: Hyper, key: Key) -> tuple[jax.Array, Any]:
        loss, metrics = loss_fn(lora.merge(base, params), batch, hyper, key)
        return loss.total, (loss, metrics)

    def accumulate(state: TrainState, batch: Batch, base: Params) -> tuple[Params, Mean, dict[str, Mean]]:
        key = state.step_key()

        def gradient(batch: Batch, key: Key) -> tuple[Params, Mean, dict[str, Mean]]:
            grads, aux = jax.grad(total, has_aux=True)(state.params, base, batch, state.hyper, key)
            return jax.tree.map(as_float, grads), *aux

        if parts is None and num_microbatches == 1:
            return gradient(batch, key)
        of_batch = _microbatches(batch, num_microbatches) if parts is None else parts(batch)
        return of_batch.summed(lambda part, index: gradient(part, jax.random.fold_in(key, index)))

    def train_step(state: TrainState, batch: Batch, base: Params = _NO_BASE) -> tuple[TrainState, Metrics]:
        grads, loss, means = accumulate(state, batch, base)
        grads = jax.tree.map(lambda g: Mean(g, loss.count).value, grads)
        opt_state = with_learning_rate(state.opt_state, state.hyper)
        wide = jax.tree.map(as_float, state.params)
        updates, opt_state = guarding.update(grads, opt_state, wide, loss=loss.value)
        key = jax.random.fold_in(state.step_key(), _ROUNDING)
        params = _rounded(optax.apply_updates(wide, updates), state.params, key)
        metrics = {"loss": loss.value, **{name: mean.value for name, mean in means.items()}}
        metrics |= {"grad_norm": optax.tree.norm(grads), **guard.counters(opt_state)}
        return dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state), metrics

    return train_step


def _microbatches(batch: Batch, number: int) -> Parts:
    split = _split(batch, number)
    return Parts(number, lambda index: (0, [jax.tree.map(lambda x: jnp.asarray(x)[index], split)]))


def _rounded(wide: Params, like: Params, key: Key) -> Params:
    """The parameters in the types of `like`: bfloat16 at random, unbiased."""
    leaves, tree = jax.tree.flatten(wide)
    keys = jax.random.split(key, max(len(leaves), 1))
    narrow = [leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(like)]
    return tree.unflatten(
        [stochastic_round(x, k) if round_it else x for x, k, round_it in zip(leaves, keys, narrow, strict=False)]
    )


def of_members(step: Step) -> Step:
    """A step of several states as one (`sharded_states`), on batches whose second axis is theirs; the base is shared.

    The metrics are their means, as `guard.of_members` has them.
    """

    def members_step(state: TrainState, batch: Batch, base: Params = _NO_BASE) -> tuple[TrainState, Metrics]:
        state, metrics = jax.vmap(step, in_axes=(0, 1, None))(state, batch, base)
        return state, guard.of_members(metrics)

    return members_step


def compiled(step: Callable[..., tuple], state: Any, *, others: int = 1) -> Callable[..., tuple]:
    """Jit of (state, …) -> (state, and `others` more), the state donated and given back in the layout that it came in.

    Without the layout, the compiler picks one for what comes out, and the second call compiles again.
    """
    layout = jax.tree.map(lambda leaf: leaf.sharding, state)
    return lockstep.jit(step, donate_argnums=(0,), out_shardings=(layout, *(None,) * others))


def in_parts(fn: Callable[[Batch], Any], batch: Batch, parts: int) -> Any:
    """fn(batch) for a row-wise function, computed for a part of the rows at a time to save memory."""
    if parts == 1:
        return fn(batch)
    out = jax.lax.map(fn, _split(batch, parts))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), out)


def _split(batch: Batch, parts: int) -> Batch:
    # Strided, not blocked: each device's rows are spread over all parts.
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def keep_if(condition: jax.Array, old: TrainState, new: TrainState) -> TrainState:
    """`old` where the condition holds, `new` where it does not."""
    moving = [(state.step, state.params, state.opt_state) for state in (old, new)]
    step, params, opt_state = jax.tree.map(lambda a, b: jnp.where(condition, a, b), *moving)
    return dataclasses.replace(new, step=step, params=params, opt_state=opt_state)


def with_learning_rate(opt_state: Any, hyper: Hyper) -> Any:
    """Hand `hyper["learning_rate"]` to an `optax.inject_hyperparams` state."""
    return opt_state._replace(hyperparams={**opt_state.hyperparams, "learning_rate": hyper["learning_rate"]})


def create_state(
    boxed_params: Params, optimizer: optax.GradientTransformation, hyper: dict[str, float], key: Key
) -> TrainState:
    """A fresh state; moments carry the same logical axis names as the parameters that are boxed with them.

    Moments of parameters in bfloat16 are float32.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=boxed_params,
        opt_state=optimizer.init(jax.tree.map(as_float, boxed_params)),
        hyper={name: jnp.asarray(value, jnp.float32) for name, value in hyper.items()},
        key=key,
    )


def sharded_state(
    mesh: Mesh,
    boxed_params: Callable[[Any], Params],
    source: Any,
    optimizer: optax.GradientTransformation,
    hyper: dict[str, float],
    key: Key,
    *,
    master: DType = "float32",
) -> TrainState:
    """A fresh state made straight into its shards, the optimiser's moments split like their parameters.

    `boxed_params(source)` returns parameters boxed with their logical axis names; `source` is what it makes them from:
    a key, or parameters that were loaded. `master` is `Optimizer.master`: the parameters' type. Of the shapes of such
    parameters it is the shapes of the state.
    """

    def make(source: Any, key: Key) -> TrainState:
        return create_state(_as_master(boxed_params(source), master), optimizer, hyper, key)

    return _in_shards(mesh, make, source, key)


def sharded_states(
    mesh: Mesh,
    boxed_params: Callable[[Any, Key], Params],
    source: Any,
    optimizer: optax.GradientTransformation,
    hyper: dict[str, float],
    keys: Key,
    *,
    master: DType = "float32",
) -> TrainState:
    """As many such states as there are keys, as one: every array has their axis in front, which no mesh axis splits.

    `boxed_params(source, key)` makes each one's parameters; its key is the state's too.
    """

    def make(source: Any, keys: Key) -> TrainState:
        def one(key: Key) -> TrainState:
            return create_state(_as_master(boxed_params(source, key), master), optimizer, hyper, key)

        return sharding.with_axis(jax.vmap(one)(keys))

    return _in_shards(mesh, make, source, keys)


def _in_shards(mesh: Mesh, make: Callable[[Any, Key], TrainState], source: Any, key: Key) -> TrainState:
    boxed = jax.eval_shape(make, source, key)
    layout = sharding.shardings(mesh, boxed)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(source)):
        return sharding.in_shards(layout, sharding.unbox(boxed))
    with sharding.scope(mesh):
        return lockstep.jit(lambda *args: sharding.unbox(make(*args)), out_shardings=layout)(source, key)


def _as_master(params: Params, master: DType) -> Params:
    """The parameters in the type in which they are trained; the few that stay in float32 have a name that says so."""

    def one(path: tuple, leaf: jax.Array) -> jax.Array:
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        stays = names[0] == "head" or any("norm" in name or name.endswith(("bias", "router")) for name in names)
        return as_float(leaf) if master == "float32" or stays else leaf.astype(master)

    return jax.tree_util.tree_map_with_path(one, params)
