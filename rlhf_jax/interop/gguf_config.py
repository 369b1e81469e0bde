"""GGUF metadata as the config.json that transformers would have for the model, by architecture."""

from typing import Any

import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.interop.families import Fields
from rlhf_jax.interop.gguf_file import GgufFile
from rlhf_jax.models.spec import Llama3Rope, ModelSpec

ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
"""llama.cpp's names (Mistral and SmolLM2 are "llama" there), and the family of each."""

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor by which Llama 3.1's stretched wavelengths are told."""

# Gemma's largest models scale queries by their share of the width, which llama.cpp tells by the number of layers.
_WIDE_QUERIES = {"gemma2": 46, "gemma3": 62}
_GEMMA_2_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_LLAMA_3_1 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_config(file: GgufFile) -> Fields:
    """The fields of config.json; raises UserError that names the key for what is missing or not supported."""
    name = architecture(file)
    if file.whole(f"{name}.expert_count", 0):
        raise file.wrong(f"{name}.expert_count", "mixtures of experts are not read from GGUF")
    heads = file.whole(f"{name}.attention.head_count", least=1)
    width = file.whole(f"{name}.embedding_length", least=1)
    head_dim = _head_dim(file, name, width // heads)
    config: dict[str, Any] = {
        "vocab_size": _vocab_size(file),
        "hidden_size": width,
        "num_hidden_layers": file.whole(f"{name}.block_count", least=1),
        "num_attention_heads": heads,
        "num_key_value_heads": file.whole(f"{name}.attention.head_count_kv", heads, least=1),
        "head_dim": head_dim,
        "intermediate_size": file.whole(f"{name}.feed_forward_length", least=1),
        "max_position_embeddings": file.whole(f"{name}.context_length", least=1),
        "rms_norm_eps": file.number(f"{name}.attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_theta": file.number(f"{name}.rope.freq_base", 10_000.0),
        "rope_scaling": _rope_scaling(file, name),
    }
    if name in ("llama", "qwen3"):
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if name == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    if name == "llama" and f"{name}.attention.sliding_window" in file.fields:
        raise file.wrong(f"{name}.attention.sliding_window", "not supported in this architecture")
    if name in ("gemma2", "gemma3"):
        config |= _gemma(file, name, config)
    return Fields(config, file.path)


def architecture(file: GgufFile) -> str:
    """`general.architecture`, one that is known."""
    name = file.text("general.architecture")
    if name not in ARCHITECTURES:
        raise file.wrong("general.architecture", f"those known are {', '.join(ARCHITECTURES)}")
    return name


def check_rope_factors(file: GgufFile, spec: ModelSpec) -> None:
    """Raise UserError unless the factors in the file, where it has them, are those of the spec's rope."""
    if ROPE_FACTORS not in file.tensors:
        return
    scaling, count = spec.rope_scaling, spec.head_dim // 2
    assert isinstance(scaling, Llama3Rope)
    wavelengths = 2 * np.pi * spec.rope_theta ** (np.arange(count) * 2 / spec.head_dim)
    kept = (scaling.original_max_len / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    kept = np.clip(kept, 0, 1)
    expected = 1 / ((1 - kept) / scaling.factor + kept)
    if not np.allclose(_rope_factors(file), expected, rtol=1e-3):
        raise UserError(
            f"{file.path}: tensor {ROPE_FACTORS!r}: no factors of the kind of Llama 3.1, which alone are read"
        )


def _rope_factors(file: GgufFile) -> np.ndarray:
    tensor = file.tensors[ROPE_FACTORS]
    if len(tensor.shape) != 1:
        raise UserError(f"{file.path}: tensor {ROPE_FACTORS!r} has shape {tensor.shape}, expected one axis")
    return tensor.rows(0, 1)[0]


def _rope_scaling(file: GgufFile, name: str) -> dict[str, Any] | None:
    kind = file.text(f"{name}.rope.scaling.type", "none")
    if ROPE_FACTORS in file.tensors:
        if name != "llama" or kind not in ("none", "linear"):
            raise UserError(f"{file.path}: tensor {ROPE_FACTORS!r} is not supported in this architecture")
        return {"rope_type": "llama3", "factor": float(_rope_factors(file).max()), **_LLAMA_3_1}
    if kind == "linear":
        return {"rope_type": "linear", "factor": file.number(f"{name}.rope.scaling.factor")}
    if kind != "none":
        raise file.wrong(f"{name}.rope.scaling.type", "those read are none and linear")
    return None


def _head_dim(file: GgufFile, name: str, default: int) -> int:
    width = file.whole(f"{name}.attention.key_length", max(default, 1), least=1)
    for key in (f"{name}.attention.value_length", f"{name}.rope.dimension_count"):
        if file.whole(key, width) != width:
            raise file.wrong(key, f"expected the width of a head, {width}")
    return width


def _vocab_size(file: GgufFile) -> int:
    if "token_embd.weight" not in file.tensors:
        raise UserError(f"{file.path}: tensor 'token_embd.weight' is missing")
    return file.tensors["token_embd.weight"].shape[0]


def _gemma(file: GgufFile, name: str, config: dict[str, Any]) -> dict[str, Any]:
    """What Gemma 2 and 3 have besides; llama.cpp knows the layers with a window by the architecture alone."""
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    wide = layers == _WIDE_QUERIES[name]
    own: dict[str, Any] = {
        "query_pre_attn_scalar": config["hidden_size"] // heads if wide else config["head_dim"],
        "sliding_window": file.whole(f"{name}.attention.sliding_window", least=1),
    }
    pattern = f"{name}.attention.sliding_window_pattern"
    if pattern in file.fields:
        every = file.fields[pattern]
        if isinstance(every, np.ndarray) and every.dtype == bool and len(every) == layers:
            own["layer_types"] = ["sliding_attention" if local else "full_attention" for local in every]
        else:
            period = file.whole(pattern, least=1)
            own["layer_types"] = [
                "full_attention" if (layer + 1) % period == 0 else "sliding_attention" for layer in range(layers)
            ]
    if name == "gemma2":
        for key, default in _GEMMA_2_CAPS.items():
            own[key] = file.number(f"gemma2.{key}", default)
    else:
        own["rope_local_base_freq"] = file.number("gemma3.rope.freq_base_swa", 10_000.0)
        if "gemma3.final_logit_softcapping" in file.fields:
            own["final_logit_softcapping"] = file.number("gemma3.final_logit_softcapping")
    return own
