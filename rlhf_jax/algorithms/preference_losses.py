"""The losses of pairs and of single completions by name, what each reads of a batch, and their weighted sum.

Shapes: n pairs, or single completions.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax import losses
from rlhf_jax.numerics import require
from rlhf_jax.types import ArrayLike, Hyper


class Side(flax.struct.PyTreeNode):
    """The chosen or the rejected completions of pairs."""

    logps: Float[ArrayLike, " n"]
    """log π of whole completions."""
    ref_logps: Float[ArrayLike, " n"]
    """log π_ref of whole completions."""
    tokens: Float[ArrayLike, " n"]
    """Tokens of each, at least 1."""

    @property
    def logratio(self) -> Float[ArrayLike, " n"]:
        """Log π/π_ref of whole completions."""
        return self.logps - self.ref_logps


Reads = Callable[[Side, Side], tuple[ArrayLike, ...]]

# What a loss is called on.
_LOGRATIO: Reads = lambda w, l: (w.logratio, l.logratio)  # noqa: E731, E741
_MEAN_LOGRATIO: Reads = lambda w, l: (w.logratio / w.tokens, l.logratio / l.tokens)  # noqa: E731, E741
_LOGPS: Reads = lambda w, l: (w.logps, l.logps)  # noqa: E731, E741
_MEAN_LOGPS: Reads = lambda w, l: (w.logps / w.tokens, l.logps / l.tokens)  # noqa: E731, E741
_ALL_LOGPS: Reads = lambda w, l: (w.logps, l.logps, w.ref_logps, l.ref_logps)  # noqa: E731, E741


def sft(chosen_mean_logps: Array, rejected_mean_logps: Array) -> tuple[Array, dict[str, Array]]:
    """Cross-entropy of the chosen completion, a token; the first term of CPO, ORPO and regularised DPO."""
    del rejected_mean_logps
    return losses.cross_entropy(chosen_mean_logps)[0], {}


LOSSES: dict[str, tuple[Callable[..., tuple[Array, dict[str, Array]]], Reads]] = {
    "dpo": (losses.dpo, _LOGRATIO),
    "dpo_norm": (losses.dpo, _MEAN_LOGRATIO),
    "robust_dpo": (losses.robust_dpo, _LOGRATIO),
    "hinge": (losses.hinge, _LOGRATIO),
    "ipo": (losses.ipo, _LOGRATIO),
    "ipo_norm": (losses.ipo, _MEAN_LOGRATIO),
    "exo_pair": (losses.exo_pair, _LOGRATIO),
    "nca_pair": (losses.nca_pair, _LOGRATIO),
    "bco_pair": (losses.bco_pair, _LOGRATIO),
    "sppo_hard": (losses.sppo_hard, _LOGRATIO),
    "apo_zero": (losses.apo_zero, _LOGRATIO),
    "apo_down": (losses.apo_down, _LOGRATIO),
    "discopop": (losses.discopop, _LOGRATIO),
    "f_dpo": (losses.f_dpo, _LOGRATIO),
    "aot": (losses.aot, _ALL_LOGPS),
    "aot_unpaired": (losses.aot_unpaired, _ALL_LOGPS),
    "simpo": (losses.simpo, _MEAN_LOGPS),
    "alpha_po": (losses.alpha_po, _MEAN_LOGPS),
    "orpo": (losses.orpo, _MEAN_LOGPS),
    "cpo": (losses.cpo, _LOGPS),
    "cpl": (losses.cpl, _LOGPS),
    "sft": (sft, _MEAN_LOGPS),
}
"""By name: the loss, and what of the two sides it is called on. `_norm`: log-ratios a token (TRL's sigmoid_norm; its
reading of IPO)."""

THUMB_LOSSES: dict[str, tuple[Callable[..., tuple[Array, dict[str, Array]]], str]] = {
    "kto": (losses.kto, "kl_baseline"),
    "bco": (losses.bco, "delta"),
}
"""By name: the loss of single completions, and the number of a whole batch, or of all before it, that it is called on.
"""

_ACROSS_BATCH = ("aot", "aot_unpaired")
# aot's entries are ranks, not pairs; exo_pair's label is a distribution already, by its label_smoothing, and its KL is
# not linear in that; kto and bco read completions that were liked or not.
_WITHOUT_PROBABILITIES = (*_ACROSS_BATCH, "exo_pair", *THUMB_LOSSES)
_WITH_REFERENCE = (_LOGRATIO, _MEAN_LOGRATIO, _ALL_LOGPS)
_INTERVALS = {
    "weight": "(0, inf)", "beta": "(0, inf)", "label_smoothing": "[0, 0.5)", "gamma": "[0, inf)", "alpha": "[0, inf)",
    "temperature": "(0, inf)", "bias": "(0, 1]", "desirable_weight": "(0, inf)", "undesirable_weight": "(0, inf)",
    "exo_pair.label_smoothing": "(0, 0.5)", "f_dpo.alpha": "(0, 1)",
}  # fmt: skip

Name = Literal[
    "dpo", "dpo_norm", "robust_dpo", "hinge", "ipo", "ipo_norm", "exo_pair", "nca_pair", "bco_pair", "sppo_hard",
    "apo_zero", "apo_down", "discopop", "f_dpo", "aot", "aot_unpaired", "simpo", "alpha_po", "orpo", "cpo", "cpl",
    "sft", "kto", "bco",
]  # fmt: skip


@dataclass(frozen=True)
class Term:
    """One loss, and its weight; an option that is None has the loss's own default, see `rlhf_jax.losses`."""

    loss: Name = "dpo"
    """By what name. `sft` is the cross-entropy of the chosen completion, a token; `kto` and `bco` read completions
    one by one, of pairs the winner as one that was liked and the loser as one that was not."""
    weight: float = 1.0
    """Times the loss."""
    beta: float | None = None
    """Strength of the pull to the reference; of the losses without one, scale of the logits."""
    label_smoothing: float | None = None
    """Expected share of wrong labels."""
    gamma: float | None = None
    """The margin of simpo and alpha_po."""
    alpha: float | None = None
    """Of alpha_po, or of f_dpo's divergence alpha."""
    temperature: float | None = None
    """Of discopop."""
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] | None = None
    """Of f_dpo."""
    bias: float | None = None
    """Of cpl."""
    desirable_weight: float | None = None
    """Of kto: what completions that were liked weigh …"""
    undesirable_weight: float | None = None
    """… and those that were not; where these are rarer, the more (Ethayarajh et al. 2024, eq. 9)."""

    def __post_init__(self) -> None:
        for name, interval in _INTERVALS.items():
            loss, _, option = name.rpartition(".")
            if loss in ("", self.loss):
                require(f"losses: {self.loss}: {option}", vars(self)[option], interval)
        known = inspect.signature(self._function).parameters
        for name in self.options:
            if name not in known:
                raise ValueError(f"losses: {self.loss} has no {name}; leave it None")

    @property
    def _function(self) -> Callable[..., tuple[Array, dict[str, Array]]]:
        return (THUMB_LOSSES if self.is_of_thumbs else LOSSES)[self.loss][0]

    @property
    def options(self) -> dict[str, Any]:
        """Those that are given."""
        names = (field.name for field in dataclasses.fields(self) if field.name not in ("loss", "weight"))
        return {name: vars(self)[name] for name in names if vars(self)[name] is not None}

    @property
    def is_of_thumbs(self) -> bool:
        """Whether it reads single completions, not pairs."""
        return self.loss in THUMB_LOSSES

    @property
    def needs_reference(self) -> bool:
        """Whether it reads the reference's log-probs."""
        return self.is_of_thumbs or LOSSES[self.loss][1] in _WITH_REFERENCE

    @property
    def is_across_batch(self) -> bool:
        """Whether it sorts a batch's pairs, so that parts of the batch would give another number."""
        return self.loss in _ACROSS_BATCH

    @property
    def takes_probabilities(self) -> bool:
        """Whether it may read pairs whose labels are soft."""
        return self.loss not in _WITHOUT_PROBABILITIES

    def with_beta(self, beta: float) -> "Term":
        """With this β where the loss takes one and none is given."""
        takes = "beta" in inspect.signature(self._function).parameters
        return dataclasses.replace(self, beta=beta) if takes and self.beta is None else self

    def hyper(self) -> dict[str, float]:
        """What a sweep may vary, by its name in `TrainState.hyper`."""
        weight = {} if self.weight == 1 else {"weight": self.weight}
        numbers = self.options | weight
        return {f"{self.loss}.{name}": value for name, value in numbers.items() if isinstance(value, float)}

    def of_pairs(self, chosen: Side, rejected: Side, hyper: Hyper) -> tuple[Array, dict[str, Array]]:
        """The loss of each pair, unweighted, and its diagnostics."""
        return self._function(*LOSSES[self.loss][1](chosen, rejected), **self._varied(hyper))

    def of_thumbs(
        self, logratios: Float[ArrayLike, " n"], desirable: Bool[ArrayLike, " n"], hyper: Hyper
    ) -> tuple[Float[Array, " n"], dict[str, Float[Array, " n"]]]:
        """The weighted loss of each completion, and its diagnostics; the batch's number stands in `hyper`."""
        baseline = hyper[THUMB_LOSSES[self.loss][1]]
        loss, diagnostics = self._function(logratios, desirable, baseline, **self._varied(hyper))
        return hyper.get(f"{self.loss}.weight", self.weight) * loss, diagnostics

    def _varied(self, hyper: Hyper) -> dict[str, Any]:
        """The options, those that a sweep varies as they are now."""
        return self.options | {name: hyper[key] for name in self.options if (key := f"{self.loss}.{name}") in hyper}


def weighted(
    terms: Sequence[Term],
    chosen: Side,
    rejected: Side,
    hyper: Hyper,
    probabilities: Float[ArrayLike, " n"] | None = None,
) -> tuple[Float[Array, " n"], dict[str, Float[Array, " n"]]]:
    """Σ weight · loss a pair; the diagnostics are the first term's, and each loss by name where there are several.

    With `probabilities` p that the chosen one is the better, a loss is p ℓ(chosen, rejected) + (1 − p) ℓ(rejected,
    chosen): that of a label drawn by p, in the mean. The other diagnostics are of the pair as it stands.
    """
    total, found = jnp.zeros(jnp.shape(chosen.logps)), {}
    for term in terms:
        loss, diagnostics = term.of_pairs(chosen, rejected, hyper)
        if probabilities is not None:
            turned, _ = term.of_pairs(rejected, chosen, hyper)
            loss = loss * probabilities + turned * (1 - jnp.asarray(probabilities))
        total += hyper.get(f"{term.loss}.weight", term.weight) * loss
        found = found or diagnostics
        found = found | ({term.loss: loss} if len(terms) > 1 else {})
    return total, found
