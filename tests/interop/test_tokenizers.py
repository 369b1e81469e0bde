"""Tokenizers of folders against transformers: `tests/oracles_hf/make_tokenizers.py` kept its tokens as numbers."""

import json
import pickle
import re
import shutil
import sys
from pathlib import Path

import pytest
import sentencepiece

from rlhf_jax.errors import UserError
from rlhf_jax.interop.tokenizers import SentencePiece, load_tokenizer, train_sentencepiece

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

ORACLES = Path(__file__).parents[1] / "oracles_hf"
GOLDEN = json.loads((ORACLES / "tokenizers.json").read_text())


@pytest.fixture(params=GOLDEN)
def name(request):
    return request.param


@pytest.fixture
def folder(name, tmp_path):
    return shutil.copytree(ORACLES / "tokenizers" / name, tmp_path / name)


def change(path, **fields):
    """Set fields of a JSON file, or, where the value is `...`, take them out."""
    found = (json.loads(path.read_text()) if path.exists() else {}) | fields
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))


def test_texts_are_those_of_transformers(name, folder):
    tokenizer = load_tokenizer(folder)
    for kept in GOLDEN[name]["texts"]:
        assert tokenizer.encode(kept["text"]) == kept["ids"], kept["text"]
        assert tokenizer.decode(kept["ids"]) == kept["decoded"]
    assert pickle.loads(pickle.dumps(tokenizer)).encode("a b") == tokenizer.encode("a b")


def test_special_tokens(name, folder):
    tokenizer = load_tokenizer(folder)
    texts = {"byte_level": ("<|im_end|>", "<|endoftext|>", "<|unused|>"), "metaspace": ("</s>", "<s>", "<unk>")}[name]
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    ids = {entry["content"]: entry["id"] for entry in vocabulary["added_tokens"]}
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id) == tuple(ids[text] for text in texts)
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("one two"), tokenizer.eos_id]) == "one two"
    assert tokenizer.vocab_size == len(vocabulary["model"]["vocab"]) + (name == "metaspace")
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == "" and not tokenizer.starts_word(tokenizer.vocab_size + 5)
    ids = tokenizer.encode("so it was 12")
    words = "".join(" " * tokenizer.starts_word(id) + tokenizer.decode([id]).strip() for id in ids)
    assert words.strip() == "so it was 12"


def test_pad_is_neither_eos_nor_bos_where_the_folder_says_so(name, folder):
    config = folder / "tokenizer_config.json"
    change(config, pad_token=json.loads(config.read_text())["eos_token"])
    (folder / "chat_template.jinja").unlink()
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_id not in (tokenizer.eos_id, tokenizer.bos_id)
    assert 0 <= tokenizer.pad_id < tokenizer.vocab_size


def test_gpt2_has_one_special_token_for_all(tmp_path):
    core = json.loads((ORACLES / "tokenizers" / "byte_level" / "tokenizer.json").read_text())
    core["added_tokens"] = core["added_tokens"][:1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(core))
    change(tmp_path / "tokenizer_config.json", bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id == tokenizer.eos_id != tokenizer.pad_id
    assert tokenizer.chat is None
    with pytest.raises(UserError, match="no chat template"):
        tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    assert tokenizer.decode([tokenizer.pad_id]) != ""  # an ordinary token, that text may have


def test_special_tokens_of_the_other_files(folder, name):
    config = folder / "tokenizer_config.json"
    end = json.loads(config.read_text())["eos_token"]
    whole = load_tokenizer(folder)
    change(config, eos_token=...)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json: no EOS token is named"):
        load_tokenizer(folder)
    change(folder / "config.json", eos_token_id=whole.eos_id, bos_token_id=7)
    found = load_tokenizer(folder)
    assert (found.eos_id, found.bos_id) == (whole.eos_id, whole.bos_id)
    change(folder / "generation_config.json", eos_token_id=[5, whole.eos_id])
    assert load_tokenizer(folder).eos_id == 5
    change(folder / "special_tokens_map.json", eos_token={"content": end, "lstrip": False})
    assert load_tokenizer(folder).eos_id == whole.eos_id


def test_the_end_of_a_turn_is_eos_where_the_template_writes_it(tmp_path):
    folder = shutil.copytree(ORACLES / "tokenizers" / "byte_level", tmp_path / "x")
    turn = load_tokenizer(folder).eos_id
    change(folder / "tokenizer_config.json", eos_token="<|endoftext|>", pad_token=...)
    assert load_tokenizer(folder).eos_id != turn
    change(folder / "generation_config.json", eos_token_id=[0, turn])
    assert load_tokenizer(folder).eos_id == turn


def test_tokens_that_only_the_config_has(tmp_path):
    folder = shutil.copytree(ORACLES / "tokenizers" / "byte_level", tmp_path / "x")
    size = load_tokenizer(folder).vocab_size
    added = {str(size): {"content": "<tool>", "special": True}, "1": {"content": "<|im_start|>", "special": True}}
    change(folder / "tokenizer_config.json", added_tokens_decoder=added)
    assert load_tokenizer(folder).encode("a<tool>")[-1] == size
    change(folder / "tokenizer_config.json", added_tokens_decoder={"9999": {"content": "<tool>"}})
    with pytest.raises(
        UserError, match=r"tokenizer_config\.json: added_tokens_decoder: '<tool>' cannot get the id 9999"
    ):
        load_tokenizer(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": {"type": "BPE"}}', "\x00\xff"])
def test_damaged_files_are_one_line(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"tokenizer\.json: no readable tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    folder = shutil.copytree(ORACLES / "tokenizers" / "byte_level", tmp_path / "x")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r'needs the package tokenizers.*pip install "rlhf_jax\[hf\]"'):
        load_tokenizer(folder)


def test_folders_without_a_tokenizer(tmp_path):
    assert load_tokenizer(tmp_path) is None


def test_sentencepiece_as_llama_has_it(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "a dog and a cat", "on and on they sat"]),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=290,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, SentencePiece)
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.decode([1, *tokenizer.encode("the cat ¾"), 2]) == "the cat 3⁄4"  # NFKC, as it was trained


def test_sentencepiece_gives_the_tokens_of_transformers():
    tokenizer = load_tokenizer(ORACLES / "tokenizers" / "sentencepiece")
    kept = json.loads((ORACLES / "sentencepiece.json").read_text())
    assert len(kept) == 15
    for one in kept:
        ids = tokenizer.encode(one["text"])
        assert ids == one["ids"], one["text"]
        assert tokenizer.decode(ids) == one["decoded"]


def test_a_vocabulary_that_the_texts_do_not_fit_is_one_line_with_what_would_do():
    texts = ["the cat sat on the mat", "a dog ate the cat's hat"]
    for wrong, where in ((100, "at least"), (5_000, "at most")):
        with pytest.raises(UserError) as caught:
            train_sentencepiece(texts, vocab_size=wrong)
        found = re.fullmatch(rf"vocab_size={wrong} is .*: {where} (\d+) would do", str(caught.value))
        assert found, caught.value
        right = int(found[1])
        assert train_sentencepiece(texts, vocab_size=right).vocab_size == right
        with pytest.raises(UserError, match=where):
            train_sentencepiece(texts, vocab_size=right - 1 if where == "at least" else right + 1)
