"""One decoder-only transformer, used only through pure functions of (spec, params, tokens, ...).

Shapes: B batch, T query positions, S key positions, D model, K key/value heads, H head, L layers, V vocabulary.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.masking import positions as mask_positions
from rlhf_jax.models.attention import Seen, made_once, placed, tokens_first
from rlhf_jax.models.experts import Routing
from rlhf_jax.models.kv_cache import Cache
from rlhf_jax.models.layers import ROUTER, Block, Norm, Read, flat, look_up, named, picked
from rlhf_jax.models.pipeline import through_stages
from rlhf_jax.models.rope import rope_table
from rlhf_jax.models.spec import ModelSpec
from rlhf_jax.models.stacking import LAYERS, unstacked
from rlhf_jax.sharding import constrain, splits, to_weights
from rlhf_jax.types import ArrayLike, Key, Params

_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Transformer(nn.Module):
    """Tokens to the final hidden state; `__call__` also returns the cache, `None` where there was none."""

    spec: ModelSpec

    @nn.compact
    def __call__(self, tokens_BT, positions_BT, attends, cache: Cache | None = None, read=None):
        """[B, T] tokens -> ([B, T, D] final hidden states, cache); of unrolled layers the states `picked` by `read`."""
        s = self.spec
        embedding = self.param(
            "embedding",
            named(nn.initializers.normal(s.d_model**-0.5), "vocab", "embed"),
            (s.vocab_size, s.d_model),
            jnp.float32,
        )
        # Made here, so that `init` makes the whole model, and read by `unembed`; a trunk with another head has none.
        if not s.tied and self.is_initializing():
            self.param(
                "unembedding",
                named(nn.initializers.lecun_normal(), "embed", "vocab"),
                (s.d_model, s.vocab_size),
                jnp.float32,
            )
        x_BTD = _rows_of(embedding, tokens_BT)
        if s.scale_embedding:  # a tied row has length about 1; times sqrt(d) the residual stream starts at unit size
            x_BTD *= s.d_model**0.5
        if s.positions == "learned":
            table = named(nn.initializers.normal(0.02), None, "embed")
            x_BTD += _rows_of(self.param("positions", table, (s.max_len, s.d_model), jnp.float32), positions_BT)
        x_BTD = constrain(x_BTD.astype(s.dtype), "batch", "length", None)
        ropes, each = _ropes(s, positions_BT), (jnp.arange(s.n_layers), jnp.asarray(s.layer_kinds))
        keys, values = (None, None) if cache is None else (cache.keys, cache.values)
        start = None if cache is None else cache.length
        apart = isinstance(self.get_variable("params", LAYERS), tuple)
        if apart or (s.unrolled and not (cache is None and read is None)):
            x_BTD, keys, values = self._one_by_one((x_BTD, keys, values), ropes, attends, start, read)
        elif splits("layers") == 1 or self.is_initializing():
            layers = _blocks(s, s.n_layers)(s, name="layers")
            (x_BTD, keys, values), _ = layers((x_BTD, keys, values), *each, ropes, attends, start)
        else:
            x_BTD = self._in_stages(x_BTD, each, (ropes, attends))
        x_BTD = Norm(s.norm_eps, s.norm, name="final_norm")(x_BTD)
        if cache is not None:
            cache = dataclasses.replace(cache, keys=keys, values=values, length=cache.length + tokens_BT.shape[1])
        return x_BTD, cache

    def _one_by_one(self, carry, ropes, attends, start, read):
        """The layers without a loop; where each layer's lie apart, as decoding has them, none is cut out of a stack.

        The last one computes what is `read` alone, but for keys and values, which are all positions', and of `Among`
        queries too.
        """
        s, layers = self.spec, self.get_variable("params", LAYERS)
        block: Any = Block(s, parent=None)
        each = layers if isinstance(layers, tuple) else unstacked(layers)
        for layer, (own, kind) in enumerate(zip(each, s.layer_kinds, strict=True)):
            last = layer == s.n_layers - 1
            carry, _ = block.apply({"params": own}, carry, layer, kind, ropes, attends, start, read if last else None)
        return carry

    def _in_stages(self, x_BTD, each, rows):
        """The layers as the stages of a pipeline; what the routers did is left where the loop over layers leaves it."""
        s, stages = self.spec, splits("layers")
        blocks = _blocks(s, s.n_layers // stages)(s, parent=None)

        def stage(mine, x_bTD, rows):
            params, layer, local = mine
            (carry, _), left = blocks.apply(
                {"params": params}, (x_bTD, None, None), layer, local, *rows, None, mutable=[ROUTER]
            )
            return carry[0], left

        layers = (self.get_variable("params", "layers"), *each)
        x_BTD, left = through_stages(stage, layers, x_BTD, rows, stages=stages, opaque=s.attention != "xla")
        if left and self.is_mutable_collection(ROUTER):
            self.put_variable(ROUTER, "layers", left[ROUTER])
        return x_BTD


def _rows_of(table, index_BT):
    """Rows of a table that is split along both axes: looked up where they lie, then sent where they are read."""
    x_BTD = look_up(table, constrain(index_BT, "lookup", None))
    return constrain(constrain(x_BTD, "lookup", None, "embed"), "batch", None, None)


def _blocks(spec, length):
    """The class of a loop over so many layers: their parameters, and what they leave, are stacked."""
    block = Block
    if spec.remat != "none":
        block = nn.remat(Block, prevent_cse=False, policy=_REMAT_POLICIES[spec.remat])
    return nn.scan(
        block,
        variable_axes={"params": 0, ROUTER: 0},
        split_rngs={"params": True},
        in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
        length=length,
        unroll=min(spec.unroll, length),
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def _ropes(spec, positions_BT):
    """Rotary tables, one a kind of layer where they differ; None for learned positions."""
    if spec.positions == "learned":
        return (None,)
    kinds = spec.kinds if spec.local_rope_theta is not None else (False,)

    def tables(positions_BT):
        return tuple(rope_table(spec, positions_BT, local=kind) for kind in kinds)

    # Loops that read them would each take the sines anew, for every head.
    return jax.lax.platform_dependent(positions_BT, cpu=made_once(tables), default=tables)


def init(spec: ModelSpec, key: Key) -> Params:
    """Random parameters, float32, boxed with the logical names of their axes; `sharding.unbox` takes these off."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    seen = jnp.ones((1, 1, 1), bool)
    return Transformer(spec).init(key, tokens, tokens, (seen, seen))["params"]


