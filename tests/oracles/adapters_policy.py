"""Losses of policies and value functions."""

import jax.numpy as jnp

from rlhf_jax import importance, kl, logprobs, losses, masking
from tests.oracles.adapters_tokens import extended
from tests.oracles.comparing import Oracle


def per_sequence(x):
    """One advantage a sequence, at each of its tokens."""
    return jnp.broadcast_to(x.seq_advantages[:, None], x.logps.shape)


def tokens(x, **bounds):
    """PPO's loss with an advantage a token, averaged over the tokens of the batch."""
    return masking.token_mean(losses.policy.ppo_clip(x.logps, x.old_logps, x.advantages, **bounds)[0], x.mask).value


def grpo(x, p, reduce):
    loss = losses.policy.ppo_clip(x.logps, x.old_logps, per_sequence(x), clip_eps=p.low, clip_eps_high=p.high)[0]
    return reduce(loss, x.mask)


def dr_grpo(x, p):
    """Dr. GRPO divides by a constant, the longest completion allowed."""
    return grpo(x, p, lambda loss, mask: masking.fixed_length_mean(loss, mask, length=p.max_length)).value


def grpo_with_kl(x, p):
    """The KL is added to each token's loss before one reduction."""
    loss = losses.policy.ppo_clip(x.logps, x.old_logps, per_sequence(x))[0]
    return masking.sequence_mean(loss + p.beta * kl.k3(x.logps, x.ref_logps), x.mask).value


def rloo(x, p):
    """RLOO's ratio is of whole sequences."""
    logps, old_logps = (logprobs.sequence_logps(each, x.mask) for each in (x.logps, x.old_logps))
    return losses.policy.ppo_clip(logps, old_logps, x.seq_advantages, clip_eps=p.low, clip_eps_high=p.high)[0].mean()


def of_sequences(name, low="low", high="high"):
    """GSPO and GMPO: a loss a sequence, and the mean over them. `low` and `high` name the case's parameters."""

    def ours(x, p):
        bounds = {"clip_eps": vars(p)[low], "clip_eps_high": vars(p)[high]}
        return getattr(losses.policy, name)(x.logps, x.old_logps, x.seq_advantages, x.mask, **bounds)[0].mean()

    return ours


def gspo_token(x, p):
    loss = losses.policy.gspo_token(
        x.logps, x.old_logps, per_sequence(x), x.mask, clip_eps=p.low, clip_eps_high=p.high
    )[0]
    return masking.sequence_mean(loss, x.mask).value


def cispo(x, p):
    """TRL's bound is of the ratio, ours of how far it lies above 1."""
    loss = losses.policy.cispo(x.logps, x.old_logps, per_sequence(x), clip_eps_high=p.high - 1)[0]
    return masking.token_mean(loss, x.mask).value


def trpo(x, p):
    """GRPO whose range is that of all ratios."""
    return masking.token_mean(losses.policy.trpo_surrogate(x.logps, x.old_logps, x.advantages)[0], x.mask).value


def sampler(weigh, outside):
    """A weight a token, 1 outside the mask in TRL, or a weight a sequence, [b, 1] in TRL."""

    def ours(x, p):
        bounds = {"low": getattr(p, "low", None), "high": p.high, "outside": outside}
        if weigh == "token":
            return jnp.where(x.mask, importance.token_weights(x.logps, x.old_logps, **bounds), 1)
        return importance.sequence_weights(x.logps, x.old_logps, x.mask, **bounds)[:, None]

    return ours


def corrected(outside):
    """OpenRLHF multiplies PPO's loss by the weight of the trainer's old log-probabilities to the sampler's."""

    def ours(x, p):
        low, high = p.threshold
        weights = importance.token_weights(x.old_logps, x.ref_logps, low=low, high=high, outside=outside)
        return masking.token_mean(losses.policy.ppo_clip(x.logps, x.old_logps, x.advantages)[0] * weights, x.mask).value

    return ours


def row_means(x, p):
    """rlax's mean of each row."""
    loss = losses.policy.ppo_clip(x.logps, x.old_logps, x.advantages, clip_eps=p.clip_eps)[0]
    return masking.keep(loss, x.mask).sum(-1) / x.mask.sum(-1)


def value_loss(x, clip_eps, mask, reduce=masking.token_mean):
    return reduce(losses.value.clipped_value(x.values, x.old_values, x.returns, clip_eps=clip_eps)[0], mask).value


def ppo_and_value(x, p, value_mask):
    """The two terms of PPO with its value function, each a mean over the tokens."""
    return tokens(x, clip_eps=p.cliprange) + p.vf_coef * value_loss(x, p.cliprange_value, value_mask)


def policy_gradient(x, p):
    """rlax's policy gradient of a table of logits, with the reference's first logits as advantages."""
    return losses.policy.reinforce(logprobs.token_logps(x.logits, x.tokens), x.ref_logits[..., 0])[0].mean()


