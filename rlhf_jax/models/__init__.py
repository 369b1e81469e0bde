"""Networks as pure functions of (spec, params, tokens, ...)."""

from rlhf_jax.models.decoding import decoding_weights
from rlhf_jax.models.heads import init_with_head, read_head, score, scores_at, values
from rlhf_jax.models.spec import ModelSpec
from rlhf_jax.models.transformer import Cache, extend, hidden, hidden_and_routing, init, init_cache, logits, unembed

__all__ = [
    "Cache",
    "ModelSpec",
    "decoding_weights",
    "extend",
    "hidden",
    "hidden_and_routing",
    "init",
    "init_cache",
    "init_with_head",
    "logits",
    "read_head",
    "score",
    "scores_at",
    "unembed",
    "values",
]
