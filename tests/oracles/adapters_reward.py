"""Losses of reward models and of supervised training."""

import jax.numpy as jnp

from rlhf_jax import logprobs, losses, masking
from tests.oracles.comparing import Oracle


def bradley_terry(x, p):
    return losses.reward.bradley_terry(x.chosen_scores, x.rejected_scores)[0]


def with_margin(x, p):
    return losses.reward.bradley_terry(x.chosen_scores, x.rejected_scores, margin=x.margin)[0]


def with_centering(x, p):
    return bradley_terry(x, p) + p.centering * losses.reward.centering(x.chosen_scores, x.rejected_scores)[0]


def k_wise(x, p):
    ranks = jnp.broadcast_to(jnp.arange(x.scores.shape[-1]), x.scores.shape)
    return losses.reward.k_wise(x.scores, ranks)[0]


def process_bce(x, p):
    """TRL's two logits are one score, their difference."""
    scores = x.logits[..., 1] - x.logits[..., 0]
    return masking.token_mean(losses.reward.process_bce(scores, x.labels)[0], x.mask).value


REWARD = (
    Oracle("losses.reward.bradley_terry", "trl_1_16", "reward", bradley_terry),
    Oracle("losses.reward.bradley_terry", "trl_1_16", "reward_margin", with_margin),
    Oracle("losses.reward.bradley_terry", "openrlhf", "PairWiseLoss_False", bradley_terry),
    Oracle("losses.reward.bradley_terry", "openrlhf", "PairWiseLoss_True", with_margin),
    Oracle("losses.reward.bradley_terry", "openrlhf", "LogExpLoss_False", bradley_terry),
    Oracle("losses.reward.centering", "trl_1_16", "reward_centering", with_centering),
    Oracle("losses.reward.k_wise", "openrlhf", "PairWiseLoss_of_k", k_wise),
    Oracle("losses.reward.best_of_k", "rlax", "best_of_k", lambda x, p: losses.reward.best_of_k(x.scores, x.best)[0]),
    Oracle(
        "losses.reward.scalar_rating",
        "rlax",
        "l2_loss",
        lambda x, p: losses.reward.scalar_rating(x.scores, x.ratings)[0],
    ),
    Oracle(
        "losses.reward.outcome_bce",
        "rlax",
        "sigmoid_log_loss",
        lambda x, p: losses.reward.outcome_bce(x.scores, x.labels)[0],
    ),
    Oracle(
        "losses.reward.plackett_luce", "tfp", "plackett_luce", lambda x, p: losses.reward.plackett_luce(x.scores)[0]
    ),
    Oracle(
        "losses.reward.ordinal_rating",
        "tfp",
        "ordered_logistic",
        lambda x, p: losses.reward.ordinal_rating(x.scores, x.stars, x.thresholds)[0],
    ),
    Oracle("losses.reward.process_bce", "trl_1_12", "prm", process_bce),
)

SUPERVISED = (
    *(
        Oracle(
            "losses.supervised.cross_entropy",
            "openrlhf",
            f"sft_{token_level}",
            lambda x, p: reducer(p)(losses.supervised.cross_entropy(x.logps)[0], x.mask).value,
        )
        for token_level in (True, False)
    ),
    Oracle(
        "losses.supervised.cross_entropy",
        "trl_1_16",
        "dpo_sft",
        lambda x, p: masking.token_mean(losses.supervised.cross_entropy(x.chosen_logps)[0], x.chosen_mask).value,
    ),
    Oracle(
        "losses.regularizers.entropy_bonus",
        "rlax",
        "entropy_loss",
        lambda x, p: losses.regularizers.entropy_bonus(logprobs.entropy(x.logits))[0].mean(),
    ),
)


def reducer(p):
    return masking.token_mean if p.token_level else masking.sequence_mean


ORACLES = (*REWARD, *SUPERVISED)
