"""Reading a folder of PEFT: a LoRA adapter, folded into the model of transformers that it names as its base."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax import models, sharding
from rlhf_jax.errors import UserError
from rlhf_jax.interop.families import Family, Fields, family_of, read_spec, sizes
from rlhf_jax.interop.hf_folder import CONFIG as BASE_CONFIG
from rlhf_jax.interop.hf_folder import load_folder, spellings
from rlhf_jax.interop.peft_layout import CONFIG, PREFIX, SCORE, WEIGHTS, Linear, linears
from rlhf_jax.interop.safetensors_io import DTYPES, Tensor, read_header, read_json, read_small
from rlhf_jax.models import lora
from rlhf_jax.models.spec import DType, Lora, ModelSpec
from rlhf_jax.types import Params

_INITS = (True, False, "gaussian", "eva", "orthogonal")
"""Ways to begin that leave the base as it is; others, such as "pissa", change its weights."""
_OTHER_METHODS = (
    *("use_dora", "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication"),
    *("arrow_config", "kasa_config", "monteclora_config", "velora_config"),
)
"""Fields of LoraConfig by which an adapter computes something else than W + scale B A."""


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter over another folder's model."""
    return (folder / CONFIG).is_file()


def adapter_base(folder: Path) -> str:
    """The base's path or hub name; UserError for an adapter that names none, or that is no plain LoRA."""
    fields = _fields(folder)
    fields.refuse("peft_type", "LORA")
    fields.refuse("task_type", "CAUSAL_LM", "SEQ_CLS")
    fields.refuse("bias", "none")
    fields.refuse("init_lora_weights", *_INITS)
    fields.refuse("revision", "main")
    for name in _OTHER_METHODS:
        fields.refuse(name, False)
    base = fields.values.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise fields.wrong(
            "base_model_name_or_path",
            "expected the base model's folder (`rlhf-jax export WORKDIR --stage base` writes a run's) or its hub name",
        )
    return base


def load_adapter(
    folder: Path, base: Path, *, dtype: DType = "float32", mesh: Mesh | None = None
) -> tuple[ModelSpec, Params]:
    """The model in the folder `base` with the adapter in `folder` folded in: W + scale B A in place of each W.

    The scale is lora_alpha / r, with `use_rslora` lora_alpha / √r; `rank_pattern` and `alpha_pattern` may give other
    values by the end of a module's name. With a score head in its file it is a reward model {"trunk", "head"}. The
    parameters lie as `load_folder` lays them. Raises UserError that names the file and the tensor or field.
    """
    file = folder / WEIGHTS
    if not file.is_file():
        raise UserError(f"{folder}: no {WEIGHTS} in this folder; adapters in other formats are not read")
    stored, config = read_header(file), read_json(base / BASE_CONFIG)
    family, spec = family_of(config, base / BASE_CONFIG), read_spec(config, base / BASE_CONFIG)
    found = [one for linear in linears(family, spec) for one in _find(linear, family, spec, stored, _fields(folder))]
    _check(file, family, spec, stored, found)
    spec, params = load_folder(base, dtype=dtype, mesh=mesh)
    trunk = params["trunk"] if "head" in params else params
    trunk = _folded(spec, trunk, found)
    if SCORE in stored:
        boxed = jax.eval_shape(lambda: models.init_with_head(spec, jax.random.key(0)))
        layout = sharding.shardings(sharding.single_device_mesh() if mesh is None else mesh, boxed)
        head = {"kernel": read_small(stored[SCORE])[0], "bias": np.zeros((), np.float32)}
        params = {"head": sharding.put(head, layout["head"])}
        trunk.pop("unembedding", None)
    return spec, {"trunk": trunk, "head": params["head"]} if "head" in params else trunk


@dataclass(frozen=True)
class _Found:
    """A linear layer's adapters."""

    linear: Linear
    scale: float
    layers: Mapping[int, tuple[Tensor, Tensor]]
    """lora_A and lora_B of each layer that has them."""


def _fields(folder: Path) -> Fields:
    return Fields(read_json(folder / CONFIG), folder / CONFIG)


