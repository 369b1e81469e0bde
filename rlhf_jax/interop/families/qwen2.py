"""Qwen 2 and 2.5: Llama with biases of queries, keys and values, and a window in the later layers, where it is on."""

from typing import Any

from rlhf_jax.interop.families.base import Family
from rlhf_jax.interop.families.fields import (
    Fields,
    layer_types,
    read_layer_types,
    read_window,
    rope_config,
    rope_kwargs,
    window_kwargs,
)
from rlhf_jax.interop.families.llama import PREFIXES, TABLE, shape_config, shape_kwargs, written_activation
from rlhf_jax.models.spec import ModelSpec


def qwen_window_kwargs(fields: Fields) -> dict[str, Any]:
    """`use_sliding_window` turns the window on, from layer `max_window_layers` on unless `layer_types` says."""
    window = read_window(fields, 4096) if fields.flag("use_sliding_window", False) else None
    first = fields.values.get("max_window_layers", 28)
    first = first if first == 0 else fields.whole("max_window_layers", 28)
    layers = fields.whole("num_hidden_layers")
    return window_kwargs(read_layer_types(fields, layers, lambda layer: layer >= first), window)


def qwen_window_config(spec: ModelSpec) -> dict[str, Any]:
    """Undo `qwen_window_kwargs`; transformers 4.52 and older know the window by its first layer alone."""
    kinds = spec.layer_kinds
    return {
        "use_sliding_window": spec.window is not None,
        "sliding_window": spec.window,
        "max_window_layers": kinds.index(True) if True in kinds else spec.n_layers,
        "layer_types": layer_types(spec),
    }


def read_spec(fields: Fields) -> ModelSpec:
    """config.json's ModelSpec."""
    return ModelSpec(
        **shape_kwargs(fields, kv_heads=32, max_len=32_768),
        **rope_kwargs(fields),
        **qwen_window_kwargs(fields),
        activation=fields.activation("hidden_act", "silu"),
        qkv_bias=True,
    )


def write_config(spec: ModelSpec) -> dict[str, Any]:
    """The spec's config.json."""
    own = {"hidden_act": written_activation(spec)}
    return shape_config(spec) | rope_config(spec) | qwen_window_config(spec) | own


QWEN2 = Family(
    "qwen2", ("Qwen2ForCausalLM", "Qwen2ForSequenceClassification"), read_spec, write_config, TABLE, PREFIXES
)
