"""Tokenizers of the `tokenizers` library: a Hugging Face folder's tokenizer.json, and what GGUF vocabularies become."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError, missing_extra
from rlhf_jax.interop.chat import ChatTemplate, Messages, Span
from rlhf_jax.interop.safetensors_io import read_json

_TOKENIZER, _CONFIG, _SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
_GENERATION, _MODEL = "generation_config.json", "config.json"
_TEMPLATE_FILE = "chat_template.jinja"
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SPARE = re.compile(r"pad|unused|reserved|extra", re.IGNORECASE)
_DOCUMENT = "<|endoftext|>"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def _byte_level() -> dict[str, int]:
    """The character that stands for each byte (GPT-2): its own where it can be seen, else the next from 256 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_level()


@dataclass(frozen=True)
class Declared:
    """What files say about special tokens."""

    tokens: Mapping[str, str]
    """The text of each, such as {"bos_token": "<s>"}."""
    ends: tuple[int, ...] = ()
    """All ids that end a generation."""
    bos: int | None = None
    """BOS where only its id is told."""
    adds_bos: bool = False
    """Whether texts were given a BOS in training."""


class JsonTokenizer:
    """A tokenizer of the `tokenizers` library with the special tokens that training needs.

    - `eos_id` ends an answer: EOS, or, where a chat template writes another of the tokens that end a generation, that.
    - `bos_id` starts every row: BOS where the model was given one before texts; else `<|endoftext|>`, which parted
      documents in the pretraining of GPT-2, Pythia, Qwen and SmolLM2; else BOS, or, without any, EOS.
    - `pad_id` is a spare token that is neither: the model's own pad if it is, else an unused or another special one,
      else any. It only ever stands under a mask, so no embedding is added for it.
    """

    def __init__(self, core: Any, declared: Declared, *, chat: ChatTemplate | None = None, origin: str) -> None:
        """`core` is a `tokenizers.Tokenizer`; `origin` names the file in messages."""
        self._core, self._origin = core, origin
        core.no_truncation()
        core.no_padding()
        core.encode_special_tokens = False
        core.add_special_tokens([text for text in declared.tokens.values() if text])
        vocabulary = core.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.eos_id = self._end(declared, chat)
        self.bos_id = self._begin(declared)
        self.pad_id = self._pad(declared, chat)
        end = core.id_to_token(self.eos_id)
        self.chat = None if chat is None else replace(chat, tokens=tuple(declared.tokens.items()), end=end or "")
        decoder = str(core.decoder)
        self._spaces = ("Ġ",) if "ByteLevel" in str(core.pre_tokenizer) + decoder else ("▁",)
        self._byte_level, self._byte_fallback = "ByteLevel" in decoder, "ByteFallback" in decoder
        self._before = self.encode("a")[-1:]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS or EOS; special tokens that are written out in it are read as such."""
        return self._core.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids; special tokens are dropped."""
        return self._core.decode([int(token) for token in tokens], skip_special_tokens=True)

    def starts_word(self, token: int) -> bool:
        """Whether a token begins with a space."""
        piece = self._core.id_to_token(int(token))
        return piece is not None and piece.startswith(self._spaces)

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to a text that it goes on from; b"" for special tokens."""
        before, both = (self.decode(ids) for ids in (self._before, [*self._before, token]))
        if before == both:  # special, or none
            return b""
        piece = self._core.id_to_token(int(token))
        if self._byte_level and set(piece) <= _BYTES.keys():
            return bytes(_BYTES[character] for character in piece)
        if self._byte_fallback and _BYTE.fullmatch(piece):
            return bytes([int(piece[3:-1], 16)])
        return both[len(before) :].encode()

    def files(self) -> dict[str, bytes]:
        """tokenizer.json, the special tokens that training used, and the chat template."""
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= {name: self._core.id_to_token(id) for name, id in ids.items()}
        found = {_TOKENIZER: self._core.to_str().encode(), _CONFIG: json.dumps(config, indent=2).encode() + b"\n"}
        return found if self.chat is None else found | {_TEMPLATE_FILE: self.chat.source.encode()}

    def encode_spans(self, text: str, spans: Iterable[Span]) -> tuple[list[int], list[bool]]:
        """Token ids, and for each whether it has a character of one of the spans."""
        encoding = self._core.encode(text, add_special_tokens=False)
        inside = [False] * len(text)
        for begin, end in spans:
            inside[begin:end] = [True] * (end - begin)
        mask = [any(inside[begin : max(end, begin + 1)]) for begin, end in encoding.offsets]
        return encoding.ids, mask

    def encode_chat(self, messages: Messages, *, start: int = 0) -> tuple[list[int], list[bool]]:
        """A conversation by the chat template, and what of it the assistant says, with the token that ends it.

        Answers before the message `start` do not count.
        """
        return self.encode_spans(*self._template().render_spans(messages, start=start))

    def encode_chat_prompt(self, messages: Messages, *, variables: Mapping[str, Any] | None = None) -> list[int]:
        """A conversation by the chat template, up to where the assistant's answer begins."""
        text = self._template().render(messages, add_generation_prompt=True, variables=variables)
        return self.encode(text)

    def _template(self) -> ChatTemplate:
        if self.chat is None:
            raise UserError(f"{self._origin}: this tokenizer has no chat template")
        return self.chat

    def _id(self, text: str | None) -> int | None:
        return None if text is None else self._core.token_to_id(text)

    def _end(self, declared: Declared, chat: ChatTemplate | None) -> int:
        eos = self._id(declared.tokens.get("eos_token"))
        candidates = [id for id in (eos, *declared.ends) if id is not None and self._core.id_to_token(id) is not None]
        if not candidates:
            raise UserError(f"{self._origin}: no EOS token is named, which a completion ends with")
        if chat is None or (eos is not None and "eos_token" in chat.source):
            return candidates[0]
        written = [id for id in candidates if self._core.id_to_token(id) in chat.source]
        return written[0] if written else candidates[0]

    def _begin(self, declared: Declared) -> int:
        bos = self._id(declared.tokens.get("bos_token"))
        if bos is None and declared.bos is not None and self._core.id_to_token(declared.bos) is not None:
            bos = declared.bos
        if bos is not None and (declared.adds_bos or bos in self._core.encode("", add_special_tokens=True).ids[:1]):
            return bos
        document = self._id(_DOCUMENT)
        return next(id for id in (document, bos, self.eos_id) if id is not None)

    def _pad(self, declared: Declared, chat: ChatTemplate | None) -> int:
        taken = {self.eos_id, self.bos_id}
        source = "" if chat is None else chat.source
        own = self._id(declared.tokens.get("pad_token"))
        if own is not None and own not in taken:
            return own
        added = self._core.get_added_tokens_decoder()
        special = {id: token.content for id, token in sorted(added.items()) if token.special and id not in taken}
        unwritten = [id for id, text in special.items() if text not in source]
        spare = [id for id in unwritten if _SPARE.search(special[id])] or unwritten
        if spare:
            return spare[0]
        free = [id for id in range(self.vocab_size) if id not in taken]
        if not free:
            raise UserError(f"{self._origin}: no token is left to pad with")
        return free[0]


