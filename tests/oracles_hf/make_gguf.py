"""What transformers says of the two small models of GGUF files, kept as numbers in gguf.json.

Its own reading of GGUF gives weights, tokenizers and chat templates. Run it from the repository's root in an
environment with torch, transformers and gguf: python tests/oracles_hf/make_gguf.py
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.oracles_hf.awkward import CONVERSATIONS, TEXTS
from tests.oracles_hf.small_models import fetch

FILE = Path(__file__).with_name("gguf.json")
NEW = 64

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "Photosynthesis is the process by which",
    "Count on: " + " ".join(f"{number}," for number in range(1, 181)),
]


def tokenizer_of(model, path):
    """transformers' tokenizer; SmolLM2's with the cut at each digit, which GGUF tells by a name that it passes over."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if model == "smollm2":
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), backend.pre_tokenizer])
    return tokenizer


def texts(tokenizer):
    """Token ids, without BOS, and what they decode to."""
    found = []
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        decoded = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        found.append({"text": text, "ids": ids, "decoded": decoded})
    return found


def chats(tokenizer):
    """Conversations by the model's own template, with and without the generation prompt."""
    found = []
    for messages in CONVERSATIONS:
        for prompt in (False, True):
            given = {"conversation": messages, "add_generation_prompt": prompt}
            text = tokenizer.apply_chat_template(**given, tokenize=False)
            ids = tokenizer.apply_chat_template(**given, tokenize=True, return_dict=False)
            found.append({"messages": messages, "add_generation_prompt": prompt, "text": text, "ids": ids})
    return found


@torch.inference_mode()
def continuation(model, ids, eos_id):
    """The most probable tokens, EOS included; and the smallest lead that one of them had."""
    made, lead, cache, tokens = [], float("inf"), None, torch.tensor([ids])
    while len(made) < NEW and (not made or made[-1] != eos_id):
        out = model(tokens, past_key_values=cache, use_cache=True)
        best = out.logits[0, -1].topk(2)
        made.append(int(best.indices[0]))
        lead = min(lead, float(best.values[0] - best.values[1]))
        cache, tokens = out.past_key_values, torch.tensor([[made[-1]]])
    return {"ids": made, "lead": round(lead, 4)}


def run(model):
    """Everything that is kept of a model."""
    path = fetch(model)
    tokenizer = tokenizer_of(model, path)
    network = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    greedy = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt).input_ids
        greedy.append({"prompt": prompt, "prompt_ids": ids, **continuation(network, ids, tokenizer.eos_token_id)})
        print(model, len(ids), greedy[-1]["lead"], repr(tokenizer.decode(greedy[-1]["ids"])))
    chat = chats(tokenizer) if tokenizer.chat_template else []
    return {"greedy": greedy, "texts": texts(tokenizer), "chats": chat}


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    found = {model: run(model) for model in ("smollm2", "gemma3")}
    FILE.write_text(json.dumps(found, ensure_ascii=True, separators=(",", ":")) + "\n")
    print(FILE, FILE.stat().st_size, "bytes; transformers", transformers.__version__)
