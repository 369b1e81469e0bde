"""Mistral: Llama with a sliding window in every layer."""

from typing import Any

from rlhf_jax.interop.families.base import Family
from rlhf_jax.interop.families.fields import Fields, read_window, rope_config, rope_kwargs
from rlhf_jax.interop.families.llama import PREFIXES, TABLE, shape_config, shape_kwargs, written_activation
from rlhf_jax.models.spec import ModelSpec


def read_spec(fields: Fields) -> ModelSpec:
    """config.json's ModelSpec."""
    return ModelSpec(
        **shape_kwargs(fields, kv_heads=8, max_len=131_072),
        **rope_kwargs(fields),
        window=read_window(fields, 4096),
        activation=fields.activation("hidden_act", "silu"),
    )


def write_config(spec: ModelSpec) -> dict[str, Any]:
    """The spec's config.json."""
    return (
        shape_config(spec)
        | rope_config(spec)
        | {
            "hidden_act": written_activation(spec),
            "sliding_window": spec.window,
        }
    )


MISTRAL = Family(
    "mistral", ("MistralForCausalLM", "MistralForSequenceClassification"), read_spec, write_config, TABLE, PREFIXES
)
