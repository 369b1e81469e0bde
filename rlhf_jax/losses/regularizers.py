"""Terms that are added to another loss: per token, or one for all parameters. Shapes: *b any leading axes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from rlhf_jax.numerics import as_float, require
from rlhf_jax.types import ArrayLike, Scalar, typed

ParamsLike = PyTree[Float[ArrayLike, "?*s"], "T"]  # pyright: ignore[reportUndefinedVariable]
"""Trees of one structure, each leaf of one shape in all of them."""


@typed
def entropy_bonus(entropy: Float[ArrayLike, "*b"]) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """−H(π), which a positive coefficient turns into a bonus. Schulman et al. 2017, eq. 9; no diagnostics.

    `entropy` comes from `logprobs.entropy`, in nats a token.

    >>> import jax.numpy as jnp
    >>> entropy_bonus(jnp.array([1.5]))[0]
    Array([-1.5], dtype=float32)
    """
    return -as_float(entropy), {}


@typed
def pretraining_mix(
    logps: Float[ArrayLike, "*b"], *, ptx_coef: Scalar = 27.8
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """−ptx_coef · log p of tokens of the pretraining data: the last term of PPO-ptx.

    Ouyang et al. 2022 (InstructGPT), eq. 2, whose γ is `ptx_coef`. There log p is a whole text's; under a mean over
    tokens, as here, the coefficient counts for less. Its tokens are others than the policy loss's: the two terms
    are reduced, each by its own count, before they are added. Diagnostics: `cross_entropy`, without the coefficient.
    Raises ValueError if ptx_coef < 0.

    >>> pretraining_mix(jnp.array([-0.5]), ptx_coef=2.0)[0]
    Array([1.], dtype=float32)
    """
    require("ptx_coef", ptx_coef, "[0, inf)")
    cross_entropy = -as_float(logps)
    return cross_entropy * ptx_coef, {"cross_entropy": cross_entropy}


@typed
def elastic_weight_consolidation(
    params: ParamsLike,
    anchor: ParamsLike,
    fisher: ParamsLike,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """½ Σ_i F_i (θ_i − θ*_i)²: what an earlier task needed of the parameters is held near θ*.

    Kirkpatrick et al. 2017, eq. 3, whose λ is the coefficient that it is added with. `anchor` θ* and `fisher` F, of
    `fisher_diagonal`, are trees like `params`. It is one number, not one a token: add coef · loss · count to the total
    of the `Mean` that a loss function returns, and no split into microbatches changes it. Diagnostics:
    `squared_distance`, Σ_i (θ_i − θ*_i)².

    >>> params, anchor = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.zeros(2)}
    >>> elastic_weight_consolidation(params, anchor, {"w": jnp.array([1.0, 0.5])})[0]
    Array(1.5, dtype=float32)
    """

    def total(squares: PyTree) -> Array:
        return sum((x.sum() for x in jax.tree.leaves(squares)), jnp.zeros((), jnp.float32))

    squares = jax.tree.map(lambda p, a: jnp.square(as_float(p) - as_float(a)), params, anchor)
    weighted = jax.tree.map(lambda f, square: as_float(f) * square, fisher, squares)
    return total(weighted) / 2, {"squared_distance": total(squares)}


@typed
def fisher_diagonal(
    logp: Callable[[Any, Any], Array], params: PyTree[Float[ArrayLike, "..."]], examples: Any
) -> PyTree[Float[Array, "..."]]:
    """The diagonal of the Fisher information, (1/n) Σ_examples (∂ log p(y|x, θ) / ∂θ)², a tree like `params`.

    Kirkpatrick et al. 2017, section 2.1. `logp(params, example)` is the log-probability of one example, a number, and
    `examples` a pytree whose leading axis they are on; one gradient is held at a time. It estimates the Fisher
    information if each y was sampled from the model, log p(y|x, θ) for a sequence being that of all its tokens; with
    the data's own y it is the empirical one, which is another matrix (Kunstner et al. 2019). Raises ValueError without
    an example.

    >>> fisher_diagonal(lambda p, x: -0.5 * (p - x) ** 2, jnp.array(0.0), jnp.array([1.0, -1.0, 2.0]))  # N(p, 1)
    Array(2., dtype=float32)
    """
    count = len(jax.tree.leaves(examples)[0])
    require("the number of examples", count, "[1, inf)")
    params = jax.tree.map(as_float, params)

    def add(total: PyTree, example: Any) -> tuple[PyTree, None]:
        gradient = jax.grad(logp)(params, example)
        return jax.tree.map(lambda t, g: t + jnp.square(g), total, gradient), None

    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), examples)
    return jax.tree.map(lambda t: t / count, total)
