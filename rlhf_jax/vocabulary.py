"""Sums over the vocabulary from hidden states, a slice of it at a time, so that no `[*b, v]` array ever exists.

The logits z = softcap · tanh(hidden · unembedding / softcap) / temperature of one slice after another are folded into a
few numbers a position: their maximum, Σ exp(z − max), and what the quantity needs besides (Milakov and Gimelshein 2018,
"Online normalizer calculation for softmax"). The backward pass makes each slice again, turns it into its gradient, and
multiplies that back: four matrix products where the plain path has three, and slices small enough to stay near the
processor where it writes and reads the logits several times over.

The vocabulary is cut, not the tokens: then the gradient of a slice of the unembedding is complete when it is written,
only the `[*b, d]` gradient of the hidden states accumulates (in float32), and a batch that is sharded over devices
stays where it is. An unembedding that is sharded along d is gathered a slice at a time; along v, as a whole.

Rows belong in the leading axes: under `jax.vmap` each would have its own gradient of the unembedding before these are
summed.

Layer 2 uses it as `logprobs.from_hidden`, `logprobs.entropy_from_hidden` and `kl.exact_from_hidden`.

Shapes: *b any leading axes, n positions (all of these flat), d width of a hidden state, v vocabulary, c one slice of
it. Units: nats.
"""

import math
from functools import partial
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array

from rlhf_jax.numerics import as_float, require
from rlhf_jax.types import ArrayLike, Scalar

CHUNK = 4096
"""Vocabulary entries a slice. Temporary memory is little more than two `[*b, c]` arrays in float32, four for the KL."""


@flax.struct.dataclass
class Head:
    """What makes logits: z = softcap · tanh(hidden · unembedding / softcap) / temperature."""

    hidden: Array  # [*b, d]
    unembedding: Array  # [d, v], or [v, d] if tied
    temperature: Array  # []
    softcap: Array | None  # []
    tied: bool = flax.struct.field(pytree_node=False)

    @property
    def axis(self) -> int:
        """Of the unembedding: its vocabulary. A transpose that a loop reads would be copied."""
        return 0 if self.tied else 1


class _Quantity(Protocol):
    """One number a position, as a fold over slices of the logits of one head or of several.

    `offset` is the vocabulary entry at which a slice starts; `logits` are those of each head, [n, c].
    """

    @staticmethod
    def start(zeros: Array) -> Any:
        """The state before the first slice, from zeros of the result's shape."""
        ...

    @staticmethod
    def update(state: Any, offset: Array, tokens: Array | None, *logits: Array) -> Any:
        """The state with a slice added."""
        ...

    @staticmethod
    def finish(state: Any) -> tuple[Array, Any]:
        """(the number [n], what its gradient needs)."""
        ...

    @staticmethod
    def gradient(saved: Any, offset: Array, tokens: Array | None, *logits: Array) -> tuple[Array, ...]:
        """The derivative of the number by each logit of the slice, one array a head."""
        ...


def head(
    hidden: ArrayLike,
    unembedding: ArrayLike,
    *,
    chunk: int,
    temperature: Scalar,
    softcap: Scalar | None,
    tied: bool,
) -> Head:
    """The head, checked: ValueError if chunk < 1, temperature ≤ 0, softcap ≤ 0 or the table lies the other way."""
    require("chunk", chunk, "[1, inf)")
    require("temperature", temperature, "(0, inf)")
    require("softcap", softcap, "(0, inf)")
    hidden, unembedding = jnp.asarray(hidden), jnp.asarray(unembedding)
    wide = partial(jnp.asarray, dtype=_wide(hidden))
    made = Head(hidden, unembedding, wide(temperature), None if softcap is None else wide(softcap), tied)
    if unembedding.shape[1 - made.axis] != hidden.shape[-1]:
        wanted = "[v, d] where tied" if tied else "[d, v] unless tied"
        raise ValueError(f"unembedding must be {wanted}: got {unembedding.shape} for hidden {hidden.shape}")
    return made


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fold(quantity: type[_Quantity], chunk: int, heads: tuple[Head, ...], tokens: Array | None = None) -> Array:
    """The quantity at every position, [n], with a gradient by all that `heads` hold. Reverse mode only."""
    return _fold_forward(quantity, chunk, heads, tokens)[0]


