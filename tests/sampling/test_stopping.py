"""Stop strings: the automaton against looking for the string in growing texts, and generation against cutting there."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax import models, sharding
from rlhf_jax.algorithms import ppo
from rlhf_jax.config import Experiment
from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.errors import UserError
from rlhf_jax.interop import Bundled
from rlhf_jax.interop.tokenizers import load_tokenizer, train_sentencepiece
from rlhf_jax.models import ModelSpec
from rlhf_jax.run import check_tokenizer
from rlhf_jax.sampling import Sampler, Sampling, Stops, Turns, ended, generate, stops
from rlhf_jax.sampling.stopping import _over_bytes, _over_tokens
from rlhf_jax.sharding import MeshConfig, make_mesh

pytest.importorskip("tokenizers")
pytestmark = pytest.mark.usefixtures("compile_quickly")

FOLDERS = Path(__file__).parents[1] / "oracles_hf" / "tokenizers"
NAMES = ("bundled", "byte_level", "metaspace", "sentencepiece")


@pytest.fixture(scope="module")
def tokenizers():
    loaded = {name: load_tokenizer(FOLDERS / name) for name in NAMES[1:]}
    return {"bundled": Bundled().tokenizer(Path()), **loaded}


def text_of(tokenizer, tokens):
    """What tokens add to a text, in bytes: by the tokenizer's own decoder, where the bytes are whole characters."""
    before = tokenizer.encode("a")
    return tokenizer.decode([*before, *tokens])[len(tokenizer.decode(before)) :].encode()


def first_stop(pieces, strings):
    """After how many tokens one of the strings stands in the text; None if it never does."""
    text = b""
    for count, piece in enumerate(pieces, start=1):
        text += piece
        if any(string.encode() in text for string in strings):
            return count
    return None


def by_automaton(found: Stops, tokens):
    state = 0
    for count, token in enumerate(tokens, start=1):
        state = int(found.table[state, found.classes[min(token, len(found.classes) - 1)]])
        if state == len(found.table) - 1:
            return count
    return None


@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_tokens_are_what_the_decoder_makes_of_them(name, tokenizers):
    tokenizer, rng = tokenizers[name], np.random.default_rng(0)
    pieces = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    assert {bytes([byte]) for byte in range(256)} <= set(pieces)
    whole = 0
    for length in rng.integers(1, 12, 600):
        tokens = rng.integers(0, tokenizer.vocab_size, length).tolist()
        joined = b"".join(pieces[token] for token in tokens)
        try:
            joined.decode()
        except UnicodeDecodeError:  # a decoder writes �, and not all the same number of them
            continue
        assert joined == text_of(tokenizer, tokens)
        whole += 1
    assert whole > 100
    for text in ("one  two\n\nthree", "naïve → 日本 🙂", "  a\tb"):
        assert b"".join(pieces[token] for token in tokenizer.encode(text)).decode().endswith(text)
    for special in (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id, tokenizer.vocab_size + 7):
        assert tokenizer.token_bytes(special) == b""


@given(
    strings=st.lists(st.text("abé", min_size=1, max_size=5), min_size=1, max_size=4),
    pieces=st.lists(st.sampled_from([b"a", b"b", b"ab", b"ba", b"aab", b"\xc3", b"\xa9", b"b\xc3", b""]), max_size=40),
)
@settings(max_examples=300, deadline=None)
def test_the_automaton_finds_what_looking_finds(strings, pieces):
    vocabulary = sorted(set(pieces)) or [b""]
    found = _over_tokens(_over_bytes([string.encode() for string in strings]), vocabulary)
    assert by_automaton(found, [vocabulary.index(piece) for piece in pieces]) == first_stop(pieces, strings)


