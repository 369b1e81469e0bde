"""Log-probabilities of tokens. The shift between logits and tokens lives in `next_token_logps` and nowhere else.

What ends in `from_hidden` takes hidden states instead of logits and never holds `[*b, v]`; `vocabulary` says how.

Shapes: *b any leading axes, t tokens, d width of a hidden state, v vocabulary. Units: nats.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax import vocabulary
from rlhf_jax.masking import keep
from rlhf_jax.numerics import LOG_RATIO_LIMIT, as_float, require
from rlhf_jax.types import ArrayLike, Scalar, typed


@typed
def token_logps(
    logits: Float[ArrayLike, "*b v"], tokens: Int[ArrayLike, "*b"], *, temperature: Scalar = 1.0
) -> Float[Array, "*b"]:
    """The log-probability log softmax(logits / temperature)[token], for logits that stand beside their token.

    Raises ValueError if temperature ≤ 0. Token ids are not checked: one outside [0, v) gives NaN.

    >>> token_logps(jnp.log(jnp.array([[0.25, 0.75]])), jnp.array([1]))
    Array([-0.2877], dtype=float32)
    """
    require("temperature", temperature, "(0, inf)")
    tokens = jnp.where(jnp.asarray(tokens) < 0, logits.shape[-1], tokens)  # a negative index would count from the end
    chosen = jnp.take_along_axis(jnp.asarray(logits), tokens[..., None], axis=-1)[..., 0]
    return as_float(chosen) / temperature - jax.nn.logsumexp(as_float(logits) / temperature, axis=-1)


@typed
def next_token_logps(
    logits: Float[ArrayLike, "*b t v"], tokens: Int[ArrayLike, "*b t"], *, temperature: Scalar = 1.0
) -> Float[Array, "*b t"]:
    """Entry t is log p(tokens[t] | tokens[<t]), read from logits[t − 1]; entry 0, which nothing predicts, is 0.

    The logits at the last position score a token that is not there and are not read. Raises as `token_logps`.

    >>> next_token_logps(jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.5]])), jnp.array([0, 1])).round(4)
    Array([ 0.    , -0.2877], dtype=float32)
    """
    logps = token_logps(logits[..., :-1, :], tokens[..., 1:], temperature=temperature)
    return jnp.concatenate([jnp.zeros_like(logps, shape=(*tokens.shape[:-1], 1)), logps], axis=-1)


@typed
def entropy(logits: Float[ArrayLike, "*b v"], *, temperature: Scalar = 1.0) -> Float[Array, "*b"]:
    """−Σ p log p of p = softmax(logits / temperature): in [0, log v], never negative; logits of −inf count for nothing.

    Raises ValueError if temperature ≤ 0.

    >>> entropy(jnp.zeros((1, 4)))
    Array([1.3863], dtype=float32)
    """
    require("temperature", temperature, "(0, inf)")
    logits = as_float(logits) / temperature
    below_max = logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.exp(below_max)
    total = weights.sum(-1)
    # Both terms are ≥ 0, so no rounding can make the sum negative: log total ≥ log 1, and below_max ≤ 0.
    return jnp.log(total) - jnp.sum(weights * jnp.where(weights > 0, below_max, 0), axis=-1) / total


@typed
def from_hidden(
    hidden: Float[ArrayLike, "*b d"],
    unembedding: Float[ArrayLike, "d v"] | Float[ArrayLike, "v d"],
    tokens: Int[ArrayLike, "*b"],
    *,
    chunk: int = vocabulary.CHUNK,
    temperature: Scalar = 1.0,
    softcap: Scalar | None = None,
    tied: bool = False,
) -> Float[Array, "*b"]:
    """`token_logps` of the logits that hidden states give, which are never held: log softmax(z / temperature)[token].

        z = hidden · unembedding,   or softcap · tanh(hidden · unembedding / softcap)

    The vocabulary is read `chunk` entries at a time, forwards and again backwards; it need not divide v. With `tied`,
    `unembedding` is a table of embeddings, `[v, d]`. In half precision the products take the dtype of `hidden` and add
    up in float32. There are gradients by `hidden`, `unembedding`, `temperature` and `softcap`, in reverse mode only.

    As with `token_logps`, a state stands beside the token that it predicts. Raises ValueError if chunk < 1,
    temperature ≤ 0, softcap ≤ 0 or the unembedding lies the other way. Token ids are not checked: one outside [0, v)
    gives NaN.

    >>> hidden, unembedding = jnp.array([[1.0]]), jnp.log(jnp.array([[0.25, 0.75]]))
    >>> from_hidden(hidden, unembedding, jnp.array([1]), chunk=1)
    Array([-0.2877], dtype=float32)
    """
    head = vocabulary.head(hidden, unembedding, chunk=chunk, temperature=temperature, softcap=softcap, tied=tied)
    return vocabulary.token_logp(chunk, (head,), jnp.asarray(tokens))


@typed
def entropy_from_hidden(
    hidden: Float[ArrayLike, "*b d"],
    unembedding: Float[ArrayLike, "d v"] | Float[ArrayLike, "v d"],
    *,
    chunk: int = vocabulary.CHUNK,
    temperature: Scalar = 1.0,
    softcap: Scalar | None = None,
    tied: bool = False,
) -> Float[Array, "*b"]:
    """`entropy` of the logits that hidden states give, which are never held: −Σ p log p, in [0, log v].

    Arguments, gradients and what raises are those of `from_hidden`.

    >>> entropy_from_hidden(jnp.ones((1, 2)), jnp.zeros((2, 4)), chunk=3)
    Array([1.3863], dtype=float32)
    """
    head = vocabulary.head(hidden, unembedding, chunk=chunk, temperature=temperature, softcap=softcap, tied=tied)
    return vocabulary.entropy(chunk, (head,))


@typed
def sequence_logps(logps: Float[ArrayLike, "*b t"], mask: Bool[ArrayLike, "*b t"]) -> Float[Array, "*b"]:
    """The log-probability of each sequence, Σ_t logps over the tokens that the mask keeps; 0 if it keeps none.

    >>> sequence_logps(jnp.array([-1.0, -2.0, -9.0]), jnp.array([True, True, False]))
    Array(-3., dtype=float32)
    """
    return keep(logps, mask).sum(-1)


@typed
def ratio_deviation(logps: Float[ArrayLike, "*b"], old_logps: Float[ArrayLike, "*b"]) -> Float[Array, ""]:
    """The largest |π/π_old − 1| of a token; what a mask left out is 0 in both and counts for nothing.

    log π/π_old is clamped at 20, as in the losses, so that the number is finite.

    >>> ratio_deviation(jnp.log(jnp.array([0.5, 0.3])), jnp.log(jnp.array([0.5, 0.25])))
    Array(0.2, dtype=float32)
    """
    log_ratio = jnp.minimum(as_float(logps) - as_float(old_logps), LOG_RATIO_LIMIT)
    return jnp.max(jnp.abs(jnp.expm1(log_ratio)), initial=0)
