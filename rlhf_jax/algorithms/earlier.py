"""What a stage takes of pairs that earlier stages have made, checked before any of them runs."""

from collections.abc import Mapping

from rlhf_jax.algorithms import ai_feedback, preference, reward_model, reward_units
from rlhf_jax.algorithms.comparisons import SampledPairs, check_apart
from rlhf_jax.algorithms.context import StageConfig, check_field
from rlhf_jax.algorithms.made_rows import named_stages
from rlhf_jax.data.sources import Data
from rlhf_jax.errors import UserError


def check_earlier(name: str, stages: Mapping[str, StageConfig], data: Data) -> None:
    """Raise UserError where a stage cannot learn from the pairs of an earlier one that it names, or be normalised."""
    stage = stages[name]
    if not isinstance(stage, preference.Config | reward_model.Config):
        return
    if isinstance(stage, reward_model.Config) and stage.normalizes and stage.normalize_on != "samples":
        check_field(f"stages.{name}.normalize_on", lambda: reward_units.source(stage, data))
    if isinstance(stage.pairs, SampledPairs):
        _check_sampled(name, stage.pairs, stages)
    for field, made in named_stages(stage).items():
        labels = field.startswith("pairs") and isinstance(stages[made], ai_feedback.Config)
        if labels and stage.certain is not None:
            raise UserError(
                f"stages.{name}.{field}: {made!r} writes each pair with a probability, and {stage.certain} takes no "
                f"soft labels"
            )


def _check_sampled(name: str, pairs: SampledPairs, stages: Mapping[str, StageConfig]) -> None:
    """An earlier stage's sampled pairs are such, and hold out as much."""
    for i, stage in enumerate(pairs.earlier):
        theirs = vars(stages[stage]).get("pairs")
        if not isinstance(theirs, SampledPairs):
            raise UserError(
                f"stages.{name}.pairs.earlier[{i}]: {stage!r} samples no pairs: its own are no SampledPairs"
            )
        check_apart(f"stages.{name}", pairs, stage, theirs.heldout_prompts)
