"""On-policy methods without a critic: one iteration, and what they differ in as fields (policy_methods.py has names).

One iteration: sample `group_size` completions of each prompt, score them, compare each with its baseline, and take
`epochs` × `minibatches` steps. `ppo` is the method with a critic; both are `policy_gradient.PolicyGradient`.

Shapes: b rollouts, k completions of a prompt, p prompt tokens, n completion tokens, t = p + n, v vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax import advantages, importance, kl, losses, masking, models
from rlhf_jax.algorithms import critic_free, onpolicy, trust_region
from rlhf_jax.algorithms.context import Context, check_positive
from rlhf_jax.algorithms.critic_free import CriticFree
from rlhf_jax.algorithms.iterations import Behaviour, Frozen
from rlhf_jax.algorithms.policy_gradient import (
    PolicyGradientConfig,
    loss_mask,
    old_logps,
    row_mean,
)
from rlhf_jax.algorithms.policy_losses import CLIPS, LOSSES, OF_COMPLETIONS, Loss, Taken
from rlhf_jax.algorithms.policy_state import PolicyState
from rlhf_jax.algorithms.trust_region import TrustRegion
from rlhf_jax.data.prompts import PromptBatch
from rlhf_jax.kl import AdaptiveKL, FixedKL
from rlhf_jax.logprobs import entropy
from rlhf_jax.masking import token_mean
from rlhf_jax.models.experts import with_load_balance
from rlhf_jax.normalizer import Moments
from rlhf_jax.numerics import require
from rlhf_jax.placement import Colocated
from rlhf_jax.rewards.shaping import OverlongPenalty, overlong_penalties
from rlhf_jax.sampling import ended
from rlhf_jax.types import Hyper, Key, LossFn, Mean, Metrics, Params, Rollout

Baseline = Literal["none", "batch", "group", "leave_one_out", "greedy"]
ESTIMATORS = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3}


@dataclass(frozen=True)
class Config(PolicyGradientConfig):
    """A method without a critic, on openings of reviews or rows of prompts; the defaults are GRPO's."""

    group_size: int = 8
    """Completions of each prompt; `batch_size` counts completions."""
    loss: Loss = "ppo_clip"
    """What of losses.policy is minimised."""
    clip_eps: float | None = 0.2
    """How far the ratio (of a token, of a completion in gspo; its log in gmpo) may fall; none: as far as it likes."""
    clip_eps_high: float | None = None
    """How far it may rise; none: as `clip_eps`."""
    baseline: Baseline = "group"
    """What is taken off a score: nothing, the mean of the iteration's others (batch), of its prompt's completions, of
    the others of them (leave_one_out), or the score of a greedy completion, which is the first of each group."""
    scale: Literal["none", "group", "batch"] = "group"
    """What divides advantages: the standard deviation of a prompt's scores, or that of all tokens (whitening)."""
    credit: Literal["completion", "token"] = "completion"
    """Whether KL in the reward counts for the whole completion, or for the tokens up to it."""
    kl_in: Literal["reward", "loss"] = "loss"
    """Where the price of KL is paid."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """In the reward only k1 is exact; in the loss k2's gradient is, k3's is that of the other direction's KL."""
    reducer: Literal["token", "sequence", "fixed", "sum"] = "sequence"
    """The loss's mean: over tokens; over completions of the mean, of the sum divided by `completion_tokens`, or of the
    sum over their tokens."""
    dynamic_sampling: int = 0
    """How often, at most, groups of equal scores are replaced by those of further prompts; where it is not 0, groups
    that are equal in the end are not learnt from (Yu et al. 2025)."""
    overlong: OverlongPenalty | None = None
    """What the last tokens before the limit cost."""
    learn_unfinished: bool = True
    """Whether completions that did not end are learnt from (False: overlong filtering, Yu et al. 2025)."""
    trust_region: TrustRegion | None = None
    """TRPO's natural-gradient step in place of the optimiser's, one an iteration."""
    kl: FixedKL | AdaptiveKL = field(default_factory=lambda: FixedKL(0.04))
    """Price of KL to the reference."""
    epochs: int = 1
    """Passes over an iteration's rollouts."""
    minibatches: int = 1
    """Optimiser steps a pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "group_size")
        require("dynamic_sampling", self.dynamic_sampling, "[0, inf)")
        for name, interval in zip(("clip_eps", "clip_eps_high"), CLIPS[self.loss], strict=True):
            value = vars(self)[name]
            if interval is None and value is not None:
                raise ValueError(f"{name}={value}: loss={self.loss!r} has no such range: None")
            require(name, value, interval or "(0, inf)")
        for wrong, text in (*self._of_groups(), *self._of_loss(), *self._of_others()):
            if wrong:
                raise ValueError(text)
        if self.packing is not None and self.loss == "p3o":
            self.packing.check(self.prompt_length, self.completion_tokens, together=2)

    def _of_groups(self) -> list[tuple[bool, str]]:
        """What may not stand together, and how it is told."""
        k, loss = self.group_size, self.loss
        compares = self.baseline in ("group", "leave_one_out", "greedy") or self.scale == "group" or loss == "p3o"
        by = "loss='p3o'" if loss == "p3o" else f"baseline={self.baseline!r}, scale={self.scale!r}"
        unit = 2 if loss == "p3o" else 1
        return [
            (compares and k < 2, f"group_size={k}: {by} compares completions of one prompt: at least 2"),
            (self.baseline == "batch" and self.batch_size < 2, "baseline='batch' needs a batch_size of at least 2"),
            (bool(self.batch_size % k), f"batch_size={self.batch_size} must divide by group_size={k}"),
            (loss == "p3o" and k % 2 > 0, f"group_size={k} must be even for loss='p3o', which learns from pairs"),
            (
                self.batch_size % (unit * self.parts) > 0,
                f"batch_size={self.batch_size} must divide by 2 × minibatches × num_microbatches = {2 * self.parts}",
            ),
            (
                loss == "p3o" and (self.baseline, self.scale) != ("none", "none"),
                "loss='p3o' compares scores itself: baseline and scale must be 'none'",
            ),
            (
                self.scale == "group" and self.baseline != "group",
                f"scale='group' goes with baseline='group', not {self.baseline!r}",
            ),
        ]

    def _of_loss(self) -> list[tuple[bool, str]]:
        loss = self.loss
        return [
            (
                loss in OF_COMPLETIONS and (self.reducer, self.credit) != ("sequence", "completion"),
                f"loss={loss!r} is one of whole completions: reducer='sequence' and credit='completion'",
            ),
            (
                loss == "cispo" and self.clip_eps_high is None,
                "clip_eps_high=None: loss='cispo' needs the weight's upper range",
            ),
            (
                self.clip_eps is None and loss in ("ppo_clip", "gspo", "gmpo", "p3o"),
                f"clip_eps=None: loss={loss!r} needs a range",
            ),
            (
                self.kl_in == "loss" and self.kl_estimator == "k1" and self.kl.coef > 0,
                "kl_estimator='k1' in the loss has an expected gradient of 0; take k2 or k3, or kl_in='reward'",
            ),
            (
                self.gamma != 1 and self.credit == "completion",
                f"gamma={self.gamma} is of rewards a token: credit='token', or 1 with credit='completion'",
            ),
            (
                loss == "p3o" and not self.learn_unfinished,
                "learn_unfinished=False: loss='p3o' learns from pairs, of which one half may not have ended: True",
            ),
        ]

    def _of_others(self) -> list[tuple[bool, str]]:
        limit, region = self.completion_tokens, self.trust_region is not None
        return [
            (
                region and (self.loss, self.epochs, self.minibatches) != ("surrogate", 1, 1),
                "trust_region takes one step by all completions: loss='surrogate', epochs=1 and minibatches=1",
            ),
            (
                self.trust_region is not None and self.batch_size % self.trust_region.fisher_every > 0,
                f"batch_size={self.batch_size} must divide by trust_region.fisher_every",
            ),
            (
                not self.learn_unfinished and not self.sampling.ends,
                "learn_unfinished=False learns from completions that end, which sampling.ends=False does not let them",
            ),
            (region and self.stop_at_kl is not None, "stop_at_kl is no part of trust_region's step, which has max_kl"),
            (region and self.ptx is not None, "ptx is no part of trust_region's step"),
            (region and self.packing is not None, "packing is no part of trust_region's step"),
            (region and self.ewc is not None, "ewc is no part of trust_region's step"),
            (
                region and (self.optimizer.master, self.optimizer.bad_steps) != ("float32", "stop"),
                "trust_region takes no optimiser's step: optimizer.master='float32' and bad_steps='stop'",
            ),
            (
                self.overlong is not None and self.overlong.buffer > limit,
                f"overlong.buffer must be at most completion_tokens={limit}",
            ),
            (
                self.dynamic_sampling > 0 and (self.group_size < 2 or isinstance(self.reward, str)),
                "dynamic_sampling replaces groups of equal scores: it needs group_size of at least 2 and a reward "
                "that is a function of texts, for a network's scores differ",
            ),
            (
                self.dynamic_sampling > 0 and self.network is not None,
                "network: a network's scores differ, and dynamic_sampling replaces groups of equal scores",
            ),
            (
                self.dynamic_sampling > 0 and self.placement != Colocated(),
                "dynamic_sampling needs placement=Colocated() without offload",
            ),
            (
                self.shaping.normalize != "none" and self.scale != "none" and not self._weighs_scores,
                f"shaping.normalize={self.shaping.normalize!r}: scale={self.scale!r} divides by the spread of scores "
                "anyway, and nothing stands beside them (KL in the reward, a clip, a penalty): 'none'",
            ),
            (
                self.shaping.whiten,
                "shaping.whiten is PPO's, of token rewards; here scale='batch' whitens advantages",
            ),
        ]

    @property
    def _weighs_scores(self) -> bool:
        """Whether something that has a unit of its own is added to scores or put in their place."""
        priced = self.kl_in == "reward" and self.kl.coef > 0
        return priced or self.shaping.sets_numbers or self.overlong is not None or self.truncate is not None

    @property
    def copies(self) -> int:
        """A group's."""
        return self.group_size

    def batch_sizes(self) -> dict[str, int]:
        """The rows of TRPO's matrix, too."""
        region = self.trust_region
        if region is None:
            return super().batch_sizes()
        rows = self.batch_size // region.fisher_every // region.fisher_parts(self.batch_size, self.parts)
        return super().batch_sizes() | {"batch_size / trust_region.fisher_every": rows}

    @property
    def redraws(self) -> int:
        """Those of dynamic sampling."""
        return self.dynamic_sampling

    def notes(self) -> list[str]:
        """What is biased."""
        biased = {
            (
                "loss",
                "k3",
            ): "k3 in the loss has the gradient of KL(reference‖policy) instead: biased",
            ("reward", "k2"): "k2 in the reward is not KL(policy‖reference) in its mean: biased",
            ("reward", "k3"): "k3 in the reward has the mean of KL(policy‖reference), but not its gradient: biased",
        }
        at, steps = (self.kl_in, self.kl_estimator), self.epochs * self.minibatches
        notes = [text for where, text in biased.items() if where == at and self.kl.coef > 0]
        if self.loss == "reinforce" and steps > 1:
            notes.append(
                f"loss='reinforce' has no ratio, and of {steps} steps an iteration (epochs × minibatches) all but the "
                f"first are by completions of a policy before theirs: biased"
            )
        return super().notes() + notes


