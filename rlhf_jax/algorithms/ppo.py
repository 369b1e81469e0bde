"""PPO with a KL penalty to a frozen reference (Ziegler et al. 2019; Stiennon et al. 2020; Huang et al. 2024).

One iteration, compiled as a whole: sample completions, score them, turn scores and KL into advantages, and take
`epochs` × `minibatches` clipped steps of the policy and of its separate critic. `placement` may part it in phases, and
have completions sampled one iteration ahead: `placement.Disaggregated` says what becomes of the loss then.

Shapes: b rollouts, p prompt tokens, n completion tokens, t = p + n, v vocabulary.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from rlhf_jax import guard, importance, kl, losses, masking, models
from rlhf_jax.advantages import gae, token_rewards
from rlhf_jax.algorithms import iterations, onpolicy
from rlhf_jax.algorithms.context import Context, Role, named
from rlhf_jax.algorithms.iterations import Frozen
from rlhf_jax.algorithms.onpolicy import ValueHead
from rlhf_jax.algorithms.policy_gradient import PolicyGradient, PolicyGradientConfig, old_logps
from rlhf_jax.algorithms.policy_state import PolicyState, averaged, copied, policy_state
from rlhf_jax.logprobs import entropy
from rlhf_jax.models import ModelSpec
from rlhf_jax.models.experts import with_load_balance
from rlhf_jax.models.heads import box
from rlhf_jax.numerics import require
from rlhf_jax.optim import Optimizer
from rlhf_jax.placement import Idle
from rlhf_jax.rewards.shaping import shape_scores
from rlhf_jax.sampling import ended
from rlhf_jax.train_step import in_parts, make_train_step, sharded_state
from rlhf_jax.types import Hyper, Key, LossFn, Mean, Metrics, Params, Rollout, TrainState


@dataclass(frozen=True)
class Config(PolicyGradientConfig):
    """PPO on openings of reviews or on rows of prompts, with a reward model or a function of texts."""

    critic: str | ValueHead = "reward_model"
    """What the critic starts from: a reward_model stage, or a policy with a new head."""
    critic_optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=3e-4))
    """The critic's."""
    lam: float = 0.95
    """λ of generalised advantage estimation."""
    whiten_advantages: bool = True
    """Scales an iteration's advantages to mean 0 and variance 1."""
    clip_eps: float = 0.2
    """Clip range of the probability ratio."""
    value_clip: float | None = 0.2
    """Clip range of the value's change; none: no clipping."""
    reducer: Literal["token", "sequence"] = "token"
    """Whether each token or each completion weighs the same in the losses."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, interval in (("lam", "[0, 1]"), ("clip_eps", "(0, 1)"), ("value_clip", "(0, inf)")):
            require(name, vars(self)[name], interval)

    def requires(self) -> dict[str, tuple[str, Role]]:
        """Policy, reward model and critic."""
        if isinstance(self.critic, str):
            return super().requires() | named("reward", critic=self.critic)
        return super().requires() | named("policy", **{"critic.trunk": self.critic.trunk})

    @property
    def idle_roles(self) -> tuple[Idle, ...]:
        """The critic too."""
        return (*super().idle_roles, "critic")


class State(PolicyState):
    """The critic too."""

    critic: TrainState


class Algorithm(PolicyGradient):
    """PPO's steps as functions of (state, frozen, prompts)."""

    def __init__(self, config: Config, spec: ModelSpec, *, eos_id: int, pad_id: int) -> None:
        super().__init__(config, spec, eos_id=eos_id, pad_id=pad_id)
        self.critic_optimizer = config.critic_optimizer.make(config.updates)
        self.critic_step = make_train_step(
            self.critic_loss(), self.critic_optimizer, num_microbatches=config.num_microbatches
        )

    def improve(
        self, state: State, frozen: Frozen, rollout: Rollout, metrics: Metrics
    ) -> tuple[State, Metrics, Rollout]:
        """Estimate advantages of a scored rollout, update; the scoring's `metrics` stand in those given back."""
        with jax.named_scope("score"):
            rollout, stale_metrics = self.with_old_logps(self.with_values(rollout, state, frozen), state, frozen)
            rollout, reward_metrics = self.with_advantages(rollout, kl_coef=state.kl.coef)
        with jax.named_scope("update"):
            state, update_metrics = self.update(state, frozen, rollout)
        controller = self.config.kl.update(state.kl, metrics["seq_kl"], self.config.batch_size)
        metrics = {**metrics, **stale_metrics, **reward_metrics, **update_metrics}
        average = averaged(state.average, state.policy, self.config.average)
        return state.replace(kl=controller, average=average), metrics, rollout

    def with_values(self, rollout: Rollout, state: State, frozen: Frozen) -> Rollout:
        """The critic's values."""
        c, critic = self.config, frozen.network(state.critic.params)

        def part(rows: Rollout) -> Array:
            values = models.values(self.spec, critic, rows.tokens, rows.mask)[:, c.prompt_length :]
            return masking.keep(values, rows.completion_mask[:, c.prompt_length :])

        return rollout.replace(values=self.padded(in_parts(part, rollout, c.parts)))

    def with_advantages(self, rollout: Rollout, *, kl_coef: Array) -> tuple[Rollout, Metrics]:
        """Rewards a token, and from these advantages and returns."""
        c, mask = self.config, rollout.completion_mask
        shaped = shape_scores(rollout.scores, ended(rollout, self.eos_id), c.shaping)
        k1 = masking.keep(kl.k1(rollout.logps, rollout.ref_logps), mask)
        rewards = token_rewards(shaped, k1, mask, kl_coef=kl_coef)
        metrics = {"reward": rewards.sum(-1).mean(), "kl_coef": kl_coef}
        if c.shaping.whiten:
            rewards = masking.whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, rollout.values, mask, gamma=c.gamma, lam=c.lam)
        residual, spread = masking.masked_var(returns - rollout.values, mask), masking.masked_var(returns, mask)
        metrics["explained_variance"] = 1 - residual / jnp.maximum(spread, 1e-8)
        if c.whiten_advantages:
            advantages = masking.whiten(advantages, mask)
        return rollout.replace(rewards=rewards, advantages=advantages, returns=returns), metrics

    def update(self, state: State, frozen: Frozen, rollout: Rollout) -> tuple[State, Metrics]:
        """`epochs` × `minibatches` steps of policy and critic."""
        rows = self.minibatch_rows(jax.random.fold_in(state.policy.step_key(), 1))

        def step(carry: tuple[State, Bool[Array, ""]], rows: Int[Array, " m"]) -> tuple[Any, tuple[Metrics, Metrics]]:
            state, stopped = carry
            batch = jax.tree.map(lambda x: x[rows], rollout)
            policy, stopped, policy_metrics = self.policy_update(state.policy, stopped, batch, frozen)
            critic, critic_metrics = self.critic_step(state.critic, batch, frozen.head_base)
            return (state.replace(policy=policy, critic=critic), stopped), (policy_metrics, critic_metrics)

        deviation = self.deviation(state.policy, frozen, jax.tree.map(lambda x: x[rows[0]], rollout))
        (state, _), (policy, critic) = jax.lax.scan(step, (state, jnp.zeros((), bool)), rows)
        policy, critic = guard.over_steps(policy), guard.over_steps(critic)
        return state, {
            "ratio_deviation": deviation,
            "policy_loss": policy["loss"],
            "value_loss": critic["loss"],
            "policy_clipped": policy["policy_clipped"],
            "value_clipped": critic["value_clipped"],
            **{name: policy[name] for name in ("approx_kl", "ptx_loss") if name in policy},
            "grad_norm": policy["grad_norm"],
            "critic_grad_norm": critic["grad_norm"],
            "skipped_updates": policy["stopped"],
            **guard.together(policy, critic),
        }

    def policy_loss(self) -> LossFn:
        """The clipped surrogate, with the entropy bonus where it has a weight."""
        c, window = self.config, slice(self.config.prompt_length, None)

        def loss_fn(params: Params, batch: Rollout, hyper: Hyper, key: Key) -> tuple[Mean, dict[str, Mean]]:
            del key
            mask, old = batch.completion_mask[:, window], old_logps(batch)[:, window]
            logits, routing = self.logits_and_routing(params, batch)
            logps = self.kept_logps(logits, batch)
            loss, d = losses.ppo_clip(logps, old, batch.advantages[:, window], clip_eps=hyper["clip_eps"])
            if c.max_weight is not None:
                loss *= importance.token_weights(old, batch.logps[:, window], high=c.max_weight)
            if c.entropy_coef:
                bonus, _ = losses.entropy_bonus(entropy(logits, temperature=c.sampling.temperature))
                loss += hyper["entropy_coef"] * bonus
            metrics = {
                "policy_clipped": masking.token_mean(d["clipped"], mask),
                "approx_kl": masking.token_mean(kl.k3(old, logps), mask),
            }
            total, balance = with_load_balance(self.spec, self.reduce(loss, mask), routing, batch.mask)
            return total, metrics | balance

        return loss_fn

    def critic_loss(self) -> LossFn:
        """Half the squared error of the values, clipped."""
        c, window = self.config, slice(self.config.prompt_length, None)

        def loss_fn(params: Params, batch: Rollout, hyper: Hyper, key: Key) -> tuple[Mean, dict[str, Mean]]:
            del key
            mask = batch.completion_mask[:, window]
            values = models.values(self.spec, params, batch.tokens, batch.mask)[:, window]
            clip_eps = None if c.value_clip is None else hyper["value_clip"]
            loss, d = losses.clipped_value(values, batch.values[:, window], batch.returns[:, window], clip_eps=clip_eps)
            return self.reduce(loss, mask), {"value_clipped": masking.token_mean(d["clipped"], mask)}

        return loss_fn


