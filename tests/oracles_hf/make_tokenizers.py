"""Two small tokenizers as transformers saves them, and what it makes of awkward texts and of chat templates.

Run it from the repository's root in an environment with transformers: python tests/oracles_hf/make_tokenizers.py
"""

import json
import shutil
import sys
from pathlib import Path

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.oracles_hf.awkward import CONVERSATIONS, TEXTS
from tests.oracles_hf.templates import CHATML, LLAMA, TEMPLATES

FOLDER = Path(__file__).parent / "tokenizers"
FILE = Path(__file__).with_name("tokenizers.json")
CORPUS = [(Path(__file__).resolve().parents[2] / "README.md").read_text(), *TEXTS]


def byte_level():
    """Like GPT-2's and Qwen's: no BOS, and bytes as letters."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unused|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    core.enable_truncation(8)  # which loading must undo
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


def metaspace():
    """Like Llama 2's: a space before the text, byte fallback, BOS, no pad."""
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=520,
        limit_alphabet=100,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    words = [word for text in CORPUS for word in text.replace(" ", " ▁").split(" ")]
    core.train_from_iterator(words, trainer)
    told = json.loads(core.to_str())  # bytes are pieces, not special tokens
    told["added_tokens"] = [entry for entry in told["added_tokens"] if not entry["content"].startswith("<0x")]
    core = Tokenizer.from_str(json.dumps(told))
    core.add_tokens([AddedToken("<extra>", special=False, normalized=False)])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=LLAMA
    )


def texts(tokenizer):
    """Token ids, without BOS, and what they decode to."""
    found = []
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        decoded = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        found.append({"text": text, "ids": ids, "decoded": decoded})
    return found


def chats(tokenizer, template):
    """Every conversation by a template: text, ids, and where it marks them the mask of answers."""
    found = []
    for messages in CONVERSATIONS:
        given = {"conversation": messages, "chat_template": template}
        prompt = tokenizer.apply_chat_template(**given, tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template(**given, tokenize=False)
        marked = tokenizer.apply_chat_template(**given, return_dict=True, return_assistant_tokens_mask=True)
        kept = {"text": text, "prompt": prompt, "ids": marked["input_ids"]}
        found.append(kept | ({"mask": marked["assistant_masks"]} if "endgeneration" in template else {}))
    return found


def run(name, tokenizer):
    """Everything that is kept of a tokenizer, read back from its folder."""
    shutil.rmtree(FOLDER / name, ignore_errors=True)
    tokenizer.save_pretrained(FOLDER / name)
    path = FOLDER / name / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), ensure_ascii=True, separators=(",", ":")) + "\n")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / name)
    return {
        "texts": texts(tokenizer),
        "own": chats(tokenizer, tokenizer.chat_template),
        "templates": {key: chats(tokenizer, source) for key, source in TEMPLATES.items()},
    }


if __name__ == "__main__":
    made = {"byte_level": run("byte_level", byte_level()), "metaspace": run("metaspace", metaspace())}
    FILE.write_text(json.dumps(made, ensure_ascii=True, separators=(",", ":")) + "\n")
    print(FILE, FILE.stat().st_size, "bytes; transformers", transformers.__version__)
