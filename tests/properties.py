"""What every function of layer 2 promises, written once: a test class lists `Case`s and inherits the rest.

class TestProperties(Properties):
    cases = (Case(ppo_clip, normal("logps", "old_logps", "advantages"), scalars={"clip_eps": 0.2}),)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from rlhf_jax.types import Mean

Arrays = dict[str, np.ndarray]
MASKS = ("mask", "where")
FINITE, NON_FINITE = (3e4, -3e4), (np.nan, np.inf)


@dataclass(frozen=True, eq=False)  # told apart and hashed by identity, as jit wants of what it compiles
class Case:
    """One function, its array arguments by name, and the scalars that a sweep may vary."""

    fn: Callable
    make: Callable[[np.random.Generator, tuple[int, ...]], Arrays]  # (rng, leading axes) -> arguments
    scalars: Mapping[str, float] = field(default_factory=dict)
    static: Mapping[str, Any] = field(default_factory=dict)
    rowwise: bool = True  # a row's result depends on that row alone
    aligned: bool = True  # entry t of the result depends on entry t of the arguments, not on t − 1
    label: str = ""

    def __str__(self):
        return self.fn.__name__ + self.label

    def arrays(self, *lead: int, dtype=np.float32) -> Arrays:
        made = self.make(np.random.default_rng(7), lead)
        return {name: x.astype(dtype) if is_float(x) else x for name, x in made.items()}

    def __call__(self, arrays: Arrays, **scalars):
        return self.fn(**arrays, **{**self.scalars, **self.static, **scalars})

    @cached_property
    def compiled(self) -> Callable:
        return jax.jit(self)

    @cached_property
    def total_and_gradients(self) -> Callable[..., tuple[jax.Array, Arrays]]:
        """Of (arrays, keep): the outputs that an outer mask keeps as one number, and its gradients by argument."""

        def total(floats: Arrays, others: Arrays, keep: np.ndarray) -> jax.Array:
            out = self({**floats, **others})
            leaves = (out.value,) if isinstance(out, Mean) else jax.tree.leaves(out)
            return sum(weight * jnp.where(keep, x, 0).sum() for weight, x in enumerate(leaves, start=1))

        compiled = jax.jit(jax.value_and_grad(total))

        def run(arrays: Arrays, keep: np.ndarray | bool = True) -> tuple[jax.Array, Arrays]:
            # Always one shape, to be compiled once.
            return jax.device_get(compiled(*split(arrays), np.broadcast_to(keep, self.shape)))

        return run

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of the first output, four rows."""
        return jax.tree.leaves(jax.eval_shape(self, self.arrays(4)))[0].shape

    @property
    def mask_name(self) -> str | None:
        return next((name for name in self.arrays() if name in MASKS), None)


def is_float(x: np.ndarray) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def split(arrays: Arrays) -> tuple[Arrays, Arrays]:
    """(what has a gradient, masks and indices)."""
    floats = {name: x for name, x in arrays.items() if is_float(x)}
    return floats, {name: x for name, x in arrays.items() if name not in floats}


def normal(*names: str, shape: tuple[int, ...] = (5,), scale: float = 1.0, **others) -> Callable:
    """Makes normal arguments, all of one shape behind the leading axes; `others` are makers of single arguments."""

    def make(rng, lead):
        arrays = {name: rng.normal(size=(*lead, *shape)) * scale for name in names}
        return arrays | {name: other(rng, lead) for name, other in others.items()}

    return make


