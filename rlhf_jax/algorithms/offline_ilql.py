"""ILQL (Snell et al. 2022): Q and V of completions that are there, learnt without sampling; they perturb a policy.

Heads of Q and of V stand on the policy's own transformer, as in trlx, which learns to predict the completions beside
them. A slow copy of Q's heads is what V learns from, and what decoding reads.

Shapes: b rows, t tokens, h heads of Q, v vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import losses, models
from rlhf_jax.advantages import token_rewards
from rlhf_jax.algorithms.context import Context, check_positive
from rlhf_jax.algorithms.offline_methods import Method, Numbers
from rlhf_jax.algorithms.offline_rows import OfflineBatch, ScoredRow
from rlhf_jax.algorithms.policy_state import copied
from rlhf_jax.algorithms.supervised import SupervisedConfig
from rlhf_jax.errors import UserError
from rlhf_jax.logprobs import token_logps
from rlhf_jax.losses.offline import ilql
from rlhf_jax.masking import keep, token_mean
from rlhf_jax.models import ModelSpec, Perturbed, Policy, lora
from rlhf_jax.models.experts import with_load_balance
from rlhf_jax.models.heads import box
from rlhf_jax.models.perturbed import init_heads, q_values, state_values
from rlhf_jax.numerics import exp_log_ratio, require
from rlhf_jax.train_step import Step, compiled, make_train_step, sharded_state
from rlhf_jax.types import Hyper, Key, LossFn, Mean, Metrics, Params, TrainState

_VARIED = ("gamma", "lam", "tau", "cql_coef", "target_share", "policy_coef", "policy_beta")
"""The fields that steps read in `TrainState.hyper`, where a sweep may vary them."""


@dataclass(frozen=True)
class Ilql(Method):
    """Implicit language Q-learning; rewards are the scores at mean 0 and standard deviation 1, at the last tokens."""

    gamma: float = 1.0
    """Discount a token."""
    lam: float = 0.0
    """λ of the returns that Q learns: 0 is one step of Bellman's equation, as in the paper; 1 the reward itself."""
    tau: float = 0.7
    """Expectile of Q over the data's next tokens that V learns: near 1 it is the best of them."""
    cql_coef: float = 0.1
    """Weight of the conservative term, which holds down Q of tokens that are not in the data."""
    heads: int = 2
    """Heads of Q; the smallest counts."""
    target_share: float = 0.005
    """The part of the way to Q's heads that their slow copy goes at each step."""
    policy_coef: float = 1.0
    """Weight of the plain policy's own cross-entropy on the completions; 0 leaves its output to the heads' gradient."""
    policy_beta: float = 0.0
    """Of that the tokens weigh exp(policy_beta u), u being min Q − V (trlx's `beta`); 0: all the same."""
    beta: float = 4.0
    """Decoding is from log π + β (min Q − V); 0 is the plain policy."""
    curve: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0, 8.0)
    """The β at which the policy is read afterwards, in evaluation.json, beside `beta`."""

    def __post_init__(self) -> None:
        check_positive(self, "heads")
        for name, interval in (
            ("gamma", "[0, 1]"), ("lam", "[0, 1]"), ("tau", "(0, 1)"), ("cql_coef", "[0, inf)"),
            ("target_share", "(0, 1]"), ("policy_coef", "[0, inf)"), ("policy_beta", "[0, inf)"), ("beta", "[0, inf)"),
        ):  # fmt: skip
            require(f"method.{name}", vars(self)[name], interval)
        for beta in self.curve:
            require("method.curve", beta, "[0, inf)")

    def fit(self, rows: Sequence[ScoredRow]) -> Numbers:
        """Scores shifted and scaled as those of the rows to train on have mean 0 and standard deviation 1."""
        scores = np.asarray([row.score for row in rows])
        mean, std = float(scores.mean()), float(scores.std())
        if scores.max() == scores.min():  # their mean may be off by rounding, and they by as much from it
            raise UserError(f"all {len(rows)} rows to train on score {mean:g}, so there is nothing to tell apart")
        return lambda some: (np.asarray([row.score for row in some]) - mean) / std

    def loss(self, spec: ModelSpec, *, balance: bool = True) -> LossFn:
        """Of `whole`."""

        def loss_fn(params: Params, batch: OfflineBatch, hyper: Hyper, key: Key) -> tuple[Mean, dict[str, Mean]]:
            del key
            states, routing = models.hidden_and_routing(spec, params["trunk"], batch.tokens, batch.mask)
            before, actions, mask = states[:, :-1], batch.tokens[:, 1:], batch.loss_mask[:, 1:]
            logps = keep(token_logps(models.unembed(spec, params["trunk"], before), actions), mask)
            values, no_kl = state_values(params["head"]["v"], before), jnp.zeros(mask.shape)
            loss, found = ilql(
                q_values(params["head"]["q"], before),
                q_values(jax.lax.stop_gradient(params["target"]), before),
                values,
                token_rewards(batch.numbers, no_kl, mask, kl_coef=0.0),
                actions,
                mask,
                **{name: hyper[name] for name in ("gamma", "lam", "tau", "cql_coef")},
            )
            weights = exp_log_ratio(hyper["policy_beta"] * jax.lax.stop_gradient(found["advantage"]))
            cloning, _ = losses.weighted_cross_entropy(logps, weights)
            terms = {**found, "policy_loss": cloning, "values": values}
            total = token_mean(loss + hyper["policy_coef"] * cloning, mask)
            total, added = with_load_balance(spec, total, routing, batch.mask) if balance else (total, {})
            return total, {name: token_mean(x, mask) for name, x in terms.items()} | added

        return loss_fn

    def start(self, config: SupervisedConfig, context: Context, name: str, params: Params) -> tuple["State", Step]:
        """Heads of values 0 beside the policy."""
        spec, optimizer = context.spec, config.optimizer.make(config.steps)
        boxes = lora.own(spec, jax.eval_shape(partial(models.init, spec), jax.random.key(0)))

        def make(params: Params) -> Params:
            return {"trunk": box(params, boxes), "head": init_heads(spec, context.key(name), heads=self.heads)}

        hyper = {"learning_rate": config.optimizer.learning_rate, **{name: vars(self)[name] for name in _VARIED}}
        master = config.optimizer.master
        learner = sharded_state(context.mesh, make, params, optimizer, hyper, context.key(name), master=master)
        state = State(learner, copied(learner.params["head"]["q"]))
        update = make_train_step(self.loss(spec), optimizer, num_microbatches=config.num_microbatches)

        def step(state: State, batch: OfflineBatch, base: Params) -> tuple[State, Metrics]:
            learner, metrics = update(state.learner, batch, {"trunk": base, "target": state.target})
            q = learner.params["head"]["q"]
            target = jax.tree.map(lambda old, new: old + learner.hyper["target_share"] * (new - old), state.target, q)
            return State(learner, target), metrics

        return state, compiled(step, state)

    def learner(self, state: "State") -> TrainState:
        """With the heads of Q and V."""
        return state.learner

    def whole(self, state: "State", base: Params) -> Params:
        """Transformer, heads, and Q's slow copy."""
        return lora.merge({"trunk": base, "target": state.target}, state.learner.params)

    def own(self, state: "State") -> Params:
        """Without the heads."""
        return state.learner.params["trunk"]

    def policies(self, state: "State", base: Params) -> dict[float, Policy]:
        """At each β of the curve, and at that of decoding."""
        plain, heads = lora.merge(base, self.own(state)), self.decoding_heads(state)
        return {beta: self.perturbed(plain, heads, beta) for beta in (*self.curve, self.beta)}

    def decoding_heads(self, state: "State") -> Params:
        """What decoding reads beside the policy: the slow copy of Q's heads, and V."""
        return {"q": state.target, "v": state.learner.params["head"]["v"]}

    def perturbed(self, plain: Params, heads: Params, beta: float) -> Perturbed:
        """The policy to sample from, of a whole transformer and heads."""
        return Perturbed(plain, heads, jnp.asarray(beta, jnp.float32))


class State(flax.struct.PyTreeNode):
    """All that changes."""

    learner: TrainState  # of {"trunk", "head": {"q", "v"}}
    target: Params  # the slow copy of Q's heads
