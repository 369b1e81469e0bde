"""PPO with a KL penalty to a frozen reference (Ziegler et al. 2019; Stiennon et al. 2020; Huang et al. 2024).

One iteration, compiled as a whole: sample completions, score them, turn scores and KL into advantages, and take
`epochs` × `minibatches` clipped steps of the policy and of its critic, a network of its own or a head on the policy.
Each minibatch may hold older rollouts too (`replay`). `placement` may part it in phases, and
have completions sampled one iteration ahead: `placement.Disaggregated` says what becomes of the loss then.

Shapes: b rollouts, p prompt tokens, n completion tokens, t = p + n, v vocabulary.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax import guard, importance, kl, losses, masking, models
from rlhf_jax.advantages import gae, token_rewards
from rlhf_jax.algorithms import onpolicy, replay, scoring
from rlhf_jax.algorithms.context import Context, Role, copies, named
from rlhf_jax.algorithms.iterations import Frozen
from rlhf_jax.algorithms.onpolicy import SharedTrunk, ValueHead
from rlhf_jax.algorithms.policy_gradient import PolicyGradient, PolicyGradientConfig
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
from rlhf_jax.algorithms.replay import Replay
from rlhf_jax.algorithms.rollouts import old_logps
from rlhf_jax.logprobs import entropy
from rlhf_jax.models.experts import with_load_balance
from rlhf_jax.models.heads import box
from rlhf_jax.normalizer import Moments
from rlhf_jax.numerics import require
from rlhf_jax.optim import Optimizer
from rlhf_jax.placement import Disaggregated, Idle
from rlhf_jax.train_step import Step, make_train_step, sharded_state
from rlhf_jax.types import Hyper, Key, LossFn, Mean, Metrics, Params, Rollout, TrainState

PARTS = ("approx_kl", "ptx_loss", "ewc_penalty", "value_loss", "value_clipped")
"""Metrics of a step that stand in an iteration's by their own names, where they are there."""
CRITIC_OPTIMIZER = Optimizer(learning_rate=3e-4)


@dataclass(frozen=True)
class Config(PolicyGradientConfig):
    """PPO on openings of reviews or on rows of prompts, with a reward model or a function of texts."""

    critic: str | ValueHead | SharedTrunk = "reward_model"
    """What the critic starts from, a reward_model stage or a policy with a new head; or a head on the policy itself."""
    critic_optimizer: Optimizer = CRITIC_OPTIMIZER
    """That of a critic of its own."""
    lam: float = 0.95
    """λ of generalised advantage estimation."""
    whiten_advantages: bool = True
    """Scales an iteration's advantages to mean 0 and variance 1."""
    clip_eps: float = 0.2
    """Clip range of the probability ratio."""
    value_clip: float | None = 0.2
    """Clip range of the value's change; none: no clipping."""
    replay: Replay | None = None
    """Older rollouts that are learnt from beside the newest; none: no older ones."""
    reducer: Literal["token", "sequence"] = "token"
    """Whether each token or each completion weighs the same in the losses."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, interval in (("lam", "[0, 1]"), ("clip_eps", "(0, 1)"), ("value_clip", "(0, inf)")):
            require(name, vars(self)[name], interval)
        if self.shared and self.critic_optimizer != CRITIC_OPTIMIZER:
            raise ValueError("critic_optimizer is for a critic of its own: critic=SharedTrunk() learns by `optimizer`")
        if self.shared and isinstance(self.placement, Disaggregated):
            raise ValueError("critic=SharedTrunk() is the policy, on its devices: placement must be Colocated")
        if self.replay is not None and self.placement.ahead:
            raise ValueError("replay weighs rollouts of policies before the newest: placement.ahead must be 0")

    def requires(self) -> dict[str, tuple[str, Role]]:
        """Policy, reward model and critic."""
        if isinstance(self.critic, SharedTrunk):
            return super().requires()
        if isinstance(self.critic, str):
            return super().requires() | named("reward", critic=self.critic)
        return super().requires() | named("policy", **{"critic.trunk": self.critic.trunk})

    def stored(self) -> float:
        """The critic's state too, where it is a network of its own."""
        critic = 0.0 if self.shared else self.critic_optimizer.copies
        return super().stored() + copies(0.0, critic, steps=self.steps, every=self.checkpoint_every)

    @property
    def shared(self) -> bool:
        """Whether the critic is a head on the policy."""
        return isinstance(self.critic, SharedTrunk)

    @property
    def idle_roles(self) -> tuple[Idle, ...]:
        """The critic too, where it is a network of its own."""
        return super().idle_roles if self.shared else (*super().idle_roles, "critic")

    @property
    def max_weight(self) -> float | None:
        """That of older rollouts, where they are learnt from."""
        return super().max_weight if self.replay is None else self.replay.max_weight


class State(PolicyState):
    """The critic too, where it is a network of its own, and older rollouts where they are learnt from."""

    critic: TrainState | None
    older: Rollout | None