def hidden(
    spec: ModelSpec,
    params: Params,
    tokens: Int[ArrayLike, "B T"],
    mask: Bool[ArrayLike, "B T"] | None = None,
    *,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    read: Read | None = None,
) -> Float[Array, "B R D"]:
    """Final hidden states of whole rows; the state at t has read tokens 0 … t.

    `mask` is False on padding, wherever that is: positions count kept tokens only, so left padding, right padding and
    packing give the same states. `segment_ids` (0 is padding) packs several texts into a row; none sees another.
    `read` is the positions whose states are wanted, a slice or indices of each row (R is T without), or `Among` all
    rows, whose shape the states then have. Where layers are unrolled, and neither kernels, experts, recomputation nor a
    mesh that divides rows or layers stand in the way, the last one computes no more than these: all of it but keys and
    values, or but attention of `Among`.
    """
    inputs, back = _whole_rows(spec, tokens, mask, segment_ids)
    if read is not None and _reads_some(spec):
        return _apply(spec, params, *inputs, None, read)[0]
    return picked(placed(_apply(spec, params, *inputs)[0], back)[:, : tokens.shape[1]], read)


def hidden_and_routing(
    spec: ModelSpec,
    params: Params,
    tokens: Int[ArrayLike, "B T"],
    mask: Bool[ArrayLike, "B T"] | None = None,
    *,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    read: Read | None = None,
) -> tuple[Float[Array, "B R D"], Routing | None]:
    """`hidden`, and what the routers did in every layer at all positions, for `experts.with_load_balance`; None without
    experts.
    """
    if spec.experts is None:
        return hidden(spec, params, tokens, mask, segment_ids=segment_ids, read=read), None
    inputs, back = _whole_rows(spec, tokens, mask, segment_ids)
    (states, _), left = _apply(spec, params, *inputs, mutable=[ROUTER])
    (routing,) = left[ROUTER]["layers"]["mlp"]["routing"]
    routing = jax.tree.map(jax.vmap(lambda x: placed(x, back)), routing)  # of each layer
    states, routing = jax.tree.map(lambda x: x[..., : tokens.shape[1], :], (placed(states, back), routing))
    return picked(states, read), routing


def _reads_some(spec):
    """Whether the last layer can do without some positions: no loop that it is a turn of, no rows divided or sorted."""
    plain = spec.attention == "xla" and spec.remat == "none" and spec.experts is None
    return plain and spec.unrolled and splits("layers") == splits("length") == 1


def _whole_rows(spec, tokens, mask, segment_ids):
    """What the transformer reads of rows without a cache, and the way back of `attention.tokens_first`.

    Rows are padded where their parts would not be of one length.
    """
    whole, back = mask is None, None
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    if short := -tokens.shape[1] % splits("length"):
        tokens, mask = (jnp.pad(x, ((0, 0), (0, short))) for x in (tokens, mask))
        segment_ids = None if segment_ids is None else jnp.pad(segment_ids, ((0, 0), (0, short)))
    if spec.attention != "xla" and not whole:
        tokens, mask, segment_ids, back = tokens_first(tokens, mask, segment_ids)
    positions = mask_positions(mask)
    if spec.attention == "xla":
        attends = _attends(spec, mask, positions, mask, positions, offset=0)
        if segment_ids is not None:
            same = segment_ids[:, :, None] == segment_ids[:, None, :]
            attends = tuple(attend & same for attend in attends)
        attends = tuple(constrain(attend, "batch", "length", None) for attend in attends)
    else:
        attends = _seen(spec, tokens, segment_ids)
    if segment_ids is not None:
        positions = _positions_in_segments(segment_ids, positions)
    return (tokens, positions, attends), back


