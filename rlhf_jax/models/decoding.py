"""Where a policy's weights lie while it samples: moved once, before the loop over tokens reads them at each turn."""

from typing import Any

import flax.linen as nn
import jax

from rlhf_jax import sharding
from rlhf_jax.models import quantized, stacking, transformer
from rlhf_jax.models.heads import HEAD, init_with_head
from rlhf_jax.models.perturbed import HEAD_AXES, Perturbed, Policy
from rlhf_jax.models.quantized import Quantized
from rlhf_jax.models.spec import PROJECTIONS, ModelSpec
from rlhf_jax.types import Params


def decoding_policy(spec: ModelSpec, policy: Policy) -> Policy:
    """`decoding_weights` of a policy, and its heads, where it has some, by the same rules."""
    if not isinstance(policy, Perturbed):
        return decoding_weights(spec, policy)
    heads = jax.tree.map(lambda leaf, axes: sharding.constrain(leaf, *axes), policy.heads, HEAD_AXES)
    return policy.replace(transformer=decoding_weights(spec, policy.transformer), heads=heads)


def decoding_weights(spec: ModelSpec, params: Params) -> Params:
    """A transformer's parameters, and its value head if it has one, laid out by the rules of `sharding.decoding`, to be
    read with `extend` and `read_head` alone.

    A matrix that moves goes in the type that products cast it to, so that all numbers stay as they are. Where the
    rules move nothing, as on one device, they stay; where there is no loop over layers, each layer's are cut out of the
    stack here, once.
    """
    boxed = jax.eval_shape(lambda: transformer.init(spec, jax.random.key(0)))
    boxed[HEAD] = jax.eval_shape(lambda: init_with_head(spec, jax.random.key(0)))[HEAD]
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=_is_box)
    names = {path: leaf.names for path, leaf in leaves if _is_box(leaf)}

    def one(path: tuple, leaf: Any) -> Any:
        if path not in names or not sharding.moves(names[path]):
            return leaf
        if isinstance(leaf, Quantized):
            axes = quantized.block_axes(spec, path, names[path])
            return jax.tree.map(lambda part: sharding.constrain(part, *axes), leaf)
        product = path[-1].key in (*PROJECTIONS, "unembedding")
        return sharding.constrain(leaf.astype(spec.dtype) if product else leaf, *names[path])

    params = jax.tree_util.tree_map_with_path(one, params, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    if not spec.unrolled:
        return params
    return stacking.apart(params)


def _is_box(leaf: object) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)
