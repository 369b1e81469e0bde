"""How varied a set of samples is. Sequences are lists of token ids, one a sample."""

from collections.abc import Iterable, Sequence


def equal_tokens(a: Iterable[Sequence[int]], b: Iterable[Sequence[int]]) -> int:
    """The number of tokens that both sets of sequences have: what `distinct_n` compares them at.

    >>> equal_tokens([[1, 2, 3], [4]], [[5], [6]])
    2
    """
    return min(sum(map(len, a)), sum(map(len, b)))


def distinct_n(sequences: Iterable[Sequence[int]], *, n: int = 2, tokens: int) -> float:
    """Distinct n-grams over all n-grams, among the first `tokens` tokens of the sequences taken in order.

    Li et al. 2016 (there over the number of tokens; here over that of n-grams, which do not cross sequences).
    The ratio falls as a set grows, so two sets are compared at equal token counts: `tokens=equal_tokens(a, b)`. The
    sequence in which the count is reached is cut there. 0.0 where no n-gram fits. Raises ValueError if n < 1, tokens <
    0, or the sequences hold fewer tokens than `tokens`.

    >>> distinct_n([[1, 2, 1, 2], [1, 2]], tokens=6)
    0.5
    >>> distinct_n([[1, 2, 1, 2], [1, 2]], tokens=3)
    1.0
    """
    if n < 1:
        raise ValueError(f"n is {n}; an n-gram has at least one token")
    if tokens < 0:
        raise ValueError(f"tokens is {tokens}; it counts tokens, so it is at least 0")
    left, total, seen = tokens, 0, set()
    for sequence in sequences:
        if left == 0:
            break
        cut = [int(token) for token in sequence[:left]]
        left -= len(cut)
        grams = list(zip(*(cut[start:] for start in range(n)), strict=False))
        total += len(grams)
        seen.update(grams)
    if left > 0:
        raise ValueError(f"the sequences hold {tokens - left} tokens, fewer than tokens={tokens}")
    return len(seen) / total if total else 0.0
