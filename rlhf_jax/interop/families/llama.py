"""Llama 1, 2 and 3, and what has their layout: SmolLM2, Yi, TinyLlama; other families build on the names here."""

from typing import Any

from rlhf_jax.interop.families.base import Family, Source
from rlhf_jax.interop.families.fields import Fields, rope_config, rope_kwargs
from rlhf_jax.models.spec import ModelSpec

_LAYER = "model.layers.{layer}."

ATTENTION = {
    "embedding": Source("model.embed_tokens.weight", "v d -> v d"),
    "layers/attention_norm/scale": Source(_LAYER + "input_layernorm.weight", "d -> d"),
    "layers/attention/query": Source(_LAYER + "self_attn.q_proj.weight", "(n h) d -> d n h"),
    "layers/attention/key": Source(_LAYER + "self_attn.k_proj.weight", "(k h) d -> d k h"),
    "layers/attention/value": Source(_LAYER + "self_attn.v_proj.weight", "(k h) d -> d k h"),
    "layers/attention/out": Source(_LAYER + "self_attn.o_proj.weight", "d (n h) -> n h d"),
    "layers/attention/query_bias": Source(_LAYER + "self_attn.q_proj.bias", "(n h) -> n h"),
    "layers/attention/key_bias": Source(_LAYER + "self_attn.k_proj.bias", "(k h) -> k h"),
    "layers/attention/value_bias": Source(_LAYER + "self_attn.v_proj.bias", "(k h) -> k h"),
    "layers/attention/out_bias": Source(_LAYER + "self_attn.o_proj.bias", "d -> d"),
    "layers/attention/query_norm/scale": Source(_LAYER + "self_attn.q_norm.weight", "h -> h"),
    "layers/attention/key_norm/scale": Source(_LAYER + "self_attn.k_norm.weight", "h -> h"),
    "layers/mlp_norm/scale": Source(_LAYER + "post_attention_layernorm.weight", "d -> d"),
    "final_norm/scale": Source("model.norm.weight", "d -> d"),
    "unembedding": Source("lm_head.weight", "v d -> d v"),
}

TABLE = ATTENTION | {
    "layers/mlp/gate": Source(_LAYER + "mlp.gate_proj.weight", "f d -> d f"),
    "layers/mlp/up": Source(_LAYER + "mlp.up_proj.weight", "f d -> d f"),
    "layers/mlp/down": Source(_LAYER + "mlp.down_proj.weight", "d f -> f d"),
    "layers/mlp/gate_bias": Source(_LAYER + "mlp.gate_proj.bias", "f -> f"),
    "layers/mlp/up_bias": Source(_LAYER + "mlp.up_proj.bias", "f -> f"),
    "layers/mlp/down_bias": Source(_LAYER + "mlp.down_proj.bias", "d -> d"),
}

PREFIXES = ("model.", "")


def shape_kwargs(
    fields: Fields,
    *,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    tied: bool = False,
    max_len: int = 2048,
    eps: float = 1e-6,
) -> dict[str, Any]:
    """The ModelSpec's fields that all families with Llama's names share; arguments are the family's defaults."""
    width, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    if kv_heads is None or "num_key_value_heads" in fields.values:  # null is not missing here
        kv_heads = heads
    return {
        "vocab_size": fields.whole("vocab_size"),
        "d_model": width,
        "n_layers": fields.whole("num_hidden_layers"),
        "n_heads": heads,
        "n_kv_heads": fields.whole("num_key_value_heads", kv_heads),
        "head_dim": fields.whole("head_dim", head_dim or max(width // heads, 1)),
        "d_ff": fields.whole("intermediate_size"),
        "max_len": fields.whole("max_position_embeddings", max_len),
        "norm_eps": fields.number("rms_norm_eps", eps),
        "tied": fields.flag("tie_word_embeddings", tied),
        "scale_embedding": False,
    }


def shape_config(spec: ModelSpec) -> dict[str, Any]:
    """Undo `shape_kwargs`."""
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.d_model,
        "num_hidden_layers": spec.n_layers,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.d_ff,
        "max_position_embeddings": spec.max_len,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tied,
    }


def check_heads(spec: ModelSpec) -> None:
    """Raise ValueError where transformers 5 refuses a width of heads of its own choice for some families."""
    if spec.d_model % spec.n_heads:
        raise ValueError(f"n_heads={spec.n_heads} must divide d_model={spec.d_model}")


def written_activation(spec: ModelSpec) -> str:
    """Transformers' first name of the activation, of those that mean the same the one that PyTorch calls so."""
    return {"gelu_tanh": "gelu_pytorch_tanh"}.get(spec.activation, spec.activation)


def read_spec(fields: Fields) -> ModelSpec:
    """config.json's ModelSpec."""
    bias = fields.flag("attention_bias", False)
    return ModelSpec(
        **shape_kwargs(fields),
        **rope_kwargs(fields),
        activation=fields.activation("hidden_act", "silu"),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
    )


def write_config(spec: ModelSpec) -> dict[str, Any]:
    """The spec's config.json."""
    check_heads(spec)
    return (
        shape_config(spec)
        | rope_config(spec)
        | {
            "hidden_act": written_activation(spec),
            "attention_bias": spec.qkv_bias,
            "mlp_bias": spec.mlp_bias,
        }
    )


LLAMA = Family(
    "llama", ("LlamaForCausalLM", "LlamaForSequenceClassification"), read_spec, write_config, TABLE, PREFIXES
)