LONGER = "keeps one value after the last token; equal under a mask one token longer"
CLIP = "losses.policy.ppo_clip"
VALUE = "losses.value.clipped_value"

PPO = (
    Oracle(CLIP, "trl_1_12", "ppo_policy_loss", lambda x, p: tokens(x, clip_eps=p.cliprange)),
    Oracle(CLIP, "trl_1_16_policy", "grpo_token_advantages", lambda x, p: tokens(x)),
    Oracle(CLIP, "trl_1_16_policy", "grpo_delta", lambda x, p: tokens(x, dual_clip=p.delta)),
    Oracle(CLIP, "trl_1_16_policy", "grpo_grpo", lambda x, p: grpo(x, p, masking.sequence_mean).value),
    Oracle(CLIP, "trl_1_16_policy", "grpo_bnpo", lambda x, p: grpo(x, p, masking.token_mean).value),
    Oracle(CLIP, "trl_1_16_policy", "grpo_dapo", lambda x, p: grpo(x, p, masking.token_mean).value),
    Oracle("masking.fixed_length_mean", "trl_1_16_policy", "grpo_dr_grpo", dr_grpo),
    Oracle("kl.k3", "trl_1_16_policy", "grpo_kl", grpo_with_kl),
    Oracle(CLIP, "trl_1_16_policy", "rloo_loss", rloo),
    Oracle(
        CLIP,
        "openrlhf",
        "policy_loss",
        lambda x, p: tokens(x, clip_eps=p.clip_eps_low, clip_eps_high=p.clip_eps_high),
    ),
    Oracle(
        CLIP,
        "openrlhf",
        "policy_loss_dual",
        lambda x, p: tokens(x, clip_eps=p.clip_eps_low, clip_eps_high=p.clip_eps_high, dual_clip=p.dual_clip),
    ),
    Oracle(
        "masking.sequence_mean",
        "openrlhf",
        "policy_loss_sequences",
        lambda x, p: (
            masking.sequence_mean(
                losses.policy.ppo_clip(
                    x.logps, x.old_logps, x.advantages, clip_eps=p.clip_eps_low, clip_eps_high=p.clip_eps_high
                )[0],
                x.mask,
            ).value
        ),
    ),
    Oracle(CLIP, "rlax", "clipped_surrogate", row_means),
    Oracle(CLIP, "trlx", "ppo_loss", lambda x, p: ppo_and_value(x, p, x.mask)),
    Oracle(
        CLIP,
        "trl_1_12",
        "ppo_loss",
        lambda x, p: ppo_and_value(x, p, extended(x.mask)),
        reading=LONGER,
        otherwise=lambda x, p: ppo_and_value(x, p, x.mask),
    ),
    Oracle("losses.policy.reinforce", "rlax", "policy_gradient", policy_gradient),
    Oracle("losses.policy.gspo", "trl_1_16_policy", "gspo", of_sequences("gspo")),
    Oracle("losses.policy.gspo", "openrlhf", "policy_loss_gspo", of_sequences("gspo", "clip_eps_low", "clip_eps_high")),
    Oracle("losses.policy.gspo_token", "trl_1_12", "gspo_token_0.04", gspo_token),
    Oracle("losses.policy.gspo_token", "trl_1_12", "gspo_token_0.5", gspo_token),
    Oracle("losses.policy.gmpo", "trl_1_16_policy", "gmpo_0.4", of_sequences("gmpo")),
    Oracle("losses.policy.gmpo", "trl_1_16_policy", "gmpo_0.05", of_sequences("gmpo")),
    Oracle("losses.policy.cispo", "trl_1_16_policy", "cispo", cispo),
    Oracle("losses.policy.trpo_surrogate", "trl_1_16_policy", "grpo_unclipped", trpo),
    *(
        Oracle(
            f"importance.{weigh}_weights",
            "trl_1_16_policy",
            f"sampler_{weigh}_{outside}{bounds}",
            sampler(weigh, outside),
        )
        for weigh in ("token", "sequence")
        for outside in ("truncate", "mask")
        for bounds in ("", "_both")
    ),
    Oracle("importance.token_weights", "openrlhf", "policy_loss_token_clip", corrected("truncate")),
    Oracle("importance.token_weights", "openrlhf", "policy_loss_token_mask", corrected("mask")),
)

VALUES = (
    Oracle(
        VALUE,
        "trl_1_12",
        "ppo_value_loss",
        lambda x, p: value_loss(x, p.cliprange_value, extended(x.mask)),
        reading=LONGER,
        otherwise=lambda x, p: value_loss(x, p.cliprange_value, x.mask),
    ),
    *(
        Oracle(
            VALUE,
            "openrlhf",
            f"value_loss_{clip_eps}_{token_level}",
            lambda x, p: value_loss(
                x, p.clip_eps, x.mask, masking.token_mean if p.token_level else masking.sequence_mean
            ),
        )
        for clip_eps in (0.2, None)
        for token_level in (True, False)
    ),
)

ORACLES = (*PPO, *VALUES)
