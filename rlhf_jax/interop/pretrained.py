"""A model that is ready to use: description, parameters, tokenizer; and the two ways to say which in a config."""

import functools
import importlib.resources
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlhf_jax import digests, hosts, models, sharding
from rlhf_jax.data.sources import Data
from rlhf_jax.errors import UserError
from rlhf_jax.interop.tokenizers import SentencePiece, Tokenizer, train_sentencepiece
from rlhf_jax.models.spec import Lora, ModelSpec
from rlhf_jax.numerics import require
from rlhf_jax.types import Params

TOKENIZER_FILE = "tokenizer.model"
PARAMS_FILE = "params.msgpack"
CARD_FILE = "card.json"


@dataclass(frozen=True)
class Pretrained:
    """What `load_pretrained` returns; the tokenizer is None where the files hold none."""

    spec: ModelSpec
    params: Params
    tokenizer: Tokenizer | None


class ModelConfig(Protocol):
    """How an experiment says where its model comes from: `spec` needs no file but the model's own description."""

    @property
    def spec(self) -> ModelSpec:
        """Shape and numerics."""
        ...

    def load(self, *, data: Data, workdir: Path, seed: int, mesh: Mesh | None = None) -> Pretrained:
        """Parameters and tokenizer; large ones lie on the mesh as training wants them."""
        ...


@dataclass(frozen=True)
class Bundled:
    """The base LM in the package: 3.4M parameters, trained on movie reviews by configs/pretrain_reviews.py."""

    unroll: int | None = None
    """Overrides how far the loop over layers is unrolled; None: completely, which runs fastest."""
    lora: Lora | None = None
    """Adapters, which alone are trained, over the frozen model; none: all weights are trained."""

    def __post_init__(self) -> None:
        require("model.unroll", self.unroll, "[1, inf)")

    @property
    def spec(self) -> ModelSpec:
        """Read from the package's model card."""
        spec = ModelSpec(**_bundled_card()["spec"])
        return replace(spec, unroll=spec.n_layers if self.unroll is None else self.unroll, lora=self.lora)

    def load(self, *, data: Data, workdir: Path, seed: int, mesh: Mesh | None = None) -> Pretrained:
        """Parameters in float32 (stored in bfloat16) and the tokenizer that comes with them."""
        folder = importlib.resources.files("rlhf_jax") / "bundled"
        return Pretrained(self.spec, *_read_bundle(folder))

    def tokenizer(self, workdir: Path) -> Tokenizer:
        """The tokenizer alone."""
        return SentencePiece((importlib.resources.files("rlhf_jax") / "bundled" / TOKENIZER_FILE).read_bytes())


@dataclass(frozen=True)
class Scratch:
    """A model with random parameters, and a tokenizer trained on the experiment's data."""

    architecture: ModelSpec = field(default_factory=ModelSpec)
    """Shape and numerics; its vocab_size is also the tokenizer's."""

    @property
    def spec(self) -> ModelSpec:
        """The architecture, as given."""
        return self.architecture

    def load(self, *, data: Data, workdir: Path, seed: int, mesh: Mesh | None = None) -> Pretrained:
        """Initialise from the seed; the tokenizer is trained once and kept in the workdir, and again if damaged."""
        from rlhf_jax.data.texts import load_texts  # it builds on the tokenizers here

        path = workdir / TOKENIZER_FILE

        def make() -> None:
            if digests.is_whole(path):
                return
            if path.exists():
                print(
                    f"{path}, now {digests.set_aside(path).name}: not as it was written; it is made again",
                    file=sys.stderr,
                )
            texts = (review.text for review in load_texts(data).train)
            try:
                tokenizer = train_sentencepiece(texts, vocab_size=self.spec.vocab_size, seed=seed)
            except UserError as error:
                raise UserError(f"model.architecture.{error}") from None
            digests.write_sealed(path, tokenizer.model)

        hosts.from_writer(make)
        tokenizer = SentencePiece.from_file(path)
        return Pretrained(self.spec, sharding.unbox(models.init(self.spec, jax.random.key(seed))), tokenizer)

    def tokenizer(self, workdir: Path) -> Tokenizer:
        """The tokenizer of a run that has begun; UserError where it is not as it was written."""
        path = workdir / TOKENIZER_FILE
        if not digests.is_whole(path):
            raise UserError(f"{path} is not as it was written; `rlhf-jax run` with this workdir makes it again")
        return SentencePiece.from_file(path)


def write_bundle(folder: Path, params: Params, tokenizer: SentencePiece, card: dict[str, Any]) -> None:
    """Write a model as `Bundled` reads it: parameters in bfloat16, tokenizer, and a card that holds its `spec`."""
    folder.mkdir(parents=True, exist_ok=True)
    half = jax.tree.map(lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16)), params)
    (folder / PARAMS_FILE).write_bytes(flax.serialization.msgpack_serialize(half))
    (folder / TOKENIZER_FILE).write_bytes(tokenizer.model)
    (folder / CARD_FILE).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def _read_bundle(folder: Any) -> tuple[Params, SentencePiece]:
    stored = flax.serialization.msgpack_restore((folder / PARAMS_FILE).read_bytes())
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), stored)
    return params, SentencePiece((folder / TOKENIZER_FILE).read_bytes())


@functools.cache
def _bundled_card() -> dict[str, Any]:
    return json.loads((importlib.resources.files("rlhf_jax") / "bundled" / CARD_FILE).read_text(encoding="utf-8"))
