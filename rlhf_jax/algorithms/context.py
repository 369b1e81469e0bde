"""What a stage is given: the experiment's model, data, mesh, seed and workdir, and the parameters of earlier stages."""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlhf_jax import models, sharding
from rlhf_jax.checkpoint import KEPT, load_params
from rlhf_jax.data.reviews import MovieReviews, Reviews
from rlhf_jax.data.sources import Data, Source
from rlhf_jax.data.texts import are_texts, load_texts
from rlhf_jax.errors import UserError
from rlhf_jax.interop.pretrained import Pretrained
from rlhf_jax.interop.tokenizers import Tokenizer
from rlhf_jax.models import ModelSpec, lora, quantized
from rlhf_jax.rewards.ensemble import Ensemble, init
from rlhf_jax.types import Key, Params

BASE = "base"
"""Names the experiment's own model where a field names a stage."""


Kind = Literal["policy", "reward", "ensemble", "rows"]
"""What a stage makes: a language model, a trunk with a head, several of these that score together, or rows."""

Role = Literal["policy", "reward", "ensemble", "scorer", "rows"]
"""What another stage needs it for; what scores may be one reward model or an ensemble."""

MAKERS: dict[Role, tuple[Kind, ...]] = {
    "policy": ("policy",),
    "reward": ("reward",),
    "ensemble": ("ensemble",),
    "scorer": ("reward", "ensemble"),
    "rows": ("rows",),
}
"""The kinds that serve in each role."""


class StageConfig(Protocol):
    """What validation asks of every stage's `Config`, before anything is compiled."""

    @property
    def produces(self) -> Kind:
        """What the stage's parameters are; or rows, and none (`made_rows`)."""
        ...

    def requires(self) -> dict[str, tuple[str, Role]]:
        """The earlier stage that each field names, BASE left out, and what it must serve as."""
        ...

    def lengths(self) -> dict[str, int]:
        """The tokens that each field, or sum of fields, asks of the model's context."""
        ...

    def batch_sizes(self) -> dict[str, int]:
        """The rows, by field, that must divide by the mesh's batch axes."""
        ...

    def check_inputs(self, data: Data) -> None:
        """Raise UserError, which begins with the field, for rows of its own or the experiment's that it cannot use."""
        ...

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise UserError, which begins with the field, for what it asks of the model's tokenizer that this has not."""
        ...

    def stored(self) -> float:
        """What it leaves on the disk, at least, in copies of the parameters that one network trains, in float32."""
        ...


