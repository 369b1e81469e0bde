"""Direct preference optimisation on pairs that the policy has just written: online DPO, IPO (Guo et al. 2024), XPO.

One iteration: sample `group_size` completions of each prompt, let the reward say which is best and which worst, and
take `epochs` × `minibatches` steps of a loss of pairs against the frozen start. It is an iteration of `policy` but for
what completions are compared by: sampling, scores, steps and the loop are the same code.

    online_preference.Config(**METHODS["online_ipo"], reward="reward_model")
    online_preference.Config(reward=JudgeReward(LocalJudge("base")))              # OAIF: a judge reads both of a pair

Shapes: b rollouts, g prompts, k completions of each, m pairs of a minibatch, t tokens, n of them a completion's.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rlhf_jax import hosts, kl, losses, masking, models
from rlhf_jax.algorithms import critic_free, onpolicy
from rlhf_jax.algorithms.context import Context
from rlhf_jax.algorithms.critic_free import CriticFree
from rlhf_jax.algorithms.iterations import Behaviour, Frozen
from rlhf_jax.algorithms.policy_gradient import PolicyGradientConfig
from rlhf_jax.algorithms.policy_state import PolicyState
from rlhf_jax.algorithms.preference_losses import Side, Term, weighted
from rlhf_jax.algorithms.rollouts import loss_mask, old_logps
from rlhf_jax.data.prompts import PromptBatch
from rlhf_jax.kl import AdaptiveKL, FixedKL
from rlhf_jax.logprobs import entropy, ratio_deviation
from rlhf_jax.metrics import read_jsonl
from rlhf_jax.models.experts import with_load_balance
from rlhf_jax.normalizer import Moments
from rlhf_jax.numerics import require
from rlhf_jax.placement import Colocated
from rlhf_jax.types import Hyper, Key, LossFn, Mean, Metrics, Params, Rollout

METHODS: dict[str, dict[str, Any]] = {
    # Guo et al. 2024 (OAIF): both completions are the policy's own.
    "online_dpo": {},
    "online_ipo": {"losses": (Term("ipo"),)},
    # Xie et al. 2024, algorithm 1, on the newest pairs (theirs: on all so far): one of them is the reference's, whose
    # log-prob under the policy is made small too, but for ties.
    "xpo": {"second": "reference", "optimism": 1e-5},
}
"""By name the fields in which a method differs from online DPO."""


@dataclass(frozen=True)
class Config(PolicyGradientConfig):
    """Pairs of the policy's own completions, judged as they are written; the defaults are online DPO's."""

    group_size: int = 2
    """Completions of each prompt, of which the best and the worst are a pair; `batch_size` counts completions."""
    losses: tuple[Term, ...] = (Term(),)
    """What of losses.preference is made small: one of pairs, or a weighted sum of several; their β is `kl.coef` where
    they give none."""
    second: Literal["policy", "reference"] = "policy"
    """Who writes the second completion of each pair."""
    optimism: float = 0.0
    """XPO's α: times the log-prob of the second completion, which is added to the loss of its pair."""
    kl: FixedKL | AdaptiveKL = field(default_factory=lambda: FixedKL(0.1))
    """β of the losses: what a nat of KL to the reference costs in units of the score."""
    epochs: int = 1
    """Passes over an iteration's pairs."""
    minibatches: int = 1
    """Optimiser steps a pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require("group_size", self.group_size, "[2, inf)")
        require("optimism", self.optimism, "[0, inf)")
        for wrong, text in (*self._of_pairs(), *self._of_fields()):
            if wrong:
                raise ValueError(text)
        if self.packing is not None:
            self.packing.check(self.prompt_length, self.completion_tokens, together=2)

    def _of_pairs(self) -> list[tuple[bool, str]]:
        """What may not stand together, and how it is told."""
        k, names = self.group_size, [term.loss for term in self.losses]
        listed, with_bonus = ", ".join(names) or "none", self.second == "reference" or self.optimism > 0
        return [
            (
                self.batch_size % (k * self.parts) > 0,
                f"batch_size={self.batch_size} must divide by group_size × minibatches × num_microbatches = "
                f"{k} × {self.minibatches} × {self.num_microbatches}",
            ),
            (not names or len(set(names)) < len(names), f"losses: at least one, and each once, got {listed}"),
            (
                any(term.is_of_thumbs or term.is_across_batch for term in self.losses),
                f"losses: each must be one of single pairs, which kto, bco, aot and aot_unpaired are not; got {listed}",
            ),
            (with_bonus and k > 2, f"group_size={k}: second='reference' and optimism are of pairs: group_size=2"),
            (
                self.second == "reference" and self.old_logps == "sampled",
                "old_logps='sampled' are the writer's: with second='reference' they must be 'recomputed'",
            ),
            (
                self.second == "reference" and self.placement != Colocated(),
                "second='reference' needs placement=Colocated() without offload",
            ),
        ]

    def _of_fields(self) -> list[tuple[bool, str]]:
        return [
            (self.kl.coef <= 0, f"kl.coef={self.kl.coef} is the losses' β: it must be over 0"),
            (
                isinstance(self.kl, AdaptiveKL) and self.terms == tuple(self.losses),
                "kl: AdaptiveKL moves the losses' β, and each of losses has its own or none: FixedKL, or beta=None",
            ),
            (self.gamma != 1, f"gamma={self.gamma} is of rewards a token, which pairs have not: 1"),
            (self.shaping.whiten, "shaping.whiten is PPO's, of token rewards; pairs have none"),
            (
                self.shaping.normalize != "none" and not self.shaping.sets_numbers and self.truncate is None,
                f"shaping.normalize={self.shaping.normalize!r} leaves the order of scores as it is, and pairs have no "
                "more of them without a clip or a penalty: 'none'",
            ),
        ]

    @property
    def copies(self) -> int:
        """A group's."""
        return self.group_size

    @property
    def own_rows(self) -> slice:
        """The policy's own: the first of each two, where the second is the reference's."""
        return slice(None) if self.second == "policy" else slice(None, None, 2)

    @property
    def reducer(self) -> str:
        """Every completion of a pair has the pair's loss."""
        return "sequence"

    @property
    def terms(self) -> tuple[Term, ...]:
        """The losses with their β."""
        return tuple(term.with_beta(self.kl.coef) for term in self.losses)

    def batch_sizes(self) -> dict[str, int]:
        """What one of two policies writes, too."""
        halves = {"batch_size / 2": self.batch_size // 2} if self.second == "reference" else {}
        return super().batch_sizes() | halves

    def notes(self) -> list[str]:
        """What is left out of the paper's rule."""
        stale = "pairs that were made ahead are learnt as they are: a loss of pairs takes no importance weights"
        return super().notes() + [stale] * (self.max_weight is not None)


class Algorithm(CriticFree):
    """The methods' steps as functions of (state, frozen, prompts)."""

    reported = (*CriticFree.reported, "accuracy", "margin", "chosen_reward", "rejected_reward")

    @property
    def together(self) -> int:
        """All of a prompt."""
        return self.config.group_size

    def sample(self, behaviour: Behaviour, frozen: Frozen, prompts: PromptBatch) -> Rollout:
        """`group_size` completions of each prompt, beside each other; the second of each two may be the reference's.

        Those are not `used`: what an iteration reports of completions is of the policy's own.
        """
        c = self.config
        groups = jnp.arange(c.batch_size) // c.group_size
        if c.second == "policy":
            return super().sample(behaviour, frozen, prompts).replace(group_ids=groups)
        other = Behaviour(frozen.reference, jax.random.fold_in(behaviour.key, 2), behaviour.step)
        halves = [
            super(Algorithm, self).sample(
                writer, frozen, jax.tree.map(lambda x, i=i: x[i::2], prompts), copies=c.group_size // 2
            )
            for i, writer in enumerate((behaviour, other))
        ]
        both = jax.tree.map(lambda a, b: jnp.stack([a, b], 1).reshape(-1, *a.shape[1:]), *halves)
        return both.replace(group_ids=groups, used=jnp.arange(c.batch_size) % 2 == 0)

    def score(self, own: Params, frozen: Frozen, rollout: Rollout) -> tuple[Rollout, Metrics]:
        """As ever; the sampler's log-probs of the reference's completions are compared with the reference's."""
        scored, metrics = super().score(own, frozen, rollout)
        if self.config.second == "policy":
            return scored, metrics
        writers = jnp.where(rollout.used[:, None], scored.logps, scored.ref_logps)
        return scored, {**metrics, "sampling_deviation": ratio_deviation(writers, rollout.logps)}

    def with_advantages(
        self, rollout: Rollout, *, kl_coef: Array, moments: Moments | None = None
    ) -> tuple[Rollout, Metrics]:
        """Scores after shaping; a prompt whose completions are all equally good is not learnt from."""
        scores = self.shaped(rollout, moments)
        groups = scores.reshape(-1, self.config.group_size)
        tied = groups.max(-1) == groups.min(-1)
        finite = 0 * scores.sum()  # not a number where a score is not: the loop sees it, whoever wrote the completion
        metrics = {"equal_groups": tied.mean(dtype=jnp.float32) + finite, "kl_coef": kl_coef}
        return rollout.replace(scores=scores, used=jnp.repeat(~tied, self.config.group_size)), metrics

    def units(self, rollout: Rollout) -> Rollout:
        """The best and the worst completion of each prompt, [g, 2, …], in the order in which they were written."""
        k = self.config.group_size
        groups = rollout.scores.reshape(-1, k)
        pairs = jnp.sort(jnp.stack([groups.argmax(-1), groups.argmin(-1)], -1), -1)  # [g, 2]
        rows = pairs + k * jnp.arange(len(groups))[:, None]
        return jax.tree.map(lambda x: x[rows], rollout)

    def policy_loss(self) -> LossFn:
        """The weighted losses of pairs [m, 2, t], with XPO's and the entropy bonus where they have a weight."""
        c, window, terms = self.config, slice(self.config.prompt_length, None), self.config.terms
        own_beta = [f"{term.loss}.beta" for one, term in zip(c.losses, terms, strict=True) if one != term]

        def loss_fn(params: Params, batch: Rollout, hyper: Hyper, key: Key) -> tuple[Mean, dict[str, Mean]]:
            del key
            first_wins = batch.scores[:, 0] > batch.scores[:, 1]
            batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
            mask, old = loss_mask(batch)[:, window], old_logps(batch)[:, window]
            at = self.reading(params, batch)
            logits = models.unembed(self.spec, params, at.states)
            logps = self.read_logps(logits, at, batch)
            lengths = jnp.maximum(batch.completion_mask.sum(-1, dtype=jnp.float32), 1)
            sides = Side(*(x.reshape(-1, 2) for x in (logps.sum(-1), batch.ref_logps.sum(-1), lengths)))
            chosen, rejected = (
                jax.tree.map(lambda x, wins=wins: jnp.where(wins, x[:, 0], x[:, 1]), sides)
                for wins in (first_wins, ~first_wins)
            )
            loss, diagnostics = weighted(terms, chosen, rejected, hyper | dict.fromkeys(own_beta, hyper["kl_coef"]))
            if c.optimism:
                loss += hyper["optimism"] * sides.logps[:, 1]
            each = masking.keep(jnp.broadcast_to(jnp.repeat(loss, 2)[:, None], mask.shape), mask)
            if c.entropy_coef:
                bonus, _ = losses.entropy_bonus(entropy(logits, temperature=c.sampling.temperature))
                each += hyper["entropy_coef"] * at.in_rows(bonus, prompt=c.prompt_length)
            judged = mask.any(-1)[::2]
            metrics = {name: masking.token_mean(x, judged) for name, x in diagnostics.items() if name in self.reported}
            own = mask if c.second == "policy" else mask & (jnp.arange(len(mask)) % 2 == 0)[:, None]
            metrics["approx_kl"] = masking.token_mean(kl.k3(old, logps), own)
            total, balance = with_load_balance(self.spec, self.reduce(each, mask), at.routing, at.mask)
            return total, metrics | balance

        return loss_fn


def train(config: Config, context: Context, name: str) -> dict[str, Any]:
    """Train the policy; the figures are for summary.json."""
    figures = onpolicy.train(config, context, name, Algorithm, initial_state)
    tied = hosts.from_writer(lambda: tied_groups(config, context, name))
    return {**figures, "pairs": config.steps * (config.batch_size // config.group_size) - tied, "pairs_tied": tied}


def initial_state(algorithm: Algorithm, context: Context, name: str) -> PolicyState:
    """The policy at the start of training, in shards."""
    c = algorithm.config
    hyper = {name: value for term in c.terms for name, value in term.hyper().items()}
    hyper |= {"optimism": c.optimism, "entropy_coef": c.entropy_coef}
    return critic_free.initial_state(algorithm, context, name, hyper)


def tied_groups(config: Config, context: Context, name: str) -> int:
    """Prompts of all iterations, those of earlier sessions included, whose completions were equally good."""
    lines = [line for line in read_jsonl(context.workdir / "metrics.jsonl") if line["stage"] == name]
    return round(sum(line["equal_groups"] for line in lines) * (config.batch_size // config.group_size))
