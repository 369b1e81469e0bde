"""Losses of reward models: comparisons, rankings, ratings and outcomes.

Scores are logits: between two completions, a difference of 1 is odds of e. A loss is one number an example, and so is a
diagnostic, a float that is averaged as the loss is.

Shapes: *b any leading axes, k completions of one prompt, s steps of one solution.
"""

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.logprobs import token_logps
from rlhf_jax.masking import keep
from rlhf_jax.numerics import EXCLUDED, as_float, require
from rlhf_jax.types import ArrayLike, Scalar, typed


@typed
def bradley_terry(
    chosen_scores: Float[ArrayLike, "*b"],
    rejected_scores: Float[ArrayLike, "*b"],
    *,
    margin: Scalar | Float[ArrayLike, "*b"] = 0.0,
    label_smoothing: Scalar = 0.0,
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """The negative log-likelihood that the chosen completion beats the rejected one.

        h = r_chosen − r_rejected − margin;   loss = −(1 − ε) log σ(h) − ε log σ(−h)

    Ouyang et al. 2022, eq. 1; the margin as in Touvron et al. 2023 (Llama 2), eq. 2; `label_smoothing` ε is the rate of
    wrong labels. Diagnostics: `accuracy`, 1 if the chosen one scores higher and ½ for a tie; `margin`, r_chosen −
    r_rejected. Raises ValueError if label_smoothing is outside [0, ½).

    >>> loss, diagnostics = bradley_terry(jnp.array([1.0, 0.0]), jnp.array([0.0, 0.0]))
    >>> loss, diagnostics["accuracy"]
    (Array([0.3133, 0.6931], dtype=float32), Array([1. , 0.5], dtype=float32))
    """
    require("label_smoothing", label_smoothing, "[0, 0.5)")
    difference = as_float(chosen_scores) - as_float(rejected_scores)
    logit = difference - margin
    loss = -log_sigmoid(logit) * (1 - label_smoothing) - log_sigmoid(-logit) * label_smoothing
    return loss, {"accuracy": (1 + jnp.sign(difference)) / 2, "margin": difference}


@typed
def centering(
    scores_a: Float[ArrayLike, "*b"], scores_b: Float[ArrayLike, "*b"]
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """(r_a + r_b)², which holds a pair's scores around 0. Eisenstein et al. 2023; no diagnostics.

    Bradley-Terry leaves a constant a prompt free; added with a small coefficient, this term settles it.

    >>> centering(jnp.array([1.0]), jnp.array([-0.5]))[0]
    Array([0.25], dtype=float32)
    """
    return jnp.square(as_float(scores_a) + as_float(scores_b)), {}


@typed
def plackett_luce(
    ranked_scores: Float[ArrayLike, "*b k"], where: Bool[ArrayLike, "*b k"] | None = None
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """The negative log-likelihood of a ranking, best first: −Σ_i (r_i − log Σ_{j ≥ i} exp r_j).

    Plackett 1975, Luce 1959; as in Rafailov et al. 2023 (DPO), eq. 18. `where` keeps the completions that exist.
    Diagnostics: `accuracy`, 1 if the best one scores highest. Raises ValueError for an empty ranking.

    >>> plackett_luce(jnp.array([1.0, 0.0]))[0], bradley_terry(jnp.array(1.0), jnp.array(0.0))[0]
    (Array(0.3133, dtype=float32), Array(0.3133, dtype=float32))
    """
    require("k", ranked_scores.shape[-1], "[1, inf)")
    kept = jnp.ones(ranked_scores.shape, bool) if where is None else jnp.asarray(where)
    scores = jnp.where(kept, as_float(ranked_scores), EXCLUDED)
    log_rest = jax.lax.cumlogsumexp(scores, axis=scores.ndim - 1, reverse=True)
    best = jnp.take_along_axis(scores, kept.argmax(-1, keepdims=True), axis=-1)[..., 0]
    accuracy = (best == scores.max(-1)) & kept.any(-1)
    return keep(log_rest - scores, kept).sum(-1), {"accuracy": accuracy.astype(scores.dtype)}


@typed
def k_wise(
    scores: Float[ArrayLike, "*b k"], ranks: Int[ArrayLike, "*b k"], where: Bool[ArrayLike, "*b k"] | None = None
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """Bradley-Terry over all pairs of K completions: −1/C(K, 2) Σ_{rank i < rank j} log σ(r_i − r_j).

    Ouyang et al. 2022 (InstructGPT), eq. 1. Rank 0 is best, and equal ranks make no pair; the weight stays 1/C(K, 2).
    `where` keeps the completions that exist, K being their number; fewer than two have no loss. Diagnostics:
    `accuracy`, the share of the pairs that are in the right order. Raises ValueError if k < 2.

    >>> k_wise(jnp.array([0.0, 1.0, 5.0]), jnp.array([1, 0, 1]))[0]
    Array(1.4438, dtype=float32)
    """
    k = scores.shape[-1]
    require("k", k, "[2, inf)")
    kept = jnp.ones(scores.shape, bool) if where is None else jnp.asarray(where)
    ranks, scores = jnp.asarray(ranks), keep(scores, kept)
    difference = scores[..., :, None] - scores[..., None, :]
    pair = (ranks[..., :, None] < ranks[..., None, :]) & kept[..., :, None] & kept[..., None, :]
    right = jnp.sum(pair & (difference > 0), axis=(-2, -1)) / jnp.maximum(pair.sum((-2, -1)), 1)
    count = kept.sum(-1, dtype=scores.dtype)
    loss = keep(-log_sigmoid(difference), pair).sum((-2, -1)) / jnp.maximum(count * (count - 1) / 2, 1)
    return loss, {"accuracy": right.astype(loss.dtype)}


@typed
def best_of_k(
    scores: Float[ArrayLike, "*b k"], best: Int[ArrayLike, "*b"], where: Bool[ArrayLike, "*b k"] | None = None
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """The softmax cross-entropy of the completion that was picked: −log (exp r_best / Σ_i exp r_i).

    Ziegler et al. 2019, eq. 1, with K = 4 there. `where` keeps the completions that exist, of which the picked one is
    one. Diagnostics: `accuracy`, 1 if the picked one scores highest.

    >>> best_of_k(jnp.array([0.0, 0.0, 0.0, 0.0]), jnp.array(2))[0]
    Array(1.3863, dtype=float32)
    """
    kept = jnp.ones(scores.shape, bool) if where is None else jnp.asarray(where)
    scores = jnp.where(kept, as_float(scores), EXCLUDED)
    loss = keep(-token_logps(scores, best), kept.any(-1))
    return loss, {"accuracy": (scores.argmax(-1) == best).astype(loss.dtype)}


@typed
def scalar_rating(
    scores: Float[ArrayLike, "*b"], ratings: Float[ArrayLike, "*b"]
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """½ (r − rating)²: regression on an absolute rating. Diagnostics: `error`, r − rating.

    >>> scalar_rating(jnp.array([2.0]), jnp.array([5.0]))[0]
    Array([4.5], dtype=float32)
    """
    error = as_float(scores) - as_float(ratings)
    return jnp.square(error) / 2, {"error": error}


@typed
def outcome_bce(
    scores: Float[ArrayLike, "*b"], labels: Bool[ArrayLike, "*b"] | Float[ArrayLike, "*b"]
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """−y log σ(r) − (1 − y) log σ(−r): is this completion correct? Cobbe et al. 2021, section 4.2.

    `labels` y are bool, or probabilities in [0, 1]. Diagnostics: `accuracy`, 1 if σ(r) and y are on the same side of ½.

    >>> outcome_bce(jnp.array([0.0, 3.0]), jnp.array([True, True]))[0]
    Array([0.6931 , 0.0486], dtype=float32)
    """
    scores, labels = as_float(scores), as_float(labels)
    loss = -labels * log_sigmoid(scores) - (1 - labels) * log_sigmoid(-scores)
    return loss, {"accuracy": ((scores > 0) == (labels > 0.5)).astype(loss.dtype)}


@typed
def process_bce(
    scores: Float[ArrayLike, "*b s"],
    labels: Bool[ArrayLike, "*b s"] | Float[ArrayLike, "*b s"],
    where: Bool[ArrayLike, "*b s"] | None = None,
) -> tuple[Float[Array, "*b s"], dict[str, Float[Array, "*b s"]]]:
    """`outcome_bce` of each step of a solution: is this step right? 0 for steps that `where` leaves out.

    Lightman et al. 2023, section 2.6; Wang et al. 2023 (Math-Shepherd), eq. 2, with probabilities as labels. Score r is
    read at the end of each step; a head with two logits, as TRL's, has r = logit[1] − logit[0]. Either hand over steps
    alone, or scores at every token and in `where` those that end a labelled step. Give `where` to the reducer too:
    under `token_mean` all steps weigh the same, as in TRL and OpenRLHF, under `sequence_mean` all solutions.
    Diagnostics: `accuracy`, as in `outcome_bce`.

    >>> where = jnp.array([True, True, False])
    >>> process_bce(jnp.array([0.0, 3.0, 9.0]), jnp.array([True, True, False]), where)[0].round(4)
    Array([0.6931, 0.0486, 0.    ], dtype=float32)
    """
    kept = jnp.ones(scores.shape, bool) if where is None else jnp.asarray(where)
    loss, diagnostics = outcome_bce(keep(scores, kept), keep(as_float(labels), kept))
    return keep(loss, kept), {"accuracy": keep(diagnostics["accuracy"], kept)}


@typed
def ordinal_rating(
    scores: Float[ArrayLike, "*b"], ratings: Int[ArrayLike, "*b"], thresholds: Float[ArrayLike, " k"]
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """The negative log-likelihood of a rating on a scale whose steps need not be equal: proportional odds.

        P(rating ≤ j) = σ(θ_j − r);   loss = −log (σ(θ_rating − r) − σ(θ_{rating − 1} − r))

    McCullagh 1980 (proportional odds). `ratings` run from 0 to k, the thresholds' number; θ increases, its ends are −∞
    and ∞. Thresholds have a gradient: fixed, or learnt as a first one plus a cumulative sum of softplus. Diagnostics:
    `accuracy`, 1 if r lies between its rating's thresholds; `error`, how many ratings r lies above it. Raises
    ValueError if thresholds do not increase or a rating lies outside [0, k]; under jit, where numbers are not known,
    thresholds out of order give NaN.

    >>> ordinal_rating(jnp.array([0.0, 0.0]), jnp.array([0, 1]), jnp.array([-1.0, 1.0]))[0].round(4)
    Array([1.3133, 0.7719], dtype=float32)
    """
    scores, ratings, thresholds = as_float(scores), jnp.asarray(ratings), as_float(thresholds)
    k = thresholds.shape[0]
    require("k", k, "[1, inf)")
    require("the gap between thresholds", jnp.diff(thresholds).min(initial=jnp.inf), "(0, inf]")
    require("ratings", ratings.min(initial=0), f"[0, {k}]")
    require("ratings", ratings.max(initial=0), f"[0, {k}]")
    above, below = thresholds[jnp.minimum(ratings, k - 1)], thresholds[jnp.maximum(ratings - 1, 0)]
    bounded = (ratings > 0) & (ratings < k)
    # σ(a) − σ(b) = σ(a) σ(−b) (1 − e^(b − a)): no difference of two numbers near 1, and none near 0
    gap = jnp.where(bounded, jnp.log(-jnp.expm1(-jnp.where(bounded, above - below, 1))), 0)
    loss = -keep(log_sigmoid(above - scores), ratings < k) - keep(log_sigmoid(scores - below), ratings > 0) - gap
    error = jnp.sum(scores[..., None] > thresholds, axis=-1) - ratings
    return loss, {"accuracy": (error == 0).astype(loss.dtype), "error": error.astype(loss.dtype)}