class Algorithm(PolicyGradient):
    """PPO's steps as functions of (state, frozen, prompts)."""

    @cached_property
    def critic_optimizer(self) -> optax.GradientTransformation:
        """That of a critic of its own."""
        return self.config.critic_optimizer.make(self.config.updates)

    @cached_property
    def critic_step(self) -> Step:
        """A step of a critic of its own."""
        return make_train_step(
            self.critic_loss(),
            self.critic_optimizer,
            num_microbatches=self.config.num_microbatches,
            parts=self.parts_of_step(),
        )

    def improve(
        self, state: State, frozen: Frozen, rollout: Rollout, metrics: Metrics
    ) -> tuple[State, Metrics, Rollout]:
        """Estimate advantages of a scored rollout, update; the scoring's `metrics` stand in those given back."""
        moments, moment_metrics = with_scores(state.moments, rollout)
        if self.config.replay is not None and state.older is not None:
            rollout = replay.joined(rollout, state.older)
            state = state.replace(older=replay.without_oldest(rollout, self.config.replay))
        with jax.named_scope("score"):
            rollout, stale_metrics = self.with_old_logps(self.with_values(rollout, state, frozen), state, frozen)
            rollout, reward_metrics = self.with_advantages(rollout, kl_coef=state.kl.coef, moments=moments)
        with jax.named_scope("update"):
            state, update_metrics = self.update(state, frozen, rollout)
        controller = self.config.kl.update(state.kl, metrics["seq_kl"], self.config.batch_size)
        metrics = {**metrics, **moment_metrics, **stale_metrics, **reward_metrics, **update_metrics}
        average = averaged(state.average, state.policy, self.config.average)
        if self.config.replay is not None:
            rollout = jax.tree.map(lambda x: x[: self.config.batch_size], rollout)
        return state.replace(kl=controller, average=average, moments=moments), metrics, rollout

    def with_values(self, rollout: Rollout, state: State, frozen: Frozen) -> Rollout:
        """The critic's values, where it is a network of its own."""
        if state.critic is None:
            return rollout
        c, critic = self.config, frozen.network(state.critic.params)

        def part(rows: Rollout) -> Array:
            at = self.reading(critic["trunk"], rows)
            return self.in_rows(models.read_head(critic, at.states), at, rows)

        return rollout.replace(values=self.padded(scoring.in_parts(c.packing, part, rollout, c.parts)))

    def with_advantages(
        self, rollout: Rollout, *, kl_coef: Array, moments: Moments | None = None
    ) -> tuple[Rollout, Metrics]:
        """Rewards a token, and from these advantages and returns."""
        c, mask = self.config, rollout.completion_mask
        k1 = masking.keep(kl.k1(rollout.logps, rollout.ref_logps), mask)
        rewards = token_rewards(self.shaped(rollout, moments), k1, mask, kl_coef=kl_coef)
        metrics = {"reward": rewards.sum(-1)[: c.batch_size].mean(), "kl_coef": kl_coef}
        if c.shaping.whiten:
            rewards = masking.whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, rollout.values, mask, gamma=c.gamma, lam=c.lam)
        residual, spread = masking.masked_var(returns - rollout.values, mask), masking.masked_var(returns, mask)
        metrics["explained_variance"] = 1 - residual / jnp.maximum(spread, 1e-8)
        if c.whiten_advantages:
            advantages = masking.whiten(advantages, mask)
        return rollout.replace(rewards=rewards, advantages=advantages, returns=returns), metrics

    def update(self, state: State, frozen: Frozen, rollout: Rollout) -> tuple[State, Metrics]:
        """`epochs` × `minibatches` steps of policy and critic, each its own or one of both."""
        c, rows = self.config, self.minibatch_rows(jax.random.fold_in(state.policy.step_key(), 1))
        if c.replay is not None:
            rows = replay.of_each(rows, c.replay, batch_size=c.batch_size)

        def step(carry: tuple[State, Bool[Array, ""]], rows: Int[Array, " m"]) -> tuple[Any, tuple[Metrics, Metrics]]:
            state, stopped = carry
            batch = jax.tree.map(lambda x: x[rows], rollout)
            policy, stopped, policy_metrics = self.policy_update(state.policy, stopped, batch, frozen)
            critic, critic_metrics = state.critic, {}
            if critic is not None:
                critic, critic_metrics = self.critic_step(critic, batch, frozen.head_base)
            return (state.replace(policy=policy, critic=critic), stopped), (policy_metrics, critic_metrics)

        deviation = self.deviation(state.policy, frozen, jax.tree.map(lambda x: x[rows[0]], rollout))
        apart = may_lie_apart(self, c.optimizer, c.critic_optimizer)
        (state, _), (policy, critic) = over_steps(step, (state, jnp.zeros((), bool)), rows, apart=apart)
        policy, critic = guard.over_steps(policy), guard.over_steps(critic)
        apart = {} if c.shared else {"value_loss": critic["loss"], "critic_grad_norm": critic["grad_norm"]}
        return state, {
            "ratio_deviation": deviation,
            "policy_loss": policy["loss"],
            **apart,
            "policy_clipped": policy["policy_clipped"],
            **{name: metrics[name] for metrics in (policy, critic) for name in PARTS if name in metrics},
            "grad_norm": policy["grad_norm"],
            "skipped_updates": policy["stopped"],
            **guard.together(policy, critic),
        }

    def policy_loss(self) -> LossFn:
        """The clipped surrogate, with the entropy bonus and the loss of the policy's own values where they weigh."""
        c, window = self.config, slice(self.config.prompt_length, None)

        def loss_fn(params: Params, batch: Rollout, hyper: Hyper, key: Key) -> tuple[Mean, dict[str, Mean]]:
            del key
            mask, old = batch.completion_mask[:, window], old_logps(batch)[:, window]
            at = self.reading(params, batch)
            logits = models.unembed(self.spec, params, at.states)
            logps = self.read_logps(logits, at, batch)
            loss, d = losses.ppo_clip(logps, old, batch.advantages[:, window], clip_eps=hyper["clip_eps"])
            if c.max_weight is not None:
                loss *= importance.token_weights(old, batch.logps[:, window], high=c.max_weight)
            if c.entropy_coef:
                bonus, _ = losses.entropy_bonus(entropy(logits, temperature=c.sampling.temperature))
                loss += hyper["entropy_coef"] * at.in_rows(bonus, prompt=c.prompt_length)
            metrics = {
                "policy_clipped": masking.token_mean(d["clipped"], mask),
                "approx_kl": masking.token_mean(kl.k3(old, logps), mask),
            }
            if isinstance(c.critic, SharedTrunk):
                values = at.in_rows(models.read_head(params, at.states), prompt=c.prompt_length)
                value_loss, value_metrics = self.value_loss(values, batch, hyper)
                loss += hyper["value_coef"] * value_loss
                metrics |= value_metrics | {"value_loss": self.reduce(value_loss, mask)}
            total, balance = with_load_balance(self.spec, self.reduce(loss, mask), at.routing, at.mask)
            return total, metrics | balance

        return loss_fn

    def critic_loss(self) -> LossFn:
        """That of a critic of its own."""
        window = slice(self.config.prompt_length, None)

        def loss_fn(params: Params, batch: Rollout, hyper: Hyper, key: Key) -> tuple[Mean, dict[str, Mean]]:
            del key
            at = self.reading(params["trunk"], batch)
            values = at.in_rows(models.read_head(params, at.states), prompt=self.config.prompt_length)
            loss, metrics = self.value_loss(values, batch, hyper)
            return self.reduce(loss, batch.completion_mask[:, window]), metrics

        return loss_fn

    def value_loss(
        self, values: Float[Array, "b n"], batch: Rollout, hyper: Hyper
    ) -> tuple[Float[Array, "b n"], dict[str, Mean]]:
        """Half the squared error of the values, clipped."""
        window = slice(self.config.prompt_length, None)
        clip_eps = None if self.config.value_clip is None else hyper["value_clip"]
        loss, d = losses.clipped_value(values, batch.values[:, window], batch.returns[:, window], clip_eps=clip_eps)
        return loss, {"value_clipped": masking.token_mean(d["clipped"], batch.completion_mask[:, window])}


