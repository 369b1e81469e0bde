"""GPT-2: LayerNorm, learned positions, biases everywhere, queries, keys and values in one kernel stored [in, out]."""

from typing import Any

from rlhf_jax.interop.families.base import Family, Source
from rlhf_jax.interop.families.fields import Fields
from rlhf_jax.models.spec import ModelSpec

_LAYER = "transformer.h.{layer}."

TABLE = {
    "embedding": Source("transformer.wte.weight", "v d -> v d"),
    "positions": Source("transformer.wpe.weight", "p d -> p d"),
    "layers/attention_norm/scale": Source(_LAYER + "ln_1.weight", "d -> d"),
    "layers/attention_norm/bias": Source(_LAYER + "ln_1.bias", "d -> d"),
    "layers/attention/query": Source(_LAYER + "attn.c_attn.weight", "d (3 n h) -> d n h", part=0),
    "layers/attention/key": Source(_LAYER + "attn.c_attn.weight", "d (3 n h) -> d n h", part=1),
    "layers/attention/value": Source(_LAYER + "attn.c_attn.weight", "d (3 n h) -> d n h", part=2),
    "layers/attention/query_bias": Source(_LAYER + "attn.c_attn.bias", "(3 n h) -> n h", part=0),
    "layers/attention/key_bias": Source(_LAYER + "attn.c_attn.bias", "(3 n h) -> n h", part=1),
    "layers/attention/value_bias": Source(_LAYER + "attn.c_attn.bias", "(3 n h) -> n h", part=2),
    "layers/attention/out": Source(_LAYER + "attn.c_proj.weight", "(n h) d -> n h d"),
    "layers/attention/out_bias": Source(_LAYER + "attn.c_proj.bias", "d -> d"),
    "layers/mlp_norm/scale": Source(_LAYER + "ln_2.weight", "d -> d"),
    "layers/mlp_norm/bias": Source(_LAYER + "ln_2.bias", "d -> d"),
    "layers/mlp/up": Source(_LAYER + "mlp.c_fc.weight", "d f -> d f"),
    "layers/mlp/up_bias": Source(_LAYER + "mlp.c_fc.bias", "f -> f"),
    "layers/mlp/down": Source(_LAYER + "mlp.c_proj.weight", "f d -> f d"),
    "layers/mlp/down_bias": Source(_LAYER + "mlp.c_proj.bias", "d -> d"),
    "final_norm/scale": Source("transformer.ln_f.weight", "d -> d"),
    "final_norm/bias": Source("transformer.ln_f.bias", "d -> d"),
    "unembedding": Source("lm_head.weight", "v d -> d v"),
}


def read_spec(fields: Fields) -> ModelSpec:
    """config.json's ModelSpec."""
    fields.refuse("scale_attn_by_inverse_layer_idx", False)
    fields.refuse("add_cross_attention", False)
    width, heads = fields.whole("n_embd", 768), fields.whole("n_head", 12)
    if width % heads:
        raise fields.wrong("n_head", f"must divide n_embd = {width}")
    return ModelSpec(
        vocab_size=fields.whole("vocab_size", 50_257),
        d_model=width,
        n_layers=fields.whole("n_layer", 12),
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=width // heads,
        d_ff=fields.whole("n_inner", 4 * width),
        max_len=fields.whole("n_positions", fields.whole("n_ctx", 1024)),
        positions="learned",
        norm="layer",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        activation=fields.activation("activation_function", "gelu_new"),
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        query_scale=None if fields.flag("scale_attn_weights", True) else 1.0,
        scale_embedding=False,
        tied=fields.flag("tie_word_embeddings", True),
    )


def write_config(spec: ModelSpec) -> dict[str, Any]:
    """The spec's config.json."""
    return {
        "vocab_size": spec.vocab_size,
        "n_embd": spec.d_model,
        "n_layer": spec.n_layers,
        "n_head": spec.n_heads,
        "n_inner": spec.d_ff,
        "n_positions": spec.max_len,
        "layer_norm_epsilon": spec.norm_eps,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(spec.activation, spec.activation),
        "scale_attn_weights": spec.query_scale is None,
        "tie_word_embeddings": spec.tied,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


GPT2 = Family(
    "gpt2",
    ("GPT2LMHeadModel", "GPT2ForSequenceClassification"),
    read_spec,
    write_config,
    TABLE,
    prefixes=("transformer.", ""),
    ignored=(r".*\.attn\.(bias|masked_bias)",),
)
