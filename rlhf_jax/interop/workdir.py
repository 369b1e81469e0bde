"""A finished stage of one of our runs as a model: config.json says what it is, Orbax holds the parameters."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from rlhf_jax import digests, models, sharding
from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.errors import UserError
from rlhf_jax.interop.pretrained import Pretrained
from rlhf_jax.interop.safetensors_io import read_json
from rlhf_jax.models import lora, quantized
from rlhf_jax.models import spec as spec_module
from rlhf_jax.models.spec import DType, ModelSpec
from rlhf_jax.types import Params

Init = Callable[[jax.Array], Any]


def find_stage(path: Path) -> tuple[Path, str] | None:
    """Workdir and stage of a path to a run, whose last finished stage it is, or to a stage; None for other folders."""
    if (path / "params").is_dir() and (path.parent / "config.json").is_file():
        return path.resolve().parent, path.resolve().name
    if not (path / "config.json").is_file():
        return None
    config = read_json(path / "config.json")
    if "experiment" not in config:
        return None
    stages = _field(config["experiment"], "stages", path)
    finished = [name for name in stages if (path / name / "params").is_dir()]
    policies = [name for name in finished if not _has_head(path / name / "params")]
    if not policies:
        raise UserError(f"{path}: no finished stage made a policy; a reward model is loaded by its own folder")
    return path, policies[-1]


def stage_model(workdir: Path, classes: Mapping[str, type]) -> Any:
    """The model that the run started from, as its config has it; `classes` are those that may stand there."""
    path = workdir / "config.json"
    plain = _field(_field(read_json(path), "experiment", path), "model", path)
    ropes = (spec_module.LinearRope, spec_module.Llama3Rope, spec_module.YarnRope)
    inside = (ModelSpec, spec_module.Experts, spec_module.Lora, *ropes)
    known = {**classes, **{cls.__name__: cls for cls in inside}}

    def build(value: Any, default: str | None) -> Any:
        if isinstance(value, list):
            return tuple(value)
        if not isinstance(value, dict):
            return value
        fields = dict(value)
        name = fields.pop("class", default)
        if name not in known:
            raise UserError(f"{path}: model: no class {str(name)[:80]!r} here; known: {', '.join(classes)}")
        return known[name](**{key: build(inner, "ModelSpec") for key, inner in fields.items()})

    try:
        return build(plain, None)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: model: {error}") from None


def load_stage(
    workdir: Path, stage: str, classes: Mapping[str, type], *, dtype: DType, mesh: Mesh | None
) -> Pretrained:
    """A stage's policy, or its reward model {"trunk", "head"}; adapters are folded into the weights."""
    model, folder = stage_model(workdir, classes), workdir / stage / "params"
    mesh = sharding.single_device_mesh() if mesh is None else mesh
    spec, has_head = model.spec, _has_head(folder)
    if has_head and len(_stored(folder)["head"]["kernel"].shape) > 1:
        raise UserError(f"{folder}: an ensemble of reward models, not one network; `rlhf-jax score` reads such a stage")
    init = partial(models.init_with_head, spec) if has_head else lambda key: lora.own(spec, models.init(spec, key))
    params, tokenizer = _restore(folder, init, dtype, mesh), model.tokenizer(workdir)
    if spec.lora is not None:
        seed = _field(_field(read_json(workdir / "config.json"), "experiment", workdir), "seed", workdir)
        whole = model.load(data=MovieReviews(), workdir=workdir, seed=seed, mesh=mesh).params
        boxed = lora.base(spec, jax.eval_shape(partial(models.init, spec), jax.random.key(0)))
        base = quantized.store(spec, lora.base(spec, whole), boxed, mesh)  # as the adapters were trained over it
        trunk = lora.fold(spec, lora.merge(base, params["trunk"] if has_head else params))
        if has_head:
            trunk.pop("unembedding", None)
        params = {"trunk": trunk, "head": params["head"]} if has_head else trunk
        spec = dataclasses.replace(spec, lora=None)
    return Pretrained(spec, params, tokenizer)


def _restore(folder: Path, init: Init, dtype: DType, mesh: Mesh) -> Params:
    wrong = digests.damage(folder)
    if wrong is not None:
        raise UserError(f"{wrong}; `rlhf-jax run` with this workdir makes these parameters again")
    boxed = jax.eval_shape(init, jax.random.key(0))
    target = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=place),
        sharding.unbox(boxed),
        sharding.shardings(mesh, boxed),
    )
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder.resolve(), target)
    except (ValueError, OSError) as error:
        raise UserError(
            f"{folder}: no readable checkpoint of this model ({str(error).splitlines()[0][:200]})"
        ) from None


def _has_head(folder: Path) -> bool:
    tree = _stored(folder)
    return "head" in tree and "trunk" in tree


def _stored(folder: Path) -> Mapping[str, Any]:
    """What a checkpoint says of its arrays, by name."""
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.metadata(folder.resolve()).item_metadata
    except (ValueError, OSError) as error:
        raise UserError(f"{folder}: no readable checkpoint ({str(error).splitlines()[0][:200]})") from None
    return {} if tree is None else tree.tree


def _field(value: Any, name: str, path: Path) -> Any:
    if not isinstance(value, dict) or name not in value:
        raise UserError(f"{path} is damaged: no {name} in config.json")
    return value[name]
