"""Qwen 3: Llama with normed queries and keys; biases and a window are there to be turned on."""

from typing import Any

from rlhf_jax.interop.families.base import Family
from rlhf_jax.interop.families.fields import Fields, rope_config, rope_kwargs
from rlhf_jax.interop.families.llama import PREFIXES, TABLE, shape_config, shape_kwargs, written_activation
from rlhf_jax.interop.families.qwen2 import qwen_window_config, qwen_window_kwargs
from rlhf_jax.models.spec import ModelSpec


def read_spec(fields: Fields) -> ModelSpec:
    """config.json's ModelSpec."""
    bias = fields.flag("attention_bias", False)
    return ModelSpec(
        **shape_kwargs(fields, kv_heads=32, head_dim=128, max_len=32_768),
        **rope_kwargs(fields),
        **qwen_window_kwargs(fields),
        activation=fields.activation("hidden_act", "silu"),
        qk_norm=True,
        qkv_bias=bias,
        out_bias=bias,
    )


def write_config(spec: ModelSpec) -> dict[str, Any]:
    """The spec's config.json."""
    return (
        shape_config(spec)
        | rope_config(spec)
        | qwen_window_config(spec)
        | {
            "hidden_act": written_activation(spec),
            "attention_bias": spec.qkv_bias,
        }
    )


QWEN3 = Family(
    "qwen3", ("Qwen3ForCausalLM", "Qwen3ForSequenceClassification"), read_spec, write_config, TABLE, PREFIXES
)
