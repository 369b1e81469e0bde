"""RLAIF: preferences of a judge instead of people's (Bai et al. 2022, Constitutional AI, §4; Lee et al. 2023).

A policy completes each prompt twice, a judge reads both in both orders unless they are the same, and the pair is kept
with the judge's probability. The stage makes rows (prompt, chosen, rejected, probability) for a `reward_model` or
`preference` stage, `pairs=FromStage("ai_feedback")`, whose loss takes the probability as the label (Bai et al. 2022,
§4.1; Lee et al. 2023, section 2.2.1). A pair of probability 1/2 exactly says nothing, and is left out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax.algorithms import made_rows, pair_judges
from rlhf_jax.algorithms.constitution import read_constitution
from rlhf_jax.algorithms.context import Context, Kind, Role, check_field, check_positive, named
from rlhf_jax.algorithms.prompting import Prompting, check_prompts, load_prompts
from rlhf_jax.data.prompt_rows import PromptRow
from rlhf_jax.data.sources import Data
from rlhf_jax.errors import UserError
from rlhf_jax.evals.preferences import accuracy_interval
from rlhf_jax.interop.tokenizers import Tokenizer
from rlhf_jax.numerics import require
from rlhf_jax.rewards.judging import Ask, Judge, LocalJudge, Pair, Verdict, verdicts
from rlhf_jax.rewards.sentiment import GoldClassifier
from rlhf_jax.sampling import Sampler, Sampling


@dataclass(frozen=True)
class Config(Prompting):
    """Pairs of a policy's completions, judged by a model."""

    policy: str = "sft"
    """The stage whose completions are judged, or "base"."""
    judge: Judge = field(default_factory=LocalJudge)
    """What judges them."""
    principles: tuple[str, ...] = ()
    """By what the better completion is chosen, in words; each pair is judged by one, drawn at random. None: the
    constitution's."""
    constitution: str | None = None
    """A file of principles, see `algorithms.constitution`; none: those of the package."""
    prompts: int = 256
    """Prompts that are completed."""
    completion_tokens: int = 40
    """Most tokens of a completion."""
    sampling: Sampling = field(default_factory=Sampling)
    """How completions are drawn."""
    least_confidence: float = 0.0
    """Pairs whose probability is nearer to a half than this are left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "prompts", "completion_tokens")
        require("least_confidence", self.least_confidence, "[0, 0.5)")
        if self.principles and self.constitution is not None:
            raise ValueError("principles and constitution: only one of the two can say by what pairs are judged")
        if self.batch_size % 2:
            raise ValueError(f"batch_size={self.batch_size} must be even: two completions a prompt")

    @property
    def produces(self) -> Kind:
        """Pairs."""
        return "rows"

    def requires(self) -> dict[str, tuple[str, Role]]:
        """The policy, and a judge of the run."""
        judge = {"judge.model": self.judge.model} if isinstance(self.judge, LocalJudge) else {}
        return named("policy", policy=self.policy, **judge)

    def check_inputs(self, data: Data) -> None:
        """The prompts and the principles."""
        check_prompts(self, data, labelled=False)
        check_field("constitution", lambda: read_constitution(self.constitution))

    @property
    def asked_by(self) -> tuple[str, ...]:
        """The principles, in words."""
        return self.principles or tuple(one.preference for one in read_constitution(self.constitution))

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """The judge's letters, and whether its questions fit."""
        pair_judges.check(self.judge, tokenizer, principles=self.asked_by, completion_tokens=self.completion_tokens)

    def lengths(self) -> dict[str, int]:
        """What is sampled, and what the judge reads."""
        judge = {"judge.length": self.judge.length} if isinstance(self.judge, LocalJudge) else {}
        return {"prompt_tokens + completion_tokens (with BOS)": self.prompt_length + self.completion_tokens} | judge

    def batch_sizes(self) -> dict[str, int]:
        """Completions, and questions to a judge of the run."""
        judge = {"judge.batch_size": self.judge.batch_size} if isinstance(self.judge, LocalJudge) else {}
        return {"batch_size": self.batch_size} | judge


