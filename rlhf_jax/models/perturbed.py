"""Heads of Q and V on a policy's own transformer (ILQL, Snell et al. 2022), and the policy that they perturb.

Heads: {"q": {"hidden" [h d w], "hidden_bias" [h w], "out" [h w v], "out_bias" [h v]}, "v": the same without h and v}.
Each is a ReLU layer of width w = 2 d and a linear one, which begins at 0: all values are 0, and nothing is perturbed.

Shapes: *b any leading axes, d model width, h heads of Q, v vocabulary.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.losses.offline import perturbed_logits
from rlhf_jax.models import transformer
from rlhf_jax.models.layers import flat
from rlhf_jax.models.spec import ModelSpec
from rlhf_jax.sharding import constrain
from rlhf_jax.types import Key, Params

HEAD_AXES = {
    "q": {
        "hidden": (None, "embed", "mlp"),
        "hidden_bias": (None, "mlp"),
        "out": (None, "embed", "vocab"),
        "out_bias": (None, "vocab"),
    },
    "v": {"hidden": ("embed", "mlp"), "hidden_bias": ("mlp",), "out": ("embed",), "out_bias": ()},
}
"""Logical names of the heads' axes."""


class Perturbed(flax.struct.PyTreeNode):
    """A policy whose logits are log π + β (min Q − V), wherever it is sampled from or its log-probs are read.

    It stands where a transformer's parameters may. β is an array: another one compiles nothing.
    """

    transformer: Params
    heads: Params
    beta: Float[Array, ""]


Policy = Params | Perturbed
"""What may be sampled from: a transformer's parameters, or these with heads."""


def transformer_of(policy: Policy) -> Params:
    """The parameters that `hidden` and `extend` read."""
    return policy.transformer if isinstance(policy, Perturbed) else policy


def policy_logits(spec: ModelSpec, policy: Policy, states: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
    """Logits, float32, of the policy's hidden states."""
    logits = transformer.unembed(spec, transformer_of(policy), states)
    if not isinstance(policy, Perturbed):
        return logits
    smallest = q_values(policy.heads["q"], states).min(-2)
    return perturbed_logits(logits, smallest, state_values(policy.heads["v"], states), beta=policy.beta)


def init_heads(spec: ModelSpec, key: Key, *, heads: int) -> Params:
    """Boxed parameters of so many heads of Q, and of V."""
    d, width, v = spec.d_model, 2 * spec.d_model, spec.vocab_size
    q_key, v_key = jax.random.split(key)

    def hidden(key: Key, *shape: int) -> Array:
        return jax.random.normal(key, shape) * d**-0.5

    plain = {
        "q": {
            "hidden": hidden(q_key, heads, d, width),
            "hidden_bias": jnp.zeros((heads, width)),
            "out": jnp.zeros((heads, width, v)),
            "out_bias": jnp.zeros((heads, v)),
        },
        "v": {
            "hidden": hidden(v_key, d, width),
            "hidden_bias": jnp.zeros(width),
            "out": jnp.zeros(width),
            "out_bias": jnp.zeros(()),
        },
    }
    boxed = nn.LogicallyPartitioned
    return {name: {part: boxed(x, HEAD_AXES[name][part]) for part, x in own.items()} for name, own in plain.items()}


def q_values(head: Params, states: Float[Array, "*b d"]) -> Float[Array, "*b h v"]:
    """Q of every token after each state, float32."""
    each = [
        _product(_inside(hidden, bias, states), out)
        for hidden, bias, out in zip(head["hidden"], head["hidden_bias"], head["out"], strict=True)
    ]
    return jnp.stack(each, axis=-2) + head["out_bias"]


def state_values(head: Params, states: Float[Array, "*b d"]) -> Float[Array, "*b"]:
    """V of each state, float32."""
    inside = _inside(head["hidden"], head["hidden_bias"], states)
    return jnp.matmul(inside.astype(jnp.float32), head["out"], precision="highest") + head["out_bias"]


def _inside(hidden: Array, bias: Array, states: Array) -> Array:
    inside = jax.nn.relu(_product(states, hidden) + bias).astype(states.dtype)
    # Left to itself the partitioner loses a part of the gradient where rows are few and the vocabulary is split.
    return constrain(inside, "rows", *(None,) * (inside.ndim - 1))


def _product(x: Array, kernel: Array) -> Array:
    """In the type of the transformer's products, summed in float32."""
    out = jnp.matmul(flat(x), kernel.astype(x.dtype), preferred_element_type=jnp.float32)
    return out.reshape(*x.shape[:-1], kernel.shape[-1])
