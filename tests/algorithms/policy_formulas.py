"""The papers' losses of on-policy methods, one formula at a time, for eight completions of at most six tokens.

s: scores; now, o, r: lists of each completion's log-probs, now, when it was written, and the reference's.
"""

import jax
import jax.numpy as jnp
import numpy as np

N, B = 6, 8  # most tokens of a completion, completions


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
    groups = [i for i, g in by_group(s, 4) if max(g) > min(g)]  # eq. 11 is of what is right, not of lengths
    s = [x + min(0.0, (N - 3 - n) / 3) for x, n in zip(s, lengths, strict=True)]  # eq. 13, a cache of 3 tokens
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


def trpo(s, now, o, r, lengths):
    s = after_kl(s, o, r, 0.04)
    a = np.repeat([s[i] - (sum(g) - s[i]) / 3 for i, g in by_group(s, 4)], lengths)
    a = np.split((a - a.mean()) / a.std(), np.cumsum(lengths)[:-1])
    return -sum((jnp.exp(x - y) * z).sum() for x, y, z in zip(now, o, a, strict=True)) / lengths.sum()


FORMULAS = {f.__name__: f for f in (
    reinforce, rloo, reinforce_plus_plus, reinforce_plus_plus_baseline, remax, grpo, dr_grpo, dapo, gspo, cispo, gmpo,
    p3o, trpo,
)}  # fmt: skip
