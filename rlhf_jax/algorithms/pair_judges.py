"""Who says which of two completions is better: a model of the run, or one behind an endpoint."""

from collections.abc import Sequence
from pathlib import Path

from rlhf_jax import hosts
from rlhf_jax.algorithms.context import Context
from rlhf_jax.interop.tokenizers import Tokenizer
from rlhf_jax.rewards.endpoint import Client
from rlhf_jax.rewards.judging import Ask, EndpointJudge, Judge, LocalJudge, Pair, Said, read_answer
from rlhf_jax.rewards.local_judge import check_local_judge, local_judge


class EndpointAsk:
    """An endpoint as a judge: process 0 asks it, and keeps what it says in `<stage>/answers.jsonl`."""

    def __init__(self, judge: EndpointJudge, cache: Path) -> None:
        self._judge, self._client = judge, Client(judge.endpoint, cache)
        self.costs = self._client.costs

    def __call__(self, pairs: Sequence[Pair]) -> list[Said]:
        """What is said of each."""
        questions = [self._judge.question(pair.question(self._judge.template)) for pair in pairs]
        return hosts.from_writer(lambda: [Said(read_answer(answer)) for answer in self._client(questions)])


def of(judge: Judge, context: Context, name: str) -> Ask:
    """A stage's judge; every process asks it the same questions."""
    if isinstance(judge, EndpointJudge):
        return EndpointAsk(judge, context.stage_dir(name) / "answers.jsonl")
    return local_judge(judge, context.spec, context.mesh, context.tokenizer, context.policy(judge.model))


def check(judge: Judge, tokenizer: Tokenizer, *, principles: Sequence[str], completion_tokens: int) -> None:
    """Raise UserError where a model of the run cannot judge by its tokenizer; an endpoint has one of its own."""
    if isinstance(judge, LocalJudge):
        check_local_judge(judge, tokenizer, principles=principles, completion_tokens=completion_tokens)


def costs(ask: Ask) -> dict[str, float]:
    """What an endpoint's answers have cost; nothing of a model of the run."""
    return hosts.from_writer(ask.costs) if isinstance(ask, EndpointAsk) else {}
