"""The architectures of transformers that can be read and written: one mapping file each, by name in FAMILIES."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.interop.families.base import Family, Layout, Source, Table, layout, sizes
from rlhf_jax.interop.families.fields import Fields
from rlhf_jax.interop.families.gemma import GEMMA, GEMMA2, GEMMA3, GEMMA3_TEXT
from rlhf_jax.interop.families.gpt2 import GPT2
from rlhf_jax.interop.families.gpt_neox import GPT_NEOX
from rlhf_jax.interop.families.llama import LLAMA
from rlhf_jax.interop.families.mistral import MISTRAL
from rlhf_jax.interop.families.mixtral import MIXTRAL
from rlhf_jax.interop.families.qwen2 import QWEN2
from rlhf_jax.interop.families.qwen3 import QWEN3
from rlhf_jax.interop.families.qwen3_moe import QWEN3_MOE
from rlhf_jax.models.spec import ModelSpec

FAMILIES = {
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "gemma3_text": GEMMA3_TEXT,
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE,
}
"""By `model_type` of config.json."""

WRITTEN = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3_TEXT, GPT2, GPT_NEOX, MIXTRAL, QWEN3_MOE)
"""Those that a model is written as; where several fit, the first."""

__all__ = ["FAMILIES", "Family", "Fields", "Layout", "Source", "Table", "layout", "read_spec", "sizes", "written_as"]


def family_of(config: dict[str, Any], path: Path) -> Family:
    """The family that a config.json names; UserError with those known where there is none."""
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        shown = f"{name[:80]!r}" if isinstance(name, str) else "no name"
        raise UserError(f"{path}: model_type: {shown} is no known architecture; there are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def read_spec(config: dict[str, Any], path: Path) -> ModelSpec:
    """The ModelSpec of a config.json; UserError that names the field for what is wrong with it or not supported."""
    family, fields = family_of(config, path), Fields(config, path)
    if "quantization_config" in config and config["quantization_config"] is not None:
        raise fields.wrong("quantization_config", "quantized weights are not read")
    try:
        return family.spec(fields)
    except ValueError as error:  # of ModelSpec, whose fields have other names
        raise UserError(f"{path}: {error}") from None


def written_as(spec: ModelSpec) -> Family:
    """The family that holds a spec, so that the config written reads back as the spec.

    Raises UserError that says where the nearest family differs.
    """
    wanted, misses = _canonical(spec), []
    for family in WRITTEN:
        there = Path("config.json")
        try:
            found = _canonical(family.spec(Fields(family.config(wanted), there)))
        except (UserError, ValueError):
            continue
        different = [name for name, value in vars(wanted).items() if vars(found)[name] != value]
        if not different:
            return family
        misses.append((len(different), family.model_type, different))
    _, nearest, different = min(misses)
    shown = ", ".join(f"{name}={vars(wanted)[name]!r}" for name in different)
    raise UserError(
        f"no architecture of transformers has these fields of the model; {nearest}, the nearest, lacks {shown}"
    )


def _canonical(spec: ModelSpec) -> ModelSpec:
    """Fields that compute the same, written the same way; numerics that no config.json holds are left out."""
    kinds = spec.layer_kinds
    rotary = spec.positions == "rotary"
    return replace(
        spec,
        window=spec.window if any(kinds) else None,
        local_layers=None if len(spec.kinds) == 1 else spec.local_layers,
        rope_theta=spec.rope_theta if rotary else 10_000.0,
        rope_scaling=spec.rope_scaling if rotary else None,
        local_rope_theta=spec.local_rope_theta if any(kinds) and rotary else None,
        rotary_dim=None if not rotary or spec.rotated == spec.head_dim else spec.rotary_dim,
        query_scale=None if spec.query_scale == spec.head_dim**-0.5 else spec.query_scale,
        experts=None if spec.experts is None else replace(spec.experts, balance_coef=0.0),
        dtype="float32",
        attention="xla",
        remat="none",
        unroll=1,
    )
