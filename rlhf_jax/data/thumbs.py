"""Single completions that were liked or not, in tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rlhf_jax.data.preferences import PreferenceGroup
from rlhf_jax.data.text import fitted


@dataclass(frozen=True)
class Liked:
    """A completion of a prompt, and whether it was liked; beside it, where asked for, one of another prompt."""

    prompt_tokens: tuple[int, ...]  # BOS first, or what a chat template begins with
    completion_tokens: tuple[tuple[int, ...], ...]  # its own, with EOS where it ended; the other prompt's
    desirable: bool
    ref_logps: tuple[float, ...] = ()  # of each completion under a reference, where that was read

    @property
    def longest(self) -> int:
        """Tokens of the row."""
        return len(self.prompt_tokens) + max(map(len, self.completion_tokens))

    def cut(self, length: int) -> "Liked":
        """The same in at most `length` tokens, see `fitted`."""
        prompt, completion = fitted(self.prompt_tokens, self.completion_tokens[0], length=length)
        return replace(self, prompt_tokens=tuple(prompt), completion_tokens=(tuple(completion),))


def from_groups(groups: Sequence[PreferenceGroup]) -> list[Liked]:
    """Of each pair the winner as one that was liked, and the loser as one that was not."""
    return [
        Liked(group.prompt_tokens, (group.completion_tokens[index],), index == pair[0])
        for group in groups
        for pair in group.pairs
        for index in pair
    ]


def with_others(rows: Sequence[Liked], rng: np.random.Generator, *, length: int) -> list[Liked]:
    """Each row with a completion of another prompt, cut to `length` tokens: what KTO's baseline is read from.

    It is the next row's in a random order, as the paper takes the next one in a batch, of the rows whose prompt is
    another; so each row keeps the same one, and a reference reads it once. ValueError where all prompts are the same.
    """
    order = rng.permutation(len(rows)).tolist()
    prompts = [row.prompt_tokens for row in rows]
    if len(set(prompts)) < 2:
        raise ValueError(f"all {len(rows)} rows have the same prompt")
    found: list[Liked] = [*rows]
    for place, index in enumerate(order):
        further = (order[(place + step) % len(order)] for step in range(1, len(order)))
        found[index] = _beside(rows[index], rows[next(j for j in further if prompts[j] != prompts[index])], length)
    return found


def _beside(row: Liked, other: Liked, length: int) -> Liked:
    room = length - len(row.prompt_tokens)
    return replace(row, completion_tokens=(row.completion_tokens[0], other.completion_tokens[0][:room]))
