"""The transformer once more, in NumPy, for one text without padding: written from the papers, with loops."""

import numpy as np


def rms_norm(x, scale, eps):
    """Zhang and Sennrich 2019, eq. 4."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def rotate(x, position, theta):
    """Su et al. 2021, eq. 15, with pair i made of entries i and i + H/2, as in Llama."""
    half = len(x) // 2
    out = np.empty_like(x)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        out[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
        out[i + half] = x[i] * np.sin(angle) + x[i + half] * np.cos(angle)
    return out


def attention(spec, p, x):
    """Vaswani et al. 2017, eq. 1, over the last `window` tokens; query heads share key heads (Ainslie et al. 2023)."""
    out = np.zeros_like(x)
    for n in range(spec.n_heads):
        shared = n // (spec.n_heads // spec.n_kv_heads)
        q, k, v = x @ p["query"][:, n], x @ p["key"][:, shared], x @ p["value"][:, shared]
        if spec.qk_norm:
            q = rms_norm(q, p["query_norm"]["scale"], spec.norm_eps)
            k = rms_norm(k, p["key_norm"]["scale"], spec.norm_eps)
        q = np.array([rotate(row, t, spec.rope_theta) for t, row in enumerate(q)])
        k = np.array([rotate(row, t, spec.rope_theta) for t, row in enumerate(k)])
        for t in range(len(x)):
            first = 0 if spec.window is None else max(0, t - spec.window + 1)
            scores = k[first : t + 1] @ q[t] / np.sqrt(spec.head_dim)
            if spec.attention_softcap is not None:
                scores = spec.attention_softcap * np.tanh(scores / spec.attention_softcap)
            weights = np.exp(scores - scores.max())
            out[t] += (weights / weights.sum() @ v[first : t + 1]) @ p["out"][n]
    return out


def swiglu(p, x):
    """Shazeer 2020, eq. 6."""
    gate = x @ p["gate"]
    return (gate / (1 + np.exp(-gate)) * (x @ p["up"])) @ p["down"]


def hidden(spec, params, tokens):
    """[t] -> [t, d]; pre-norm blocks as in Touvron et al. 2023."""
    x = params["embedding"][tokens] * np.sqrt(spec.d_model)
    for layer in range(spec.n_layers):
        p = pick(params["layers"], layer)
        x = x + attention(spec, p["attention"], rms_norm(x, p["attention_norm"]["scale"], spec.norm_eps))
        x = x + swiglu(p["mlp"], rms_norm(x, p["mlp_norm"]["scale"], spec.norm_eps))
    return rms_norm(x, params["final_norm"]["scale"], spec.norm_eps)


def logits(spec, params, tokens):
    out = hidden(spec, params, tokens) @ (params["embedding"].T if spec.tied else params["unembedding"])
    return out if spec.logits_softcap is None else spec.logits_softcap * np.tanh(out / spec.logits_softcap)


def pick(tree, layer):
    return {name: pick(x, layer) if isinstance(x, dict) else x[layer] for name, x in tree.items()}