def train(config: Config, context: Context, name: str) -> dict[str, Any]:
    """Sample, judge, write the pairs; the figures are for summary.json."""
    rows = load_prompts(config, context, name).train[: config.prompts]
    principles = config.asked_by
    drawn = [principles[i] for i in context.rng(f"{name}/principles").integers(len(principles), size=len(rows))]
    complete, judge = _completions(config, context, name), pair_judges.of(config.judge, context, name)

    def judged(number: int, batch: Sequence[tuple[PromptRow, str]]) -> made_rows.Rows:
        written = complete(number, [row for row, _ in batch])
        pairs = zip(batch, written[::2], written[1::2], strict=True)
        return _judged(judge, [(row, principle, a, b) for (row, principle), a, b in pairs])

    items = list(zip(rows, drawn, strict=True))
    made = made_rows.in_batches(context, name, items, judged, batch_size=config.batch_size // 2)
    differ = [row for row in made if row["chosen"] != row["rejected"]]
    decided = [row for row in differ if row["probability"] != 0.5]
    kept = [row for row in decided if row["probability"] - 0.5 >= config.least_confidence]
    if not kept:
        raise UserError(f"{name}: of {len(made)} pairs {len(differ)} differ, and of none is the judge sure enough")
    made_rows.write(context, name, [{k: v for k, v in row.items() if k not in _READINGS} for row in kept])
    figures = {"pairs": len(kept), "left_out": len(made) - len(kept), **_figures(differ)}
    figures["undecided"] = len(differ) - len(decided)
    if config.data is None and context.labelled:
        figures |= _agreement(kept, context)
    return figures | pair_judges.costs(judge)


_READINGS = ("as_a", "as_b", "unread", "cut", "asked")


class Written(NamedTuple):
    """A completion: its text, and the ids that were written, with EOS where it was."""

    text: str
    ids: list[int]


def _completions(config: Config, context: Context, name: str) -> Callable[[int, Sequence[PromptRow]], list[Written]]:
    """Of a batch, by its number: two completions a prompt, side by side."""
    sampler = Sampler(
        context.spec,
        context.mesh,
        context.tokenizer,
        prompt_length=config.prompt_length,
        max_new_tokens=config.completion_tokens,
        sampling=config.sampling,
        batch_size=config.batch_size,
    )
    params, key = context.policy(config.policy), context.key(f"{name}/completions")

    def complete(number: int, rows: Sequence[PromptRow]) -> list[Written]:
        prompts = [list(row.tokens) for row in rows for _ in range(2)]
        samples = sampler(params, prompts, jax.random.fold_in(key, number))
        return [Written(context.tokenizer.decode(sample.tokens), sample.tokens) for sample in samples]

    return complete


def _judged(judge: Ask, pairs: Sequence[tuple[PromptRow, str, Written, Written]]) -> made_rows.Rows:
    """A row a pair, the better completion chosen."""
    asked = [Pair(principle, row.text, a.text, b.text) for row, principle, a, b in pairs]
    rows = []
    for (row, principle, a, b), verdict in zip(pairs, verdicts(judge, asked), strict=True):
        p = verdict.probability
        chosen, rejected = (a, b) if p >= 0.5 else (b, a)
        ids = {"prompt_tokens": list(row.tokens), "chosen_tokens": chosen.ids, "rejected_tokens": rejected.ids}
        rows.append(
            made_rows.conversation(row, {"chosen": chosen.text, "rejected": rejected.text})
            | {"probability": max(p, 1 - p), "principle": principle, **vars(verdict), **ids}
        )
    return rows


def _figures(rows: made_rows.Rows) -> dict[str, float]:
    """How sure the judge is of pairs that differ, and how much it minds the order."""
    verdicts = [Verdict(row["as_a"], row["as_b"]) for row in rows]
    return {
        "confidence": float(np.mean([row["probability"] for row in rows])),
        "flipped": float(np.mean([verdict.is_flipped for verdict in verdicts])),
        "chose_a": float(np.mean([(verdict.as_a + 1 - verdict.as_b) / 2 for verdict in verdicts])),
        "unread": int(sum(row["unread"] for row in rows)),
        "questions_cut": int(sum(row["cut"] for row in rows)),
    }


def _agreement(rows: made_rows.Rows, context: Context) -> dict[str, float]:
    """How often the judge chooses as the gold classifier does, beside a half by chance."""
    gold = GoldClassifier.fit(context.reviews.train)
    chosen, rejected = (gold([row["prompt"] + row[which] for row in rows]) for which in ("chosen", "rejected"))
    wins = float(((np.sign(chosen - rejected) + 1) / 2).sum())
    low, high = accuracy_interval(wins, len(rows))
    return {"agreement": wins / len(rows), "agreement_low": low, "agreement_high": high}
