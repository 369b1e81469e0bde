"""Vocabularies of GGUF files as tokenizers of the `tokenizers` library: byte-level BPE, SentencePiece with scores."""

from typing import Any

import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.interop.chat import ChatTemplate
from rlhf_jax.interop.gguf_file import GgufFile
from rlhf_jax.interop.json_tokenizer import Declared, JsonTokenizer, LibraryErrors, library

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_SPACE = "▁"

# How text is cut before merging, by `tokenizer.ggml.pre`. The file names it and leaves out what it is.
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_WORDS = ("gpt-2", "mpt", "olmo", "jais", "phi-2")
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")
_PATTERNS = {"llama-bpe": _LLAMA_3, "llama3": _LLAMA_3, "llama-v3": _LLAMA_3, "qwen2": _QWEN_2}
_KINDS = (*_WORDS, *_DIGITS, *_PATTERNS)


def read_tokenizer(file: GgufFile) -> JsonTokenizer | None:
    """The tokenizer and chat template of a file; None where it holds no vocabulary."""
    if "tokenizer.ggml.model" not in file.fields:
        return None
    kind = file.text("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise file.wrong("tokenizer.ggml.model", "those read are gpt2 (byte-level BPE) and llama (SentencePiece)")
    pieces = file.texts("tokenizer.ggml.tokens")
    rows = file.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in file.tensors else len(pieces)
    if not 0 < len(pieces) <= rows:
        raise UserError(
            f"{file.path}: key 'tokenizer.ggml.tokens': {len(pieces)} tokens, the embedding has {rows} rows"
        )
    if len(set(pieces)) < len(pieces):
        raise UserError(f"{file.path}: key 'tokenizer.ggml.tokens': a token stands twice")
    types = np.ones(len(pieces), int)
    if "tokenizer.ggml.token_type" in file.fields:
        types = file.numbers("tokenizer.ggml.token_type", len(pieces))
    if kind == "llama":  # llama.cpp writes the spaces of user-defined pieces as they are
        known = set(pieces)
        spaced = [piece.replace(" ", _SPACE) for piece in pieces]
        defined = (types == _USER_DEFINED).tolist()
        pieces = [b if own and b not in known else a for a, b, own in zip(pieces, spaced, defined, strict=True)]
    tokenizers = library(str(file.path))
    with LibraryErrors(f"{file.path}: its vocabulary makes no tokenizer"):
        core = (_byte_level if kind == "gpt2" else _sentencepiece)(file, tokenizers, pieces, types)
        _add_special(core, tokenizers, pieces, types)
    return JsonTokenizer(core, _declared(file, pieces), chat=_chat(file), origin=str(file.path))


def _byte_level(file: GgufFile, tokenizers: Any, pieces: list[str], types: np.ndarray) -> Any:
    merges = [tuple(merge.split(" ")) for merge in file.texts("tokenizer.ggml.merges")]
    for merge in merges:
        if len(merge) != 2:
            raise UserError(f"{file.path}: key 'tokenizer.ggml.merges': {' '.join(merge)[:80]!r} is no pair")
    pre = file.text("tokenizer.ggml.pre", "gpt-2")
    if pre not in _KINDS:
        raise file.wrong("tokenizer.ggml.pre", f"those read are {', '.join(_KINDS)}")
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    # Llama 3 has whole words for which no merges lead.
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, ignore_merges="llama" in pre))
    steps = tokenizers.pre_tokenizers
    cut = [steps.ByteLevel(add_prefix_space=False, use_regex=pre not in _PATTERNS)]
    if pre in _DIGITS:
        cut.insert(0, steps.Digits(individual_digits=True))
    elif pre in _PATTERNS:
        cut.insert(0, steps.Split(tokenizers.Regex(_PATTERNS[pre]), behavior="isolated"))
    core.pre_tokenizer = steps.Sequence(cut)
    core.decoder = tokenizers.decoders.ByteLevel()
    if pre == "qwen2":
        core.normalizer = tokenizers.normalizers.NFC()
    return core


def _sentencepiece(file: GgufFile, tokenizers: Any, pieces: list[str], types: np.ndarray) -> Any:
    """BPE that merges the pair of the highest score first; characters without a token become bytes."""
    scores = file.numbers("tokenizer.ggml.scores", len(pieces))
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    unknown = pieces[file.whole("tokenizer.ggml.unknown_token_id", 0)] if pieces else None
    core = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocabulary, _merges(vocabulary, scores, types), unk_token=unknown, fuse_unk=True, byte_fallback=True
        )
    )
    prefix = file.flag("tokenizer.ggml.add_space_prefix", True)
    normal, decoders = tokenizers.normalizers, tokenizers.decoders
    spaces = normal.Replace(" ", _SPACE)
    core.normalizer = normal.Sequence([normal.Prepend(_SPACE), spaces]) if prefix else spaces
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    core.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return core


def _merges(vocabulary: dict[str, int], scores: np.ndarray, types: np.ndarray) -> list[tuple[str, str]]:
    """Every way to make an ordinary token of two others, the highest score first."""
    made = []
    merged = {piece for piece, id in vocabulary.items() if types[id] == 1}
    for piece in merged:
        id = vocabulary[piece]
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in merged and right in merged:
                made.append((-float(scores[id]), id, vocabulary[left], vocabulary[right], left, right))
    made.sort(key=lambda merge: merge[:4])
    return [merge[4:] for merge in made]


def _add_special(core: Any, tokenizers: Any, pieces: list[str], types: np.ndarray) -> None:
    """Tokens that stand in text as they are: control tokens, which decoding drops, and user-defined ones.

    Runs of spaces are looked for once spaces are written as the vocabulary writes them.
    """
    added = [
        tokenizers.AddedToken(
            pieces[id], special=bool(types[id] != _USER_DEFINED), normalized=pieces[id].startswith(_SPACE)
        )
        for id in np.flatnonzero(np.isin(types, (_UNKNOWN, _CONTROL, _USER_DEFINED)))
        if pieces[id]
    ]
    core.add_tokens(added)


def _declared(file: GgufFile, pieces: list[str]) -> Declared:
    """BOS, EOS and the like by id; llama.cpp's end of a turn or message also ends a generation."""

    def id_of(name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        if key not in file.fields:
            return None
        if file.whole(key) >= len(pieces):
            raise file.wrong(key, f"the vocabulary has {len(pieces)} tokens")
        return file.whole(key)

    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: id_of(key) for name, key in names.items()}
    turns = (id_of(name) for name in ("eot", "eom"))
    return Declared(
        tokens={name: pieces[id] for name, id in ids.items() if id is not None},
        ends=tuple(id for id in turns if id is not None),
        adds_bos=file.flag("tokenizer.ggml.add_bos_token", file.text("tokenizer.ggml.model") == "llama"),
    )


def _chat(file: GgufFile) -> ChatTemplate | None:
    key = "tokenizer.chat_template"
    if key not in file.fields:
        return None
    return ChatTemplate(file.text(key), origin=f"{file.path}: {key}")
