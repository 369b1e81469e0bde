"""TRPO's step: the natural gradient by conjugate gradients, as long as a divergence allows (Schulman et al. 2015)."""

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jax.scipy.sparse.linalg import cg
from jaxtyping import Array, Float

from rlhf_jax import kl, masking
from rlhf_jax.algorithms.iterations import Frozen
from rlhf_jax.algorithms.policy_gradient import PolicyGradient
from rlhf_jax.algorithms.rollouts import loss_mask
from rlhf_jax.numerics import require
from rlhf_jax.train_step import in_parts
from rlhf_jax.types import Metrics, Params, Rollout, TrainState

Scalar = Callable[[Params], Float[Array, ""]]


@dataclass(frozen=True)
class TrustRegion:
    """How far one step goes, and how it is found."""

    max_kl: float = 0.01
    """Largest KL(old‖new) of a step, exact over the vocabulary, in nats a token."""
    iterations: int = 10
    """Of conjugate gradients; each is a product with the Fisher matrix."""
    damping: float = 0.1
    """Added to the Fisher matrix's diagonal."""
    fisher_every: int = 4
    """That matrix is of one completion in so many: it is but a metric, and its products are most of a step's cost
    (appendix C.1)."""
    backtracks: int = 10
    """How often a step is halved that is too long or does not improve the surrogate; then it is left out."""

    def fisher_parts(self, batch_size: int, parts: int) -> int:
        """In how many parts that matrix's rows are computed, where a batch's are in `parts`."""
        return math.gcd(parts, batch_size // self.fisher_every)

    def __post_init__(self) -> None:
        for name, interval in (
            ("max_kl", "(0, inf)"), ("iterations", "[1, inf)"), ("damping", "[0, inf)"), ("backtracks", "[0, inf)"),
            ("fisher_every", "[1, inf)"),
        ):  # fmt: skip
            require(f"trust_region.{name}", vars(self)[name], interval)


def natural_step(
    config: TrustRegion, params: Params, surrogate: Scalar, cross_entropy: Scalar, divergence: Scalar
) -> tuple[Params, Metrics]:
    """Parameters after one step that lowers `surrogate` while `divergence` stays at most `max_kl`.

        x ≈ (F + λI)⁻¹ g;   θ ← θ − 2⁻ʲ √(2δ / xᵀ(F + λI)x) x,   j the first in 0, 1, … that is accepted

    Appendix C. All three are functions of parameters. F is the Hessian of `cross_entropy` at `params`, −Σ π_old log π:
    that of the divergence, whose own value is clamped at 0 and so has no curvature there. What is not finite is not
    accepted. Metrics: `step_share`, 2⁻ʲ, or 0 where no step was accepted and the parameters stay; `grad_norm`.
    """
    before, gradient = jax.value_and_grad(surrogate)(params)

    def product(vector: Params) -> Params:
        _, curved = jax.jvp(jax.grad(cross_entropy), (params,), (vector,))
        return jax.tree.map(lambda c, v: c + config.damping * v, curved, vector)

    direction, _ = cg(product, gradient, maxiter=config.iterations)
    length = jnp.sqrt(2 * config.max_kl / jnp.maximum(optax.tree.vdot(direction, product(direction)), 1e-20))

    def moved(share: Array) -> Params:
        return jax.tree.map(lambda p, x: p - share * length * x, params, direction)

    def accepted(share: Array) -> Array:
        new = moved(share)
        return (surrogate(new) < before) & (divergence(new) <= config.max_kl)

    def halve(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        share = carry[0] / 2
        return share, accepted(share)

    smallest = 2.0**-config.backtracks
    first = jnp.ones(()), accepted(jnp.ones(()))
    share, found = jax.lax.while_loop(lambda carry: ~carry[1] & (carry[0] > smallest), halve, first)
    new = jax.tree.map(lambda a, b: jnp.where(found, a, b), moved(share), params)
    return new, {"step_share": jnp.where(found, share, 0), "grad_norm": optax.tree.norm(gradient)}


def update(
    algorithm: PolicyGradient, config: TrustRegion, policy: TrainState, frozen: Frozen, rollout: Rollout
) -> tuple[TrainState, Metrics]:
    """The state after one step by all completions of a rollout, a part of them at a time.

    Besides what `natural_step` says: `policy_loss` before the step, `approx_kl`, KL(old‖new) after it.
    """
    # A Hessian's products take forward derivatives, which kernels of attention do not have.
    algorithm = copy.copy(algorithm)
    algorithm.spec = dataclasses.replace(algorithm.spec, attention="xla")
    c, loss_fn = algorithm.config, algorithm.policy_loss()
    window = slice(c.prompt_length, None)
    everything = rollout, c.parts
    some = jax.tree.map(lambda x: x[:: config.fisher_every], rollout), config.fisher_parts(c.batch_size, c.parts)

    def over_rows(part: Callable[[Params, Rollout], Array], among: tuple[Rollout, int]) -> Scalar:
        """A sum over rows, none of whose passes is kept for the gradient's."""
        part = jax.checkpoint(part)
        return lambda own: in_parts(lambda rows: part(own, rows)[None], *among).sum(0)

    def surrogate(own: Params) -> Array:
        def part(own: Params, rows: Rollout) -> Array:
            loss, _ = loss_fn(frozen.policy(own), rows, policy.hyper, policy.key)
            return jnp.stack([loss.total, loss.count])

        total, count = over_rows(part, everything)(own)
        return total / jnp.maximum(count, 1)

    def of_logits(fn: Callable[[Array, Array], Array], among: tuple[Rollout, int]) -> Scalar:
        tokens = jnp.maximum(loss_mask(among[0]).sum(), 1)

        def part(own: Params, rows: Rollout) -> Array:
            old, new = (algorithm.logits_and_values(frozen.policy(x), rows)[0] for x in (policy.params, own))
            each = fn(old / c.sampling.temperature, new / c.sampling.temperature)
            return masking.keep(each, loss_mask(rows)[:, window]).sum() / tokens

        return over_rows(part, among)

    def crossed(old: Array, new: Array) -> Array:
        return -(jax.nn.softmax(old) * jax.nn.log_softmax(new)).sum(-1)

    divergence = of_logits(kl.exact, everything)
    params, metrics = natural_step(config, policy.params, surrogate, of_logits(crossed, some), divergence)
    found = {"policy_loss": surrogate(policy.params), "approx_kl": divergence(params)}
    return dataclasses.replace(policy, step=policy.step + 1, params=params), metrics | found
