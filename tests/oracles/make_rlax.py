"""Numbers of rlax 0.1.9 in float64: GAE, λ-returns, the clipped surrogate, policy gradients, distributions, expectiles.

python -m venv rlax && rlax/bin/pip install rlax==0.1.9 jax
rlax/bin/python -m tests.oracles.make_rlax        # from the root of the repository

rlax is written for one sequence without a mask: here it runs on each row's kept tokens, and what it returns is put back
where they were. It takes the value after the last token as an argument, which is 0 here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import rlax

from tests.oracles.make_jax_common import write

GAMMA, LAM = 0.97, 0.9


def by_row(x, fn):
    """`fn` of each row's kept tokens, 0 elsewhere; masks are NumPy's, so that they cut while JAX differentiates."""
    rows = []
    for i, mask in enumerate(np.asarray(x["mask"])):
        kept = {name: value[i][mask] for name, value in x.items() if value.ndim == 2 and name != "mask"}
        out = fn(kept)
        rows.append(jnp.zeros(mask.shape, out.dtype).at[np.flatnonzero(mask)].set(out))
    return jnp.stack(rows)


def gae(x):
    def row(kept):
        values = jnp.append(kept["values"], 0.0)
        discounts = jnp.full_like(kept["rewards"], GAMMA)
        return rlax.truncated_generalized_advantage_estimation(kept["rewards"], discounts, LAM, values)

    return by_row(x, row)


def lambda_returns(x):
    def row(kept):
        after = jnp.append(kept["values"][1:], 0.0)
        return rlax.lambda_returns(kept["rewards"], jnp.full_like(after, GAMMA), after, LAM)

    return by_row(x, row)


def clipped_surrogate(x):
    """A mean over the kept tokens of each row, times their number: the mean over rows is ours to take."""
    mask = np.asarray(x["mask"])
    rows = [(jnp.exp(x["logps"][i] - x["old_logps"][i])[m], x["advantages"][i][m]) for i, m in enumerate(mask)]
    return jnp.stack([rlax.clipped_surrogate_pg_loss(ratio, advantages, 0.2) for ratio, advantages in rows])


def policy_gradient(x):
    """−A log π of a table of logits, a mean over its tokens; the advantages are the reference's first logits."""
    count = x["tokens"].size
    logits, advantages = x["logits"].reshape(count, -1), x["ref_logits"].reshape(count, -1)[:, 0]
    return rlax.policy_gradient_loss(logits, x["tokens"].reshape(-1), advantages, jnp.ones(count))


def entropy(x):
    count = x["tokens"].size
    return rlax.entropy_loss(x["logits"].reshape(count, -1), jnp.ones(count))


CASES = {
    "gae": ("rollout", gae, "rewards values", {"gamma": GAMMA, "lam": LAM}),
    "lambda_returns": ("rollout", lambda_returns, "rewards values", {"gamma": GAMMA, "lam": LAM}),
    "clipped_surrogate": ("rollout", clipped_surrogate, "logps", {"clip_eps": 0.2}),
    "policy_gradient": ("logits", policy_gradient, "logits", {}),
    "entropy_loss": ("logits", entropy, "logits", {}),
    "token_logps": ("logits", lambda x: rlax.softmax().logprob(x["tokens"], x["logits"]), "logits", {}),
    "token_logps_0.7": (
        "logits",
        lambda x: rlax.softmax(temperature=0.7).logprob(x["tokens"], x["logits"]),
        "logits",
        {"temperature": 0.7},
    ),
    "entropy": ("logits", lambda x: rlax.softmax().entropy(x["logits"]), "logits", {}),
    "entropy_0.7": ("logits", lambda x: rlax.softmax(0.7).entropy(x["logits"]), "logits", {"temperature": 0.7}),
    "categorical_kl": (
        "logits",
        lambda x: rlax.categorical_kl_divergence(x["logits"], x["ref_logits"]),
        "logits ref_logits",
        {},
    ),
    "best_of_k": (
        "ranked",
        lambda x: jax.vmap(rlax.categorical_cross_entropy)(jax.nn.one_hot(x["best"], 5), x["scores"]),
        "scores",
        {},
    ),
    "l2_loss": ("ratings", lambda x: rlax.l2_loss(x["scores"], x["ratings"]), "scores ratings", {}),
    "sigmoid_log_loss": (
        "ratings",
        lambda x: rlax.log_loss(jax.nn.sigmoid(x["scores"]), x["labels"].astype(float)),
        "scores",
        {},
    ),
    "expectile_loss": (
        "ratings",
        lambda x: rlax.expectile_loss(x["scores"], x["ratings"], 0.7),
        "scores",
        {"tau": 0.7},
    ),
}


if __name__ == "__main__":
    write("rlax", ("rlax", "jax", "jaxlib", "distrax", "numpy"), CASES)
