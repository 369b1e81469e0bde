"""Completions that were judged one by one, whole or step by step: rows of tokens, and endless batches of them.

Shapes: b rows, t tokens, s judged places of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import grain
import numpy as np

from rlhf_jax.data.pipeline import READ, WHOLE, endless
from rlhf_jax.data.text import fitted
from rlhf_jax.sharding import Shard
from rlhf_jax.types import JudgedBatch


@dataclass(frozen=True)
class JudgedRow:
    """A completion of a prompt in one or more parts, and what was said of each of them."""

    prompt: str
    prompt_tokens: tuple[int, ...]
    parts: tuple[tuple[int, ...], ...]
    """The completion's tokens, a part a step; a completion that was judged as a whole is one part."""
    targets: tuple[float | None, ...]
    """A rating, or 1 or 0, one a part; None where nothing was said."""
    annotator: str | None = None

    @property
    def tokens(self) -> list[int]:
        """All of it."""
        return [*self.prompt_tokens, *(token for part in self.parts for token in part)]

    @property
    def longest(self) -> int:
        """Tokens of all of it."""
        return len(self.prompt_tokens) + sum(map(len, self.parts))

    @property
    def ends(self) -> list[int]:
        """The places of the parts' last tokens."""
        return (np.cumsum([len(part) for part in self.parts]) + len(self.prompt_tokens) - 1).tolist()

    @property
    def judged(self) -> list[tuple[int, float]]:
        """(place, target) of what was judged."""
        return [(end, target) for end, target in zip(self.ends, self.targets, strict=True) if target is not None]

    @property
    def tells(self) -> bool:
        """Whether anything was."""
        return any(target is not None for target in self.targets)

    def cut(self, length: int) -> "JudgedRow":
        """The same in at most `length` tokens: parts after the last judged one go first, which nothing before them
        sees; then the prompt loses what follows its first token, from its start on, then the completion its end; of
        several parts those that lose any of it are no longer judged.
        """
        if self.longest <= length:
            return self
        if self.tells and self.targets[-1] is None:
            return replace(self, parts=self.parts[:-1], targets=self.targets[:-1]).cut(length)
        prompt, kept = fitted(self.prompt_tokens, [token for part in self.parts for token in part], length=length)
        parts, targets = [], []
        for part, target in zip(self.parts, self.targets, strict=True):
            own, kept = tuple(kept[: len(part)]), kept[len(part) :]
            if own:
                parts.append(own)
                targets.append(target if len(own) == len(part) or len(self.parts) == 1 else None)
        return replace(self, prompt_tokens=tuple(prompt), parts=tuple(parts), targets=tuple(targets))


def judged_batches(
    rows: Sequence[JudgedRow],
    *,
    pad_id: int,
    batch_size: int,
    places: int,
    length: int,
    seed: int,
    shard: Shard = WHOLE,
) -> grain.DatasetIterator:
    """Endless `JudgedBatch`es, see `endless`; of each the process's `shard`."""

    def batch(some: Sequence[JudgedRow]) -> JudgedBatch:
        return batch_judged(some[shard.rows(batch_size)], pad_id=pad_id, places=places, length=length)

    batches = endless(rows, seed=seed).batch(batch_size, batch_fn=batch)
    return iter(batches.to_iter_dataset(READ))


def batch_judged(rows: Sequence[JudgedRow], *, pad_id: int, places: int, length: int) -> JudgedBatch:
    """Stack rows of at most `places` judged places; tokens are padded on the right."""
    b = len(rows)
    tokens, mask = np.full((b, length), pad_id, np.int32), np.zeros((b, length), bool)
    ends, where = np.zeros((b, places), np.int32), np.zeros((b, places), bool)
    targets = np.zeros((b, places), np.float32)
    for i, row in enumerate(rows):
        tokens[i, : row.longest] = row.tokens
        mask[i, : row.longest] = True
        for j, (end, target) in enumerate(row.judged):
            ends[i, j], targets[i, j], where[i, j] = end, target, True
    return JudgedBatch(tokens, mask, ends, targets, where)
