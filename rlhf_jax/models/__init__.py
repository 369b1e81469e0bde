"""Networks as pure functions of (spec, params, tokens, ...)."""

from rlhf_jax.models.decoding import decoding_policy
from rlhf_jax.models.heads import init_with_head, read_head, score, scores_at, values
from rlhf_jax.models.kv_cache import Cache, init_cache
from rlhf_jax.models.layers import Among
from rlhf_jax.models.perturbed import Perturbed, Policy, policy_logits, transformer_of
from rlhf_jax.models.spec import ModelSpec
from rlhf_jax.models.transformer import extend, hidden, hidden_and_routing, init, logits, prefill, unembed

__all__ = [
    "Among",
    "Cache",
    "ModelSpec",
    "Perturbed",
    "Policy",
    "decoding_policy",
    "extend",
    "hidden",
    "hidden_and_routing",
    "init",
    "init_cache",
    "init_with_head",
    "logits",
    "policy_logits",
    "prefill",
    "read_head",
    "score",
    "scores_at",
    "transformer_of",
    "unembed",
    "values",
]