def mask_of(size: int = 5) -> Callable:
    """Makes masks with holes, late starts and early ends; each row keeps something."""

    def make(rng, lead):
        mask = rng.random((*lead, size)) < 0.6
        mask[..., size // 2] = True
        mask[..., 0] = False
        return mask

    return make


def assert_close(actual, expected, rtol=2e-5, atol=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected)


def spoil(x: np.ndarray, kept: np.ndarray, garbage: float) -> np.ndarray:
    """`x` with garbage wherever the mask of its leading axes is False."""
    return np.where(kept.reshape(kept.shape + (1,) * (x.ndim - kept.ndim)), x, x.dtype.type(garbage))


@pytest.mark.usefixtures("compile_quickly")
class Properties:
    """Inherited by the test class of a module, which sets `cases`."""

    cases: tuple[Case, ...] = ()

    def pytest_generate_tests(self, metafunc):
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.cases, ids=str)
        if "aligned" in metafunc.fixturenames:
            metafunc.parametrize("aligned", [case for case in self.cases if case.aligned], ids=str)
        if "swept" in metafunc.fixturenames:
            metafunc.parametrize("swept", [case for case in self.cases if case.scalars], ids=str)

    def test_row_batch_vmap_jit_and_numpy_agree(self, case):
        arrays = case.arrays(4)
        rows = [{name: x[i] for name, x in arrays.items()} for i in range(4)]
        deeper = {name: x.reshape(2, 2, *x.shape[1:]) for name, x in arrays.items()}

        @jax.jit  # one program for all: compiling is what takes the time
        def several_ways(arrays, rows, deeper):
            of_numpy = case(numpy_arrays), case(numpy_row)  # a row of NumPy's may be one of its scalars
            by_row = [case(row) for row in rows]
            return case(arrays), by_row, jax.vmap(case)(arrays), of_numpy, case(deeper) if case.rowwise else ()

        numpy_arrays, numpy_row = arrays, rows[0]
        batch, by_row, mapped, of_numpy, deep = jax.device_get(several_ways(arrays, rows, deeper))
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *by_row)
        assert_close(mapped, stacked)
        assert_close(of_numpy, (batch, by_row[0]))
        if case.rowwise:
            assert_close(stacked, batch)
            assert_close(jax.tree.map(lambda x: x.reshape(4, *x.shape[2:]), deep), batch)

    def test_scalars_may_be_traced_and_mapped(self, swept):
        arrays = swept.arrays(4)
        mapped = jax.jit(jax.vmap(lambda scalars: swept(arrays, **scalars)))
        out = mapped({name: np.float32([value, value]) for name, value in swept.scalars.items()})
        assert_close(jax.tree.map(lambda x: x[1], jax.device_get(out)), swept.compiled(arrays))

    def test_gradient_equals_finite_differences(self, case, float64):
        arrays = case.arrays(4, dtype=np.float64)
        floats, others = split(arrays)
        total, gradients = case.total_and_gradients(arrays)
        assert total.dtype == jnp.float64
        for seed in range(2):
            rng, step = np.random.default_rng(seed), 1e-6
            direction = {name: rng.normal(size=x.shape) for name, x in floats.items()}
            ahead, behind = (
                case.total_and_gradients({n: x + sign * step * direction[n] for n, x in floats.items()} | others)[0]
                for sign in (1, -1)
            )
            expected = sum(np.vdot(gradients[name], direction[name]) for name in floats)
            np.testing.assert_allclose((ahead - behind) / (2 * step), expected, rtol=1e-6, atol=1e-7)

    def test_garbage_in_the_pads_changes_no_value_and_no_gradient(self, aligned):
        case = aligned
        arrays, name = case.arrays(4), case.mask_name
        # Without a mask of its own a function can promise no more than finite numbers for finite numbers.
        if name is None:
            kept = keep = np.random.default_rng(1).random(case.shape) < 0.5
            garbages = FINITE
        else:
            kept, keep, garbages = arrays[name], True, FINITE + NON_FINITE
        floats, others = split(arrays)
        padded = {name for name, x in floats.items() if x.shape[: kept.ndim] == kept.shape}
        total, gradients = case.total_and_gradients(arrays, keep)
        assert not any(gradients[name][~kept].any() for name in padded)
        for garbage in garbages:
            spoilt = {n: spoil(x, kept, garbage) if n in padded else x for n, x in floats.items()} | others
            same = case.total_and_gradients(spoilt, keep)
            jax.tree.map(np.testing.assert_array_equal, same, (total, gradients))

    def test_finite_when_all_is_masked(self, case):
        arrays, name = case.arrays(4), case.mask_name
        if name is None:
            total, gradients = case.total_and_gradients(arrays, False)
            assert total == 0 and not any(g.any() for g in gradients.values())
            return
        for some_rows in (np.zeros(4, bool), np.arange(4) > 0):
            masked = {**arrays, name: arrays[name] & some_rows[:, None]}
            assert all_finite(case.compiled(masked)) and all_finite(case.total_and_gradients(masked))

    def test_extreme_numbers_stay_finite(self, case):
        floats, others = split(case.arrays(4))
        arrays = {name: np.sign(x) * 3e3 for name, x in floats.items()} | others
        assert all_finite(case.compiled(arrays)) and all_finite(case.total_and_gradients(arrays))

    def test_half_precision_is_promoted_and_double_kept(self, case, float64):
        def dtypes(arrays):
            return {x.dtype for x in jax.tree.leaves(jax.eval_shape(case, arrays))}

        for given, kept in ((jnp.bfloat16, jnp.float32), (jnp.float16, jnp.float32), (np.float64, jnp.float64)):
            assert dtypes(case.arrays(4, dtype=given)) == {jnp.dtype(kept)}

    def test_half_precision_is_promoted_before_anything_else(self, case):
        arrays = case.arrays(4, dtype=jnp.bfloat16)
        wide = {name: x.astype(np.float32) if x.dtype == jnp.bfloat16 else x for name, x in arrays.items()}
        assert_close(case.compiled(arrays), case.compiled(wide))

    def test_integers_and_wrong_shapes_are_refused_by_name(self, case):
        arrays = case.arrays(4)
        for name, x in split(arrays)[0].items():
            with pytest.raises(TypeCheckError, match=name):
                case({**arrays, name: np.ones(x.shape, np.int32)})
            if len(arrays) > 1:
                with pytest.raises(TypeCheckError):
                    case({**arrays, name: x[..., None]})


def all_finite(tree) -> bool:
    return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))
