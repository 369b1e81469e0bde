"""Qwen 3's mixtures of experts: normed queries and keys, experts in every layer, weights summing to 1 by a field."""

from typing import Any

from rlhf_jax.interop.families.base import Family, Source
from rlhf_jax.interop.families.fields import Fields, read_window, rope_config, rope_kwargs
from rlhf_jax.interop.families.llama import ATTENTION, PREFIXES, shape_config, shape_kwargs, written_activation
from rlhf_jax.models.spec import Experts, ModelSpec

_MLP = "model.layers.{layer}.mlp."

TABLE = ATTENTION | {
    "layers/mlp/router": Source(_MLP + "gate.weight", "e d -> d e"),
    "layers/mlp/gate": Source(_MLP + "experts.{expert}.gate_proj.weight", "f d -> d f"),
    "layers/mlp/up": Source(_MLP + "experts.{expert}.up_proj.weight", "f d -> d f"),
    "layers/mlp/down": Source(_MLP + "experts.{expert}.down_proj.weight", "d f -> f d"),
}


def read_spec(fields: Fields) -> ModelSpec:
    """config.json's ModelSpec; a model with dense layers among those with experts is refused."""
    fields.refuse("mlp_only_layers", [])
    fields.refuse("decoder_sparse_step", 1)
    number = fields.whole("num_experts", fields.whole("num_local_experts", 128))
    picked = fields.whole("num_experts_per_tok", 8)
    if picked > number:
        raise fields.wrong("num_experts_per_tok", f"at most num_experts = {number}")
    bias = fields.flag("attention_bias", False)
    shape = shape_kwargs(fields, kv_heads=4, max_len=32_768)
    shape["d_ff"] = fields.whole("moe_intermediate_size", 768)
    return ModelSpec(
        **shape,
        **rope_kwargs(fields),
        window=read_window(fields, 4096) if fields.flag("use_sliding_window", False) else None,
        activation=fields.activation("hidden_act", "silu"),
        qk_norm=True,
        qkv_bias=bias,
        out_bias=bias,
        experts=Experts(number, picked, normalize=fields.flag("norm_topk_prob", False)),
    )


def write_config(spec: ModelSpec) -> dict[str, Any]:
    """The spec's config.json."""
    experts = spec.experts or Experts(1, 1)
    return (
        shape_config(spec)
        | rope_config(spec)
        | {
            "moe_intermediate_size": spec.d_ff,
            "hidden_act": written_activation(spec),
            "attention_bias": spec.qkv_bias,
            "use_sliding_window": spec.window is not None,
            "sliding_window": spec.window,
            "num_experts": experts.number,
            "num_experts_per_tok": experts.per_token,
            "norm_topk_prob": experts.normalize,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    )


QWEN3_MOE = Family(
    "qwen3_moe", ("Qwen3MoeForCausalLM", "Qwen3MoeForSequenceClassification"), read_spec, write_config, TABLE, PREFIXES
)
