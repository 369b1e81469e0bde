"""Divergences of a student from a teacher over the whole vocabulary, per token, in nats.

The gradient of both flows; whoever does not train the teacher stops it. Shapes: *b any leading axes, v vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax import kl
from rlhf_jax.numerics import as_float, require
from rlhf_jax.types import ArrayLike, Scalar, typed


@typed
def forward_kl(
    logits: Float[ArrayLike, "*b v"], teacher_logits: Float[ArrayLike, "*b v"]
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """KL(teacher‖student): the student covers all that the teacher may say. Hinton et al. 2015; no diagnostics.

    >>> import jax.numpy as jnp
    >>> forward_kl(jnp.log(jnp.array([0.25, 0.75])), jnp.log(jnp.array([0.5, 0.5])))[0]
    Array(0.1438, dtype=float32)
    """
    return kl.exact(teacher_logits, logits), {}


@typed
def reverse_kl(
    logits: Float[ArrayLike, "*b v"], teacher_logits: Float[ArrayLike, "*b v"]
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """KL(student‖teacher): the student says nothing that the teacher would not. Gu et al. 2023; no diagnostics.

    >>> import jax.numpy as jnp
    >>> reverse_kl(jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75])))[0]
    Array(0.1438, dtype=float32)
    """
    return kl.exact(logits, teacher_logits), {}


@typed
def jensen_shannon(
    logits: Float[ArrayLike, "*b v"], teacher_logits: Float[ArrayLike, "*b v"], *, beta: Scalar = 0.5
) -> tuple[Float[Array, "*b"], dict[str, Float[Array, "*b"]]]:
    """β KL(teacher‖m) + (1 − β) KL(student‖m), with the mixture m = β teacher + (1 − β) student.

    The generalised Jensen-Shannon divergence of Agarwal et al. 2023 (GKD). It is at most the entropy of (β, 1 − β),
    log 2 at β = ½. Divided by β it becomes the forward KL as β goes to 0, divided by 1 − β the reverse KL as β goes to
    1. No diagnostics. Raises ValueError unless 0 < β < 1.

    >>> import jax.numpy as jnp
    >>> jensen_shannon(jnp.array([40.0, 0.0]), jnp.array([0.0, 40.0]))[0]
    Array(0.6931, dtype=float32)
    """
    require("beta", beta, "(0, 1)")
    log_q, log_p = (jax.nn.log_softmax(as_float(x), axis=-1) for x in (logits, teacher_logits))
    mixture = jnp.logaddexp(jnp.log(beta) + log_p, jnp.log1p(-beta) + log_q)
    return kl.exact(teacher_logits, mixture) * beta + kl.exact(logits, mixture) * (1 - beta), {}
