"""What the stages without a critic share of an iteration: its improvement by a scored rollout, and the first state.

Shapes: b rollouts, u units of them that no split of a batch divides: one completion, or a pair.
"""

import dataclasses
from abc import abstractmethod

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from rlhf_jax import guard
from rlhf_jax.algorithms.context import Context
from rlhf_jax.algorithms.iterations import Frozen
from rlhf_jax.algorithms.policy_gradient import PolicyGradient
from rlhf_jax.algorithms.policy_state import (
    PolicyState,
    averaged,
    copied,
    first_moments,
    may_lie_apart,
    over_steps,
    policy_state,
    with_scores,
)
from rlhf_jax.normalizer import Moments
from rlhf_jax.types import Metrics, Rollout, TrainState


class CriticFree(PolicyGradient):
    """An iteration's last phase but for how completions are compared."""

    reported: tuple[str, ...] = ("policy_clipped", "approx_kl", "grad_norm", "ptx_loss", "ewc_penalty")
    """Of the steps' metrics those of an iteration, besides the loss."""

    @property
    @abstractmethod
    def together(self) -> int:
        """Completions beside each other that one step takes together."""

    @abstractmethod
    def with_advantages(
        self, rollout: Rollout, *, kl_coef: Array, moments: Moments | None = None
    ) -> tuple[Rollout, Metrics]:
        """What completions are worth beside others, and which are learnt from."""

    @abstractmethod
    def units(self, rollout: Rollout) -> Rollout:
        """Of each `together` completions what a step learns from, as one row of its batch."""

    def improve(
        self, state: PolicyState, frozen: Frozen, rollout: Rollout, metrics: Metrics
    ) -> tuple[PolicyState, Metrics, Rollout]:
        """Compare the completions of a scored rollout, update; the scoring's `metrics` stand in those given back."""
        moments, moment_metrics = with_scores(state.moments, rollout)
        with jax.named_scope("score"):
            rollout, stale_metrics = self.with_old_logps(rollout, state, frozen)
            rollout, reward_metrics = self.with_advantages(rollout, kl_coef=state.kl.coef, moments=moments)
        with jax.named_scope("update"):
            state, update_metrics = self.update(state, frozen, rollout)
        controller = self.config.kl.update(state.kl, metrics["seq_kl"], self.config.batch_size)
        metrics = {**metrics, **moment_metrics, **stale_metrics, **reward_metrics, **update_metrics}
        average = averaged(state.average, state.policy, self.config.average)
        return state.replace(kl=controller, average=average, moments=moments), metrics, rollout

    def update(self, state: PolicyState, frozen: Frozen, rollout: Rollout) -> tuple[PolicyState, Metrics]:
        """`epochs` × `minibatches` steps."""
        rows = self.minibatch_rows(jax.random.fold_in(state.policy.step_key(), 1), together=self.together)
        start, deviation = self.beginning(state, frozen, rollout, rows[0])
        units, order = self.units(rollout), rows[:, :: self.together] // self.together

        def step(
            carry: tuple[TrainState, Bool[Array, ""]], some: Int[Array, " m"]
        ) -> tuple[tuple[TrainState, Bool[Array, ""]], Metrics]:
            policy, stopped, metrics = self.policy_update(*carry, jax.tree.map(lambda x: x[some], units), frozen)
            return (policy, stopped), metrics

        apart = may_lie_apart(self, self.config.optimizer)
        (policy, _), metrics = over_steps(step, (start, jnp.zeros((), bool)), order, apart=apart)
        metrics = guard.over_steps(metrics)
        return state.replace(policy=policy), {
            "ratio_deviation": deviation,
            "policy_loss": metrics["loss"],
            "skipped_updates": metrics["stopped"],
            **{name: metrics[name] for name in self.reported if name in metrics},
            **guard.together(metrics),
        }

    def beginning(
        self, state: PolicyState, frozen: Frozen, rollout: Rollout, first: Int[Array, " m"]
    ) -> tuple[TrainState, Array]:
        """The policy with the price of KL as it is now, and how far its ratio is from 1 on the `first` rows."""
        start = dataclasses.replace(state.policy, hyper={**state.policy.hyper, "kl_coef": state.kl.coef})
        return start, self.deviation(start, frozen, jax.tree.map(lambda x: x[first], rollout))


def initial_state(algorithm: CriticFree, context: Context, name: str, hyper: dict[str, float]) -> PolicyState:
    """The policy at the start of training, in shards; `hyper` beside its learning rate and the price of KL."""
    c = algorithm.config
    policy = policy_state(algorithm, context, name, {**hyper, "kl_coef": c.kl.coef})
    average = None if c.average is None else copied(policy.params)
    return PolicyState(policy, context.replicated(c.kl.init()), average, first_moments(c.shaping, context))
