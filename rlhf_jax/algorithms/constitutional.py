"""Constitutional AI's supervised phase: answer, critique, revision (Bai et al. 2022, §3).

A model answers each prompt, criticises its answer by a principle drawn from a constitution, and rewrites it; `rounds`
times, each by another draw. The stage makes rows (prompt, completion: the last revision) for an `sft` stage:
`data=FromStage("constitutional")`. The pairs of the paper's second phase are `ai_feedback`'s.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax.algorithms import made_rows
from rlhf_jax.algorithms.constitution import Principle, read_constitution
from rlhf_jax.algorithms.context import Context, Kind, Role, check_field, check_positive, named
from rlhf_jax.algorithms.prompting import Prompting, check_prompts, load_prompts
from rlhf_jax.data.encoding import chat_tokenizer
from rlhf_jax.data.formats import render
from rlhf_jax.data.prompt_rows import PromptRow
from rlhf_jax.data.sources import Data
from rlhf_jax.errors import UserError
from rlhf_jax.interop.tokenizers import Tokenizer
from rlhf_jax.sampling import Sampler, Sampling
from rlhf_jax.types import Key

Messages = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Config(Prompting):
    """Answers that a model has revised by principles."""

    policy: str = "base"
    """The stage of the model that answers, criticises and revises, or "base"; it should follow instructions."""
    constitution: str | None = None
    """A file of principles, see `algorithms.constitution`; none: those of the package."""
    rounds: int = 1
    """Critiques and revisions of an answer, one after the other."""
    prompts: int = 128
    """Prompts that are answered."""
    answer_tokens: int = 64
    """Most tokens of an answer, and of a revision."""
    critique_tokens: int = 64
    """Most tokens of a critique."""
    length: int = 512
    """Most tokens of a conversation before a critique or a revision; a prompt whose conversation gets longer is left
    out."""
    sampling: Sampling = field(default_factory=Sampling)
    """How all of them are drawn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "rounds", "prompts", "answer_tokens", "critique_tokens", "length")

    @property
    def produces(self) -> Kind:
        """Prompts and answers."""
        return "rows"

    def requires(self) -> dict[str, tuple[str, Role]]:
        """The model."""
        return named("policy", policy=self.policy)

    def check_inputs(self, data: Data) -> None:
        """The prompts and the principles."""
        check_prompts(self, data, labelled=False)
        check_field("constitution", lambda: read_constitution(self.constitution))

    def lengths(self) -> dict[str, int]:
        """The answer's conversation, and the longest one."""
        return {
            "prompt_tokens + answer_tokens (with BOS)": self.prompt_length + self.answer_tokens,
            "length + max(answer_tokens, critique_tokens)": self.length + max(self.answer_tokens, self.critique_tokens),
        }

    def batch_sizes(self) -> dict[str, int]:
        """Conversations."""
        return {"batch_size": self.batch_size}


class Said(NamedTuple):
    """What a model said: the text, what it had read, and what it wrote, with EOS where it was written."""

    text: str
    read: list[int]
    ids: list[int]


@dataclass(frozen=True)
class Revised:
    """A prompt's conversation on its way."""

    row: PromptRow
    principles: Sequence[Principle]
    answers: list[Said]
    critiques: list[str]

    @property
    def prompt(self) -> Messages:
        """What is answered."""
        return tuple(self.row.messages) or ({"role": "user", "content": self.row.text},)

    def before_critique(self, number: int) -> Messages:
        """The prompt, the newest answer, and what asks for its critique."""
        asked = {"role": "user", "content": self.principles[number].critique}
        return (*self.prompt, {"role": "assistant", "content": self.answers[-1].text}, asked)

    def before_revision(self, number: int) -> Messages:
        """The same with the critique, and what asks for the revision."""
        asked = {"role": "user", "content": self.principles[number].revision}
        return (*self.before_critique(number), {"role": "assistant", "content": self.critiques[-1]}, asked)

    def to_row(self) -> dict[str, Any]:
        """The prompt with its last revision, and how it came to it.

        Its ids are those that were read with the prompt, and written: a revision that was cut short has no EOS.
        """
        asked = dataclasses.replace(self.row, messages=self.prompt)
        row = made_rows.conversation(asked, {"completion": self.answers[-1].text})
        ids = {"prompt_tokens": self.answers[0].read, "completion_tokens": self.answers[-1].ids}
        used = [principle.critique for principle in self.principles]
        before = [answer.text for answer in self.answers[:-1]]
        return row | ids | {"answers": before, "critiques": self.critiques, "principles": used}