class LibraryErrors:
    """Turns what the `tokenizers` library raises, mostly Exception itself and nothing narrower, into a UserError."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind in (Exception, OverflowError, TypeError, ValueError):
            raise UserError(f"{self._what} ({str(error)[:200]})") from None


def library(origin: str) -> Any:
    """The `tokenizers` package, or UserError where it is missing."""
    try:
        import tokenizers
    except ImportError:
        raise missing_extra("tokenizers", origin) from None
    return tokenizers


def load_json(folder: Path) -> JsonTokenizer:
    """The tokenizer.json of a folder, with what the files beside it say of special tokens and the chat template."""
    path = folder / _TOKENIZER
    tokenizers = library(str(path))
    with LibraryErrors(f"{path}: no readable tokenizer"):
        core = tokenizers.Tokenizer.from_file(str(path))
    config = _optional(folder / _CONFIG)
    _add_missing(core, tokenizers, config, folder / _CONFIG)
    generation, model = _optional(folder / _GENERATION), _optional(folder / _MODEL)
    ends = _ids(generation, "eos_token_id") or _ids(model, "eos_token_id")
    begins = _ids(generation, "bos_token_id") or _ids(model, "bos_token_id")
    declared = Declared(
        tokens=_special_texts(_optional(folder / _SPECIAL)) | _special_texts(config),
        ends=ends,
        bos=begins[0] if begins else None,
        adds_bos=config.get("add_bos_token") is True,
    )
    return JsonTokenizer(core, declared, chat=_template(folder, config), origin=str(path))


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _special_texts(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name; each is a string, or an object with its content."""
    found = {}
    for name in _NAMES:
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[name] = value
    return found


def _ids(config: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """One id or a list of them."""
    value = config.get(name)
    values = value if isinstance(value, list) else [value]
    return tuple(x for x in values if isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 2**31)


def _add_missing(core: Any, tokenizers: Any, config: Mapping[str, Any], path: Path) -> None:
    """Tokens that only tokenizer_config.json has; each must get the id that it says."""
    listed = config.get("added_tokens_decoder")
    if not isinstance(listed, dict):
        return
    if not all(key.isdecimal() and isinstance(entry, dict) for key, entry in listed.items()):
        raise UserError(f"{path}: added_tokens_decoder: expected an object of tokens by their ids")
    for key, entry in sorted(listed.items(), key=lambda item: int(item[0])):
        content, special = entry.get("content"), entry.get("special") is True
        if not isinstance(content, str) or core.token_to_id(content) is not None:
            continue
        flags = {name: entry.get(name) is True for name in ("lstrip", "rstrip", "single_word")}
        core.add_tokens([tokenizers.AddedToken(content, special=special, normalized=not special, **flags)])
        if core.token_to_id(content) != int(key):
            raise UserError(f"{path}: added_tokens_decoder: {content[:80]!r} cannot get the id {key[:20]}")


def _template(folder: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
    """chat_template.jinja, else tokenizer_config.json's, of several the one named "default"."""
    path = folder / _TEMPLATE_FILE
    if path.is_file():
        try:
            return ChatTemplate(path.read_text(encoding="utf-8"), origin=str(path))
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8") from None
    value = config.get("chat_template")
    if isinstance(value, list):
        named = [entry for entry in value if isinstance(entry, dict) and entry.get("name") == "default"]
        value = named[0].get("template") if named else None
    return ChatTemplate(value, origin=str(folder / _CONFIG)) if isinstance(value, str) else None
