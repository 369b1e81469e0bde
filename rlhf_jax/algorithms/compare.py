"""Two policies of a run side by side: what each writes for the same held-out prompts, and what is said of it.

On-policy stages end with such a reading; this is one for stages that do not sample, or of any two policies.
"""

import math
from dataclasses import dataclass
from typing import Any

from rlhf_jax import hosts
from rlhf_jax.algorithms import made_rows, onpolicy
from rlhf_jax.algorithms.context import Context, Kind, Role, named
from rlhf_jax.algorithms.evaluation import Drawing, evaluate
from rlhf_jax.algorithms.onpolicy import Rewarded
from rlhf_jax.algorithms.prompting import load_prompts
from rlhf_jax.errors import NonFiniteError
from rlhf_jax.evals.policy import compare, write_samples


@dataclass(frozen=True)
class Config(Rewarded):
    """Completions of held-out prompts by a policy and by a reference, with scores, KL, and judges' readings."""

    reference: str = "sft"
    """The stage whose policy stands before, and to which KL is read; or "base"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.policy == self.reference:
            raise ValueError(f"reference={self.reference!r} is the policy too; name another stage")

    @property
    def produces(self) -> Kind:
        """The policy's completions with their scores."""
        return "rows"

    def requires(self) -> dict[str, tuple[str, Role]]:
        """The reference too."""
        return super().requires() | named("policy", reference=self.reference)

    def batch_sizes(self) -> dict[str, int]:
        """What is sampled at once."""
        return {"batch_size": self.batch_size} | self.turn_rows


def train(config: Config, context: Context, name: str) -> dict[str, Any]:
    """Let both complete the prompts; the figures are for summary.json, the reference's as before."""
    prompts = load_prompts(config, context, name)
    reference = context.policy(config.reference)
    drawing = Drawing(
        config.prompt_length, config.completion_tokens, config.sampling, config.batch_size, turns=config.turns
    )
    with onpolicy.reward_of(config, context, name) as (reward, ensemble):
        before, after = evaluate(
            drawing,
            context,
            name,
            (reference, context.policy(config.policy)),
            prompts=prompts.heldout,
            reference=reference,
            reward=reward,
            ensemble=ensemble,
            judges=onpolicy.judges(config, context),
        )
    broken = [row for row in (*before, *after) if not math.isfinite(row.readings["score"])]
    if broken:
        raise NonFiniteError(f"{name}: a score is {broken[0].readings['score']}: {broken[0].completion[:80]!r}")
    if hosts.is_writer():
        write_samples(context.stage_dir(name) / "samples.jsonl", before, after, step=1)
    rows = [made_rows.written(prompt, row) for prompt, row in zip(prompts.heldout, after, strict=True)]
    made_rows.write(context, name, rows)
    counts = {} if config.data is None else prompts.counts.figures()
    return {**compare(before, after), **counts}
