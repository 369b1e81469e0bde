"""PPO's details: texts beside rollouts, a moving average, the papers' presets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.algorithms import ppo, pretraining_mix, prompting
from rlhf_jax.algorithms.consolidation import Anchor, Consolidation
from rlhf_jax.algorithms.onpolicy import SharedTrunk, ValueHead
from rlhf_jax.algorithms.ppo_presets import PRESETS
from rlhf_jax.algorithms.pretraining_mix import PretrainingMix
from rlhf_jax.algorithms.truncation import Truncation
from rlhf_jax.kl import AdaptiveKL, FixedKL
from rlhf_jax.optim import Optimizer
from rlhf_jax.placement import Colocated
from rlhf_jax.rewards.shaping import EosPenalty, Shaping
from rlhf_jax.sampling import Sampling
from tests.algorithms.conftest import SPEC, put_stages

pytestmark = pytest.mark.usefixtures("compile_quickly")

CONFIG = ppo.Config(
    steps=2, batch_size=8, completion_tokens=6, epochs=1, minibatches=1, exact_kl_rows=4, evaluation_prompts=4,
    optimizer=Optimizer(1e-3), critic=ValueHead(), reward="reward_model", truncate=Truncation("e", after=2),
    ptx=PretrainingMix(coef=0.5, batch_size=4, row_length=16, rows=6), average=0.75,
    ewc=Consolidation(coef=3.0, texts=2, row_length=8),
)  # fmt: skip
STOPS = tuple(range(5, 200))  # as if each of these tokens were the one that the reward stops reading at


def setup(context, config):
    put_stages(context)
    ends = {"eos_id": context.tokenizer.eos_id, "pad_id": context.tokenizer.pad_id}
    algorithm = ppo.Algorithm(config, SPEC, **ends, cut_ids=STOPS)
    batches = prompting.prompt_batches(prompting.load_prompts(config, context, "ppo").train, config, context)
    return algorithm, ppo.initial_state(algorithm, context, "ppo"), algorithm.frozen(context, "ppo"), next(batches)[0]


def test_an_iteration_learns_texts_holds_parameters_and_reads_what_is_left(make_context):
    """All of PPO's details at once, each by hand from what stood before the iteration's one step."""
    algorithm, state, frozen, prompts = setup(make_context(), CONFIG)
    jax.tree.map(np.testing.assert_array_equal, frozen.anchor.params, frozen.reference)
    away = jax.tree.map(lambda x: x + 0.05 * np.sign(x), frozen.reference)
    frozen = dataclasses.replace(frozen, anchor=Anchor(away, frozen.anchor.fisher))
    new, metrics, scored = jax.jit(algorithm.iteration)(state, frozen, prompts)
    assert jax.tree.leaves(frozen.texts)[0].shape == (6, 16)

    squares = [
        (np.float64(f) * np.square(np.float64(p) - np.float64(a))).sum()
        for f, p, a in zip(*map(jax.tree.leaves, (frozen.anchor.fisher, state.policy.params, away)), strict=True)
    ]
    assert metrics["ewc_penalty"] == pytest.approx(3.0 * sum(squares) / 2, rel=1e-4) and sum(squares) > 0

    read = np.zeros(scored.tokens.shape, bool)
    for i, (tokens, mask) in enumerate(zip(np.asarray(scored.tokens), np.asarray(scored.completion_mask), strict=True)):
        places = np.flatnonzero(mask)
        stop = next((n for n, place in enumerate(places) if n >= 2 and tokens[place] in STOPS), len(places))
        read[i, places[: stop + 1]] = True
    np.testing.assert_array_equal(scored.read_mask, read)
    assert read.sum() < scored.completion_mask.sum()
    wanted = models.score(SPEC, frozen.network(frozen.reward), scored.tokens, scored.prompt_mask | read)
    np.testing.assert_allclose(scored.scores, wanted, atol=1e-5)

    drawn = jax.random.randint(jax.random.fold_in(state.policy.step_key(), 2**31 - 2), (4,), 0, 6)
    rows = jax.device_get(jax.tree.map(lambda x: x[drawn], frozen.texts))
    logps = jax.nn.log_softmax(models.logits(SPEC, state.policy.params, rows.tokens, rows.segment_ids > 0))[:, :-1]
    each = -np.take_along_axis(np.asarray(logps), rows.tokens[:, 1:, None], -1)[..., 0]
    assert metrics["ptx_loss"] == pytest.approx(each[rows.loss_mask[:, 1:]].mean(), rel=1e-4)

    # A minibatch's gradient is that of the two means, by hand, whatever the microbatches.
    batch = jax.tree.map(lambda x: x[:4], scored)
    count = float(batch.completion_mask.sum())
    mixed = pretraining_mix.mixed(CONFIG.ptx, batch, jnp.float32(count), frozen.texts, jax.random.key(1))
    texts = jax.device_get(mixed.texts)
    loss_fn, hyper = algorithm.policy_loss(), state.policy.hyper

    def by_hand(params):
        logits = models.logits(SPEC, params, texts.tokens, texts.segment_ids > 0)
        assert (texts.segment_ids <= 1).all()  # a row holds one text here: no segment hides another
        logps = jax.nn.log_softmax(logits[:, :-1])
        each = -jnp.take_along_axis(logps, texts.tokens[:, 1:, None], -1)[..., 0]
        kept = texts.loss_mask[:, 1:]
        policy = loss_fn(params, batch, hyper, jax.random.key(0))[0].value
        return policy + 0.5 * (each * kept).sum() / kept.sum()

    wanted = jax.jit(jax.grad(by_hand))(state.policy.params)
    both = pretraining_mix.with_texts(loss_fn, SPEC)

    def in_parts(params):
        halves = [jax.tree.map(lambda x, i=i: x[i::2], mixed) for i in (0, 1)]
        one, other = (both(params, half, hyper, jax.random.key(0))[0] for half in halves)
        return (one + other).value

    for a, b in zip(*map(jax.tree.leaves, (jax.jit(jax.grad(in_parts))(state.policy.params), wanted)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    for old, now, mean in zip(*map(jax.tree.leaves, (state.policy.params, new.policy.params, new.final)), strict=True):
        np.testing.assert_allclose(mean, 0.75 * old + 0.25 * now, atol=1e-6)
    assert new.final is not new.policy.params


def test_the_same_seed_holds_the_same_texts(make_context):
    context = make_context()
    one, other = (jax.device_get(pretraining_mix.held(CONFIG.ptx, context)) for _ in range(2))
    np.testing.assert_array_equal(one.tokens, other.tokens)
    shapes = pretraining_mix.shapes(CONFIG.ptx)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(one)] == [(x.shape, x.dtype) for x in jax.tree.leaves(shapes)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ptx": PretrainingMix(batch_size=5), "num_microbatches": 2}, "ptx.batch_size=5 must divide by num_microb"),
        ({"placement": Colocated(("reference",))}, r"ptx needs placement=Colocated\(\) without offload"),
        ({"average": 1.0}, r"average must lie in \(0, 1\), got 1"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **fields)


SHARED = {"epochs": 4, "gamma": 1.0, "lam": 0.95, "clip_eps": 0.2, "value_clip": 0.2, "batch_size": 512}
SHARED |= {"whiten_advantages": True, "entropy_coef": 0.0, "replay": None, "ewc": None, "stop_at_kl": None}
TLDR = SHARED | {
    "steps": 1953, "minibatches": 1, "prompt_tokens": (1, 511), "completion_tokens": 53, "too_long": "paragraph",
    "sampling": Sampling(temperature=0.7), "evaluation_sampling": Sampling(temperature=0.01), "kl": FixedKL(0.05),
    "critic": "reward_model", "truncate": None, "ptx": None, "average": None,
    "shaping": Shaping(eos_penalty=EosPenalty(score=-1.0, how="replace"), whiten=False),
}  # fmt: skip
PAPERS = {
    "ziegler2019": SHARED | {
        "steps": 1953, "minibatches": 1, "prompt_tokens": (1, 64), "completion_tokens": 24,
        "sampling": Sampling(temperature=0.7, top_k=0, top_p=1.0, ends=False),
        "truncate": Truncation(at=".", after=16, score=-1.0), "critic": SharedTrunk(value_coef=0.1),
        "kl": AdaptiveKL(0.15, 6.0, 10_000), "shaping": Shaping(eos_penalty=None, whiten=True), "ptx": None,
        "average": None,
    },
    "stiennon2020": TLDR,
    "nplus": TLDR,
    "instructgpt": SHARED | {
        "steps": 500, "epochs": 1, "minibatches": 8, "kl": FixedKL(0.02), "average": 0.992, "critic": "reward_model",
        "truncate": None, "ptx": PretrainingMix(coef=27.8, batch_size=512, row_length=1024, rows=8192),
    },
}  # fmt: skip
ADAM = {"kind": "adamw", "b1": 0.9, "b2": 0.999, "eps": 1e-5, "weight_decay": 0.0, "final_share": 0.0}
UNCLIPPED = {"clip_norm": 1e9}  # a gradient's norm: none of these clipped it
LATER = {"eps_form": "torch", "schedule": "linear"}
OPTIMIZERS = {
    "ziegler2019": ADAM | UNCLIPPED | {"learning_rate": 1e-5, "eps_form": "tensorflow", "schedule": "linear"},
    "stiennon2020": ADAM | UNCLIPPED | LATER | {"learning_rate": 1.5e-5},  # appendix B.1, 1.3B
    "nplus": ADAM | UNCLIPPED | LATER | {"learning_rate": 3e-6, "weight_decay": 0.01},  # AdamW as PyTorch has it
    # Ouyang et al. 2022, appendix C: Adam with β2 0.95, a constant rate after ten iterations of eight steps.
    "instructgpt": ADAM
    | {"b2": 0.95, "eps": 1e-8, "eps_form": "torch", "clip_norm": 1.0}
    | {"learning_rate": 9e-6, "schedule": "constant", "warmup_steps": 10 * 8},
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_papers_details(name):
    """Field by field, from the papers (Huang et al. 2024 for what Stiennon et al. leave open)."""
    made = ppo.Config(**PRESETS[name])
    assert {field: vars(made)[field] for field in PAPERS[name]} == PAPERS[name]
    used = made.optimizer, *(() if made.shared else (made.critic_optimizer,))
    for optimizer in used:
        wanted = OPTIMIZERS[name]
        assert {field: vars(optimizer)[field] for field in wanted} == wanted
    if name == "instructgpt":  # eight texts an episode, a minibatch of 64
        assert made.ptx.batch_size * made.minibatches == 8 * made.batch_size
        assert made.batch_size // made.minibatches == 64 and made.steps * made.batch_size == 256_000
    assert set(PRESETS) == set(PAPERS)