def _fold_forward(quantity, chunk, heads, tokens):
    def step(state, offset, size):
        return quantity.update(state, offset, tokens, *(_logits(h, offset, size)[1] for h in heads))

    state = _over_slices(step, quantity.start(as_float(jnp.zeros_like(heads[0].hidden[..., 0]))), chunk, heads[0])
    out, saved = quantity.finish(state)
    return out, (saved, heads, tokens)


def _fold_backward(quantity, chunk, residuals, cotangent):
    saved, heads, tokens = residuals

    def step(gradients, offset, size):
        tables, logits, pulls = zip(*(_logits(h, offset, size) for h in heads), strict=True)
        d_logits = quantity.gradient(saved, offset, tokens, *logits)
        return tuple(
            _add(gradient, h, table, pull(cotangent[..., None] * by_z), offset)
            for gradient, h, table, pull, by_z in zip(gradients, heads, tables, pulls, d_logits, strict=True)
        )

    zeros = tuple(jax.tree.map(jnp.zeros_like, h.replace(hidden=as_float(h.hidden))) for h in heads)
    gradients = _over_slices(step, zeros, chunk, heads[0])
    return tuple(g.replace(hidden=g.hidden.astype(h.hidden.dtype)) for g, h in zip(gradients, heads, strict=True)), None


_fold.defvjp(_fold_forward, _fold_backward)


def _over_slices(step, carry, chunk, head):
    """The carry after step(carry, offset, size) over all slices; the last is smaller where chunk does not divide v."""
    vocabulary = head.unembedding.shape[head.axis]
    chunk = min(chunk, vocabulary)
    whole, rest = divmod(vocabulary, chunk)
    carry = jax.lax.fori_loop(0, whole, lambda i, carry: step(carry, i * chunk, chunk), carry)
    return step(carry, whole * chunk, rest) if rest else carry


def _logits(head, offset, size):
    """(a slice of the unembedding, its logits [n, c], what pulls a gradient back through softcap and temperature).

    As `unembed` has it: the product takes the unembedding in the dtype of the hidden states and adds up in float32.
    """
    table = jax.lax.dynamic_slice_in_dim(head.unembedding, offset, size, head.axis).astype(head.hidden.dtype)
    raw = _product(head.hidden, table, (1, 1 - head.axis))
    return table, *jax.vjp(_cap_and_divide, raw, head.temperature, head.softcap)


def _cap_and_divide(raw, temperature, softcap):
    capped = raw if softcap is None else softcap * jnp.tanh(raw / softcap)
    return capped / temperature


def _add(gradient, head, table, by_raw_and_scalars, offset):
    """The head's gradient with a slice's added; its part by the unembedding is complete, and written where it belongs.

    The gradient by the logits takes the dtype of the hidden states before it is multiplied, as the logits' product did.
    """
    by_raw, by_temperature, by_softcap = by_raw_and_scalars
    by_raw = by_raw.astype(head.hidden.dtype)
    operands = (by_raw, head.hidden) if head.tied else (head.hidden, by_raw)
    by_table = _product(*operands, (0, 0)).astype(gradient.unembedding.dtype)
    return gradient.replace(
        hidden=gradient.hidden + _product(by_raw, table, (1, head.axis)),
        unembedding=jax.lax.dynamic_update_slice_in_dim(gradient.unembedding, by_table, offset, head.axis),
        temperature=gradient.temperature + by_temperature,
        softcap=None if by_softcap is None else gradient.softcap + by_softcap,
    )


def _product(a, b, axes):
    return jnp.tensordot(a, b, axes, preferred_element_type=_wide(a))


def _wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)


@flax.struct.dataclass
class _Total:
    """The running normaliser Σ exp(z − peak) of one head's logits, at least 1 once a slice has been read."""

    peak: Array
    total: Array

    @classmethod
    def start(cls, zeros: Array) -> "_Total":
        """Of nothing. The peak is finite, so that 0 times its distance from the first one is 0."""
        return cls(zeros + jnp.finfo(zeros.dtype).min, zeros)

    def update(self, logits: Array) -> tuple["_Total", Array, Array]:
        """(with a slice added, log of what earlier sums of exp(z − peak) shrink by, z − new peak)."""
        peak = jnp.maximum(self.peak, logits.max(-1))
        shrink = self.peak - peak
        below = logits - peak[..., None]
        return _Total(peak, self.total * jnp.exp(shrink) + jnp.exp(below).sum(-1)), shrink, below

    def log_probs(self, logits: Array) -> Array:
        """Log-probabilities of a slice, once all have been read; exact for logits far from 0, too."""
        return (logits - self.peak[..., None]) - jnp.log(self.total)[..., None]


