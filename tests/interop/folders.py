"""Small Hugging Face folders, written from drawn numbers."""

import json
import math

import numpy as np

from rlhf_jax.interop.safetensors_io import read_header, write
from tests.oracles_hf.weights import draw


def weights(name, case):
    """The tensors of a case, by name."""
    return {tensor: draw(name, tensor, *rest) for tensor, *rest in case["tensors"]}


def write_case(folder, case, *, config="config", dtype="F32", name=None):
    """config.json and model.safetensors of a case; its name is the folder's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(case[config]))
    write_tensors(folder / "model.safetensors", weights(name or folder.name, case), dtype)
    return folder


def write_tensors(path, tensors, dtype="F32"):
    """A file of tensors."""
    write(path, [(name, dtype, x.shape) for name, x in tensors.items()], iter(tensors.values()))


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def change_config(folder, **fields):
    """Set fields of config.json, or, where the value is `...`, take them out."""
    changed = {name: value for name, value in (read_config(folder) | fields).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(changed))


def read_tensors(path):
    """The arrays of a float32 file, by name."""
    data = path.read_bytes()
    found = read_header(path)
    return {
        name: np.frombuffer(data, np.float32, math.prod(tensor.shape), tensor.start).reshape(tensor.shape)
        for name, tensor in found.items()
    }