@pytest.mark.parametrize("name", NAMES)
def test_random_tokens_stop_where_their_text_has_the_string(name, tokenizers):
    tokenizer, rng = tokenizers[name], np.random.default_rng(1)
    strings = (" t", "he", "\n", "é", "s a", "1", "the ")
    found, pieces = stops(strings, tokenizer), [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    written = [tokenizer.encode(text) for text in ("is that it", "a café", "one\ntwo", "x1")]
    random = [rng.integers(0, tokenizer.vocab_size, 30).tolist() for _ in range(300)]
    counts = [by_automaton(found, row) for row in written + random]
    assert counts == [first_stop([pieces[token] for token in row], strings) for row in written + random]
    assert all(counts[: len(written)]) and len(set(counts)) > 10
    assert found.table.shape[1] < tokenizer.vocab_size


def test_strings_that_end_nothing_are_refused():
    with pytest.raises(ValueError, match='"" stands in every text'):
        Sampling(stop=("a", ""))
    with pytest.raises(ValueError, match=r"sampling\.ends must be True"):
        Sampling(stop=("a",), ends=False)
    few = train_sentencepiece(["ab ba abba"] * 50, vocab_size=264)
    assert stops(("日",), few) is not None and stops((), few) is None  # by bytes
    letters = _Letters()
    with pytest.raises(UserError, match=r"sampling\.stop: no tokens of this model's tokenizer write 'bd'"):
        stops(("a", "bd"), letters)
    twice = stops(("ab", "ab", "abc"), letters)
    assert twice.table.shape[0] == 3  # nothing of it, "a", whole: what goes on after a whole string is nobody's


class _Letters:
    """Three of them are all it has."""

    vocab_size = 3

    def token_bytes(self, token):
        return b"abc"[token : token + 1]


def test_a_stage_says_in_which_field_such_a_string_stands():
    for field in ("sampling", "evaluation_sampling"):
        stages = {"ppo": ppo.Config(**{field: Sampling(stop=("bd",))})}
        with pytest.raises(UserError, match=rf"^stages\.ppo\.{field}\.stop: no tokens .* write 'bd'$"):
            check_tokenizer(Experiment(Bundled(), MovieReviews(), stages), _Letters())


SPEC = ModelSpec(vocab_size=300, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48, max_len=40)
LEARNED = ModelSpec(**{**vars(SPEC), "positions": "learned", "n_layers": 1})
STRINGS = ("e", " a", "ti", "\n", "n")


@pytest.fixture(scope="module")
def small():
    """A tokenizer of 300 tokens, and what it takes `generate` to write with it."""
    return train_sentencepiece(["the time of the tea is at ten\nand it ended"] * 20, vocab_size=300)


def written(spec, tokenizer, strings, *, rows=16, mesh=None, **options):
    rng = np.random.default_rng(0)
    prompts = np.repeat(rng.integers(4, 300, (rows // 2, 5)), 2, axis=0).astype(np.int32)
    mask = np.arange(5) >= np.repeat(rng.integers(0, 4, (rows // 2, 1)), 2, axis=0)
    fixed = {"max_new_tokens": 20, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    sampling, found = Sampling(stop=strings), stops(strings, tokenizer)
    params = sharding.unbox(models.init(spec, jax.random.key(1)))
    params["embedding"] = params["embedding"].at[tokenizer.eos_id].multiply(3.0)
    program = jax.jit(partial(generate, spec, sampling=sampling, stops=found, **fixed, **options))
    if mesh is None:
        return jax.device_get(program(params, prompts, mask, jax.random.key(3)))
    with sharding.scope(mesh):
        return jax.device_get(program(params, *sharding.shard_batch(mesh, (prompts, mask)), jax.random.key(3)))


CASES = {
    "all at once": {},
    "turns": {"turns": Turns(8, 1)},
    "groups in turns, greedy": {"turns": Turns(8, 0), "copies": 2, "greedy": np.arange(16) % 4 == 0},
    "on a mesh": {"mesh": MeshConfig(data=2, fsdp=2, tensor=2), "turns": Turns(8, 1), "copies": 2},
    "learned positions": {"spec": LEARNED},
}


@pytest.mark.parametrize("case", CASES)
def test_a_completion_is_the_plain_one_cut_at_its_first_stop(case, small):
    options = {"spec": SPEC, **CASES[case]}
    spec, mesh = options.pop("spec"), options.pop("mesh", None)
    plain = written(spec, small, (), **{k: v for k, v in options.items() if k == "greedy"})
    stopped = written(spec, small, STRINGS, mesh=mesh and make_mesh(mesh), **options)
    lengths, by_string = [], []
    for row, kept in zip(plain.tokens, plain.completion_mask, strict=True):
        tokens = row[kept].tolist()
        count = first_stop([small.token_bytes(token) for token in tokens], STRINGS)
        lengths.append(len(tokens) if count is None else count)
        by_string.append(count is not None)
    own = np.arange(20) < np.asarray(lengths)[:, None]
    np.testing.assert_array_equal(stopped.completion_mask[:, 5:], own)
    np.testing.assert_array_equal(stopped.tokens[:, 5:], np.where(own, plain.tokens[:, 5:], small.pad_id))
    np.testing.assert_allclose(stopped.logps[:, 5:], np.where(own, plain.logps[:, 5:], 0), atol=1e-4)
    np.testing.assert_array_equal(stopped.stopped, by_string)
    np.testing.assert_array_equal(ended(stopped, small.eos_id), np.asarray(ended(plain, small.eos_id)) | by_string)
    assert plain.stopped is None and len(set(lengths)) > 4 and sum(by_string) >= 4


def test_a_sampler_says_which_have_ended(small):
    params = sharding.unbox(models.init(SPEC, jax.random.key(1)))
    fixed = {"prompt_length": 4, "max_new_tokens": 6, "batch_size": 8}
    sampler = Sampler(SPEC, sharding.single_device_mesh(), small, sampling=Sampling(stop=("e", "t")), **fixed)
    samples = sampler(params, [[5, 6, 7]] * 16, jax.random.key(0))
    for sample in samples:
        text = b"".join(small.token_bytes(token) for token in sample.tokens)
        assert sample.ended == (b"e" in text or b"t" in text or small.eos_id in sample.tokens)
    assert 0 < sum(sample.ended for sample in samples) < 16


def test_stop_strings_without_their_automaton_are_an_error(small):
    with pytest.raises(ValueError, match="stops go together"):
        generate(
            *(SPEC, {}, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool), jax.random.key(0)),
            max_new_tokens=1,
            sampling=Sampling(stop=("a",)),
            eos_id=1,
            pad_id=0,
        )
