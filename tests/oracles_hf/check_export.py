"""Read exported folders with transformers and write the numbers it makes of them; run where torch and transformers are.

python tests/oracles_hf/check_export.py FOLDER …: each folder holds inputs.npz (ids, mask) and gets outputs.npz.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification


def run(folder):
    """Logits [rows, length, vocabulary] of a language model, scores [rows] of a classifier."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    auto = AutoModelForSequenceClassification if name.endswith("SequenceClassification") else AutoModelForCausalLM
    model, info = auto.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert type(model).__name__ == name, (type(model).__name__, name)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with np.load(folder / "inputs.npz") as inputs:
        ids, mask = inputs["ids"], inputs["mask"]
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    tensors = {"input_ids": ids, "attention_mask": mask.astype(int), "position_ids": positions}
    with torch.no_grad():
        out = model.eval()(**{key: torch.tensor(x) for key, x in tensors.items()}, use_cache=False).logits
    np.savez(folder / "outputs.npz", out=out.numpy())


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    for argument in sys.argv[1:]:
        run(Path(argument))
