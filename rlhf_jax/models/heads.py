"""Scalar heads on the transformer: a reward model reads its last token, a critic every token.

Parameters: {"trunk": a transformer's, without an untied output head, "head": {"kernel" [d], "bias" []}}.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.masking import last_index
from rlhf_jax.models import lora, transformer
from rlhf_jax.models.spec import ModelSpec
from rlhf_jax.types import ArrayLike, Key, Params

HEAD = "head"
"""Of a network's parameters, the scalar head on its trunk."""


def init_with_head(spec: ModelSpec, key: Key, trunk: Params | None = None) -> Params:
    """Boxed parameters that train: a new head, N(0, 1/√(d+1)) (Stiennon et al. 2020), on a given trunk or a random one.

    Where the spec has adapters, these alone are the trunk's part.
    """
    trunk_key, head_key = jax.random.split(key)
    boxed = lora.own(spec, transformer.init(spec, trunk_key))
    boxed.pop("unembedding", None)
    if trunk is not None:
        boxed = box({name: trunk[name] for name in boxed}, boxed)
    kernel = jax.random.normal(head_key, (spec.d_model,)) * (spec.d_model + 1) ** -0.5
    return {
        "trunk": boxed,
        HEAD: {"kernel": nn.LogicallyPartitioned(kernel, ("embed",)), "bias": jnp.zeros(())},
    }


def box(params: Params, boxes: Params) -> Params:
    """Put plain parameters into the boxes, with logical axis names, of a tree made by `init`."""
    return jax.tree.map(
        lambda empty, value: empty.replace_boxed(value) if _is_box(empty) else value, boxes, params, is_leaf=_is_box
    )


def score(
    spec: ModelSpec, params: Params, tokens: Int[ArrayLike, "b t"], mask: Bool[ArrayLike, "b t"]
) -> Float[Array, " b"]:
    """One score a sequence, read at its last kept token; float32, for any padding."""
    last = jnp.maximum(last_index(mask), 0)
    return read_head(params, transformer.hidden(spec, params["trunk"], tokens, mask, read=last[:, None])[:, 0])


def scores_at(
    spec: ModelSpec,
    params: Params,
    tokens: Int[ArrayLike, "b t"],
    mask: Bool[ArrayLike, "b t"],
    ends: Int[ArrayLike, "b s"],
) -> Float[Array, "b s"]:
    """The head's outputs at some tokens of each row, such as those that end its steps; float32, for any padding."""
    return read_head(params, transformer.hidden(spec, params["trunk"], tokens, mask, read=ends))


def values(
    spec: ModelSpec, params: Params, tokens: Int[ArrayLike, "b t"], mask: Bool[ArrayLike, "b t"]
) -> Float[Array, "b t"]:
    """V before each token: entry t is the head's output at t − 1, entry 0 is 0; float32."""
    outputs = read_head(params, transformer.hidden(spec, params["trunk"], tokens, mask, read=slice(None, -1)))
    return jnp.pad(outputs, ((0, 0), (1, 0)))


def read_head(params: Params, states: Float[Array, "*b d"]) -> Float[Array, "*b"]:
    """The head's outputs, float32, of the trunk's hidden states."""
    head = params[HEAD]
    return jnp.matmul(states.astype(jnp.float32), head["kernel"], precision="highest") + head["bias"]


def _is_box(x: object) -> bool:
    return isinstance(x, nn.meta.AxisMetadata)
