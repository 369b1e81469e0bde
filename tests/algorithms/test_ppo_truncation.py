"""What a reward reads of a completion, and completions that go on past EOS, by loops over tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models, sharding
from rlhf_jax.algorithms import iterations, ppo, truncation
from rlhf_jax.algorithms.iterations import Frozen
from rlhf_jax.algorithms.truncation import Truncation
from rlhf_jax.data.prompt_rows import PromptRow
from rlhf_jax.errors import UserError
from rlhf_jax.evals.policy import PolicyEvaluation
from rlhf_jax.interop.tokenizers import train_sentencepiece
from rlhf_jax.models import ModelSpec
from rlhf_jax.rewards.lexical import Length
from rlhf_jax.rewards.shaping import EosPenalty, Shaping
from rlhf_jax.rewards.with_network import NetworkPart
from rlhf_jax.sampling import Sampler, Sampling
from rlhf_jax.types import Rollout

pytestmark = pytest.mark.usefixtures("compile_quickly")

CONFIG = ppo.Config(
    prompt_tokens=(1, 3), completion_tokens=8, truncate=Truncation(after=2, score=-5.0), batch_size=64, epochs=1,
    minibatches=1, shaping=Shaping(scale=2.0),
)  # fmt: skip
STOPS = (6, 7)
PART = NetworkPart("rm", weight=0.5, mean=0.1, std=2.0, clip=0.2)


def rollouts():
    """Left-padded prompts of four columns and completions of one to eight tokens, both with tokens to cut at."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, 12, (64, 12)).astype(np.int32)
    column = np.arange(12)
    prompts = (column < 4) & (column >= rng.integers(0, 4, (64, 1)))
    completions = (column >= 4) & (column < 4 + rng.integers(1, 9, (64, 1)))
    return Rollout(tokens, prompts, completions, scores=rng.normal(size=64).astype(np.float32))


def test_a_completion_is_read_up_to_the_first_token_to_cut_at_and_pays_where_there_is_none():
    algorithm = ppo.Algorithm(CONFIG, ModelSpec(vocab_size=12), eos_id=3, pad_id=0, cut_ids=STOPS)
    rollout = rollouts()
    read, shaped = jax.jit(lambda rollout: (algorithm.cut(rollout).read, algorithm.shaped(rollout, None)))(rollout)
    lost = 0
    for i in range(64):
        kept = np.flatnonzero(rollout.completion_mask[i]).tolist()
        ends = [n for n, t in enumerate(kept) if n >= 2 and rollout.tokens[i, t] in STOPS]
        wanted = kept[: ends[0] + 1] if ends else kept
        assert np.flatnonzero(read[i]).tolist() == wanted
        assert shaped[i] == pytest.approx(2 * rollout.scores[i] if ends else -5.0)
        lost += not ends
    assert 10 < lost < 54
    assert read.sum() < rollout.completion_mask.sum()


TEXTS = ("a film . a story . the end", "no end", "a story .")
PROMPT = CONFIG.prompt_length


@pytest.fixture(scope="module")
def model():
    """A tokenizer, a model's spec and parameters, and a reward model's."""
    tokenizer = train_sentencepiece(TEXTS, vocab_size=290)
    spec = ModelSpec(vocab_size=tokenizer.vocab_size, d_model=8, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=8,
                     d_ff=8, max_len=64)  # fmt: skip
    params = sharding.unbox(models.init(spec, jax.random.key(0)))
    return tokenizer, spec, params, sharding.unbox(models.init_with_head(spec, jax.random.key(1), params))


def test_tokens_to_cut_at_are_found_by_their_text(model):
    tokenizer = model[0]
    ids = truncation.token_ids(CONFIG.truncate, tokenizer)
    assert {tokenizer.decode([i]).strip() for i in ids} == {"."} and truncation.token_ids(None, tokenizer) == ()
    assert set(tokenizer.encode("so . yes.")) & set(ids)
    with pytest.raises(UserError, match=r"truncate\.at: no token of the vocabulary is 'ß!'"):
        truncation.token_ids(Truncation("ß!"), tokenizer)


