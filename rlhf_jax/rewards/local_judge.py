"""A model of the run as a judge: the log-probs of "A" and "B" as the next token of a question."""

from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from rlhf_jax import hosts, lockstep, models, sharding
from rlhf_jax.data.encoding import chat_tokenizer
from rlhf_jax.data.prompts import pad_left
from rlhf_jax.errors import UserError
from rlhf_jax.interop.tokenizers import Tokenizer
from rlhf_jax.models import ModelSpec
from rlhf_jax.rewards.judging import LETTERS, Ask, LocalJudge
from rlhf_jax.types import Params


def local_judge(judge: LocalJudge, spec: ModelSpec, mesh: Mesh, tokenizer: Tokenizer, params: Params) -> Ask:
    """A model of the run as a judge; raises UserError for a tokenizer that has no token of its own for each letter."""
    first, second = (_letter(tokenizer, letter) for letter in LETTERS)
    probability = judging_program(spec, first, second)

    def asked(questions: Sequence[str]) -> list[float | None]:
        rows, found = [_question(judge, tokenizer, text) for text in questions], []
        for start in range(0, len(rows), judge.batch_size):
            part = rows[start : start + judge.batch_size]
            filled = part + part[:1] * (judge.batch_size - len(part))
            batch = pad_left(filled, length=judge.length, pad_id=tokenizer.pad_id)
            with sharding.scope(mesh):
                found += hosts.fetch(probability(params, *sharding.shard_batch(mesh, batch)))[: len(part)].tolist()
        return found

    return asked


def judging_program(spec: ModelSpec, first: int, second: int) -> Callable[[Params, Array, Array], Float[Array, " b"]]:
    """P(token `first`), of it and `second`, after rows padded on the left; compiled, of (params, tokens, mask)."""

    def program(params: Params, tokens: Array, mask: Array) -> Float[Array, " b"]:
        last = models.hidden(spec, params, tokens, mask)[:, -1:]
        logits = models.unembed(spec, params, last)[:, 0]
        return jax.nn.sigmoid(logits[:, first] - logits[:, second])

    return lockstep.jit(program)


def _letter(tokenizer: Tokenizer, letter: str) -> int:
    """The token that an answer begins with: after a chat template the bare letter, else one after "Answer:"."""
    if chat_tokenizer(tokenizer) is not None:
        ids = tokenizer.encode(letter)
    else:
        ids = tokenizer.encode(f"Answer: {letter}")[len(tokenizer.encode("Answer:")) :]
    if len(ids) != 1:
        raise UserError(f"judge: the tokenizer has no token of its own for the answer {letter!r}")
    return ids[0]


def _question(judge: LocalJudge, tokenizer: Tokenizer, text: str) -> list[int]:
    chat = chat_tokenizer(tokenizer)
    if chat is not None:
        tokens = chat.encode_chat_prompt([{"role": "user", "content": text}])
    else:
        tokens = [tokenizer.bos_id, *tokenizer.encode(f"{text}\n\nAnswer:")]
    if len(tokens) > judge.length:
        shown = " ".join(text.split())[:80]
        raise UserError(f"judge.length={judge.length}: a question has {len(tokens)} tokens: {shown!r}")
    return tokens
