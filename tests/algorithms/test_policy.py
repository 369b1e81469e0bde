"""The policy stage: each method's gradient against its paper's formula, learning, kills, meshes, fields."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models, sharding
from rlhf_jax.algorithms import policy
from rlhf_jax.algorithms.policy_methods import METHODS, method
from rlhf_jax.models import ModelSpec
from rlhf_jax.optim import Optimizer
from rlhf_jax.rewards.shaping import OverlongPenalty
from rlhf_jax.rewards.verifiers import PatternMatch
from rlhf_jax.types import Rollout

pytestmark = pytest.mark.usefixtures("compile_quickly")

SPEC = ModelSpec(vocab_size=300, d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=32, max_len=16)
P, N, B, EOS = 5, 6, 8, 3  # columns of a prompt, tokens of a completion, completions
COMMON = {
    "policy": "base", "steps": 4, "batch_size": B, "prompt_tokens": (1, P - 1), "too_long": "start",
    "completion_tokens": N, "evaluation_prompts": 4, "exact_kl_rows": 4, "checkpoint_every": 2,
    "optimizer": Optimizer(learning_rate=1e-2, eps=1e-3),
}  # fmt: skip


def make(name, **fields):
    """A method at a small size; what it needs of rewards is a function."""
    own = {"reward": PatternMatch("e")} if METHODS[name].get("dynamic_sampling") else {}
    own |= {"overlong": OverlongPenalty(buffer=3)} if "overlong" in METHODS[name] else {}
    own |= {"group_size": 4} if METHODS[name].get("group_size", 8) == 8 else {}
    return method(name, **{**COMMON, **own, **fields})


def algorithm_of(config):
    return policy.Algorithm(config, SPEC, eos_id=EOS, pad_id=0)


@pytest.fixture(scope="module")
def params():
    return sharding.unbox(models.init(SPEC, jax.random.key(0)))


@pytest.fixture(scope="module")
def written(params):
    """A rollout by an older policy than the one that learns, with reference log-probs and scores; and the vjp."""
    rng = np.random.default_rng(0)
    lengths = np.array([6, 3, 1, 5, 6, 6, 2, 4])
    tokens = rng.integers(4, 300, (B, P + N)).astype(np.int32)
    mask = np.zeros((B, P + N), bool)
    for i, length in enumerate(lengths):
        mask[i, P : P + length] = True
        if i % 3:
            tokens[i, P + length - 1] = EOS
    tokens[np.arange(B)[:, None].repeat(P + N, 1) < 0] = 0
    prompt = np.arange(P + N) < P

    def logps(params):
        logits = models.logits(SPEC, params, tokens, mask | prompt)[:, P - 1 : -1]
        return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, P:, None], -1)[..., 0] * mask[:, P:]

    now, pull = jax.vjp(jax.jit(logps), params)
    other = [np.asarray(now) + rng.normal(0, size, now.shape) * mask[:, P:] for size in (0.3, 0.5)]
    pad = lambda x: jnp.pad(jnp.asarray(x, jnp.float32), ((0, 0), (P, 0)))  # noqa: E731
    rollout = Rollout(
        tokens=jnp.asarray(tokens), prompt_mask=jnp.asarray(np.broadcast_to(prompt, mask.shape)),
        completion_mask=jnp.asarray(mask), logps=pad(other[0]), ref_logps=pad(other[1]),
        scores=jnp.asarray([1.0, 0, 2.5, -1, 0.5, 0.5, 0.5, 0.5]),
    )  # fmt: skip
    return rollout, np.asarray(now, np.float64), *other, lengths, pull


# The papers' losses of rows of log-probs, one formula at a time. s: scores; l, o, r: lists of each completion's
# log-probs, now, when it was written, and the reference's.


def clip(ratio, a, low, high):
    return -jnp.minimum(ratio * a, jnp.clip(ratio, 1 - low, 1 + high) * a)


def by_group(s, size):
    return [(i, s[i // size * size : i // size * size + size]) for i in range(len(s))]


def after_kl(s, o, r, coef):
    return [x - coef * float(np.sum(a - b)) for x, a, b in zip(s, o, r, strict=True)]


def grpo_advantages(s):
    return [(s[i] - np.mean(g)) / (np.std(g, ddof=1) + 1e-4) for i, g in by_group(s, 4)]


def k3(now, ref):
    return jnp.exp(ref - now) - (ref - now) - 1


def reinforce(s, now, o, r, lengths):
    s = after_kl(s, o, r, 0.04)
    return -sum((s[i] - np.mean(np.delete(s, i))) * x.sum() for i, x in enumerate(now)) / B


def rloo(s, now, o, r, lengths):
    s = after_kl(s, o, r, 0.04)
    return -sum((s[i] - (sum(g) - s[i]) / 3) * now[i].sum() for i, g in by_group(s, 4)) / B


def reinforce_plus_plus(s, now, o, r, lengths):
    to_go = [x - 0.04 * np.cumsum((a - b)[::-1])[::-1] for x, a, b in zip(s, o, r, strict=True)]
    mean, std = np.concatenate(to_go).mean(), np.concatenate(to_go).std()
    terms = zip(now, o, to_go, strict=True)
    return sum(clip(jnp.exp(a - b), (g - mean) / std, 0.2, 0.2).sum() for a, b, g in terms) / lengths.sum()


def reinforce_plus_plus_baseline(s, now, o, r, lengths):
    centered = np.concatenate([np.full(lengths[i], s[i] - np.mean(g)) for i, g in by_group(s, 4)])
    whitened = np.split((centered - centered.mean()) / centered.std(), np.cumsum(lengths)[:-1])
    terms = zip(now, o, r, whitened, strict=True)
    return sum((clip(jnp.exp(a - b), g, 0.2, 0.2) + 0.02 * (a - c) ** 2).sum() for a, b, c, g in terms) / lengths.sum()


def remax(s, now, o, r, lengths):
    total = 0
    for i in range(1, B, 2):  # the one before is greedy
        to_go = np.cumsum((o[i] - r[i])[::-1])[::-1]
        total += ((s[i] - s[i - 1] - 0.04 * to_go) * now[i]).sum()
    return -total / (B / 2)


def grpo(s, now, o, r, lengths):
    terms = zip(now, o, r, grpo_advantages(s), strict=True)
    return sum((clip(jnp.exp(a - b), g, 0.2, 0.2) + 0.04 * k3(a, c)).mean() for a, b, c, g in terms) / B


def dr_grpo(s, now, o, r, lengths):
    return sum(clip(jnp.exp(now[i] - o[i]), s[i] - np.mean(g), 0.2, 0.2).sum() / N for i, g in by_group(s, 4)) / B


def dapo(s, now, o, r, lengths):
    s = [x + min(0.0, (N - 3 - n) / 3) for x, n in zip(s, lengths, strict=True)]  # eq. 13, a cache of 3 tokens
    groups = [i for i, g in by_group(s, 4) if max(g) > min(g)]
    a = grpo_advantages(s)
    return sum(clip(jnp.exp(now[i] - o[i]), a[i], 0.2, 0.28).sum() for i in groups) / sum(lengths[i] for i in groups)


def gspo(s, now, o, r, lengths):
    terms = zip(now, o, grpo_advantages(s), strict=True)
    return sum(clip(jnp.exp((a - b).mean()), g, 3e-4, 4e-4) for a, b, g in terms) / B


def cispo(s, now, o, r, lengths):
    def one(a, b, g):
        return -(jax.lax.stop_gradient(jnp.minimum(jnp.exp(a - b), 5.0)) * g * a).sum()

    return sum(one(*x) for x in zip(now, o, grpo_advantages(s), strict=True)) / lengths.sum()


def gmpo(s, now, o, r, lengths):
    def one(a, b, c, g):
        ratio = jnp.exp(a - b)
        sign = 1 if g > 0 else -1
        kept = sign * jnp.minimum(sign * ratio, sign * jnp.clip(ratio, np.exp(-0.4), np.exp(0.4)))
        return -g * kept.prod() ** (1 / len(a)) + 0.04 * k3(a, c).mean()

    return sum(one(*x) for x in zip(now, o, r, grpo_advantages(s), strict=True)) / B


def p3o(s, now, o, r, lengths):
    s, total = after_kl(s, o, r, 0.04), 0
    for i in range(B):
        j = i ^ 1
        rho, other = jnp.exp((now[i] - o[i]).sum()), jax.lax.stop_gradient(jnp.exp((now[j] - o[j]).sum()))
        total += clip(rho, (s[i] - s[j]) * other, 0.2, 0.2) / 2
    return total / (B / 2)


FORMULAS = {f.__name__: f for f in (
    reinforce, rloo, reinforce_plus_plus, reinforce_plus_plus_baseline, remax, grpo, dr_grpo, dapo, gspo, cispo, gmpo,
    p3o,
)}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_the_gradient_is_that_of_the_papers_formula(name, written, params):
    rollout, now, old, ref, lengths, pull = written
    algorithm = algorithm_of(config := make(name))
    if name == "remax":
        rollout = rollout.replace(used=jnp.arange(B) % 2 == 1)
    rollout, metrics = algorithm.with_advantages(rollout, kl_coef=jnp.float32(config.kl.coef))
    hyper = {"clip_eps": config.clip_eps, "clip_eps_high": config.clip_eps_high, "kl_coef": config.kl.coef}
    hyper = {key: jnp.float32(value or 0) for key, value in hyper.items()}
    batch = rollout if name != "p3o" else jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:]), rollout)
    loss_fn = algorithm.policy_loss()

    def total(params):
        loss, found = loss_fn(params, batch, hyper, jax.random.key(0))
        return loss.value, found["policy_clipped"].value

    gradient, clipped = jax.jit(jax.grad(total, has_aux=True))(params)
    scores = np.asarray(rollout.scores, np.float64)

    def formula(now):
        rows = [[x[i, : lengths[i]] for i in range(B)] for x in (now, old, ref)]
        return FORMULAS[name](scores, *rows, lengths)

    (wanted,) = pull(jax.jit(jax.grad(formula))(jnp.asarray(now, jnp.float32)))
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 + 1e-4 * float(jnp.abs(b).max()))
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(wanted)) > 1e-3
    assert (clipped > 0) == (config.clip_eps is not None)  # the ratios are far enough for a clip to show
    assert metrics.get("equal_groups", 0) == {1: 0, 2: 0.5, 4: 0.5}[config.group_size] or name == "dapo"
