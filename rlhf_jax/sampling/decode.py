"""Sampling completions in one program: the prompts at once, then a token at a time until all rows have ended.

Shapes: b batch, p prompt tokens (left-padded), n new tokens, v vocabulary, D model.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax import models
from rlhf_jax.logprobs import token_logps
from rlhf_jax.models import Cache, ModelSpec, Policy
from rlhf_jax.sampling.prefill import Prefilled, lengthened, prefill, rows_of, take
from rlhf_jax.sampling.transforms import Sampling, draw_token, transform_logits
from rlhf_jax.sampling.turns import Step, Turns, Written, in_turn
from rlhf_jax.sharding import constrain, decoding, splits
from rlhf_jax.types import ArrayLike, Key, Rollout


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
    copies: int = 1,
    turns: Turns | None = None,
) -> Rollout:
    """Sample a completion for each left-padded prompt: tokens, masks and the sampled tokens' log-probs.

    A row ends with EOS, its last token, where `sampling.ends`, or after `max_new_tokens`. `logps` hold the temperature,
    but not top-k and top-p. What a row draws depends on the key, its index and the position alone, not on other rows.
    Rows of `greedy` take the most probable token each time. Of a `Perturbed` policy all this is of its own logits.
    Runs of `copies` rows have one prompt, which is read once. With `turns` rows take turns, which changes none of them.

    On a mesh rows and weights lie as its `decode` says, and the rollout as a batch does.
    """
    prompts, prompt_mask = jnp.asarray(prompts), jnp.asarray(prompt_mask)
    row_keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(len(prompts)))
    with decoding(prompts=True):
        policy = models.decoding_policy(spec, policy)
        params = models.transformer_of(policy)
        copies = copies if len(prompts) // copies % splits("batch") == 0 else 1  # each device reads for its own rows
        before = prefill(spec, params, prompts[::copies], prompt_mask[::copies])

    @decoding()
    def step(
        state: Float[Array, "w D"], alive: Bool[Array, " w"], t: Int[Array, " w"], rows: Int[Array, " w"], cache: Cache
    ) -> tuple[Int[Array, " w"], Float[Array, " w"], Float[Array, "w D"], Cache]:
        """The t-th tokens of `rows`, their log-probs, and what the next step reads."""
        logits = models.policy_logits(spec, policy, state)
        keys = jax.vmap(jax.random.fold_in)(row_keys[rows], t)
        drawn = jax.vmap(draw_token)(keys, transform_logits(logits, sampling))
        if greedy is not None:
            drawn = jnp.where(jnp.asarray(greedy)[rows], logits.argmax(-1), drawn)
        drawn = jnp.where(alive, drawn, pad_id)
        logps = jnp.where(alive, token_logps(logits, drawn, temperature=sampling.temperature), 0)
        states, cache = models.extend(spec, params, drawn[:, None], alive[:, None], cache)
        return drawn, logps, states[:, 0], cache

    last = eos_id if sampling.ends else None
    if turns is None:
        tokens, mask, logps = all_at_once(step, before, copies=copies, length=max_new_tokens, last=last)
    else:
        tokens, mask, logps = in_turn(turns, step, before, copies=copies, length=max_new_tokens, last=last)
    tokens = jnp.concatenate([jnp.where(prompt_mask, prompts, pad_id), jnp.where(mask, tokens, pad_id)], axis=1)
    prompt_mask = jnp.pad(prompt_mask, ((0, 0), (0, max_new_tokens)))
    mask, logps = (jnp.pad(x, ((0, 0), (prompts.shape[1], 0))) for x in (mask, logps))
    tokens, prompt_mask, mask, logps = (constrain(x, "batch", None) for x in (tokens, prompt_mask, mask, logps))
    return Rollout(tokens=tokens, prompt_mask=prompt_mask, completion_mask=mask, logps=logps)


def all_at_once(step: Step, before: Prefilled, *, copies: int, length: int, last: int | None) -> Written:
    """Every row from its first token to its last; those that have ended wait for the longest."""
    rows = jnp.arange(len(before.tokens) * copies)
    cache = lengthened(before.cache if copies == 1 else rows_of(before.cache, rows // copies), length)
    empty = jnp.zeros((len(rows), length), jnp.int32)

    def unfinished(carry: Any) -> Array:
        t, alive = carry[0], carry[1]
        return (t < length) & jnp.any(alive)

    def body(carry: Any) -> Any:
        t, alive, tokens, mask, logps, state, cache = carry
        drawn, logp, state, cache = step(state, alive, jnp.broadcast_to(t, alive.shape), rows, cache)
        tokens, mask, logps = (
            jax.lax.dynamic_update_slice(all_of, new[:, None], (0, t))
            for all_of, new in ((tokens, drawn), (mask, alive), (logps, logp))
        )
        alive = alive if last is None else alive & (drawn != last)
        return t + 1, alive, tokens, mask, logps, state, cache

    empty = empty, jnp.zeros(empty.shape, bool), jnp.zeros(empty.shape, jnp.float32)
    first = (jnp.zeros((), jnp.int32), jnp.ones(len(rows), bool), *empty, take(before.states, rows // copies), cache)
    return jax.lax.while_loop(unfinished, body, first)[2:5]


def ended(rollout: Rollout, eos_id: int) -> Bool[Array, " b"]:
    """Whether each row's completion ends with EOS, rather than at the limit."""
    return jnp.any((rollout.tokens == eos_id) & rollout.completion_mask, axis=-1)
