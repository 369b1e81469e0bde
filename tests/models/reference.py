"""The transformer once more, in NumPy, for one text without padding: written from the papers, with loops."""

import math

import numpy as np

from rlhf_jax.models.spec import LinearRope


def rms_norm(x, p, eps):
    """Zhang and Sennrich 2019, eq. 4."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * p["scale"]


def norm(spec, x, p):
    """RMSNorm, or LayerNorm (Ba et al. 2016, eq. 4)."""
    if spec.norm == "rms":
        return rms_norm(x, p, spec.norm_eps)
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt(x.var(-1, keepdims=True) + spec.norm_eps) * p["scale"] + p["bias"]


def rotate(spec, x, position, local):
    """Su et al. 2021, eq. 15, with pair i made of entries i and i + R/2, as in Llama; the rest of the head stays."""
    half, out, stretch = spec.rotated // 2, x.copy(), 1.0
    theta = spec.local_rope_theta if local and spec.local_rope_theta is not None else spec.rope_theta
    if isinstance(spec.rope_scaling, LinearRope) and not (local and spec.local_rope_theta is not None):
        stretch = spec.rope_scaling.factor
    for i in range(half):
        angle = position / stretch * theta ** (-2 * i / spec.rotated)
        out[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
        out[i + half] = x[i] * np.sin(angle) + x[i + half] * np.cos(angle)
    return out


def attention(spec, p, x, local):
    """Vaswani et al. 2017, eq. 1, over the last `window` tokens; query heads share key heads (Ainslie et al. 2023)."""
    out = np.zeros_like(x)
    for n in range(spec.n_heads):
        shared = n // (spec.n_heads // spec.n_kv_heads)
        q, k, v = (x @ p[name][:, head] for name, head in (("query", n), ("key", shared), ("value", shared)))
        if spec.qkv_bias:
            q, k, v = q + p["query_bias"][n], k + p["key_bias"][shared], v + p["value_bias"][shared]
        if spec.qk_norm:
            q, k = rms_norm(q, p["query_norm"], spec.norm_eps), rms_norm(k, p["key_norm"], spec.norm_eps)
        if spec.positions == "rotary":
            q, k = (np.array([rotate(spec, row, t, local) for t, row in enumerate(rows)]) for rows in (q, k))
        scale = 1 / np.sqrt(spec.head_dim) if spec.query_scale is None else spec.query_scale
        for t in range(len(x)):
            first = max(0, t - spec.window + 1) if local else 0
            scores = k[first : t + 1] @ q[t] * scale
            if spec.attention_softcap is not None:
                scores = spec.attention_softcap * np.tanh(scores / spec.attention_softcap)
            weights = np.exp(scores - scores.max())
            out[t] += (weights / weights.sum() @ v[first : t + 1]) @ p["out"][n]
    return out + p["out_bias"] if spec.out_bias else out


def activation(spec, x):
    """SiLU, or GELU by the error function or by tanh (Hendrycks and Gimpel 2016)."""
    if spec.activation == "silu":
        return x / (1 + np.exp(-x))
    if spec.activation == "gelu":
        return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def feed_forward(spec, p, x):
    """Shazeer 2020, eq. 6, or one projection; of the experts that the router likes best (Jiang et al. 2024, eq. 2)."""
    if spec.experts is None:
        b = {name: p[f"{name}_bias"] if spec.mlp_bias else 0 for name in ("gate", "up", "down")[not spec.gated :]}
        up = x @ p["up"] + b["up"]
        inner = activation(spec, x @ p["gate"] + b["gate"]) * up if spec.gated else activation(spec, up)
        return inner @ p["down"] + b["down"]
    out = np.zeros_like(x)
    for t, row in enumerate(x):
        chances = np.exp(row @ p["router"])
        chances /= chances.sum()
        best = np.argsort(-chances)[: spec.experts.per_token]
        total = chances[best].sum() if spec.experts.normalize else 1
        for e in best:
            out[t] += chances[e] / total * (activation(spec, row @ p["gate"][e]) * (row @ p["up"][e])) @ p["down"][e]
    return out


def hidden(spec, params, tokens):
    """[t] -> [t, d]; pre-norm blocks as in Touvron et al. 2023, with the variants of later families."""
    x = params["embedding"][tokens] * (np.sqrt(spec.d_model) if spec.scale_embedding else 1)
    if spec.positions == "learned":
        x = x + params["positions"][: len(tokens)]
    for layer in range(spec.n_layers):
        p, local = pick(params["layers"], layer), spec.layer_kinds[layer]
        attended = attention(spec, p["attention"], norm(spec, x, p["attention_norm"]), local)
        if spec.post_norms:
            attended = norm(spec, attended, p["attention_post_norm"])
        fed = feed_forward(spec, p["mlp"], norm(spec, x if spec.parallel else x + attended, p["mlp_norm"]))
        x = x + attended + (norm(spec, fed, p["mlp_post_norm"]) if spec.post_norms else fed)
    return norm(spec, x, params["final_norm"])


def logits(spec, params, tokens):
    out = hidden(spec, params, tokens) @ (params["embedding"].T if spec.tied else params["unembedding"])
    return out if spec.logits_softcap is None else spec.logits_softcap * np.tanh(out / spec.logits_softcap)


def pick(tree, layer):
    return {name: pick(x, layer) if isinstance(x, dict) else x[layer] for name, x in tree.items()}
