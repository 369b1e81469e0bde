"""FLOPs of a traced program's matrix products, bodies of loops times their turns (XLA's own count takes each once)."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from jax.extend import core

PHASES = ("sample", "score", "update")
"""Named scopes that an iteration is divided by."""


def phase(scope: str, otherwise: str) -> str:
    """The phase that a scope such as jit(iteration)/update/while lies in."""
    return next((part for part in scope.split("/") if part in PHASES), otherwise)


def count(jaxpr: core.ClosedJaxpr, *, decode_steps: int = 0, whole: str = "all") -> Counter[str]:
    """FLOPs on all devices together, a multiplication and an addition being two, by phase; `whole` outside of phases.

    A loop without a fixed number of turns has `decode_steps`; of a condition's branches the dearest counts.
    Raises ValueError for such a loop where `decode_steps` is 0.
    """
    return _count(jaxpr.jaxpr, decode_steps, whole)


def _count(jaxpr: core.Jaxpr, decode_steps: int, around: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for eqn in jaxpr.eqns:
        where = phase(str(eqn.source_info.name_stack), around)
        name = eqn.primitive.name
        if name in _PRODUCTS:
            total[where] += _PRODUCTS[name](eqn)
        elif name == "cond":
            branches = [_count(branch.jaxpr, decode_steps, where) for branch in eqn.params["branches"]]
            total.update(max(branches, key=Counter.total))
        else:
            turns = _turns(eqn, decode_steps)
            for inner in _jaxprs(eqn.params.values()):
                inside = _count(inner, decode_steps, where)
                total.update({key: turns * flops for key, flops in inside.items()})
    return total


def _turns(eqn: core.JaxprEqn, decode_steps: int) -> int:
    if eqn.primitive.name == "scan":
        return eqn.params["length"]
    if eqn.primitive.name == "shard_map":  # its body is one device's
        return math.prod(eqn.params["mesh"].shape[axis] for axis in eqn.params["newly_manual_axes"])
    if eqn.primitive.name == "pallas_call":  # its body is one block's; those that it skips count, as they do elsewhere
        return math.prod(eqn.params["grid_mapping"].grid)
    if eqn.primitive.name == "while":
        products = any(_count(inner, 1, "").total() for inner in _jaxprs(eqn.params.values()))
        if products and not decode_steps:
            raise ValueError("a loop without a fixed number of turns, and decode_steps is 0")
        return decode_steps
    return 1


def _jaxprs(values: Iterable[Any]) -> list[core.Jaxpr]:
    found = []
    for value in values:
        if isinstance(value, core.ClosedJaxpr):
            found.append(value.jaxpr)
        elif isinstance(value, core.Jaxpr):
            found.append(value)
    return found


def _dot(eqn: core.JaxprEqn) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left, _, out = _shapes(eqn)
    return 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)


def _ragged_dot(eqn: core.JaxprEqn) -> int:
    """[m, k] rows, each with the [k, n] of its group, or [m, k] and [m, n] to a [k, n] a group: 2 m k n either way."""
    left, right, out = _shapes(eqn)
    return 2 * math.prod(left) * (right[-1] if len(out) == 3 else out[-1])


def _shapes(eqn: core.JaxprEqn) -> tuple[tuple[int, ...], ...]:
    """Of both factors and of the product."""
    variables: Any = (*eqn.invars[:2], eqn.outvars[0])
    return tuple(variable.aval.shape for variable in variables)


_PRODUCTS = {"dot_general": _dot, "ragged_dot": _ragged_dot, "ragged_dot_general": _ragged_dot}
