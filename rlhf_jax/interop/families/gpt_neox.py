"""GPT-NeoX and Pythia: LayerNorm, a part of each head rotated, attention and feed-forward added at once.

Queries, keys and values lie in one kernel, head by head.
"""

from typing import Any

from rlhf_jax.interop.families.base import Family, Source
from rlhf_jax.interop.families.fields import Fields, read_rope, rope_config
from rlhf_jax.models.spec import ModelSpec

_LAYER = "gpt_neox.layers.{layer}."

TABLE = {
    "embedding": Source("gpt_neox.embed_in.weight", "v d -> v d"),
    "layers/attention_norm/scale": Source(_LAYER + "input_layernorm.weight", "d -> d"),
    "layers/attention_norm/bias": Source(_LAYER + "input_layernorm.bias", "d -> d"),
    "layers/attention/query": Source(_LAYER + "attention.query_key_value.weight", "(n 3 h) d -> d n h", part=0),
    "layers/attention/key": Source(_LAYER + "attention.query_key_value.weight", "(n 3 h) d -> d n h", part=1),
    "layers/attention/value": Source(_LAYER + "attention.query_key_value.weight", "(n 3 h) d -> d n h", part=2),
    "layers/attention/query_bias": Source(_LAYER + "attention.query_key_value.bias", "(n 3 h) -> n h", part=0),
    "layers/attention/key_bias": Source(_LAYER + "attention.query_key_value.bias", "(n 3 h) -> n h", part=1),
    "layers/attention/value_bias": Source(_LAYER + "attention.query_key_value.bias", "(n 3 h) -> n h", part=2),
    "layers/attention/out": Source(_LAYER + "attention.dense.weight", "d (n h) -> n h d"),
    "layers/attention/out_bias": Source(_LAYER + "attention.dense.bias", "d -> d"),
    "layers/mlp_norm/scale": Source(_LAYER + "post_attention_layernorm.weight", "d -> d"),
    "layers/mlp_norm/bias": Source(_LAYER + "post_attention_layernorm.bias", "d -> d"),
    "layers/mlp/up": Source(_LAYER + "mlp.dense_h_to_4h.weight", "f d -> d f"),
    "layers/mlp/up_bias": Source(_LAYER + "mlp.dense_h_to_4h.bias", "f -> f"),
    "layers/mlp/down": Source(_LAYER + "mlp.dense_4h_to_h.weight", "d f -> f d"),
    "layers/mlp/down_bias": Source(_LAYER + "mlp.dense_4h_to_h.bias", "d -> d"),
    "final_norm/scale": Source("gpt_neox.final_layer_norm.weight", "d -> d"),
    "final_norm/bias": Source("gpt_neox.final_layer_norm.bias", "d -> d"),
    "unembedding": Source("embed_out.weight", "v d -> d v"),
}


def read_spec(fields: Fields) -> ModelSpec:
    """config.json's ModelSpec."""
    width, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    if width % heads:
        raise fields.wrong("num_attention_heads", f"must divide hidden_size = {width}")
    rope = read_rope(fields, theta=fields.number("rotary_emb_base", 10_000.0), share=fields.number("rotary_pct", 0.25))
    head_dim = width // heads
    rotated = int(head_dim * rope.share)
    if rotated % 2 or not 2 <= rotated <= head_dim:
        raise fields.wrong("rotary_pct", f"must leave an even number of the {head_dim} entries of a head")
    bias = fields.flag("attention_bias", True)
    return ModelSpec(
        vocab_size=fields.whole("vocab_size"),
        d_model=width,
        n_layers=fields.whole("num_hidden_layers"),
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=head_dim,
        d_ff=fields.whole("intermediate_size"),
        max_len=fields.whole("max_position_embeddings", 2048),
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        rotary_dim=None if rotated == head_dim else rotated,
        norm="layer",
        norm_eps=fields.number("layer_norm_eps", 1e-5),
        parallel=fields.flag("use_parallel_residual", True),
        activation=fields.activation("hidden_act", "gelu"),
        gated=False,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        scale_embedding=False,
        tied=fields.flag("tie_word_embeddings", False),
    )


def write_config(spec: ModelSpec) -> dict[str, Any]:
    """The spec's config.json."""
    share = spec.rotated / spec.head_dim
    if int(spec.head_dim * share) < spec.rotated:  # the division rounded down
        share = (spec.rotated + 0.5) / spec.head_dim
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.d_model,
        "num_hidden_layers": spec.n_layers,
        "num_attention_heads": spec.n_heads,
        "intermediate_size": spec.d_ff,
        "max_position_embeddings": spec.max_len,
        "rotary_emb_base": spec.rope_theta,
        "rotary_pct": share,
        "layer_norm_eps": spec.norm_eps,
        "use_parallel_residual": spec.parallel,
        "hidden_act": {"gelu_tanh": "gelu_new"}.get(spec.activation, spec.activation),
        "attention_bias": spec.qkv_bias,
        "tie_word_embeddings": spec.tied,
    } | rope_config(spec)


GPT_NEOX = Family(
    "gpt_neox",
    ("GPTNeoXForCausalLM", "GPTNeoXForSequenceClassification"),
    read_spec,
    write_config,
    TABLE,
    prefixes=("gpt_neox.", ""),
    aliases={"embed_out.weight": "lm_head.weight"},
    ignored=(r".*\.attention\.(bias|masked_bias)",),
)
