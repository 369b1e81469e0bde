"""Strings that end a completion, found while it is written: an automaton over tokens, made once of the tokenizer's.

Its states are those of Aho and Corasick (1975) over bytes: the longest end of the text so far that begins one of the
strings; the last state is that one of them is whole, and stays. A token leads from each state to where its bytes do.
Most tokens do the same, so that the table has a column a class of tokens. Bytes, and not characters, because a token
may be a part of one: no UTF-8 string begins or ends inside a character of another.

Shapes: s states, v tokens of the vocabulary, c classes of them, w rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from rlhf_jax.errors import UserError
from rlhf_jax.interop.tokenizers import Tokenizer


@dataclass(frozen=True, eq=False)
class Stops:
    """The automaton of some strings; a row begins in state 0."""

    classes: Int[np.ndarray, " v+1"]
    """The class of each token; the last entry is that of all others, which add no text."""
    table: Int[np.ndarray, "s c"]
    """The state after a token of each class."""

    def after(self, states: Int[Array, " w"], tokens: Int[Array, " w"]) -> Int[Array, " w"]:
        """States of rows that have got one more token each."""
        classes = jnp.asarray(self.classes)[jnp.minimum(tokens, len(self.classes) - 1)]
        return jnp.asarray(self.table)[states, classes]

    def whole(self, states: Int[Array, " w"]) -> Bool[Array, " w"]:
        """Whether one of the strings stands in a row's text."""
        return states == len(self.table) - 1


def stops(strings: Sequence[str], tokenizer: Tokenizer) -> Stops | None:
    """What finds the strings in texts of a tokenizer; None where there are none.

    Raises UserError for a string that no tokens of it can write, such as one with a character that it does not know.
    """
    if not strings:
        return None
    pieces = [*(tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)), b""]
    for string in strings:
        if not _reaches(_over_tokens(_over_bytes([string.encode()]), pieces).table):
            raise UserError(f"sampling.stop: no tokens of this model's tokenizer write {string!r}")
    return _over_tokens(_over_bytes([string.encode() for string in strings]), pieces)


def _over_bytes(strings: Sequence[bytes]) -> Int[np.ndarray, "s 256"]:
    """The state after each byte from each state; the last state is that a string is whole."""
    following: list[dict[int, int]] = [{}]  # of the tree of the strings' beginnings, whose nodes are states
    ends = set()
    for string in strings:
        node = 0
        for byte in string:
            if byte not in following[node]:
                following[node][byte] = len(following)
                following.append({})
            node = following[node][byte]
        ends.add(node)
    table = np.zeros((len(following), 256), np.int32)
    shorter, queue = {0: 0}, [0]  # the longest end of a node's text that is another node's
    for node in queue:
        if node:
            table[node] = table[shorter[node]]
        if shorter[node] in ends:
            ends.add(node)
        for byte, child in following[node].items():
            shorter[child] = int(table[node, byte])
            table[node, byte] = child
            queue.append(child)
    kept = [node for node in range(len(table)) if node not in ends]
    names = np.full(len(table), len(kept), np.int32)
    names[kept] = np.arange(len(kept))
    return np.concatenate([names[table[kept]], np.full((1, 256), len(kept), np.int32)])


def _over_tokens(table: Int[np.ndarray, "s 256"], pieces: Sequence[bytes]) -> Stops:
    """The same of tokens, all of them at once a byte further at a time, those that are at their end left out."""
    order = np.asarray(sorted(range(len(pieces)), key=lambda token: -len(pieces[token])))
    lengths = np.asarray([len(pieces[token]) for token in order])
    letters = np.asarray([pieces[token] for token in order], f"S{max(lengths[0], 1)}").view(np.uint8)
    letters = letters.reshape(len(pieces), -1)
    states = np.repeat(np.arange(len(table), dtype=np.int32)[:, None], len(pieces), axis=1)
    for place in range(lengths[0]):
        longer = int(np.searchsorted(-lengths, -place))
        states[:, :longer] = table[states[:, :longer], letters[:longer, place]]
    classes = np.zeros(len(pieces), np.int64)
    for after in states:  # those that do the same so far, parted by where they lead from one state more
        _, classes = np.unique(classes * len(table) + after, return_inverse=True)
    _, first = np.unique(classes, return_index=True)
    back = np.empty(len(pieces), np.int32)
    back[order] = classes
    return Stops(back, states[:, first])


def _reaches(table: Int[np.ndarray, "s c"]) -> bool:
    """Whether any tokens lead from the first state to the last."""
    reached = {0}
    while more := set(np.unique(table[sorted(reached)]).tolist()) - reached:
        reached |= more
    return len(table) - 1 in reached
