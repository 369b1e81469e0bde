"""Sampling completions in one program: the prompts at once, then a token at a time until all rows have ended.

Shapes: b batch, p prompt tokens (left-padded), n new tokens, v vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax import models
from rlhf_jax.lockstep import any_replica
from rlhf_jax.logprobs import token_logps
from rlhf_jax.models import ModelSpec, Policy
from rlhf_jax.sampling.transforms import Sampling, draw_token, transform_logits
from rlhf_jax.sharding import constrain, decoding
from rlhf_jax.types import ArrayLike, Key, Rollout

CACHE_AXES = (None, "batch", None, "kv", None)
"""Logical names of the axes of a cache's keys and values."""


def generate(
    spec: ModelSpec,
    policy: Policy,
    prompts: Int[ArrayLike, "b p"],
    prompt_mask: Bool[ArrayLike, "b p"],
    key: Key,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    eos_id: int,
    pad_id: int,
    greedy: Bool[ArrayLike, " b"] | None = None,
) -> Rollout:
    """Sample a completion for each left-padded prompt: tokens, masks and the sampled tokens' log-probs.

    A row ends with EOS, its last token, where `sampling.ends`, or after `max_new_tokens`. `logps` hold the temperature,
    but not top-k and top-p. What a row draws depends on the key, its index and the position alone, not on other rows.
    Rows of `greedy` take the most probable token each time. Of a `Perturbed` policy all this is of its own logits.

    On a mesh rows and weights lie as its `decode` says, and the rollout as a batch does.
    """
    (b, p), length = prompts.shape, prompts.shape[1] + max_new_tokens
    with decoding(prompts=True):
        policy = models.decoding_policy(spec, policy)
        params = models.transformer_of(policy)
        prompts, prompt_mask = (constrain(jnp.asarray(x), "batch", None) for x in (prompts, prompt_mask))
        cache = _constrained(models.init_cache(spec, b, length))
        states, cache = models.extend(spec, params, prompts, prompt_mask, cache)
    row_keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(b))

    def draw(t: Array, logits: Float[Array, "b v"]) -> Int[Array, " b"]:
        keys = jax.vmap(lambda row_key: jax.random.fold_in(row_key, t))(row_keys)
        drawn = jax.vmap(draw_token)(keys, transform_logits(logits, sampling))
        return drawn if greedy is None else jnp.where(greedy, logits.argmax(-1), drawn)

    def unfinished(carry: Any) -> Array:
        t, alive = carry[0], carry[1]
        return (t < max_new_tokens) & any_replica(alive)

    @decoding()
    def step(carry: Any) -> Any:
        t, alive, tokens, mask, logps, state, cache = carry
        logits = models.policy_logits(spec, policy, state)
        drawn = jnp.where(alive, draw(t, logits), pad_id)
        logp = jnp.where(alive, token_logps(logits, drawn, temperature=sampling.temperature), 0)
        tokens = jax.lax.dynamic_update_slice(tokens, drawn[:, None], (0, p + t))
        mask = jax.lax.dynamic_update_slice(mask, alive[:, None], (0, p + t))
        logps = jax.lax.dynamic_update_slice(logps, logp[:, None], (0, p + t))
        states, cache = models.extend(spec, params, drawn[:, None], alive[:, None], cache)
        alive = alive & (drawn != eos_id) if sampling.ends else alive
        return t + 1, alive, tokens, mask, logps, states[:, 0], cache

    tokens = jnp.full((b, length), pad_id, jnp.int32).at[:, :p].set(jnp.where(prompt_mask, prompts, pad_id))
    empty = jnp.zeros((b, length), bool), jnp.zeros((b, length), jnp.float32)
    first = (jnp.zeros((), jnp.int32), jnp.ones((b,), bool), tokens, *empty, states[:, -1], cache)
    _, _, tokens, mask, logps, _, _ = jax.lax.while_loop(unfinished, step, first)
    prompt_mask = jnp.pad(prompt_mask, ((0, 0), (0, max_new_tokens)))
    tokens, prompt_mask, mask, logps = (constrain(x, "batch", None) for x in (tokens, prompt_mask, mask, logps))
    return Rollout(tokens=tokens, prompt_mask=prompt_mask, completion_mask=mask, logps=logps)


def ended(rollout: Rollout, eos_id: int) -> Bool[Array, " b"]:
    """Whether each row's completion ends with EOS, rather than at the limit."""
    return jnp.any((rollout.tokens == eos_id) & rollout.completion_mask, axis=-1)


def _constrained(cache: models.Cache) -> models.Cache:
    return cache.replace(keys=constrain(cache.keys, *CACHE_AXES), values=constrain(cache.values, *CACHE_AXES))
