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
from rlhf_jax.rewards.judging import LETTERS, Ask, LocalJudge, Pair, Said, ask
from rlhf_jax.types import Params


def local_judge(judge: LocalJudge, spec: ModelSpec, mesh: Mesh, tokenizer: Tokenizer, params: Params) -> Ask:
    """A model of the run as a judge; raises UserError for a tokenizer that has no token of its own for each letter."""
    first, second = (_letter(tokenizer, letter) for letter in LETTERS)
    probability = judging_program(spec, first, second)

    def asked(pairs: Sequence[Pair]) -> list[Said]:
        read = [_question(judge, tokenizer, pair) for pair in pairs]
        rows, found = [tokens for tokens, _ in read if tokens], []
        for start in range(0, len(rows), judge.batch_size):
            part = rows[start : start + judge.batch_size]
            filled = part + part[:1] * (judge.batch_size - len(part))
            batch = pad_left(filled, length=judge.length, pad_id=tokenizer.pad_id)
            with sharding.scope(mesh):
                found += hosts.fetch(probability(params, *sharding.shard_batch(mesh, batch)))[: len(part)].tolist()
        answers = iter(found)
        return [Said(next(answers) if tokens else None, is_cut) for tokens, is_cut in read]

    return asked


def check_local_judge(
    judge: LocalJudge, tokenizer: Tokenizer, *, principles: Sequence[str], completion_tokens: int
) -> None:
    """Raise UserError for a tokenizer that has no token of its own for each letter, or a `judge.length` that two whole
    completions do not fit into with the longest question about them, though its prompt be empty.
    """
    for letter in LETTERS:
        _letter(tokenizer, letter)
    empty = [ask(judge.template, principle=principle, prompt="", first="", second="") for principle in principles]
    asked = max(len(_encoded(tokenizer, text)) for text in empty)
    if asked + 2 * completion_tokens > judge.length:
        raise UserError(
            f"judge.length={judge.length} must hold a question of {asked} tokens, its prompt left out, and two "
            f"completions of {completion_tokens}: at least {asked + 2 * completion_tokens}"
        )


def judging_program(spec: ModelSpec, first: int, second: int) -> Callable[[Params, Array, Array], Float[Array, " b"]]:
    """P(token `first`), of it and `second`, after rows padded on the left; compiled, of (params, tokens, mask)."""

    def program(params: Params, tokens: Array, mask: Array) -> Float[Array, " b"]:
        last = models.hidden(spec, params, tokens, mask, read=slice(-1, None))
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


def _question(judge: LocalJudge, tokenizer: Tokenizer, pair: Pair) -> tuple[list[int] | None, bool]:
    """A pair's question, and whether its prompt lost its start; None where it is too long even without a prompt, as
    completions may be whose text has more tokens than were written.
    """
    tokens = _encoded(tokenizer, pair.question(judge.template))
    if len(tokens) <= judge.length:
        return tokens, False
    prompt = tokenizer.encode(pair.prompt)
    while prompt and len(tokens) > judge.length:
        prompt = prompt[len(tokens) - judge.length :]
        tokens = _encoded(tokenizer, pair._replace(prompt=tokenizer.decode(prompt)).question(judge.template))
    return (tokens if len(tokens) <= judge.length else None), True


def _encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    chat = chat_tokenizer(tokenizer)
    if chat is not None:
        return chat.encode_chat_prompt([{"role": "user", "content": text}])
    return [tokenizer.bos_id, *tokenizer.encode(f"{text}\n\nAnswer:")]
