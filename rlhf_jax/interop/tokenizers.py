"""Tokenizers: what the stages need of one, and SentencePiece; `json_tokenizer` has those of the tokenizers library."""

import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece

from rlhf_jax.errors import UserError

_SPACE = "\u2581"  # SentencePiece's


class Tokenizer(Protocol):
    """Text to token ids and back; pad and EOS are different tokens."""

    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids; special tokens are dropped."""
        ...

    def starts_word(self, token: int) -> bool:
        """Whether a token begins with a space: a text may be cut before it without splitting a word."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to a text that it goes on from, in UTF-8 or a part of a character; b"" for special tokens.

        Where `decode` drops a text's first space, these bytes have it.
        """
        ...

    def files(self) -> dict[str, bytes]:
        """What a Hugging Face folder holds of it, by the names of the files."""
        ...


class SentencePiece:
    """A SentencePiece model (Kudo and Richardson 2018)."""

    def __init__(self, model: bytes) -> None:
        """`model` holds the bytes of a trained `.model` file."""
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.model = model
        self.vocab_size = self._processor.vocab_size()
        self.eos_id = self._processor.eos_id()
        if self.eos_id < 0:
            raise RuntimeError("it has no EOS token")
        bos, pad = self._processor.bos_id(), self._processor.pad_id()
        self.bos_id = self.eos_id if bos < 0 else bos
        # Llama's has no pad: the unknown token, which byte fallback leaves unused, stands under the mask.
        self.pad_id = self._processor.unk_id() if pad in (-1, self.eos_id) else pad
        self._special = {self.pad_id, self.bos_id, self.eos_id}
        self._prefixed = "".join(self._processor.encode("a", out_type=str)).startswith(_SPACE)

    @classmethod
    def from_file(cls, path: Path) -> "SentencePiece":
        """Read a `.model` file."""
        try:
            return cls(Path(path).read_bytes())
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path}: no readable SentencePiece model ({error})") from None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens.

        A model that puts a space before every text puts none where there is one, as transformers does (`legacy` false):
        a completion is encoded as it stands in a text, and a text's first space is lost when it is decoded.
        """
        if not self._prefixed or not text.startswith((" ", _SPACE)):
            return self._processor.encode(text)
        rest = text[1:]
        return self._processor.encode(rest) if rest else [self._processor.piece_to_id(_SPACE)]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids; special tokens are dropped."""
        return self._processor.decode([int(t) for t in tokens if int(t) not in self._special])

    def starts_word(self, token: int) -> bool:
        """Whether a token begins with a space."""
        return self._processor.id_to_piece(int(token)).startswith(_SPACE)

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to a text that it goes on from; b"" for special tokens."""
        known = self._processor
        if token in self._special or token >= self.vocab_size or known.is_control(token):
            return b""
        piece = known.id_to_piece(token)
        if known.is_byte(token):
            return bytes([int(piece[3:-1], 16)])
        return known.decode([token]).encode() if known.is_unknown(token) else piece.replace(_SPACE, " ").encode()

    def files(self) -> dict[str, bytes]:
        """tokenizer.model, and a tokenizer_config.json by which transformers makes the same tokens of it."""
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        ids["unk_token"] = self._processor.unk_id()
        config = {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": False,
            "add_prefix_space": self._prefixed,
            "add_bos_token": False,
            "add_eos_token": False,
            **{name: self._processor.id_to_piece(id) for name, id in ids.items() if id >= 0},
        }
        return {"tokenizer.model": self.model, "tokenizer_config.json": json.dumps(config, indent=2).encode() + b"\n"}


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder, by tokenizer.json or else tokenizer.model; None where it has neither.

    Raises UserError that names the file for one that cannot be read. A chat template comes with tokenizer.json only.
    """
    from rlhf_jax.interop.json_tokenizer import load_json  # it builds on the protocol here

    if (folder / "tokenizer.json").is_file():
        return load_json(folder)
    if (folder / "tokenizer.model").is_file():
        return SentencePiece.from_file(folder / "tokenizer.model")
    return None


def train_sentencepiece(texts: Iterable[str], *, vocab_size: int, seed: int = 0) -> SentencePiece:
    """Train a lossless BPE tokenizer with byte fallback: pad 0, unk 1, bos 2, eos 3.

    No normalisation and no dummy prefix, so that `decode(encode(x)) == x` and a completion is encoded as it stands
    after its prompt. Raises UserError, which begins with vocab_size, where it is too small or too large for the texts.
    """
    sentencepiece.set_random_generator_seed(seed)
    model = io.BytesIO()
    settings: dict[str, Any] = {"model_type": "bpe", "byte_fallback": True, "character_coverage": 0.9995}
    settings |= {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}
    settings |= {"max_sentence_length": 20_000, "num_threads": 1, "minloglevel": 2}
    settings |= {"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, vocab_size=vocab_size, **settings
        )
    except RuntimeError as error:
        raise _misfit(vocab_size, error) from None
    return SentencePiece(model.getvalue())


def _misfit(vocab_size: int, error: RuntimeError) -> Exception:
    """What is right for the texts in place of `vocab_size`, which the trainer's own words give; else its error."""
    least = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
    if least:
        return UserError(f"vocab_size={vocab_size} is too small for the texts: at least {least[1]} would do")
    most = re.search(r"Vocabulary size too high .* value <= (\d+)", str(error), re.DOTALL)
    if most:
        return UserError(f"vocab_size={vocab_size} is more than the texts have pieces for: at most {most[1]} would do")
    return error