def _find(
    linear: Linear, family: Family, spec: ModelSpec, stored: Mapping[str, Tensor], fields: Fields
) -> Iterator[_Found]:
    """The module's adapters, where it has some in any layer; every shape is checked."""
    layers, kinds = {}, set()
    for layer in range(spec.n_layers):
        for module in spellings(family, linear.module.format(layer=layer)):
            names = [f"{PREFIX}{module}.lora_{x}.weight" for x in "AB"]
            if not any(name in stored for name in names):
                continue
            kinds.add(_rank_and_scale(fields, module))
            if len(kinds) > 1:
                raise UserError(
                    f"{fields.path}: rank_pattern or alpha_pattern: only some layers of {linear.module!r} have a value "
                    "of their own, which is not read; a module's layers must agree"
                )
            ((rank, _),) = kinds
            for name, shape in zip(names, linear.shapes(rank, sizes(spec)), strict=True):
                if name not in stored:
                    raise UserError(f"{fields.path.with_name(WEIGHTS)}: tensor {name[:200]!r} is missing")
                _check_tensor(stored[name], shape)
            layers[layer] = stored[names[0]], stored[names[1]]
    for _, scale in kinds:
        yield _Found(linear, scale, layers)


def _rank_and_scale(fields: Fields, module: str) -> tuple[int, float]:
    by_name = {}
    for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        inside = fields.inside(pattern)
        for end in inside.values:
            if not re.fullmatch(r"[\w.]+", end):
                raise fields.wrong(pattern, "only ends of modules' names are read, no expressions")
        chosen = next((end for end in inside.values if f".{module}".endswith(f".{end}")), None)
        source, name = (fields, default) if chosen is None else (inside, chosen)
        by_name[default] = source.whole(name) if default == "r" else source.number(name)
    rank = by_name["r"]
    return rank, by_name["lora_alpha"] / (rank**0.5 if fields.flag("use_rslora", False) else rank)


def _check_tensor(tensor: Tensor, shape: tuple[int, ...]) -> None:
    where = f"{tensor.path}: tensor {tensor.name[:200]!r}"
    if tensor.shape != shape:
        raise UserError(f"{where} has shape {tensor.shape}, {CONFIG} and the base make it {shape}")
    if tensor.dtype not in DTYPES:
        raise UserError(f"{where} is of {tensor.dtype}; adapters are {', '.join(DTYPES)}")


def _check(file: Path, family: Family, spec: ModelSpec, stored: Mapping[str, Tensor], found: list[_Found]) -> None:
    """An adapter that nothing here reads would be lost without a word."""
    used = {tensor.name for one in found for pair in one.layers.values() for tensor in pair}
    if SCORE in stored:
        _check_tensor(stored[SCORE], (1, spec.d_model))
    left = [name for name in stored if name not in used and name != SCORE]
    if left:
        raise UserError(f"{file}: tensor {left[0][:200]!r} has no place in a {family.model_type} model of this size")
    if not used:
        raise UserError(f"{file}: holds no adapter")


def _folded(spec: ModelSpec, params: Params, found: list[_Found]) -> Params:
    """The same model with the adapters in its weights."""
    adapters: Params = {}
    for one in found:
        for path, (a, b) in _stacked(spec, one).items():
            *above, name = path.split("/")
            tree: Params = {f"{name}_lora_a": a, f"{name}_lora_b": b}
            for outer in reversed(above):
                tree = {outer: tree}
            adapters = lora.merge(adapters, tree)
    targets = tuple(path.split("/")[-1] for one in found for path, _ in one.linear.parts)
    unscaled = replace(spec, lora=Lora(rank=1, alpha=1.0, targets=targets))  # the scale is in B already
    layout = jax.tree.map(lambda x: x.sharding, params)
    fold = jax.jit(lambda base, own: lora.fold(unscaled, lora.merge(base, own)), donate_argnums=0, out_shardings=layout)
    return fold(params, adapters)


def _stacked(spec: ModelSpec, one: _Found) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A [layers, ..., r] and B [layers, r, ...] by our projections, 0 in layers without; B is scaled."""
    stacks: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for layer, (a, b) in one.layers.items():
        scaled = read_small(b) * np.float32(one.scale)
        for path, parts in one.linear.unpack(read_small(a), scaled, sizes(spec)).items():
            if path not in stacks:
                first, second = (np.zeros((spec.n_layers, *part.shape), np.float32) for part in parts)
                stacks[path] = first, second
            for stack, part in zip(stacks[path], parts, strict=True):
                stack[layer] = part
    return stacks