class _TokenLogp:
    """log softmax(z)[token]; NaN for a token outside [0, v), whose own logit then adds nothing to the gradient."""

    @staticmethod
    def start(zeros):
        return _Total.start(zeros), jnp.full_like(zeros, jnp.nan)

    @staticmethod
    def update(state, offset, tokens, logits):
        total, chosen = state
        column = tokens - offset
        size = logits.shape[-1]
        found = jnp.take_along_axis(logits, jnp.clip(column, 0, size - 1)[..., None], axis=-1)[..., 0]
        return total.update(logits)[0], jnp.where((column >= 0) & (column < size), found, chosen)

    @staticmethod
    def finish(state):
        total, chosen = state
        return (chosen - total.peak) - jnp.log(total.total), total

    @staticmethod
    def gradient(total, offset, tokens, logits):
        is_token = (tokens - offset)[..., None] == jnp.arange(logits.shape[-1])
        return (jnp.where(is_token, 1, 0) - jnp.exp(total.log_probs(logits)),)


class _Entropy:
    """H = log Σ w − Σ w (z − peak) / Σ w with w = exp(z − peak): two terms ≥ 0, so no rounding can make it negative."""

    @staticmethod
    def start(zeros):
        return _Total.start(zeros), zeros

    @staticmethod
    def update(state, offset, tokens, logits):
        del offset, tokens
        old, spread = state
        total, shrink, below = old.update(logits)
        spread = jnp.exp(shrink) * (spread + shrink * old.total)
        return total, spread + jnp.sum(jnp.exp(below) * below, axis=-1)

    @staticmethod
    def finish(state):
        total, spread = state
        entropy = jnp.log(total.total) - spread / total.total
        return entropy, (total, entropy)

    @staticmethod
    def gradient(saved, offset, tokens, logits):
        """−p (log p + H)."""
        del offset, tokens
        total, entropy = saved
        log_p = total.log_probs(logits)
        return (-jnp.exp(log_p) * (log_p + entropy[..., None]),)


class _ExactKL:
    """Σ p (log p − log q), with the logits x and y of the two heads: E_p[x − y] − log Σ exp x + log Σ exp y."""

    @staticmethod
    def start(zeros):
        return _Total.start(zeros), _Total.start(zeros), zeros

    @staticmethod
    def update(state, offset, tokens, logits, ref_logits):
        del offset, tokens
        total, ref_total, gap = state
        total, shrink, below = total.update(logits)
        gap = gap * jnp.exp(shrink) + jnp.sum(jnp.exp(below) * (logits - ref_logits), axis=-1)
        return total, ref_total.update(ref_logits)[0], gap

    @staticmethod
    def finish(state):
        total, ref_total, gap = state
        log_ratio = jnp.log(total.total) - jnp.log(ref_total.total)
        kl = (gap / total.total - (total.peak - ref_total.peak)) - log_ratio
        return jnp.maximum(kl, 0), (total, ref_total, kl)  # the maximum undoes rounding near 0

    @staticmethod
    def gradient(saved, offset, tokens, logits, ref_logits):
        """(p (log p − log q − KL), q − p)."""
        del offset, tokens
        total, ref_total, kl = saved
        log_p, log_q = total.log_probs(logits), ref_total.log_probs(ref_logits)
        p = jnp.exp(log_p)
        return p * (log_p - log_q - kl[..., None]), jnp.exp(log_q) - p


def _over_positions(quantity, chunk, heads, tokens=None):
    """As `_fold`, for any leading axes. Products of flat operands need no transpose."""
    lead = heads[0].hidden.shape[:-1]
    n = math.prod(lead)
    flat = tuple(h.replace(hidden=h.hidden.reshape(n, h.hidden.shape[-1])) for h in heads)
    return jnp.reshape(_fold(quantity, chunk, flat, None if tokens is None else tokens.reshape(n)), lead)


token_logp = partial(_over_positions, _TokenLogp)
"""(chunk, (head,), tokens) -> [*b]."""
entropy = partial(_over_positions, _Entropy)
"""(chunk, (head,)) -> [*b]."""
exact_kl = partial(_over_positions, _ExactKL)
"""(chunk, (head, reference's head)) -> [*b]."""