def train(config: Config, context: Context, name: str) -> dict[str, Any]:
    """Train the policy; the figures are for summary.json."""
    algorithm = Algorithm(config, context.spec, eos_id=context.tokenizer.eos_id, pad_id=context.tokenizer.pad_id)
    places = iterations.places(config.placement, context)
    return onpolicy.train(algorithm, initial_state(algorithm, places.training, name), context, places, name)


def initial_state(algorithm: Algorithm, context: Context, name: str) -> State:
    """Policy and critic at the start of training, in shards."""
    c, spec = algorithm.config, context.spec
    critic_boxes = jax.eval_shape(partial(models.init_with_head, spec), jax.random.key(0))
    policy = policy_state(algorithm, context, name, {"clip_eps": c.clip_eps, "entropy_coef": c.entropy_coef})
    return State(
        policy=policy,
        average=None if c.average is None else copied(policy.params),
        critic=sharded_state(
            context.mesh,
            partial(box, boxes=critic_boxes),
            onpolicy.critic_params(context, c.critic),
            algorithm.critic_optimizer,
            {"learning_rate": c.critic_optimizer.learning_rate, "value_clip": c.value_clip or 0.0},
            context.key(name),
            master=c.critic_optimizer.master,
        ),
        kl=context.replicated(c.kl.init()),
    )
