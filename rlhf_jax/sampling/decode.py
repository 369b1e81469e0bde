"""Sampling completions in one program: the prompts at once, then a token at a time until all rows have ended.

Shapes: b batch, p prompt tokens (left-padded), n new tokens, v vocabulary, D model.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from rlhf_jax import models
from rlhf_jax.lockstep import any_replica
from rlhf_jax.logprobs import token_logps
from rlhf_jax.models import Cache, ModelSpec, Policy
from rlhf_jax.sampling.prefill import Prefilled, State, lengthened, prefill, rows_of, take_all
from rlhf_jax.sampling.stopping import Stops
from rlhf_jax.sampling.transforms import Sampling, draw_token, transform_logits
from rlhf_jax.sampling.turns import Drawn, Step, Turns, in_turn, nothing
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
    stops: Stops | None = None,
    values: bool = False,
) -> Rollout:
    """Sample a completion for each left-padded prompt: tokens, masks and the sampled tokens' log-probs.

    A row ends with EOS, its last token, where `sampling.ends`; with the token that makes one of `stops` whole, which
    are `sampling.stop` as the tokenizer writes them; or after `max_new_tokens`. `logps` hold the temperature, but not
    top-k and top-p. What a row draws depends on the key, its index and the position alone, not on other rows.
    Rows of `greedy` take the most probable token each time. Of a `Perturbed` policy all this is of its own logits.
    Runs of `copies` rows have one prompt, which is read once. With `turns` rows take turns, which changes none of them.
    With `values` the policy has a head, and the rollout its values before each token.

    On a mesh rows and weights lie as its `decode` says, and the rollout as a batch does.
    """
    if bool(sampling.stop) != (stops is not None):
        raise ValueError("sampling.stop and stops go together: stops = stopping.stops(sampling.stop, tokenizer)")
    prompts, prompt_mask = jnp.asarray(prompts), jnp.asarray(prompt_mask)
    row_keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(len(prompts)))
    with decoding(prompts=True):
        policy = models.decoding_policy(spec, policy)
        copies = copies if len(prompts) // copies % splits("batch") == 0 else 1  # each device reads for its own rows
        read = models.transformer_of(policy), prompts[::copies], prompt_mask[::copies]
        before = prefill(spec, *read, stops=stops is not None, kind=sampling.cache)
    how: Any = {"sampling": sampling, "eos_id": eos_id, "pad_id": pad_id, "stops": stops, "values": values}
    step = _step(spec, policy, row_keys, greedy, **how)
    zero = jnp.float32(0)
    like = Drawn(jnp.int32(0), zero, zero if values else None, None if stops is None else jnp.bool_(False))
    if turns is None:
        drawn, mask = all_at_once(step, before, like, copies=copies, length=max_new_tokens)
    else:
        drawn, mask = in_turn(turns, step, before, like, copies=copies, length=max_new_tokens)
    return _rollout(jnp.where(prompt_mask, prompts, pad_id), prompt_mask, drawn, mask, pad_id)


def _step(
    spec: ModelSpec,
    policy: Policy,
    row_keys: Array,
    greedy: Bool[ArrayLike, " b"] | None,
    *,
    sampling: Sampling,
    eos_id: int,
    pad_id: int,
    stops: Stops | None,
    values: bool,
) -> Step:
    """What makes the next token of each row."""
    params = models.transformer_of(policy)

    @decoding()
    def step(
        state: State, alive: Bool[Array, " w"], t: Int[Array, " w"], rows: Int[Array, " w"], cache: Cache
    ) -> tuple[Drawn, Bool[Array, " w"], State, Cache]:
        """The t-th tokens of `rows`, which of them end, and what the next step reads."""
        logits = models.policy_logits(spec, policy, state.hidden)
        keys = jax.vmap(jax.random.fold_in)(row_keys[rows], t)
        drawn = jax.vmap(draw_token)(keys, transform_logits(logits, sampling))
        if greedy is not None:
            drawn = jnp.where(jnp.asarray(greedy)[rows], logits.argmax(-1), drawn)
        drawn = jnp.where(alive, drawn, pad_id)
        logps = jnp.where(alive, token_logps(logits, drawn, temperature=sampling.temperature), 0)
        ends, matched, stopped = (drawn == eos_id) & sampling.ends, None, None
        if stops is not None and state.matched is not None:
            matched = stops.after(state.matched, drawn)
            stopped = alive & stops.whole(matched)
            ends |= stopped
        states, cache = models.extend(spec, params, drawn[:, None], alive[:, None], cache)
        before_it = jnp.where(alive, models.read_head(params, state.hidden), 0) if values else None
        return Drawn(drawn, logps, before_it, stopped), ends, State(states[:, 0], matched), cache

    return step


def _rollout(prompts: Array, prompt_mask: Array, drawn: Drawn, mask: Array, pad_id: int) -> Rollout:
    """Prompts with what was drawn after them, laid out as a batch is."""

    def after(x: Array) -> Array:
        return constrain(jnp.pad(x, ((0, 0), (prompts.shape[1], 0))), "batch", None)

    rollout = Rollout(
        tokens=constrain(jnp.concatenate([prompts, jnp.where(mask, drawn.tokens, pad_id)], axis=1), "batch", None),
        prompt_mask=constrain(jnp.pad(prompt_mask, ((0, 0), (0, mask.shape[1]))), "batch", None),
        completion_mask=after(mask),
        logps=after(drawn.logps),
    )
    if drawn.values is not None:
        rollout = rollout.replace(values=after(drawn.values))
    if drawn.stopped is not None:
        rollout = rollout.replace(stopped=constrain(drawn.stopped.any(-1), "batch"))
    return rollout


def all_at_once(
    step: Step, before: Prefilled, like: Drawn, *, copies: int, length: int
) -> tuple[Drawn, Bool[Array, "b n"]]:
    """Every row from its first token to its last; those that have ended wait for the longest."""
    rows = jnp.arange(len(before.tokens) * copies)
    cache = lengthened(before.cache if copies == 1 else rows_of(before.cache, rows // copies), length)

    def unfinished(carry: Any) -> Array:
        t, alive = carry[0], carry[1]
        return (t < length) & any_replica(alive)

    def body(carry: Any) -> Any:
        t, alive, kept, state, cache = carry
        drawn, ends, state, cache = step(state, alive, jnp.broadcast_to(t, alive.shape), rows, cache)
        kept = jax.tree.map(
            lambda all_of, new: jax.lax.dynamic_update_slice(all_of, new[:, None], (0, t)), kept, (drawn, alive)
        )
        return t + 1, alive & ~ends, kept, state, cache

    kept = nothing(like, len(rows), length), jnp.zeros((len(rows), length), bool)
    states = take_all(before.states, rows // copies)
    first = (jnp.zeros((), jnp.int32), jnp.ones(len(rows), bool), kept, states, cache)
    return jax.lax.while_loop(unfinished, body, first)[2]


def ended(rollout: Rollout, eos_id: int) -> Bool[Array, " b"]:
    """Whether each row's completion ends with EOS or a stop string, rather than at the limit."""
    with_eos = jnp.any((rollout.tokens == eos_id) & rollout.completion_mask, axis=-1)
    return with_eos if rollout.stopped is None else with_eos | rollout.stopped