def _seen(spec, tokens, segment_ids):
    """The same for a kernel, one a kind of layer that there is."""
    return tuple(Seen(jnp.full(tokens.shape[:1], kind), segment_ids) for kind in spec.kinds)


def unembed(spec: ModelSpec, params: Params, hidden_states: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Logits, float32, of hidden states."""
    table = params["embedding"].T if spec.tied else params["unembedding"]
    states = flat(to_weights(hidden_states, "embed"))
    out = jnp.matmul(states, table.astype(states.dtype), preferred_element_type=jnp.float32)
    out = out.reshape(*hidden_states.shape[:-1], spec.vocab_size)
    return out if spec.logits_softcap is None else spec.logits_softcap * jnp.tanh(out / spec.logits_softcap)


def logits(
    spec: ModelSpec, params: Params, tokens: Int[ArrayLike, "B T"], mask: Bool[ArrayLike, "B T"] | None = None
) -> Float[Array, "B T V"]:
    """Next-token logits, float32, for any padding; `logits[:, t]` predicts `tokens[:, t + 1]`."""
    return unembed(spec, params, hidden(spec, params, tokens, mask))


def extend(
    spec: ModelSpec, params: Params, tokens: Int[ArrayLike, "B T"], mask: Bool[ArrayLike, "B T"], cache: Cache
) -> tuple[Float[Array, "B T D"], Cache]:
    """Read T more tokens of each row after those in the cache: a prompt at once, or a token at a time.

    They take the slots from `cache.length` on, and see all that `cache.mask` has in other slots, be these before or
    after; past the last slot a new token takes the place of the last one. The caller counts.
    """
    before = jnp.sum(cache.mask, axis=1, keepdims=True)
    positions = jnp.maximum(before + jnp.cumsum(mask, axis=1) - 1, 0)
    at = (0, cache.length)
    cache = dataclasses.replace(
        cache,
        positions=jax.lax.dynamic_update_slice(cache.positions, positions.astype(jnp.int32), at),
        mask=jax.lax.dynamic_update_slice(cache.mask, mask, at),
    )
    attends = _attends(spec, mask, positions, cache.mask, cache.positions, offset=cache.length)
    return _apply(spec, params, tokens, positions, attends, cache)


def prefill(
    spec: ModelSpec, params: Params, tokens: Int[ArrayLike, "B T"], mask: Bool[ArrayLike, "B T"], cache: Cache
) -> tuple[Float[Array, "B T D"], Cache]:
    """`extend` of an empty cache, by the kernel of `spec.attention`: what is read sees itself alone.

    With a kernel each row's slots have its tokens first and its pads last, whatever order they came in.
    """
    if spec.attention == "xla":
        return extend(spec, params, tokens, mask, cache)
    tokens, mask, _, back = tokens_first(tokens, mask)
    positions = mask_positions(mask)
    cache = dataclasses.replace(
        cache,
        positions=jax.lax.dynamic_update_slice(cache.positions, positions, (0, 0)),
        mask=jax.lax.dynamic_update_slice(cache.mask, mask, (0, 0)),
    )
    states, cache = _apply(spec, params, tokens, positions, _seen(spec, tokens, None), cache)
    return placed(states, back), cache


def _apply(spec, params, *inputs, mutable: Any = False) -> Any:
    return Transformer(spec).apply({"params": params}, *inputs, mutable=mutable)


def _attends(spec, query_mask, query_positions, key_mask, key_positions, *, offset):
    """One [B, T, S] a kind of layer that there is."""
    window = {False: None, True: spec.window}
    return tuple(
        _causal(query_mask, query_positions, key_mask, key_positions, window[kind], offset=offset)
        for kind in spec.kinds
    )


def _causal(query_mask, query_positions, key_mask, key_positions, window, *, offset):
    """[B, T, S]: keys that are real, no later ones of the queries' own, in a query's window.

    A pad sees itself, to stay finite.
    """
    query_slots = offset + jnp.arange(query_mask.shape[1])
    key_slots = jnp.arange(key_mask.shape[1])
    later = (key_slots[None, :] > query_slots[:, None]) & (key_slots < offset + query_mask.shape[1])
    attend = key_mask[:, None, :] & ~later
    if window is not None:
        attend &= query_positions[:, :, None] - key_positions[:, None, :] < window
    own = query_slots[:, None] == key_slots[None, :]
    return attend | (own & ~query_mask[:, :, None])


def _positions_in_segments(segment_ids, positions):
    """Positions in a row, counted from where each segment starts."""
    starts = jnp.concatenate(
        [jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    return positions - jax.lax.cummax(jnp.where(starts, positions, 0), axis=1)
