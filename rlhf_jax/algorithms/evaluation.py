"""Policies read by what they write, for every stage that trains one: the same prompts, key and judges."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_jax.algorithms.context import Context
from rlhf_jax.data.prompt_rows import PromptRow
from rlhf_jax.evals.policy import Cut, Judge, PolicyEvaluation, Row, Scorer
from rlhf_jax.models import Policy
from rlhf_jax.rewards.ensemble import Ensemble
from rlhf_jax.rewards.sentiment import GoldClassifier, vader
from rlhf_jax.rewards.with_network import NetworkPart
from rlhf_jax.sampling import Sampler, Sampling, Turns
from rlhf_jax.types import Params


@dataclass(frozen=True)
class Drawing:
    """How completions are drawn to be read."""

    prompt_length: int
    """Columns of a prompt, BOS included."""
    completion_tokens: int
    """Most tokens of a completion."""
    sampling: Sampling
    batch_size: int
    """Completions at once."""
    temperature: float | None = None
    """Of the log-probs in the KL; none: that of `sampling`."""
    turns: Turns | None = None
    """How rows take turns; none: all of a batch at once."""


def sentiment_judges(context: Context) -> dict[str, Judge]:
    """Who reads openings of labelled reviews with what follows them: a classifier fitted on others, and VADER."""
    return {"gold": GoldClassifier.fit(context.reviews.train), "vader": vader}


def evaluator(
    drawing: Drawing,
    context: Context,
    stream: str,
    *,
    prompts: Sequence[PromptRow],
    reward: Params | Scorer,
    ensemble: Ensemble | None = None,
    judges: Mapping[str, Judge],
    cut: Cut | None = None,
    network: tuple[NetworkPart, Params] | None = None,
) -> PolicyEvaluation:
    """What lets a policy complete the prompts, by the random `stream` of a stage, and reads what it writes."""
    sampler = Sampler(
        context.spec,
        context.mesh,
        context.tokenizer,
        prompt_length=drawing.prompt_length,
        max_new_tokens=drawing.completion_tokens,
        sampling=drawing.sampling,
        batch_size=drawing.batch_size,
        turns=drawing.turns,
    )
    return PolicyEvaluation(
        context.spec,
        context.mesh,
        context.tokenizer,
        sampler,
        prompts,
        context.key(stream),
        reward=reward,
        ensemble=ensemble,
        judges=judges,
        cut=cut,
        network=network,
        temperature=drawing.sampling.temperature if drawing.temperature is None else drawing.temperature,
    )


def evaluate(
    drawing: Drawing,
    context: Context,
    name: str,
    policies: Sequence[Policy],
    *,
    prompts: Sequence[PromptRow],
    reference: Params,
    reward: Params | Scorer,
    ensemble: Ensemble | None = None,
    judges: Mapping[str, Judge],
    cut: Cut | None = None,
    network: tuple[NetworkPart, Params] | None = None,
) -> list[list[Row]]:
    """Let each policy complete the same prompts, and read what it writes; a reward that is {} gives no scores.

    The reward reads what `cut` leaves of a completion; a `network` may stand beside one that is a function.
    """
    read = evaluator(
        *(drawing, context, f"{name}/evaluation"),
        prompts=prompts,
        reward=reward,
        ensemble=ensemble,
        judges=judges,
        cut=cut,
        network=network,
    )
    return [read(policy, reference) for policy in policies]
