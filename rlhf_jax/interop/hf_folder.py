"""Reading a Hugging Face folder: config.json to a ModelSpec, tensors straight into the devices' shards."""

import functools
import itertools
import math
import mmap
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlhf_jax import models, sharding
from rlhf_jax.errors import UserError
from rlhf_jax.interop.families import Family, Source, family_of, read_spec, sizes
from rlhf_jax.interop.safetensors_io import DTYPES, Tensor, read_folder, read_into, read_json
from rlhf_jax.models.quantized import store_leaf
from rlhf_jax.models.spec import DType, Lora, ModelSpec
from rlhf_jax.types import Params

CONFIG = "config.json"

# In folders of older versions of transformers; nothing is learnt in them.
_NO_PARAMETERS = (r".*\.rotary_emb\.inv_freq",)

BIAS = "score_bias"
"""The field of config.json in which `export` keeps what transformers' score heads have no place for."""

_TRUNK, _KERNEL = "trunk/", "head/kernel"


def folder_spec(folder: Path) -> ModelSpec:
    """The ModelSpec of a folder, from its config.json alone."""
    return read_spec(read_json(folder / CONFIG), folder / CONFIG)


def load_folder(
    folder: Path, *, dtype: DType = "float32", mesh: Mesh | None = None, lora: Lora | None = None
) -> tuple[ModelSpec, Params]:
    """A model from config.json and safetensors; every name and shape is checked before the first tensor is read.

    The parameters are of `dtype`, those of norms of float32, and lie on the mesh (or the first device) as training
    wants them. A stacked parameter is put together a device's shard at a time, so that the host holds one shard of one
    parameter and a few megabytes more. Each kernel is stored as `lora.base` says before the next one is read; the
    adapters are not made here. A …ForSequenceClassification with one label is a reward model {"trunk",
    "head"}. Raises UserError that names the file and the tensor or field.
    """
    config, there = read_json(folder / CONFIG), folder / CONFIG
    family, spec = family_of(config, there), read_spec(config, there)
    is_reward, stored = _is_reward(config), read_folder(folder)
    # Checked before anything is made of the spec's sizes, which are only a file's claim so far.
    needed = _needed(family, spec, is_reward=is_reward)
    sources = {path: _Stacked(folder, family, source, spec, stored) for path, source in needed}
    _check_nothing_is_left(folder, family, spec, stored, sources.values())
    boxed = _abstract(spec, is_reward)
    mesh = sharding.single_device_mesh() if mesh is None else mesh
    layout, adapted = sharding.shardings(mesh, boxed), replace(spec, lora=lora)

    def make(path: tuple, shape: jax.ShapeDtypeStruct, place: jax.sharding.Sharding, box: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name == "head/bias":
            return sharding.put(np.asarray(_bias(config, there), np.float32), place)
        kind = np.dtype(np.float32) if name == _KERNEL else _stored_dtype(name, dtype)
        return store_leaf(adapted, mesh, path, box, sources[name.removeprefix(_TRUNK)].put(shape.shape, kind, place))

    return spec, jax.tree_util.tree_map_with_path(make, sharding.unbox(boxed), layout, boxed)


def parameter_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Path and shape of every parameter of a language model."""
    leaves = jax.tree_util.tree_leaves_with_path(sharding.unbox(_abstract(spec, False)))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}


@functools.lru_cache(maxsize=32)
def _abstract(spec: ModelSpec, is_reward: bool) -> Any:
    """Shapes of parameters in boxes with the names of their axes."""
    init = models.init_with_head if is_reward else models.init
    return jax.eval_shape(lambda: init(spec, jax.random.key(0)))


def _is_reward(config: Mapping[str, Any]) -> bool:
    classes = config.get("architectures")
    return isinstance(classes, list) and any(str(name).endswith("ForSequenceClassification") for name in classes)


def _bias(config: Mapping[str, Any], path: Path) -> float:
    value = config.get(BIAS, 0.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{path}: {BIAS}: expected a number, got {str(value)[:80]!r}")
    return float(value)


def _stored_dtype(path: str, dtype: DType) -> np.dtype:
    """Norms stay in float32: they are computed there, and Gemma's 1 + w loses its digits in bfloat16."""
    return np.dtype(np.float32) if "norm/" in path else np.dtype(jnp.dtype(dtype))


def _needed(family: Family, spec: ModelSpec, *, is_reward: bool) -> Iterator[tuple[str, Source]]:
    """The table's entries for parameters that the spec has."""
    one_layer = {name: value for name, value in vars(spec).items() if name not in ("n_layers", "local_layers")}
    small = ModelSpec(**one_layer, n_layers=1)
    for path in parameter_shapes(small):
        if not (is_reward and path == "unembedding"):
            yield path, family.table[path]
    if is_reward:
        yield _KERNEL, Source("score.weight", "1 d -> d")


class _Stacked:
    """One parameter and the tensors that it is made of, one for each layer and expert."""

    def __init__(
        self, folder: Path, family: Family, source: Source, spec: ModelSpec, stored: Mapping[str, Tensor]
    ) -> None:
        self.source, self.sizes = source, sizes(spec)
        counts = {"layer": spec.n_layers, "expert": self.sizes["e"]}
        self._counts = tuple(counts[name] for name in counts if f"{{{name}}}" in source.name)
        self._tensors: dict[tuple[int, ...], Tensor] = {}
        shape = source.layout.stored(self.sizes)
        for at in itertools.product(*map(range, self._counts)):
            name = source.name.format(**dict(zip(counts, at, strict=False)))
            tensor = next((stored[n] for n in spellings(family, name) if n in stored), None)
            if tensor is None:
                raise UserError(f"{folder}: tensor {name!r} is missing from the weights")
            if tensor.shape != shape:
                raise UserError(
                    f"{tensor.path}: tensor {tensor.name!r} has shape {tensor.shape}, {CONFIG} makes it {shape}"
                )
            if tensor.dtype not in DTYPES:
                raise UserError(
                    f"{tensor.path}: tensor {tensor.name!r} is of {tensor.dtype}; weights are {', '.join(DTYPES)}"
                )
            self._tensors[at] = tensor

    @property
    def names(self) -> set[str]:
        """The tensors, as the files call them."""
        return {tensor.name for tensor in self._tensors.values()}

    def put(self, shape: tuple[int, ...], dtype: np.dtype, place: jax.sharding.Sharding) -> jax.Array:
        """The parameter on its devices; each shard is read once, for all devices that hold it."""
        holders: dict[tuple, list[Any]] = {}
        for device, index in place.addressable_devices_indices_map(shape).items():
            bounds = tuple(piece.indices(size) for piece, size in zip(index or (), shape, strict=True))
            holders.setdefault(bounds, []).append(device)
        shards = []
        for bounds, devices in holders.items():
            host = self._read(tuple(slice(*b) for b in bounds), shape, dtype)
            shards += [jax.device_put(host, device) for device in devices]
            jax.block_until_ready(shards[-len(devices) :])
        return jax.make_array_from_single_device_arrays(shape, place, shards)

    def _read(self, index: tuple[slice, ...], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        out = _scratch([len(range(*piece.indices(size))) for piece, size in zip(index, shape, strict=True)], dtype)
        stacked = len(self._counts)
        picked = [range(*piece.indices(size)) for piece, size in zip(index[:stacked], shape[:stacked], strict=True)]
        for to in itertools.product(*(range(len(p)) for p in picked)):
            at = tuple(p[i] for p, i in zip(picked, to, strict=True))
            read_into(out[to], self._tensors[at], self.source, self.sizes, index[stacked:])
        return out


def _scratch(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """An array in pages of its own: on a CPU they become the parameter, else they go back; malloc would keep some."""
    pages = mmap.mmap(-1, max(math.prod(shape) * dtype.itemsize, 1))
    return np.frombuffer(pages, dtype, math.prod(shape)).reshape(shape)


def spellings(family: Family, name: str) -> Iterator[str]:
    """A tensor's name as the table has it, then as other versions and bare trunks write it."""
    yield name
    if family.aliases is not None and name in family.aliases:
        yield family.aliases[name]
    first, *others = family.prefixes
    if name.startswith(first):
        for prefix in others:
            yield prefix + name.removeprefix(first)


def _check_nothing_is_left(
    folder: Path, family: Family, spec: ModelSpec, stored: Mapping[str, Tensor], read: Any
) -> None:
    """A parameter that the config does not speak of would be lost without a word."""
    used = set().union(*(stacked.names for stacked in read))
    patterns = list(family.ignored + _NO_PARAMETERS)
    if spec.tied:  # some folders hold the table twice
        patterns += [re.escape(name) for name in spellings(family, family.table["unembedding"].name)]
        patterns.append(r"(.*\.)?lm_head\.weight")
    ignored = re.compile("|".join(f"(?:{pattern})" for pattern in patterns))
    for name, tensor in stored.items():
        if name not in used and not ignored.fullmatch(name):
            raise UserError(
                f"{tensor.path}: tensor {name[:200]!r} has no place in a {family.model_type} model "
                f"as {CONFIG} describes it"
            )