def train(config: Config, context: Context, name: str) -> dict[str, Any]:
    """Train the policy; the figures are for summary.json."""
    return onpolicy.train(config, context, name, Algorithm, initial_state)


def initial_state(algorithm: Algorithm, context: Context, name: str) -> State:
    """Policy and critic at the start of training, in shards."""
    c, own = algorithm.config, isinstance(algorithm.config.critic, SharedTrunk)
    hyper = {"clip_eps": c.clip_eps, "entropy_coef": c.entropy_coef}
    if isinstance(c.critic, SharedTrunk):
        hyper |= {"value_clip": c.value_clip or 0.0, "value_coef": c.critic.value_coef}
    policy = policy_state(algorithm, context, name, hyper, head=onpolicy.zero_head(context.spec) if own else None)
    length = c.prompt_length + c.completion_tokens
    return State(
        policy=policy,
        average=None if c.average is None else copied(policy.params),
        critic=None if isinstance(c.critic, SharedTrunk) else critic_state(algorithm, context, name, c.critic),
        kl=context.replicated(c.kl.init()),
        moments=first_moments(c.shaping, context),
        older=None if c.replay is None else replay.empty(c.replay, context, rows=c.batch_size, length=length),
    )


def critic_state(algorithm: Algorithm, context: Context, name: str, critic: str | ValueHead) -> TrainState:
    """A critic of its own at the start of training, in shards."""
    c, boxes = algorithm.config, jax.eval_shape(partial(models.init_with_head, context.spec), jax.random.key(0))
    return sharded_state(
        context.mesh,
        partial(box, boxes=boxes),
        onpolicy.critic_params(context, critic),
        algorithm.critic_optimizer,
        {"learning_rate": c.critic_optimizer.learning_rate, "value_clip": c.value_clip or 0.0},
        context.key(name),
        master=c.critic_optimizer.master,
    )