def test_networks_and_functions_read_what_is_left(model):
    tokenizer, spec, params, reward = model
    rows = [tokenizer.encode(text) for text in TEXTS]
    tokens = np.zeros((3, PROMPT + max(map(len, rows))), np.int32)
    completions, prompts = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
    for i, row in enumerate(rows):
        tokens[i, PROMPT - 1 : PROMPT + len(row)] = [tokenizer.bos_id, *row]
        completions[i, PROMPT : PROMPT + len(row)], prompts[i, PROMPT - 1] = True, True
    config = dataclasses.replace(CONFIG, batch_size=3, exact_kl_rows=1, reward=Length(5), network=PART)
    ids = truncation.token_ids(config.truncate, tokenizer)
    algorithm = ppo.Algorithm(config, spec, eos_id=tokenizer.eos_id, pad_id=0, cut_ids=ids)
    rollout = Rollout(tokens, prompts, completions, np.zeros(tokens.shape, np.float32))
    rollout = algorithm.cut(jax.tree.map(jnp.asarray, rollout))
    read = [row.completion for row in iterations.with_rows(rollout, [PromptRow("", (2,), {})] * 3, tokenizer)]
    assert read == ["a film .", "no end", "a story ."]
    given = np.asarray([0.5, -1.0, 2.0], np.float32)
    rollout = rollout.replace(scores=jnp.asarray(given))
    scored, metrics = jax.jit(algorithm.score)(params, Frozen(params, reward, {}, {}), rollout)
    own = []
    for text in read:
        row = np.asarray([[tokenizer.bos_id, *tokenizer.encode(text)]])
        own.append(float(models.score(spec, reward, row, row >= 0)[0]))
    np.testing.assert_allclose(scored.scores, given + 0.5 * np.clip((np.asarray(own) - 0.1) / 2, -0.2, 0.2), atol=1e-5)
    assert metrics["network_score"] == pytest.approx(np.mean(own), abs=1e-5) and max(np.abs(own)) > 0.5


def test_completions_go_on_past_eos_and_are_read_so_before_and_after(model):
    tokenizer, spec, params, reward = model
    rows, ids, made = [PromptRow("", (2, 5 + i), {}) for i in range(64)], tuple(range(20, 40)), {}
    mesh = sharding.single_device_mesh()
    for goes_on in (False, True):
        sampling = Sampling(temperature=5.0, ends=not goes_on)  # EOS as often as any token
        sampler = Sampler(spec, mesh, tokenizer, prompt_length=PROMPT, max_new_tokens=30, sampling=sampling,
                          batch_size=64)  # fmt: skip
        read = PolicyEvaluation(
            *(spec, mesh, tokenizer, sampler, rows, jax.random.key(0)), judges={}, temperature=5.0,
            reward=lambda texts: np.asarray([len(text.completion) for text in texts], np.float32),
            network=(PART, reward), cut=lambda rollout: truncation.cut(Truncation(after=3), ids, rollout),
        )  # fmt: skip
        made[goes_on] = read(params, params)
    for short, long in zip(made[False], made[True], strict=True):
        assert len(long.tokens) == 30 and long.tokens[: len(short.tokens)] == short.tokens
    assert any(tokenizer.eos_id in row.tokens[:-1] for row in made[True])
    whole, mask, lengths = np.zeros((64, 32), np.int32), np.zeros((64, 32), bool), []
    for i, (row, prompt) in enumerate(zip(made[True], rows, strict=True)):
        stop = next((n for n, token in enumerate(row.tokens) if n >= 3 and token in ids), 29)
        left = [*prompt.tokens, *row.tokens[: stop + 1]]
        whole[i, : len(left)], mask[i, : len(left)] = left, True
        lengths.append(len(tokenizer.decode(row.tokens[: stop + 1])))
    score, own = (np.asarray([row.readings[name] for row in made[True]]) for name in ("score", "network_score"))
    np.testing.assert_allclose(own, models.score(spec, reward, whole, mask), atol=1e-5)
    np.testing.assert_allclose(score, lengths + 0.5 * np.clip((own - 0.1) / 2, -0.2, 0.2), atol=1e-5)
    assert 100 < mask.sum() < 64 * 24


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Truncation(""), "truncate.at must be the text of a token without spaces around it, got ''"),
        (lambda: Truncation(after=-1), r"truncate.after must lie in \[0, inf\), got -1"),
        (lambda: dataclasses.replace(CONFIG, completion_tokens=2), "truncate.after=2 must be under completion_tok"),
        (
            lambda: ppo.Config(network=PART),
            "network is added to a reward that is a function of texts, not to rew",
        ),
        (lambda: NetworkPart(std=0.0), r"network.std must lie in \(0, inf\), got 0"),
        (
            lambda: ppo.Config(sampling=Sampling(ends=False), shaping=Shaping(eos_penalty=EosPenalty())),
            "shaping.eos_penalty is for completions that may end: sampling.ends must be True",
        ),
    ],
)
def test_bad_fields_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
