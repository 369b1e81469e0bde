"""Parameters of layers, and whatever has their structure: stacked along a leading axis, or each layer's apart."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.models.spec import ModelSpec
from rlhf_jax.sharding import platform, splits

LAYERS = "layers"
"""Of a transformer's parameters, those of its layers."""


def may_lie_apart(spec: ModelSpec) -> bool:
    """Whether a model reads layers that lie apart: no loop over them, no stages, nothing recomputed, routed or added to
    a base; on a CPU, since they take memory beside the stacks that they are cut out of.
    """
    plain = spec.remat == "none" and spec.experts is None and spec.lora is None
    return plain and spec.unrolled and splits(LAYERS) == 1 and platform() == "cpu"


def apart(tree: Any) -> Any:
    """With a tuple of each layer's own arrays in place of stacked ones, wherever there are LAYERS in a tree."""
    return _changed(tree, unstacked)


def together(tree: Any) -> Any:
    """What `apart` was made of."""
    return _changed(tree, lambda layers: jax.tree.map(lambda *own: jnp.stack(own), *layers))


def unstacked(layers: Any) -> tuple[Any, ...]:
    """Each layer's arrays, all cut out of the stack at once: gradients are then laid together, not added up."""
    leaves, tree = jax.tree.flatten(layers)
    cut = [jax.lax.split(x, (1,) * len(x)) for x in leaves]
    return tuple(tree.unflatten([jnp.squeeze(x, 0) for x in own]) for own in zip(*cut, strict=True))


def _changed(tree: Any, change: Callable[[Any], Any]) -> Any:
    def has_layers(node: Any) -> bool:
        return isinstance(node, dict) and LAYERS in node

    return jax.tree.map(
        lambda node: {**node, LAYERS: change(node[LAYERS])} if has_layers(node) else node, tree, is_leaf=has_layers
    )
