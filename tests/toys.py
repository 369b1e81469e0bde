"""A stage that trains nothing, for tests of what stands around stages."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.algorithms.context import Context, Kind, Role, Stage, named
from rlhf_jax.checkpoint import load_params, save_params
from rlhf_jax.config import Experiment
from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.data.sources import Data
from rlhf_jax.errors import UserError
from rlhf_jax.interop.pretrained import Pretrained
from rlhf_jax.kl import AdaptiveKL, FixedKL
from rlhf_jax.models import ModelSpec
from rlhf_jax.optim import Optimizer

SPEC = ModelSpec(vocab_size=32, d_model=8, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=4, d_ff=8, max_len=64)


@dataclass(frozen=True)
class ToyModel:
    """A model without parameters."""

    spec: ModelSpec = SPEC
    """Shape and numerics."""

    def load(self, *, data: Data, workdir: Path, seed: int, mesh: Mesh | None = None) -> Pretrained:
        return Pretrained(self.spec, {}, None)


@dataclass(frozen=True)
class ToyStage(Stage):
    """A toy stage."""

    steps: int = 3
    """Optimiser steps."""
    init: str = "base"
    """The stage that it starts from."""
    batch_size: int = 64
    """Rows a step."""
    length: int = 16
    """Tokens in a row."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """How the gradient becomes a step."""
    kl: FixedKL | AdaptiveKL = field(default_factory=FixedKL)
    """Price of KL."""
    value_clip: float | None = 0.2
    """Clip range; none: no clipping."""
    prompt_tokens: tuple[int, int] = (2, 8)
    """Fewest and most tokens of a prompt."""
    reducer: Literal["token", "sequence"] = "token"
    """What weighs the same."""
    path: Path | None = None
    """A file."""
    whiten: bool = True
    """Whether advantages are whitened."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    @property
    def produces(self) -> Kind:
        return "policy"

    def requires(self) -> dict[str, tuple[str, Role]]:
        return named("policy", init=self.init)

    def check_inputs(self, data: Data) -> None:
        if self.path is not None and not self.path.exists():
            raise UserError(f"path: {self.path}: no such file")

    def lengths(self) -> dict[str, int]:
        return {"length": self.length}

    def batch_sizes(self) -> dict[str, int]:
        return {"batch_size": self.batch_size}


@dataclass(frozen=True)
class ToyReward(ToyStage):
    """A toy stage that makes a reward."""

    @property
    def produces(self) -> Kind:
        return "reward"


def train(config: ToyStage, context: Context, name: str) -> dict[str, Any]:
    """Write parameters that depend on the seed and the config alone, after a line in `trained.txt`."""
    with (context.workdir / "trained.txt").open("a") as file:
        file.write(f"{name}\n")
    values = np.arange(4, dtype=np.float32) * config.steps + context.seed
    save_params(context.stage_dir(name) / "params", {"layer": {"kernel": jnp.asarray(values)}})
    return {"loss": 1 / config.steps, "steps": config.steps}


def read(stage_dir: Path) -> Any:
    """What `train` wrote."""
    return load_params(stage_dir / "params", {"layer": {"kernel": jax.ShapeDtypeStruct((4,), jnp.float32)}})


def experiment(**changes: Any) -> Experiment:
    """Two toy stages, the second on the first."""
    stages = {"sft": ToyStage(), "ppo": ToyStage(init="sft", kl=AdaptiveKL(coef=0.1))}
    return Experiment(**{"model": ToyModel(), "data": MovieReviews(), "stages": stages, **changes})
