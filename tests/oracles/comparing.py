"""An oracle: one case of a peer, and how our function is called on the same inputs to be the same number.

Errors are relative, element by element, of the value and of the gradient of its weighted sum; where the peer's number
is 0, ours has to be below 1e-12 of the peer's largest to count as equal.
"""

import ast
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.oracles.inputs import weights

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TOLERANCE = 1e-6
FLOOR = 1e-6
"""An element below this share of the largest is measured against that share: what rounding of the largest leaves."""

Ours = Callable[[SimpleNamespace, SimpleNamespace], jax.Array]  # (inputs by name, the case's parameters) -> value


@dataclass(frozen=True)
class Oracle:
    """A peer's case beside ours. `function` is the public name that it vouches for, without `rlhf_jax.`."""

    function: str
    peer: str
    case: str
    ours: Ours
    reading: str = ""
    """Where a paper is read in two ways: what the peer does, and what `ours` does to the inputs to equal it."""
    otherwise: Ours | None = None
    """Our function in the other reading, on the same inputs: a test asserts that it is another number."""

    def __str__(self):
        return f"{self.function}-{self.peer}-{self.case}"


@dataclass(frozen=True)
class Errors:
    """The largest relative error of the value and of the gradient; None where the peer has no gradient."""

    value: float
    gradient: float | None


@functools.cache
def numbers(peer: str) -> dict[str, Any]:
    """A peer's file."""
    return json.loads((HERE / f"{peer}.json").read_text())


def peers() -> list[str]:
    """The peers that have a file."""
    return sorted(path.stem for path in HERE.glob("*.json"))


def relative_error(ours: jax.Array, theirs: np.ndarray) -> float:
    """The largest |ours − theirs| / |theirs| over the elements; infinite if the shapes differ."""
    ours = np.asarray(ours)
    if ours.shape != theirs.shape or not np.isfinite(ours).all():
        return float("inf")
    scale = np.abs(theirs)
    scale = np.maximum(scale, FLOOR * scale.max(initial=0))
    return float(np.max(np.abs(ours - theirs) / np.where(scale > 0, scale, 1), initial=0))


def inputs_of(oracle: Oracle) -> tuple[SimpleNamespace, SimpleNamespace, dict[str, Any]]:
    """(arrays in float64, parameters, the case)."""
    data = numbers(oracle.peer)
    case = data["cases"][oracle.case]
    arrays = {name: np.asarray(values) for name, values in data["inputs"][case["inputs"]].items()}
    return SimpleNamespace(**arrays), SimpleNamespace(**case["params"]), case


def compare(oracle: Oracle, ours: Ours | None = None) -> Errors:
    """Our value and gradient against the peer's. Needs 64-bit JAX."""
    ours = ours or oracle.ours
    x, params, case = inputs_of(oracle)

    def total(leaves):
        value = ours(SimpleNamespace(**{**vars(x), **leaves}), params)
        return jnp.sum(value * weights(value.shape)), value

    leaves = {name: jnp.asarray(vars(x)[name]) for name in case["gradients"]}
    (_, value), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(leaves)
    errors = [relative_error(gradients[name], np.asarray(theirs)) for name, theirs in case["gradients"].items()]
    return Errors(relative_error(value, np.asarray(case["value"])), max(errors, default=None))


def defines_test(path: Path, name: str) -> bool:
    """Whether a test file defines a function (or a method) of this name."""
    tree = ast.parse(path.read_text())
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in ast.walk(tree))