@dataclass(frozen=True)
class Stage:
    """What most stages' configs say of what validation asks."""

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Nothing: any will do."""

    def stored(self) -> float:
        """Nothing to speak of: rows."""
        return 0.0


@dataclass(frozen=True)
class Context:
    """The surroundings of a run's stages."""

    workdir: Path
    seed: int
    mesh: Mesh
    model: Pretrained
    data: Data
    wandb: bool = False
    ensembles: Mapping[str, Ensemble] = field(default_factory=dict)
    """The stages whose parameters are those of several reward models."""

    @property
    def spec(self) -> ModelSpec:
        """The model's shape and numerics."""
        return self.model.spec

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        assert self.model.tokenizer is not None
        return self.model.tokenizer

    @functools.cached_property
    def reviews(self) -> Reviews:
        """The data's texts, read once; UserError where its rows are no texts."""
        return load_texts(self.data, self.tokenizer)

    @functools.cached_property
    def labelled(self) -> bool:
        """Whether the data are texts, each with a label."""
        splits = (self.reviews.train, self.reviews.validation, self.reviews.test) if are_texts(self.data) else ()
        return bool(splits) and all(review.label is not None for split in splits for review in split)

    def stage_dir(self, name: str) -> Path:
        """Where a stage keeps its files."""
        return self.workdir / name

    def key(self, name: str, member: int = 0) -> Key:
        """A stage's own random key; of an ensemble's member, the key of the stage in a run of that seed."""
        return jax.random.fold_in(jax.random.key(self.seed + member), zlib.crc32(name.encode()))

    def keys(self, name: str, members: int) -> Key:
        """The keys of a stage's members, one behind the other."""
        return jnp.stack([self.key(name, member) for member in range(members)])

    def rng(self, name: str) -> np.random.Generator:
        """A stage's own generator for what is drawn on the host."""
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])

    @functools.cached_property
    def base(self) -> Params:
        """The frozen weights that all networks share, in shards, stored as the spec says; empty without adapters."""
        boxed = lora.base(self.spec, jax.eval_shape(partial(models.init, self.spec), jax.random.key(0)))
        return quantized.store(self.spec, lora.base(self.spec, self.model.params), boxed, self.mesh)

    @property
    def head_base(self) -> Params:
        """The frozen weights as a network with a head reads them."""
        trunk = {name: value for name, value in self.base.items() if name != "unembedding"}
        return {"trunk": trunk} if trunk else {}

    def policy_params(self, source: str) -> Params:
        """What trains of the transformer of a finished stage, or of the model itself (BASE), in shards."""
        return self._params(source, lambda key: lora.own(self.spec, models.init(self.spec, key)))

    def head_params(self, source: str) -> Params:
        """What trains of a finished reward model or ensemble, trunk and head, in shards."""
        one, ensemble = partial(models.init_with_head, self.spec), self.ensembles.get(source)
        if ensemble is None:
            return self._params(source, one)
        return self._params(source, lambda key: init(one, jax.random.split(key, ensemble.members), ensemble))

    def policy(self, source: str) -> Params:
        """The whole transformer of a finished stage, or of the model itself (BASE), to read with."""
        return lora.merge(self.base, self.policy_params(source))

    def network(self, source: str) -> Params:
        """A whole finished reward model or ensemble, to read with."""
        return lora.merge(self.head_base, self.head_params(source))

    def replicated(self, tree: Any) -> Any:
        """A tree of arrays, whole on every device."""
        return sharding.put(tree, sharding.replicated(self.mesh))

    def zeros(self, shapes: Any) -> Any:
        """A tree of shapes as zeros, the leading axis of each split as a batch's is."""
        layout = sharding.batch_sharding(self.mesh)
        return jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), out_shardings=layout)()

    def _params(self, source: str, init: Callable[[Key], Any]) -> Params:
        boxed = jax.eval_shape(init, jax.random.key(0))
        layout = sharding.shardings(self.mesh, boxed)
        if source == BASE and self.spec.lora is not None:  # fresh adapters, which change nothing yet
            fresh = jax.jit(lambda key: sharding.unbox(init(key)), out_shardings=layout)
            return fresh(self.key("adapters"))
        if source == BASE:
            return sharding.put(self.model.params, layout)
        return load_params(self.stage_dir(source) / "params", sharding.in_shards(layout, sharding.unbox(boxed)))


def copies(params: float, state: float, *, steps: int, every: int) -> float:
    """Finished parameters, and a state as often as it is kept of so many steps, with a checkpoint `every` few."""
    return params + state * min(KEPT, math.ceil(steps / every))


def named(role: Role, **fields: str) -> dict[str, tuple[str, Role]]:
    """The fields that name a stage for a role, without those that name BASE as a policy."""
    return {field: (stage, role) for field, stage in fields.items() if stage != BASE or role != "policy"}


def check_field(field: str, check: Callable[[], Any]) -> None:
    """Let `check` raise its UserError with the stage's field in front."""
    try:
        check()
    except UserError as error:
        raise UserError(f"{field}: {error}") from None


def own_source(own: Source | None, data: Data, *, instead: str) -> Source:
    """A stage's own rows, or, where it names none, the experiment's; UserError where these are movie reviews."""
    source = data if own is None else own
    if isinstance(source, MovieReviews):
        raise UserError(f"None stands for the experiment's rows, which are movie reviews; {instead}")
    return source


def check_prompt_tokens(prompt_tokens: tuple[int, int]) -> None:
    """Raise ValueError unless it is (fewest, most) with 1 <= fewest <= most."""
    low, high = prompt_tokens
    if not 1 <= low <= high:
        raise ValueError(f"prompt_tokens must be (fewest, most) with 1 <= fewest <= most, got {prompt_tokens}")


def check_positive(config: Any, *names: str) -> None:
    """Raise ValueError, naming the field, for one of a dataclass's fields that is not at least 1."""
    values = dataclasses.asdict(config)
    for name in names:
        if values[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {values[name]}")
