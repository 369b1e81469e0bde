"""What every on-policy stage shares around its algorithm: prompts, texts, and the reading before and after."""

from collections.abc import Sequence

import flax.struct
import grain
import jax

from rlhf_jax.algorithms.context import BASE, Context
from rlhf_jax.data.prompts import prompt_batches, review_prompts
from rlhf_jax.evals.policy import PolicyEvaluation, Row
from rlhf_jax.interop.tokenizers import Tokenizer
from rlhf_jax.metrics import read_jsonl
from rlhf_jax.models import lora
from rlhf_jax.rewards.sentiment import GoldClassifier, vader
from rlhf_jax.sampling import Sampler, Sampling
from rlhf_jax.types import Params, Rollout


@flax.struct.dataclass
class Frozen:
    """What no on-policy stage trains: reference, reward model, and the weights under all networks' adapters."""

    reference: Params
    reward: Params
    base: Params
    head_base: Params

    def policy(self, own: Params) -> Params:
        """A whole policy, as models read it: its own parameters over the shared base."""
        return lora.merge(self.base, own)

    def network(self, own: Params) -> Params:
        """A whole reward model or critic: trunk and head."""
        return lora.merge(self.head_base, own)


def frozen(context: Context, *, policy: str, reward: str) -> Frozen:
    """The reference, which is the policy's start, and a reward model, from the stages that made them.

    The model itself (BASE) as a reference is the base without adapters.
    """
    shared = policy == BASE and context.spec.lora is not None
    return Frozen(
        reference={} if shared else context.policy_params(policy),
        reward=context.head_params(reward),
        base=context.base,
        head_base=context.head_base,
    )


def prompts(context: Context, name: str, *, tokens: tuple[int, int], batch_size: int) -> grain.DatasetIterator:
    """Endless batches of prompts from the validation reviews."""
    reviews, tokenizer = context.reviews.validation, context.tokenizer
    count = max(len(reviews), batch_size)
    pool = review_prompts(reviews, tokenizer, tokens=tokens, count=count, rng=context.rng(name))
    return prompt_batches(pool, length=1 + tokens[1], pad_id=tokenizer.pad_id, batch_size=batch_size, seed=context.seed)


def largest(context: Context, name: str, *metrics: str) -> dict[str, float]:
    """The largest value of each metric over a stage's steps, those of earlier sessions included."""
    lines = [line for line in read_jsonl(context.workdir / "metrics.jsonl") if line["stage"] == name]
    return {metric: max(line[metric] for line in lines) for metric in metrics}


def texts(rollout: Rollout, tokenizer: Tokenizer) -> list[str]:
    """Prompt and completion of each row, as a judge reads them."""
    tokens, mask = jax.device_get((rollout.tokens, rollout.mask))
    return [tokenizer.decode(row[kept].tolist()) for row, kept in zip(tokens, mask, strict=True)]


def evaluate(
    context: Context,
    name: str,
    policies: Sequence[Params],
    *,
    reference: Params,
    reward: Params,
    gold: GoldClassifier,
    prompt_tokens: tuple[int, int],
    completion_tokens: int,
    sampling: Sampling,
    count: int,
    batch_size: int,
) -> list[list[Row]]:
    """Let each policy complete the same prompts from the test reviews, and read what it writes."""
    tokenizer, stream = context.tokenizer, f"{name}/evaluation"
    chosen = review_prompts(context.reviews.test, tokenizer, tokens=prompt_tokens, count=count, rng=context.rng(stream))
    sampler = Sampler(
        context.spec,
        context.mesh,
        tokenizer,
        prompt_length=1 + prompt_tokens[1],
        max_new_tokens=completion_tokens,
        sampling=sampling,
        batch_size=batch_size,
    )
    evaluation = PolicyEvaluation(
        context.spec,
        context.mesh,
        tokenizer,
        sampler,
        chosen,
        context.key(stream),
        judges={"gold": gold, "vader": vader},
        temperature=sampling.temperature,
    )
    return [evaluation(params, reference, reward) for params in policies]
