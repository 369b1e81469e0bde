"""Prompts of an on-policy stage: openings of reviews, or rows of a source."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from rlhf_jax.algorithms.context import Context, check_field, check_positive, check_prompt_tokens
from rlhf_jax.data import formats
from rlhf_jax.data.encoding import Selected
from rlhf_jax.data.formats import Prompt
from rlhf_jax.data.prompt_rows import PromptRow, Prompts, TooLong, select_prompts
from rlhf_jax.data.prompts import review_prompts
from rlhf_jax.data.reading import read
from rlhf_jax.data.reviews import Review
from rlhf_jax.data.sources import Data, Source
from rlhf_jax.data.text import fitted
from rlhf_jax.data.texts import check_texts
from rlhf_jax.errors import UserError
from rlhf_jax.interop.tokenizers import Tokenizer
from rlhf_jax.sampling import Sampling, Turns


@dataclass(frozen=True)
class Prompting:
    """Fields of a stage that say which prompts its policy completes."""

    data: Source | None = None
    """Rows of prompts; none: openings of the experiment's reviews."""
    prompt_tokens: tuple[int, int] = (2, 8)
    """Fewest and most tokens of a prompt, BOS not counted; of rows the most counts alone."""
    too_long: TooLong = "paragraph"
    """A row's longer prompt is cut before its last paragraph, at a line break where one is near; loses its start; or is
    dropped."""
    as_chat: bool = False
    """Whether a row's prompt that is a text goes by the chat template too, as what a user says."""
    batch_size: int = 128
    """Completions an iteration."""
    evaluation_prompts: int = 256
    """Prompts of the test split, or at most so many held-out rows, sampled with the first and the last policy."""

    def __post_init__(self) -> None:
        check_positive(self, "batch_size", "evaluation_prompts")
        check_prompt_tokens(self.prompt_tokens)
        if self.as_chat and self.data is None:
            raise ValueError("as_chat: openings of reviews are no conversations; name rows by data, or leave it False")

    @property
    def copies(self) -> int:
        """How often each prompt stands in a batch."""
        return 1

    @property
    def prompt_length(self) -> int:
        """Columns of a prompt: BOS and the most tokens."""
        return 1 + self.prompt_tokens[1]


@dataclass(frozen=True)
class Completing(Prompting):
    """Fields of a stage in which policies complete prompts."""

    completion_tokens: int = 40
    """Most tokens of a completion."""
    sampling: Sampling = field(default_factory=Sampling)
    """How completions are drawn."""
    turns: Turns | None = None
    """Rows of a batch take turns while they are sampled, which is faster where many end early; none: all at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "completion_tokens")

    @property
    def turn_rows(self) -> dict[str, int]:
        """Rows that are decoded at once, by their field, where they take turns."""
        return {} if self.turns is None else {"turns.slots": min(self.turns.slots, self.batch_size)}

    def lengths(self) -> dict[str, int]:
        """BOS, prompt and completion."""
        return {"prompt_tokens + completion_tokens (with BOS)": self.prompt_length + self.completion_tokens}


def check_prompts(config: Prompting, data: Data, *, labelled: bool) -> list[Prompt]:
    """All rows of prompts, or one empty one for openings of texts; UserError for what is wrong with them."""
    if config.data is None:
        check_field("data=None", lambda: check_texts(data, labelled=labelled))
        return [Prompt("", (), {})]
    try:
        return [row for part in read(config.data, formats.prompt) for row in (*part.train, *part.heldout)]
    except UserError as error:
        raise UserError(f"data: {error}") from None


def load_prompts(config: Prompting, context: Context, name: str) -> Selected[PromptRow]:
    """A source's prompts, or openings of validation reviews, and of as many test reviews as are evaluated on."""
    if config.data is None:
        reviews = context.reviews
        most = max(len(reviews.validation), config.batch_size)
        train = openings(context, reviews.validation, name, tokens=config.prompt_tokens, count=most)
        heldout = heldout_openings(context, name, tokens=config.prompt_tokens, count=config.evaluation_prompts)
        return Selected(train, heldout, reviews.counts)
    selected = select_prompts(
        config.data,
        context.tokenizer,
        length=config.prompt_length,
        too_long=config.too_long,
        as_chat=config.as_chat,
    )
    order = context.rng(f"{name}/evaluation").permutation(len(selected.heldout))
    some = sorted(order[: config.evaluation_prompts].tolist())
    return Selected(selected.train, [selected.heldout[i] for i in some], selected.counts)


def heldout_openings(context: Context, name: str, *, tokens: tuple[int, int], count: int) -> list[PromptRow]:
    """Openings of test reviews, which nothing was trained on: what a stage is evaluated on."""
    return openings(context, context.reviews.test, f"{name}/evaluation", tokens=tokens, count=count)


def openings(
    context: Context, reviews: Sequence[Review], stream: str, *, tokens: tuple[int, int], count: int
) -> list[PromptRow]:
    """So many openings of reviews, of fewest and most `tokens`, drawn by the random `stream` of a stage."""
    tokenizer, rng = context.tokenizer, context.rng(stream)
    chosen = review_prompts(reviews, tokenizer, tokens=tokens, count=count, rng=rng)
    return [PromptRow(tuple(ids), tokenizer.decode(ids), {}) for ids in chosen]


def prompt_batches(rows: Sequence[PromptRow], config: Prompting, context: Context) -> Prompts:
    """Endless batches of the prompts to train on, with their rows."""
    return Prompts(
        rows,
        length=config.prompt_length,
        pad_id=context.tokenizer.pad_id,
        batch_size=config.batch_size,
        seed=context.seed,
        copies=config.copies,
    )


def prompts_of(rows: Sequence[Sequence[int]], tokenizer: Tokenizer, *, length: int, count: int) -> list[PromptRow]:
    """The first `count` distinct prompts of rows in tokens, each in at most `length`, its first token always left."""
    several = dict.fromkeys(tuple(fitted(tokens, (), length=length)[0]) for tokens in rows)
    return [PromptRow(tokens, tokenizer.decode(list(tokens)), {}) for tokens in list(several)[:count]]
