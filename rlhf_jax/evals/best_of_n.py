"""The best of n samples: what it is worth, and how far it is from one sample. Shapes: p prompts, m samples of each."""

import math

import numpy as np
from jaxtyping import Float

from rlhf_jax.errors import NonFiniteError
from rlhf_jax.types import ArrayLike, typed


def best_of_n_kl(n: int) -> float:
    """KL of the best of n to one sample: log n − (n − 1)/n nats a completion. Stiennon et al. 2020, appendix G.3.

    Exact where no two samples are alike or score alike, else an upper bound (Beirami et al. 2024). Raises ValueError
    if n < 1.

    >>> best_of_n_kl(1), best_of_n_kl(1_000)
    (0.0, 5.91)
    """
    if n < 1:
        raise ValueError(f"n is {n}; the best is one of at least 1 sample")
    return math.log(n) - (n - 1) / n


def powers_up_to(most: int) -> list[int]:
    """1, 2, 4, … and `most` itself.

    >>> powers_up_to(12)
    [1, 2, 4, 8, 12]
    """
    return sorted({2**i for i in range(most.bit_length())} | {most})


@typed
def best_of_n(scores: Float[ArrayLike, "p m"], values: Float[ArrayLike, "p m"], *, n: int) -> Float[np.ndarray, " p"]:
    """A prompt's mean of `values` of the sample with the highest score, over all C(m, n) sets of n of its m samples.

        Σ_{i≥n} C(i − 1, n − 1) / C(m, n) · values of the i-th in rising order of scores,

    an unbiased estimate of what the best of n is worth. Nakano et al. 2021; Coste et al. 2023.
    Where scores tie in a set each is as likely to be the best. n = 1 is the mean, n = m the best of all.

    Raises ValueError unless 1 ≤ n ≤ m, `NonFiniteError` where a score is not finite.

    >>> best_of_n(np.array([[0.1, 0.3, 0.2]]), np.array([[1.0, 0.0, 3.0]]), n=2)
    array([1.])
    """
    scores, values = (np.asarray(x).astype(np.float64) for x in (scores, values))
    if not np.isfinite(scores).all():
        raise NonFiniteError(f"scores: {int((~np.isfinite(scores)).sum())} of {scores.size} are not finite")
    m = scores.shape[1]
    if not 1 <= n <= m:
        raise ValueError(f"n is {n}; of {m} samples it is 1 to {m}")
    weights = np.asarray([math.comb(i, n - 1) / math.comb(m, n) for i in range(m)])
    found = np.empty(len(scores))
    for row, (own_scores, own_values) in enumerate(zip(scores, values, strict=True)):
        _, places, counts = np.unique(own_scores, return_inverse=True, return_counts=True)
        means = np.bincount(places, own_values) / counts  # of those that tie
        found[row] = weights @ np.repeat(means, counts)
    return found
