"""Small GGUF files, as llama.cpp's converter lays out the weights of a transformers model."""

import struct

import numpy as np
import pytest

from tests.interop.folders import weights

gguf = pytest.importorskip("gguf")

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma", "gemma2": "gemma2"} | {
    "gemma3_text": "gemma3"
}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def tensors(name, case):
    """The tensors of a case as a file has them: renamed, heads permuted, Gemma's norms plus one."""
    config, found = case["config"], {}
    kind = config["model_type"]
    after = "post_attention_norm" if kind in ("gemma2", "gemma3_text") else "ffn_norm"
    for tensor, x in weights(name, case).items():
        renamed = tensor.replace("post_attention_layernorm", after)
        for theirs, ours in _NAMES.items():
            renamed = renamed.replace(theirs + ".", ours + ".")
        if "norm" in tensor and kind.startswith("gemma"):
            x = x + 1
        if kind == "llama" and ("q_proj" in tensor or "k_proj" in tensor):
            heads = config["num_attention_heads" if "q_proj" in tensor else "num_key_value_heads"]
            x = x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        found[renamed] = x
    return found


def metadata(case):
    """The keys of a case's config."""
    config = case["config"]
    name = ARCHITECTURES[config["model_type"]]
    rope = config.get("rope_parameters") or {}
    if "full_attention" in rope:
        rope = rope["full_attention"]
    found = {
        "context_length": config["max_position_embeddings"],
        "block_count": config["num_hidden_layers"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(rope.get("rope_theta", 10_000.0)),
    }
    if "head_dim" in config:
        found |= {"attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"]}
    if rope.get("rope_type") == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if name in ("gemma2", "gemma3"):
        found["attention.sliding_window"] = config["sliding_window"]
        found["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in config["layer_types"]]
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(key):
            found[key] = float(config[key])
    return {"general.architecture": name} | {f"{name}.{key}": value for key, value in found.items()}


def write(path, keys, arrays):
    """A file of keys and of tensors: arrays, or (bytes of blocks, the type of GGUF)."""
    writer = gguf.GGUFWriter(path, keys.get("general.architecture", "none"))
    for key, value in keys.items():
        if key == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, x in arrays.items():
        if isinstance(x, tuple):
            writer.add_tensor(name, x[0], raw_dtype=x[1])
        else:
            writer.add_tensor(name, np.ascontiguousarray(x, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_case(path, name, case):
    """A case of families.npz."""
    return write(path, metadata(case), tensors(name, case))


def text(value):
    """A string as the format has it."""
    encoded = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def raw(keys=b"", table=b"", data=b"", *, n_keys=0, n_tensors=0, version=3, magic=b"GGUF"):
    """A file byte by byte, for headers that no writer writes."""
    head = magic + struct.pack("<IQQ", version, n_tensors, n_keys) + keys + table
    return head + b"\0" * (-len(head) % 32) + data


def entry(name, sizes, kind=0, offset=0):
    """A line of the table of tensors."""
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)
