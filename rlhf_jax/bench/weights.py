"""Random weights whose completions are as long as a measurement wants them, in every library that loads them.

Random weights do not end a completion in any useful way. Here the first entry of the residual stream is the same at
every token: the embedding puts it there and no layer writes to it. The rows of EOS and of the padding token in the
output head read this entry alone, so that their probabilities are the same at every step: of EOS as chosen, of padding
none. What computes with the weights is not told, and pays for them as for any others.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import models, sharding
from rlhf_jax.bench.work import EOS, PAD, SIZES
from rlhf_jax.interop import Pretrained, export
from rlhf_jax.models import ModelSpec
from rlhf_jax.models.spec import DType
from rlhf_jax.types import Params

NEVER = 1e-12
"""A probability that no measurement will see."""


def write(spec: ModelSpec, folder: Path, *, eos: float, dtype: DType = "float32") -> None:
    """A folder of Hugging Face's with random weights that end a completion at each token with probability `eos`."""
    export(Pretrained(spec, ending(spec, jax.random.key(0), eos=eos), None), folder, dtype=dtype)


def ending(spec: ModelSpec, key: jax.Array, *, eos: float) -> Params:
    """Random parameters whose next token is EOS with probability `eos`, whatever came before, and never padding."""
    params = jax.tree.map(np.array, sharding.unbox(models.init(spec, key)))
    layers, table = params["layers"], params["embedding"]
    constant = 10 * spec.d_model**0.5  # far above what the layers write: the final norm leaves it nearly as it is
    table[:, 0] = constant
    layers["attention"]["out"][..., 0] = 0
    layers["mlp"]["down"][..., 0] = 0
    params["final_norm"]["scale"][0] = 1 / (constant * spec.d_model**0.5)  # a head's entry of c then adds about 1
    head = table if spec.tied else params["unembedding"].T
    head[[PAD, EOS]] = 0
    if not spec.tied:
        head[:, 0] = 0
    tokens = jax.random.randint(jax.random.fold_in(key, 1), (4, min(64, spec.max_len)), EOS + 1, spec.vocab_size)
    mask = jnp.ones(tokens.shape, bool)
    states = jax.jit(lambda params: models.hidden(spec, params, tokens, mask))(params)
    logits = np.asarray(jax.jit(lambda params: models.unembed(spec, params, states))(params))
    others = np.delete(logits, [PAD, EOS], axis=-1)
    mean = float(np.mean(jax.nn.logsumexp(others, axis=-1)))
    entry = float(np.mean(states[..., 0]))
    for token, probability in ((EOS, eos), (PAD, NEVER)):
        head[token, 0] = (mean + np.log(probability / (1 - probability))) / entry
    return params


def eos_probability(limit: int, mean: float) -> float:
    """The p of which completions of at most `limit` tokens, EOS included, have so many in the mean: (1 − (1 − p)ⁿ) / p.

    >>> round(eos_probability(48, 12), 4)
    0.082
    """
    low, high = 1e-9, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        longer = (1 - (1 - middle) ** limit) / middle > mean
        low, high = (middle, high) if longer else (low, middle)
    return (low + high) / 2


def main(path: str) -> None:
    """Write the folder of a job's model, in a process of its own, and say EOS's probability as JSON."""
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    natural = job["variant"] == "natural"
    eos = eos_probability(job["completion"], job["completion"] / 4) if natural else NEVER
    write(SIZES[job["size"]].spec, Path(job["model"]), eos=eos)
    print(json.dumps({"eos": eos}))


if __name__ == "__main__":
    main(sys.argv[1])
