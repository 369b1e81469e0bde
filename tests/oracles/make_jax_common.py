"""What the scripts that run JAX peers share: values and gradients in float64, and the file."""

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.oracles.inputs import SETS, weights

jax.config.update("jax_enable_x64", True)

Case = tuple[str, Callable, str, dict[str, Any]]  # (input set, function of arrays, names with gradients, parameters)


def run(inputs: str, fn: Callable, wrt: str, params: dict[str, Any]) -> dict[str, Any]:
    """The value of one case, and the gradients of its weighted sum."""
    arrays = {name: x if x.dtype == bool else jnp.asarray(x) for name, x in SETS[inputs]().items()}

    def total(leaves):
        value = fn({**arrays, **leaves})
        return (value * weights(value.shape)).sum(), value

    leaves = {name: arrays[name] for name in wrt.split()}
    (_, value), gradients = jax.value_and_grad(total, has_aux=True)(leaves)
    as_lists = {name: np.asarray(gradient).tolist() for name, gradient in gradients.items()}
    return {"inputs": inputs, "params": params, "value": np.asarray(value).tolist(), "gradients": as_lists}


def write(peer: str, packages: tuple[str, ...], cases: dict[str, Case]) -> None:
    """`<peer>.json` beside this file, one case a line."""
    made = {name: run(*case) for name, case in cases.items()}
    used = sorted({case["inputs"] for case in made.values()})
    inputs = {name: {key: x.tolist() for key, x in SETS[name]().items()} for name in used}
    path = Path(__file__).parent / f"{peer}.json"
    parts = [f'"versions": {json.dumps({name: version(name) for name in packages})}']
    for key, entries in (("inputs", inputs), ("cases", made)):
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
        parts.append(f'"{key}": {{\n{lines}\n}}')
    path.write_text("{" + ",\n".join(parts) + "}\n")
    print(f"{path.name}: {len(made)} cases, {path.stat().st_size / 1000:.0f} kB")
