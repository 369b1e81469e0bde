"""What a reward reads of a completion, where it is cut at a token, such as a full stop (Ziegler et al. 2019).

Shapes: b rollouts, t tokens of prompt and completion.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax import masking
from rlhf_jax.errors import UserError
from rlhf_jax.interop.tokenizers import Tokenizer
from rlhf_jax.numerics import require
from rlhf_jax.types import Rollout


@dataclass(frozen=True)
class Truncation:
    """The reward reads a completion up to a token; the policy learns all of it, and has the score at its end."""

    at: str = "."
    """The token's text, spaces around it aside: of several such tokens any."""
    after: int = 16
    """How many tokens of the completion stand before the first that it may be cut at; that one stays."""
    score: float = -1.0
    """Takes the place of the shaped score of a completion that has no such token there."""

    def __post_init__(self) -> None:
        if not self.at.strip() or self.at != self.at.strip():
            raise ValueError(f"truncate.at must be the text of a token without spaces around it, got {self.at!r}")
        require("truncate.after", self.after, "[0, inf)")
        require("truncate.score", self.score, "(-inf, inf)")


def token_ids(config: Truncation | None, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that completions are cut at; none without a truncation. UserError where the vocabulary has none."""
    if config is None:
        return ()
    found = tuple(i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]).strip() == config.at)
    if not found:
        raise UserError(f"truncate.at: no token of the vocabulary is {config.at!r}")
    return found


def _may_cut(config: Truncation, ids: tuple[int, ...], rollout: Rollout) -> Bool[Array, "b t"]:
    mask = rollout.completion_mask
    return mask & jnp.isin(rollout.tokens, jnp.asarray(ids, jnp.int32)) & (masking.positions(mask) >= config.after)


def cut(config: Truncation, ids: tuple[int, ...], rollout: Rollout) -> Rollout:
    """With `read_mask`: the completion up to the first token to cut at, or all where there is none."""
    at = _may_cut(config, ids, rollout)
    before = jnp.cumsum(at, axis=-1) - at
    return rollout.replace(read_mask=rollout.completion_mask & (before == 0))


def penalised(
    scores: Float[Array, " b"], config: Truncation | None, ids: tuple[int, ...], rollout: Rollout
) -> Float[Array, " b"]:
    """The shaped scores, and in place of those of completions without a token to cut at the penalty."""
    return scores if config is None else jnp.where(_may_cut(config, ids, rollout).any(-1), scores, config.score)
