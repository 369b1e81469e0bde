"""Optimisers and schedules, as fields of a stage's config."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from rlhf_jax.guard import guarded
from rlhf_jax.models.spec import DType
from rlhf_jax.numerics import require

# Which axes of a stacked [layer, ...] parameter are the rows and columns of its matrix; all else is AdamW's.
_MATRICES = {
    "query": MuonDimensionNumbers(1, (2, 3)),
    "key": MuonDimensionNumbers(1, (2, 3)),
    "value": MuonDimensionNumbers(1, (2, 3)),
    "out": MuonDimensionNumbers((1, 2), 3),
    "gate": MuonDimensionNumbers(1, 2),
    "up": MuonDimensionNumbers(1, 2),
    "down": MuonDimensionNumbers(1, 2),
}


@dataclass(frozen=True)
class Optimizer:
    """AdamW or Muon with global-norm clipping, linear warm-up and a decay."""

    learning_rate: float = 3e-4
    """Peak learning rate."""
    kind: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon on the blocks' matrices (Jordan 2024) with adamw, its momentum Nesterov's, on all else."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay from the peak to `final_share` of it over the stage."""
    warmup_steps: int = 0
    """Steps of linear warm-up, the first at 1/(warmup_steps + 1) of the peak."""
    final_share: float = 0.0
    """Share of the peak learning rate that is left after the last step."""
    b1: float = 0.9
    """Decay of Adam's first moment."""
    b2: float = 0.95
    """Decay of Adam's second moment."""
    eps: float = 1e-8
    """Added to the root of Adam's second moment."""
    eps_form: Literal["torch", "tensorflow"] = "torch"
    """Which root eps is added to: that of the corrected second moment, or, as TensorFlow's Adam and so Ziegler et al.
    2019 had it, of the uncorrected one, which makes early steps smaller (Huang et al. 2024)."""
    weight_decay: float = 0.0
    """Decoupled weight decay, times the learning rate."""
    clip_norm: float = 1.0
    """Largest global norm of a gradient."""
    adam_share: float = 1.0
    """With muon: AdamW's learning rate as a share of `learning_rate`."""
    master: DType = "float32"
    """Type of the parameters between steps. bfloat16: half the memory; what an update leads to is rounded at random to
    one of its two neighbours, since to the nearest one small updates would be lost. Norms, biases, routers and score
    heads stay in float32, and so do the optimiser's moments."""

    bad_steps: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is not finite stops the run, or its update is left out and counted (`skipped`)."""
    spike_sigmas: float | None = None
    """A step is bad, too, whose loss or gradient norm is so many standard deviations above the mean of recent steps;
    none: it is not."""
    spike_window: int = 128
    """How many steps are recent; until there are half as many nothing is a spike."""
    most_skipped: int = 10
    """Updates left out in a row; one more stops the run."""

    def __post_init__(self) -> None:
        for name, interval in (
            ("warmup_steps", "[0, inf)"), ("final_share", "[0, 1]"), ("b1", "[0, 1)"), ("b2", "[0, 1)"),
            ("eps", "(0, inf)"), ("weight_decay", "[0, inf)"), ("clip_norm", "(0, inf)"), ("adam_share", "(0, inf)"),
            ("learning_rate", "(0, inf)"), ("spike_sigmas", "(0, inf)"), ("spike_window", "[4, inf)"),
            ("most_skipped", "[1, inf)"),
        ):  # fmt: skip
            require(f"optimizer.{name}", vars(self)[name], interval)
        if self.kind == "muon" and self.eps_form == "tensorflow":
            raise ValueError("optimizer.eps_form='tensorflow' is Adam's: kind must be 'adamw', not 'muon'")

    @property
    def weights(self) -> float:
        """What parameters take between steps, in copies of them in float32; norms and the like left aside."""
        return jnp.dtype(self.master).itemsize / 4

    @property
    def copies(self) -> float:
        """What a training state holds of a network: its parameters and their moments, of Muon's matrices one."""
        return self.weights + (2 if self.kind == "adamw" else 1)

    @property
    def elementwise(self) -> bool:
        """Whether, but for the gradient's norm, each number is updated by itself, however arrays are cut."""
        return self.kind == "adamw" and self.master == "float32"

    def share(self, total_steps: int) -> optax.Schedule:
        """The schedule, as a share of the peak."""
        decay_steps = max(total_steps - self.warmup_steps, 1)
        decay = {
            "constant": optax.constant_schedule(1.0),
            "linear": optax.linear_schedule(1.0, self.final_share, decay_steps),
            "cosine": optax.cosine_decay_schedule(1.0, decay_steps, alpha=self.final_share),
        }[self.schedule]
        if not self.warmup_steps:
            return decay
        warmup = optax.linear_schedule(1 / (self.warmup_steps + 1), 1.0, self.warmup_steps)
        return optax.join_schedules([warmup, decay], [self.warmup_steps])

    def make(self, total_steps: int) -> optax.GradientTransformation:
        """The transformation; its learning rate is a hyperparameter in its state, so that a sweep may map over it."""

        def build(learning_rate: Any) -> optax.GradientTransformation:
            if self.kind == "muon":
                core = muon(
                    learning_rate,
                    eps=self.eps,
                    weight_decay=self.weight_decay,
                    adam_b1=self.b1,
                    adam_b2=self.b2,
                    adam_weight_decay=0.0,
                    adam_learning_rate=learning_rate * self.adam_share,
                    muon_weight_dimension_numbers=_matrix_axes,
                )
            elif self.eps_form == "tensorflow":
                core = optax.chain(
                    _tensorflow_adam(self.b1, self.b2, self.eps),
                    optax.add_decayed_weights(self.weight_decay),
                    optax.scale_by_learning_rate(learning_rate),
                )
            else:
                core = optax.adamw(learning_rate, self.b1, self.b2, self.eps, weight_decay=self.weight_decay)
            clip, share = optax.clip_by_global_norm(self.clip_norm), optax.scale_by_schedule(self.share(total_steps))
            if self.bad_steps == "stop" and self.spike_sigmas is None:  # a loop sees by itself what is not finite
                return optax.chain(clip, core, share)
            most = self.most_skipped if self.bad_steps == "skip" else 0
            core = guarded(optax.chain(clip, core), sigmas=self.spike_sigmas, window=self.spike_window, most=most)
            return optax.chain(core, share)  # the schedule counts every step

        return optax.inject_hyperparams(build)(learning_rate=self.learning_rate)


def _tensorflow_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """M / (√v + eps) · √(1 − b2ᵗ) / (1 − b1ᵗ): Adam's text before section 2.1's last lines (Kingma & Ba 2015)."""
    adam = optax.scale_by_adam(b1, b2)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        _, state = adam.update(updates, state, params)
        t = state.count.astype(jnp.float32)
        share = jnp.sqrt(1 - b2**t) / (1 - b1**t)
        return jax.tree.map(lambda m, v: share * m / (jnp.sqrt(v) + eps), state.mu, state.nu), state

    return optax.GradientTransformation(adam.init, update)


def _matrix_axes(params: Any) -> Any:
    def axes(path: tuple, leaf: Any) -> MuonDimensionNumbers | None:
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        return _MATRICES.get(names[-1]) if "layers" in names else None

    return jax.tree_util.tree_map_with_path(axes, params)
