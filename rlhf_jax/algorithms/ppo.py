"""PPO with a KL penalty to a frozen reference (Ziegler et al. 2019; Stiennon et al. 2020; Huang et al. 2024).

One iteration, compiled as a whole: sample completions, score them, turn scores and KL into advantages, and take
`epochs` × `minibatches` clipped steps of the policy and of its separate critic. `placement` may part it in phases, and
have completions sampled one iteration ahead: `placement.Disaggregated` says what becomes of the loss then.

Shapes: b rollouts, p prompt tokens, n completion tokens, t = p + n, v vocabulary.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax import guard, importance, kl, losses, masking, models
from rlhf_jax.advantages import gae, token_rewards
from rlhf_jax.algorithms import iterations, onpolicy
from rlhf_jax.algorithms.context import Context, Role, check_positive, named
from rlhf_jax.algorithms.iterations import Behaviour, Frozen
from rlhf_jax.algorithms.onpolicy import OnPolicyConfig, ValueHead
from rlhf_jax.data.prompts import PromptBatch
from rlhf_jax.kl import AdaptiveKL, FixedKL
from rlhf_jax.logprobs import entropy, ratio_deviation, token_logps
from rlhf_jax.models import ModelSpec, lora
from rlhf_jax.models.experts import with_load_balance
from rlhf_jax.models.heads import box
from rlhf_jax.numerics import require
from rlhf_jax.optim import Optimizer
from rlhf_jax.placement import Idle
from rlhf_jax.rewards.ensemble import reward as read_reward
from rlhf_jax.rewards.shaping import Shaping, shape_scores
from rlhf_jax.sampling import ended, generate
from rlhf_jax.train_step import in_parts, keep_if, make_train_step, sharded_state
from rlhf_jax.types import Hyper, Key, LossFn, Mean, Metrics, Params, Rollout, TrainState


@dataclass(frozen=True)
class Config(OnPolicyConfig):
    """PPO on openings of reviews or on rows of prompts, with a reward model or a function of texts."""

    critic: str | ValueHead = "reward_model"
    """What the critic starts from: a reward_model stage, or a policy with a new head."""
    epochs: int = 4
    """Passes over an iteration's rollouts."""
    minibatches: int = 4
    """Optimiser steps a pass."""
    num_microbatches: int = 1
    """Parts that a minibatch's gradient is accumulated over; scoring is done in `minibatches` times as many."""
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=1e-4))
    """The policy's."""
    critic_optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=3e-4))
    """The critic's."""
    kl: FixedKL | AdaptiveKL = field(default_factory=FixedKL)
    """Price of KL to the reference, k1 a token in the reward."""
    shaping: Shaping = field(default_factory=Shaping)
    """Scaling, clipping, EOS penalty and whitening of rewards."""
    gamma: float = 1.0
    """Discount a token."""
    lam: float = 0.95
    """λ of generalised advantage estimation."""
    whiten_advantages: bool = True
    """Scales an iteration's advantages to mean 0 and variance 1."""
    clip_eps: float = 0.2
    """Clip range of the probability ratio."""
    value_clip: float | None = 0.2
    """Clip range of the value's change; none: no clipping."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    reducer: Literal["token", "sequence"] = "token"
    """Whether each token or each completion weighs the same in the losses."""
    stop_at_kl: float | None = None
    """Ends an iteration's policy updates where the KL to the policy it began with exceeds this, in nats a token."""
    exact_kl_rows: int = 32
    """Completions an iteration whose KL is also summed over the whole vocabulary."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "epochs", "minibatches", "num_microbatches", "exact_kl_rows")
        parts = self.minibatches * self.num_microbatches
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size={self.batch_size} must divide by minibatches × num_microbatches = "
                f"{self.minibatches} × {self.num_microbatches} = {parts}"
            )
        if isinstance(self.kl, AdaptiveKL) and self.batch_size >= 5 * self.kl.horizon:
            raise ValueError(f"kl.horizon={self.kl.horizon} must be over a fifth of batch_size={self.batch_size}")
        if self.exact_kl_rows > self.batch_size:
            raise ValueError(f"exact_kl_rows={self.exact_kl_rows} must be at most batch_size={self.batch_size}")
        for name, interval in (
            ("gamma", "[0, 1]"), ("lam", "[0, 1]"), ("clip_eps", "(0, 1)"), ("value_clip", "(0, inf)"),
            ("entropy_coef", "[0, inf)"), ("stop_at_kl", "(0, inf)"),
        ):  # fmt: skip
            require(name, vars(self)[name], interval)

    def requires(self) -> dict[str, tuple[str, Role]]:
        """Policy, reward model and critic."""
        if isinstance(self.critic, str):
            return super().requires() | named("reward", critic=self.critic)
        return super().requires() | named("policy", **{"critic.trunk": self.critic.trunk})

    def batch_sizes(self) -> dict[str, int]:
        """A microbatch of a minibatch."""
        parts = self.minibatches * self.num_microbatches
        return {"batch_size / (minibatches × num_microbatches)": self.batch_size // parts}

    @property
    def idle_roles(self) -> tuple[Idle, ...]:
        """The critic too."""
        return (*super().idle_roles, "critic")

    @property
    def updates(self) -> int:
        """Optimiser steps of the whole stage."""
        return self.steps * self.epochs * self.minibatches


class State(flax.struct.PyTreeNode):
    """All that changes: policy, critic, KL controller."""

    policy: TrainState
    critic: TrainState
    kl: kl.KLState


class Algorithm:
    """PPO's steps as functions of (state, frozen, prompts); the config fixes shapes and choices."""

    def __init__(self, config: Config, spec: ModelSpec, *, eos_id: int, pad_id: int) -> None:
        self.config, self.spec, self.eos_id, self.pad_id = config, spec, eos_id, pad_id
        self.policy_optimizer = config.optimizer.make(config.updates)
        self.critic_optimizer = config.critic_optimizer.make(config.updates)
        make = partial(make_train_step, num_microbatches=config.num_microbatches)
        self.policy_step = make(self.policy_loss(), self.policy_optimizer)
        self.critic_step = make(self.critic_loss(), self.critic_optimizer)

    def iteration(self, state: State, frozen: Frozen, prompts: PromptBatch) -> tuple[State, Metrics, Rollout]:
        """Sample, score, estimate advantages, update."""
        with jax.named_scope("sample"):
            rollout = self.sample(iterations.behaviour(state.policy), frozen, prompts)
        return self.learn(state, frozen, rollout)

    def sample(self, behaviour: Behaviour, frozen: Frozen, prompts: PromptBatch) -> Rollout:
        """A completion for each prompt."""
        rollout = generate(
            self.spec,
            frozen.policy(behaviour.params),
            prompts.tokens,
            prompts.mask,
            jax.random.fold_in(behaviour.key, 0),
            max_new_tokens=self.config.completion_tokens,
            sampling=self.config.sampling,
            eos_id=self.eos_id,
            pad_id=self.pad_id,
        )
        return rollout.replace(written_at=jnp.full(len(prompts.tokens), behaviour.step))

    def learn(self, state: State, frozen: Frozen, rollout: Rollout) -> tuple[State, Metrics, Rollout]:
        """Score what this policy has written, estimate advantages, update."""
        with jax.named_scope("score"):
            rollout, metrics = self.score(state.policy.params, frozen, rollout)
        return self.improve(state, frozen, rollout, metrics)

    def improve(
        self, state: State, frozen: Frozen, rollout: Rollout, metrics: Metrics
    ) -> tuple[State, Metrics, Rollout]:
        """Estimate advantages of a scored rollout, update; the scoring's `metrics` stand in those given back."""
        with jax.named_scope("score"):
            rollout, stale_metrics = self.with_values(rollout, state, frozen)
            rollout, reward_metrics = self.with_advantages(rollout, kl_coef=state.kl.coef)
        with jax.named_scope("update"):
            state, update_metrics = self.update(state, frozen, rollout)
        controller = self.config.kl.update(state.kl, metrics["seq_kl"], self.config.batch_size)
        metrics = {**metrics, **stale_metrics, **reward_metrics, **update_metrics}
        return state.replace(kl=controller), metrics, rollout

    def score(self, own: Params, frozen: Frozen, rollout: Rollout) -> tuple[Rollout, Metrics]:
        """Scores, where the reward is a network, log-probs and reference log-probs, and what compares the two policies.

        `own` are the parameters of the policy that wrote the rollout. Its log-probs are read again without a cache, as
        training reads them; `sampling_deviation` says how far the sampler's own were from them.
        """
        c = self.config
        policy, reference, reward = frozen.policy(own), frozen.policy(frozen.reference), frozen.network(frozen.reward)
        is_network = isinstance(c.reward, str)

        def part(rows: Rollout) -> tuple[Any, ...]:
            window, temperature = slice(c.prompt_length, None), c.sampling.temperature
            mask = rows.completion_mask[:, window]
            logits = self.completion_logits(policy, rows)
            ref_logits = self.completion_logits(reference, rows)
            return (
                *(self.kept_logps(x, rows) for x in (logits, ref_logits)),
                masking.keep(entropy(logits, temperature=temperature), mask),
                masking.keep(kl.exact(logits / temperature, ref_logits / temperature), mask),
                read_reward(self.spec, reward, frozen.ensemble, rows.tokens, rows.mask)
                if is_network
                else {"score": rows.scores},
            )

        logps, ref_logps, entropies, exact, readings = in_parts(part, rollout, c.minibatches * c.num_microbatches)
        sampled_logps, scores = rollout.logps, readings.pop("score")
        rollout = rollout.replace(logps=self.padded(logps), ref_logps=self.padded(ref_logps), scores=scores)
        mask = rollout.completion_mask
        k1 = masking.keep(kl.k1(rollout.logps, rollout.ref_logps), mask)
        kept = mask[:, c.prompt_length :]
        metrics = {
            "score": scores.mean(),
            **{name: reading.mean() for name, reading in readings.items()},  # an ensemble's uncertainty
            "kl": masking.masked_mean(k1, mask),
            "seq_kl": k1.sum(-1).mean(),
            "seq_kl_exact": exact[: c.exact_kl_rows].sum(-1).mean(),
            "entropy": masking.masked_mean(entropies, kept),
            "sampling_deviation": ratio_deviation(rollout.logps, sampled_logps),
            "length": mask.sum(-1).mean(dtype=jnp.float32),
            "no_eos": jnp.mean(~ended(rollout, self.eos_id), dtype=jnp.float32),
        }
        return rollout, metrics

    def with_values(self, rollout: Rollout, state: State, frozen: Frozen) -> tuple[Rollout, Metrics]:
        """The critic's values; of a rollout made ahead also this policy's log-probs, and how far it has moved on."""
        c, bound = self.config, self.config.max_weight
        policy, critic = frozen.policy(state.policy.params), frozen.network(state.critic.params)

        def part(rows: Rollout) -> tuple[Array, Array | None]:
            values = models.values(self.spec, critic, rows.tokens, rows.mask)[:, c.prompt_length :]
            logps = self.kept_logps(self.completion_logits(policy, rows), rows) if bound is not None else None
            return masking.keep(values, rows.completion_mask[:, c.prompt_length :]), logps

        values, logps = in_parts(part, rollout, c.minibatches * c.num_microbatches)
        rollout = rollout.replace(values=self.padded(values))
        if bound is None:
            return rollout, {}
        rollout, mask = rollout.replace(old_logps=self.padded(logps)), rollout.completion_mask
        cut = jnp.exp(rollout.old_logps - rollout.logps) > bound
        return rollout, {
            "staleness": jnp.mean(state.policy.step - rollout.written_at, dtype=jnp.float32),
            "stale_kl": masking.masked_mean(kl.k3(rollout.logps, rollout.old_logps), mask),
            "weights_cut": masking.masked_mean(cut.astype(jnp.float32), mask),
        }

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
        c = self.config
        key = jax.random.fold_in(state.policy.step_key(), 1)
        orders = jax.vmap(lambda epoch: jax.random.permutation(jax.random.fold_in(key, epoch), c.batch_size))
        rows = orders(jnp.arange(c.epochs)).reshape(c.epochs * c.minibatches, -1)

        def step(carry: tuple[State, Bool[Array, ""]], rows: Int[Array, " m"]) -> tuple[Any, tuple[Metrics, Metrics]]:
            state, stopped = carry
            batch = jax.tree.map(lambda x: x[rows], rollout)
            policy, policy_metrics = self.policy_step(state.policy, batch, frozen.base)
            if c.stop_at_kl is not None:
                stopped |= policy_metrics["approx_kl"] > c.stop_at_kl  # went too far already: this step is not taken
                policy = keep_if(stopped, state.policy, policy)
            critic, critic_metrics = self.critic_step(state.critic, batch, frozen.head_base)
            policy_metrics["stopped"] = stopped.astype(jnp.float32)
            return (state.replace(policy=policy, critic=critic), stopped), (policy_metrics, critic_metrics)

        first = jax.tree.map(lambda x: x[rows[0]], rollout)
        logits = self.completion_logits(frozen.policy(state.policy.params), first)
        deviation = ratio_deviation(self.kept_logps(logits, first), old_logps(first)[:, c.prompt_length :])
        (state, _), (policy, critic) = jax.lax.scan(step, (state, jnp.zeros((), bool)), rows)
        policy, critic = guard.over_steps(policy), guard.over_steps(critic)
        return state, {
            "ratio_deviation": deviation,
            "policy_loss": policy["loss"],
            "value_loss": critic["loss"],
            "policy_clipped": policy["policy_clipped"],
            "value_clipped": critic["value_clipped"],
            "approx_kl": policy["approx_kl"],
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
            states, routing = models.hidden_and_routing(self.spec, params, batch.tokens, batch.mask)
            logits = models.unembed(self.spec, params, states[:, c.prompt_length - 1 : -1])
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
            total, balance = with_load_balance(self.spec, masking.REDUCERS[c.reducer](loss, mask), routing, batch.mask)
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
            return masking.REDUCERS[c.reducer](loss, mask), {"value_clipped": masking.token_mean(d["clipped"], mask)}

        return loss_fn

    def padded(self, x: Float[Array, "b n"]) -> Float[Array, "b t"]:
        """Zeros in place of the prompt."""
        return jnp.pad(x, ((0, 0), (self.config.prompt_length, 0)))

    def kept_logps(self, logits: Float[Array, "b n v"], rollout: Rollout) -> Float[Array, "b n"]:
        """Of the completion's tokens at the sampling temperature, 0 elsewhere."""
        window = slice(self.config.prompt_length, None)
        logps = token_logps(logits, rollout.tokens[:, window], temperature=self.config.sampling.temperature)
        return masking.keep(logps, rollout.completion_mask[:, window])

    def completion_logits(self, params: Params, rollout: Rollout) -> Float[Array, "b n v"]:
        """Logits that predict the completion's tokens; prompts never reach the vocabulary."""
        states = models.hidden(self.spec, params, rollout.tokens, rollout.mask)
        return models.unembed(self.spec, params, states[:, self.config.prompt_length - 1 : -1])


def old_logps(rollout: Rollout) -> Float[Array, "b t"]:
    """Of the policy that an update starts from: the one that wrote the rollout, or, made ahead of it, an older one."""
    return rollout.logps if rollout.old_logps is None else rollout.old_logps


def train(config: Config, context: Context, name: str) -> dict[str, Any]:
    """Train the policy; the figures are for summary.json."""
    algorithm = Algorithm(config, context.spec, eos_id=context.tokenizer.eos_id, pad_id=context.tokenizer.pad_id)
    places = iterations.places(config.placement, context)
    return onpolicy.train(algorithm, initial_state(algorithm, places.training, name), context, places, name)


def initial_state(algorithm: Algorithm, context: Context, name: str) -> State:
    """Policy and critic at the start of training, in shards."""
    c, spec = algorithm.config, context.spec
    policy_boxes = lora.own(spec, jax.eval_shape(partial(models.init, spec), jax.random.key(0)))
    critic_boxes = jax.eval_shape(partial(models.init_with_head, spec), jax.random.key(0))
    policy_hyper = {"learning_rate": c.optimizer.learning_rate, "clip_eps": c.clip_eps, "entropy_coef": c.entropy_coef}
    critic_hyper = {"learning_rate": c.critic_optimizer.learning_rate, "value_clip": c.value_clip or 0.0}
    make = partial(sharded_state, context.mesh, key=context.key(name))
    return State(
        policy=make(
            partial(box, boxes=policy_boxes),
            context.policy_params(c.policy),
            algorithm.policy_optimizer,
            policy_hyper,
            master=c.optimizer.master,
        ),
        critic=make(
            partial(box, boxes=critic_boxes),
            onpolicy.critic_params(context, c.critic),
            algorithm.critic_optimizer,
            critic_hyper,
            master=c.critic_optimizer.master,
        ),
        kl=context.replicated(c.kl.init()),
    )
