"""Numbers of TensorFlow Probability (on JAX), in float64, for the two likelihoods that no RLHF library has.

python -m venv tfp && tfp/bin/pip install tfp-nightly jax
tfp/bin/python -m tests.oracles.make_tfp        # from the root of the repository

Plackett-Luce over whole rankings, best first, and the ordered logistic (proportional odds) over ratings.
"""

import jax.numpy as jnp
from tensorflow_probability.substrates.jax import distributions

from tests.oracles.make_jax_common import write


def plackett_luce(x):
    """TFP takes positive scores, e^r, and the ranking as indices: here the completions stand in order."""
    ranking = jnp.broadcast_to(jnp.arange(x["scores"].shape[-1]), x["scores"].shape)
    return -distributions.PlackettLuce(jnp.exp(x["scores"])).log_prob(ranking)


def ordered_logistic(x):
    return -distributions.OrderedLogistic(cutpoints=x["thresholds"], loc=x["scores"]).log_prob(x["stars"])


CASES = {
    "plackett_luce": ("ranked", plackett_luce, "scores", {}),
    "ordered_logistic": ("ratings", ordered_logistic, "scores thresholds", {}),
}

if __name__ == "__main__":
    write("tfp", ("tfp-nightly", "jax", "jaxlib", "numpy"), CASES)