class Speaker:
    """The model as a function from conversations to what it says next."""

    def __init__(self, config: Config, context: Context) -> None:
        self._tokenizer, self._params, self._length = context.tokenizer, context.policy(config.policy), config.length
        self._samplers = {
            what: Sampler(
                context.spec,
                context.mesh,
                context.tokenizer,
                prompt_length=config.length,
                max_new_tokens=tokens,
                sampling=config.sampling,
                batch_size=config.batch_size,
            )
            for what, tokens in (("answer", config.answer_tokens), ("critique", config.critique_tokens))
        }

    def __call__(self, what: str, conversations: Sequence[Messages], key: Key) -> list[Said | None]:
        """What is said next in each; None where a conversation is too long."""
        rows = [encode(self._tokenizer, messages) for messages in conversations]
        fitting = [i for i, row in enumerate(rows) if len(row) <= self._length]
        said: list[Said | None] = [None] * len(rows)
        if fitting:
            for i, one in zip(
                fitting, self._samplers[what](self._params, [rows[i] for i in fitting], key), strict=True
            ):
                said[i] = Said(self._tokenizer.decode(one.tokens).strip(), rows[i], one.tokens)
        return said


def encode(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """A conversation up to where the assistant speaks: by the chat template, or as HH-RLHF writes conversations."""
    chat = chat_tokenizer(tokenizer)
    if chat is not None:
        return chat.encode_chat_prompt(messages)
    return [tokenizer.bos_id, *tokenizer.encode(f"{render(messages)}\n\nAssistant:")]


def train(config: Config, context: Context, name: str) -> dict[str, Any]:
    """Answer, criticise, revise, write the rows; the figures are for summary.json."""
    rows = load_prompts(config, context, name).train[: config.prompts]
    principles, rng = read_constitution(config.constitution), context.rng(f"{name}/principles")
    drawn = rng.integers(len(principles), size=(len(rows), config.rounds))
    speaker, key = Speaker(config, context), context.key(f"{name}/conversations")

    def revised(number: int, batch: Sequence[tuple[PromptRow, np.ndarray]]) -> made_rows.Rows:
        own = [Revised(row, [principles[i] for i in choice], [], []) for row, choice in batch]
        return [one.to_row() for one in revise(own, speaker, config.rounds, jax.random.fold_in(key, number))]

    items = list(zip(rows, drawn, strict=True))
    made = made_rows.in_batches(context, name, items, revised, batch_size=config.batch_size)
    if not made:
        raise UserError(f"{name}: length={config.length}: every one of the {len(rows)} conversations is longer")
    made_rows.write(context, name, made)
    first, last = ([answer.split() for answer in answers] for answers in _ends(made))
    return {
        "rows": len(made),
        "left_out": len(rows) - len(made),
        "changed": float(np.mean([a != b for a, b in zip(first, last, strict=True)])),
        "words_before": float(np.mean([len(words) for words in first])),
        "words_after": float(np.mean([len(words) for words in last])),
    }


def revise(own: Sequence[Revised], speaker: Speaker, rounds: int, key: Key) -> list[Revised]:
    """The conversations to their end, without those that get too long on the way, or fall silent."""
    own = _answered(own, speaker("answer", [one.prompt for one in own], jax.random.fold_in(key, 0)))
    for number in range(rounds):
        keys = [jax.random.fold_in(key, 1 + 2 * number + i) for i in range(2)]
        said = speaker("critique", [one.before_critique(number) for one in own], keys[0])
        own = [dataclasses.replace(one, critiques=[*one.critiques, new.text]) for one, new in _paired(own, said)]
        own = _answered(own, speaker("answer", [one.before_revision(number) for one in own], keys[1]))
    return own


def _answered(own: Sequence[Revised], said: Sequence[Said | None]) -> list[Revised]:
    return [dataclasses.replace(one, answers=[*one.answers, new]) for one, new in _paired(own, said)]


def _paired(own: Sequence[Revised], said: Sequence[Said | None]) -> list[tuple[Revised, Said]]:
    """Those in which something was said, with it."""
    return [(one, new) for one, new in zip(own, said, strict=True) if new is not None and new.text]


def _ends(rows: made_rows.Rows) -> tuple[list[str], list[str]]:
    """Each row's first answer and its last."""
    return [row["answers"][0] for row in rows], [row["completion"][0]["content"] for row in rows]
