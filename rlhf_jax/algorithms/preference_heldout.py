"""What a policy makes of held-out judgements: each loss, how well the implicit rewards rank, and by how much.

Shapes: n pairs or completions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from rlhf_jax import losses
from rlhf_jax.algorithms.preference_losses import Side, Term, weighted
from rlhf_jax.data.preferences import PreferenceGroup
from rlhf_jax.data.thumbs import Liked
from rlhf_jax.evals.bootstrap import Statistic, area_under_curve, mean_of, with_interval
from rlhf_jax.types import Hyper


@dataclass(frozen=True)
class HeldOut:
    """Figures of held-out rows, each as a function of the rows' weights."""

    prompts: Sequence[int]
    """The rows' prompts by number."""
    figures: Mapping[str, Statistic]
    by_length: tuple[str, Statistic]
    """The figure that says how well the policy ranks, and what the completions' lengths alone make of it."""

    def means(self) -> dict[str, float]:
        """The figures, in metrics."""
        return self._read(intervals=False)

    def summary(self) -> dict[str, float]:
        """With 95% intervals over prompts, and what a constant and the lengths alone, longer or shorter, rank right."""
        name, statistic = self.by_length
        longer = statistic(np.ones(len(self.prompts)))
        baselines = {"baseline": 0.5, "by_length": max(longer, 1 - longer)} if name in self.figures else {}
        return self._read(intervals=True) | {f"heldout_{name}_{how}": value for how, value in baselines.items()}

    def _read(self, *, intervals: bool) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, statistic in self.figures.items():
            found |= with_interval(f"heldout_{name}", statistic, self.prompts, intervals=intervals and name != "loss")
        return found


def of_pairs(
    terms: Sequence[Term], groups: Sequence[PreferenceGroup], logps: Float[np.ndarray, "g k"], hyper: Hyper
) -> HeldOut:
    """Pairs by a policy's log-probs; accuracy and margin are the first loss's own, of aot those of dpo.

    A constant has an accuracy of 1/2. The loss is by the pairs' probabilities, as in training; the accuracy is how
    often the chosen one is ahead.
    """
    pairs = [(group, index, pair) for index, group in enumerate(groups) for pair in group.pairs]
    prompts = {tokens: index for index, tokens in enumerate(dict.fromkeys(group.prompt_tokens for group in groups))}
    chosen, rejected = (
        Side(
            np.asarray([logps[index][pair[place]] for _, index, pair in pairs], np.float32),
            np.asarray(
                [(group.ref_logps or logps[index] * 0)[pair[place]] for group, index, pair in pairs], np.float32
            ),
            np.asarray([len(group.completion_tokens[pair[place]]) for group, _, pair in pairs], np.float32),
        )
        for place in (0, 1)
    )
    known = [group.probabilities or (1.0,) * len(group.pairs) for group in groups]
    soft = np.concatenate([np.asarray(each, np.float32) for each in known])
    loss, diagnostics = weighted(terms, chosen, rejected, hyper, None if (soft == 1).all() else soft)
    if terms[0].is_across_batch:
        diagnostics = losses.dpo(chosen.logratio, rejected.logratio, beta=terms[0].beta or 0.1)[1]
    figures = {"loss": loss, **{name: diagnostics[name] for name in ("accuracy", "margin") if name in diagnostics}}
    longer = (1 + np.sign(chosen.tokens - rejected.tokens)) / 2
    return HeldOut(
        [prompts[group.prompt_tokens] for group, _, _ in pairs],
        {name: mean_of(np.asarray(x)) for name, x in figures.items()},
        ("accuracy", mean_of(longer)),
    )


def of_thumbs(term: Term, rows: Sequence[Liked], logratios: Float[np.ndarray, " n"], hyper: Hyper) -> HeldOut:
    """Completions by their log-ratios: the area under the ROC curve of liked against not, 1/2 of a constant."""
    liked = np.asarray([row.desirable for row in rows])
    loss, diagnostics = term.of_thumbs(logratios, liked, hyper)
    numbers = {tokens: index for index, tokens in enumerate(dict.fromkeys(row.prompt_tokens for row in rows))}
    reward = np.asarray(diagnostics["reward"], np.float64)
    lengths = np.asarray([len(row.completion_tokens[0]) for row in rows])
    return HeldOut(
        [numbers[row.prompt_tokens] for row in rows],
        {"loss": mean_of(np.asarray(loss)), "auc": area_under_curve(reward, liked)},
        ("auc", area_under_curve(lengths, liked)),
    )