class Algorithm(CriticFree):
    """The methods' steps as functions of (state, frozen, prompts)."""

    @property
    def together(self) -> int:
        """Two of P3O, which is of pairs; else each is alone."""
        return 2 if self.config.loss == "p3o" else 1

    def sample(self, behaviour: Behaviour, frozen: Frozen, prompts: PromptBatch) -> Rollout:
        """`group_size` completions of each prompt, beside each other, the first greedy if the baseline is."""
        rows = jnp.arange(self.config.batch_size)
        greedy = rows % self.config.group_size == 0 if self.config.baseline == "greedy" else None
        rollout = super().sample(behaviour, frozen, prompts, greedy=greedy)
        return rollout.replace(group_ids=rows // self.config.group_size, used=None if greedy is None else ~greedy)

    def with_advantages(
        self, rollout: Rollout, *, kl_coef: Array, moments: Moments | None = None
    ) -> tuple[Rollout, Metrics]:
        """Rewards a token, from these advantages, and which completions are learnt from."""
        c, mask = self.config, rollout.completion_mask
        has_ended, shaped = ended(rollout, self.eos_id), self.shaped(rollout, moments)
        if c.overlong is not None:
            shaped += overlong_penalties(mask.sum(-1), c.overlong, limit=c.completion_tokens)
        groups = rollout.scores.reshape(-1, c.group_size)  # before the overlong penalty, as dynamic sampling reads them
        equal = jnp.repeat(groups.max(-1) == groups.min(-1), c.group_size)
        drawn = jnp.ones_like(equal) if rollout.used is None else rollout.used
        used = drawn if c.learn_unfinished else drawn & has_ended
        used = used & ~equal if c.dynamic_sampling else used
        paid = masking.keep(ESTIMATORS[c.kl_estimator](rollout.logps, rollout.ref_logps), mask)
        in_reward = kl_coef if c.kl_in == "reward" else 0.0
        rewards = advantages.token_rewards(shaped, paid, mask, kl_coef=in_reward)
        metrics = {"reward": row_mean(rewards.sum(-1), drawn), "kl_coef": kl_coef}
        if c.group_size > 1:
            metrics["equal_groups"] = equal.mean(dtype=jnp.float32)
        if c.credit == "completion":
            each = self.compared(rewards.sum(-1))
            estimates = masking.keep(jnp.broadcast_to(each[:, None], mask.shape), mask)
        else:
            to_come = advantages.token_rewards(self.compared(shaped), paid, mask, kl_coef=in_reward)
            estimates, _ = advantages.gae(to_come, jnp.zeros_like(rewards), mask, gamma=c.gamma, lam=1.0)
        if c.scale == "batch":
            estimates = masking.whiten(estimates, mask & used[:, None])
        return rollout.replace(rewards=rewards, advantages=estimates, used=used), metrics

    def compared(self, scores: Float[Array, " b"]) -> Float[Array, " b"]:
        """Scores against their baseline, over their group's spread where that is asked."""
        c, groups = self.config, scores.reshape(-1, self.config.group_size)
        if c.scale == "group":
            return advantages.group_normalized(groups).reshape(-1)
        made = {
            "none": lambda: groups,
            "batch": lambda: advantages.leave_one_out(scores),
            "group": lambda: advantages.group_centered(groups),
            "leave_one_out": lambda: advantages.leave_one_out(groups),
            "greedy": lambda: advantages.remax(groups, jnp.broadcast_to(groups[:, :1], groups.shape)),
        }
        return made[c.baseline]().reshape(-1)

    def units(self, rollout: Rollout) -> Rollout:
        """Completions, or for P3O pairs of them."""
        if self.together == 1:
            return rollout
        return jax.tree.map(lambda x: x.reshape(-1, self.together, *x.shape[1:]), rollout)

    def update(self, state: PolicyState, frozen: Frozen, rollout: Rollout) -> tuple[PolicyState, Metrics]:
        """`epochs` × `minibatches` steps, or the one of a trust region."""
        region = self.config.trust_region
        if region is None:
            return super().update(state, frozen, rollout)
        rows = self.minibatch_rows(jax.random.fold_in(state.policy.step_key(), 1))
        start, deviation = self.beginning(state, frozen, rollout, rows[0])
        policy, metrics = trust_region.update(self, region, start, frozen, rollout)
        return state.replace(policy=policy), {"ratio_deviation": deviation, **metrics}

    def policy_loss(self) -> LossFn:
        """The method's loss, with KL and the entropy bonus where they have a weight in it."""
        c, window = self.config, slice(self.config.prompt_length, None)

        def loss_fn(params: Params, batch: Rollout, hyper: Hyper, key: Key) -> tuple[Mean, dict[str, Mean]]:
            del key
            if self.together > 1:
                batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
            mask, old = loss_mask(batch)[:, window], old_logps(batch)[:, window]
            at = self.reading(params, batch)
            logits = models.unembed(self.spec, params, at.states)
            logps = self.read_logps(logits, at, batch)
            taken = Taken(logps, old, batch.advantages[:, window], batch.rewards.sum(-1), mask)
            low, high = (None if vars(c)[name] is None else hyper[name] for name in ("clip_eps", "clip_eps_high"))
            loss, clipped = LOSSES[c.loss](taken, low, high)
            if c.max_weight is not None and c.loss in OF_COMPLETIONS:
                whole = (x.reshape(-1, self.together * x.shape[1]) for x in (old, batch.logps[:, window], mask))
                weights = importance.sequence_weights(*whole, high=c.max_weight)  # of what has one ratio
                loss *= jnp.repeat(weights, self.together)[:, None]
            elif c.max_weight is not None:
                loss *= importance.token_weights(old, batch.logps[:, window], high=c.max_weight)
            if c.kl_in == "loss":
                loss += hyper["kl_coef"] * ESTIMATORS[c.kl_estimator](logps, batch.ref_logps[:, window])
            if c.entropy_coef:
                bonus, _ = losses.entropy_bonus(entropy(logits, temperature=c.sampling.temperature))
                loss += hyper["entropy_coef"] * at.in_rows(bonus, prompt=c.prompt_length)
            metrics = {"policy_clipped": token_mean(clipped, mask), "approx_kl": token_mean(kl.k3(old, logps), mask)}
            total, balance = with_load_balance(self.spec, self.reduce(loss, mask), at.routing, at.mask)
            return total, metrics | balance

        return loss_fn


def train(config: Config, context: Context, name: str) -> dict[str, Any]:
    """Train the policy; the figures are for summary.json."""
    return onpolicy.train(config, context, name, Algorithm, initial_state)


def initial_state(algorithm: Algorithm, context: Context, name: str) -> PolicyState:
    """The policy at the start of training, in shards."""
    c = algorithm.config
    hyper = {"clip_eps": c.clip_eps or 0.0, "clip_eps_high": c.clip_eps_high or 0.0, "entropy_coef": c.entropy_coef}
    return critic_free.initial_state(algorithm, context, name, hyper)
