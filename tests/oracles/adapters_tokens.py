"""Below the losses: log-probabilities, KL, reductions and whitening, rewards a token, advantages, controllers."""

import jax.numpy as jnp
import numpy as np

from rlhf_jax import advantages, kl, logprobs, losses, masking, normalizer
from tests.oracles.comparing import Oracle


def per_token(name):
    """One of `kl`'s estimators."""
    return lambda x, p: getattr(kl, name)(x.logps, x.ref_logps)


def extended(mask):
    """The mask with one more token after each row's last, which is where TRL's PPO puts the score if there is room."""
    return mask | np.pad(mask, ((0, 0), (1, 0)))[:, :-1]


def padded(x):
    """(values, KL a token) as TRL's PPO has them: 0 outside the completion, but for the value after its end."""
    estimate = {"k1": kl.k1, "k3": kl.k3}
    return masking.keep(x.old_values, extended(x.mask)), lambda p: masking.keep(
        estimate[p.kl_estimator](x.old_logps, x.ref_logps), x.mask
    )


def ppo_rewards(x, p, mask):
    return advantages.token_rewards(x.scores, padded(x)[1](p), mask, kl_coef=p.kl_coef)


def ppo_gae(x, p, mask):
    return advantages.gae(ppo_rewards(x, p, mask), padded(x)[0], mask, gamma=p.gamma, lam=p.lam)


def unbiased(whitened, mask, mean=0.0):
    """What whitening by the unbiased variance would have given: sqrt((n − 1)/n) of it, around its mean."""
    n = mask.sum()
    return masking.keep((whitened - mean) * np.sqrt((n - 1) / n) + mean, mask)


def whitened_twice(x, p):
    """TRL's last step: the advantages of the longer mask, whitened under the shorter one by the unbiased variance."""
    return unbiased(masking.whiten(ppo_gae(x, p, extended(x.mask))[0], x.mask), x.mask)


def whitened_rewards(x, p):
    mask = extended(x.mask)
    rewards = ppo_rewards(x, p, mask)
    whitened = masking.whiten(rewards, mask, shift_mean=False)
    return unbiased(whitened, mask, mean=masking.masked_mean(rewards, mask))


def trl_whiten(x, p):
    mean = 0.0 if p.shift_mean else masking.masked_mean(x.rewards, x.mask)
    return unbiased(masking.whiten(x.rewards, x.mask, shift_mean=p.shift_mean), x.mask, mean)


def trlx_whiten(x, p):
    everything = np.ones_like(x.mask)
    mean = 0.0 if p.shift_mean else masking.masked_mean(x.rewards, everything)
    return unbiased(masking.whiten(x.rewards, everything, shift_mean=p.shift_mean), everything, mean)


def gae_of(index, mask=None):
    """`gae`'s advantages (0) or returns (1), under the inputs' mask unless another is made of it."""
    return lambda x, p: advantages.gae(
        x.rewards, x.values, x.mask if mask is None else mask(x.mask), gamma=p.gamma, lam=p.lam
    )[index]


def adaptive_kl(x, p):
    """The coefficient after each of a stream of KLs."""
    controller = kl.AdaptiveKL(coef=p.init, target=p.target, horizon=p.horizon)
    state, coefs = controller.init(), []
    for value in np.abs(x.scores).mean(-1):
        state = controller.update(state, value, p.n_steps)
        coefs.append(state.coef)
    return jnp.stack(coefs)


ON_EOS = "puts the score one token after the last where there is room; equal under a mask one token longer"
BESSEL = "divides by n − 1 in the variance; equal but for sqrt((n − 1)/n)"
BOTH = f"{ON_EOS}; whitening {BESSEL}"


def head(x):
    """Hidden states and an unembedding whose logits are the inputs': the unembedding is the identity."""
    return x.logits, np.eye(x.logits.shape[-1])


def moments(x, p):
    """(mean, biased variance, unbiased standard deviation) after each batch of scores."""
    state, rows = normalizer.Moments(), []
    for batch in x.scores:
        state = normalizer.update(state, batch)
        rows.append([state.mean, state.variance, jnp.sqrt(state.squares / (state.count - 1))])
    return jnp.stack([jnp.stack(row) for row in rows])


LOGPROBS = (
    Oracle("logprobs.token_logps", "rlax", "token_logps", lambda x, p: logprobs.token_logps(x.logits, x.tokens)),
    Oracle(
        "logprobs.token_logps",
        "rlax",
        "token_logps_0.7",
        lambda x, p: logprobs.token_logps(x.logits, x.tokens, temperature=p.temperature),
    ),
    Oracle("logprobs.token_logps", "openrlhf", "log_probs", lambda x, p: logprobs.token_logps(x.logits, x.tokens)),
    Oracle("logprobs.token_logps", "trlx", "logprobs", lambda x, p: logprobs.token_logps(x.logits, x.tokens)),
    Oracle(
        "logprobs.next_token_logps",
        "openrlhf",
        "gpt_lm",
        lambda x, p: -logprobs.next_token_logps(x.logits, x.tokens)[:, 1:].mean(),
    ),
    Oracle(
        "logprobs.sequence_logps",
        "trl_1_16",
        "batch_logps_False",
        lambda x, p: logprobs.sequence_logps(logprobs.next_token_logps(x.logits, x.tokens), x.mask),
    ),
    Oracle("logprobs.entropy", "rlax", "entropy", lambda x, p: logprobs.entropy(x.logits)),
    Oracle(
        "logprobs.sequence_logps",
        "trl_1_16",
        "batch_logps_True",
        lambda x, p: logprobs.sequence_logps(logprobs.next_token_logps(x.logits, x.tokens), x.mask) / x.mask.sum(-1),
    ),
    Oracle(
        "logprobs.from_hidden",
        "rlax",
        "token_logps_0.7",
        lambda x, p: logprobs.from_hidden(*head(x), x.tokens, chunk=4, temperature=p.temperature),
    ),
    Oracle(
        "logprobs.entropy_from_hidden", "rlax", "entropy", lambda x, p: logprobs.entropy_from_hidden(*head(x), chunk=4)
    ),
    Oracle(
        "logprobs.entropy", "rlax", "entropy_0.7", lambda x, p: logprobs.entropy(x.logits, temperature=p.temperature)
    ),
)

KL = (
    *(Oracle(f"kl.{name}", "openrlhf", name, per_token(name)) for name in ("k1", "k2", "k3")),
    Oracle("kl.exact", "rlax", "categorical_kl", lambda x, p: kl.exact(x.logits, x.ref_logits)),
    Oracle(
        "losses.distillation.reverse_kl",
        "rlax",
        "categorical_kl",
        lambda x, p: losses.reverse_kl(x.logits, x.ref_logits)[0],
    ),
    Oracle(
        "losses.distillation.forward_kl",
        "rlax",
        "categorical_kl",
        lambda x, p: losses.forward_kl(x.ref_logits, x.logits)[0],
    ),
    Oracle(
        "kl.exact_from_hidden",
        "rlax",
        "categorical_kl",
        lambda x, p: kl.exact_from_hidden(*head(x), x.ref_logits, np.eye(x.logits.shape[-1]), chunk=4),
    ),
    Oracle(
        "kl.sequence_kl",
        "trl_1_16_policy",
        "rloo_rewards",
        lambda x, p: x.scores - p.beta * kl.sequence_kl(kl.k1(x.old_logps, x.ref_logps), x.mask),
    ),
    *(
        Oracle("kl.AdaptiveKL", peer, case, adaptive_kl)
        for peer, case in (("openrlhf", "adaptive_kl_0.8"), ("openrlhf", "adaptive_kl_4.0"), ("trlx", "adaptive_kl"))
    ),
)

MASKING = (
    Oracle("masking.token_mean", "trl_1_12", "masked_mean", lambda x, p: masking.token_mean(x.rewards, x.mask).value),
    Oracle("masking.masked_mean", "trl_1_12", "masked_mean", lambda x, p: masking.masked_mean(x.rewards, x.mask)),
    Oracle(
        "masking.sequence_mean", "openrlhf", "sft_False", lambda x, p: masking.sequence_mean(-x.logps, x.mask).value
    ),
    Oracle("masking.masked_var", "trl_1_12", "masked_var_False", lambda x, p: masking.masked_var(x.rewards, x.mask)),
    Oracle(
        "masking.masked_var",
        "trl_1_12",
        "masked_var_True",
        lambda x, p: masking.masked_var(x.rewards, x.mask) * x.mask.sum() / (x.mask.sum() - 1),
        reading="its default divides by n − 1; equal times n/(n − 1)",
        otherwise=lambda x, p: masking.masked_var(x.rewards, x.mask),
    ),
    Oracle("masking.whiten", "openrlhf", "whiten", lambda x, p: masking.whiten(x.rewards, x.mask)),
    *(
        Oracle(
            "masking.whiten",
            "trl_1_12",
            f"masked_whiten_{shift_mean}",
            trl_whiten,
            reading=BESSEL,
            otherwise=lambda x, p: masking.whiten(x.rewards, x.mask, shift_mean=p.shift_mean),
        )
        for shift_mean in (True, False)
    ),
    *(
        Oracle(
            "masking.whiten",
            "trlx",
            f"whiten_{shift_mean}",
            trlx_whiten,
            reading=f"{BESSEL}; takes no mask",
            otherwise=lambda x, p: masking.whiten(x.rewards, x.mask, shift_mean=p.shift_mean),
        )
        for shift_mean in (True, False)
    ),
)

REWARDS = (
    Oracle(
        "advantages.token_rewards",
        "openrlhf",
        "rewards",
        lambda x, p: advantages.token_rewards(x.scores, kl.k1(x.logps, x.ref_logps), x.mask, kl_coef=p.kl_coef),
    ),
    *(
        Oracle(
            "advantages.token_rewards",
            "trl_1_12",
            f"ppo_rewards_{estimator}",
            lambda x, p: ppo_rewards(x, p, extended(x.mask)),
            reading=ON_EOS,
            otherwise=lambda x, p: ppo_rewards(x, p, x.mask),
        )
        for estimator in ("k1", "k3")
    ),
    Oracle(
        "advantages.token_rewards",
        "trl_1_12",
        "ppo_rewards_whitened",
        whitened_rewards,
        reading=BOTH,
        otherwise=lambda x, p: masking.whiten(ppo_rewards(x, p, x.mask), x.mask, shift_mean=False),
    ),
)

GAE = (
    Oracle("advantages.gae", "rlax", "gae", gae_of(0)),
    Oracle("advantages.gae", "rlax", "lambda_returns", gae_of(1)),
    Oracle("advantages.gae", "openrlhf", "gae_returns", gae_of(1)),
    Oracle("advantages.gae", "openrlhf", "gae_advantages", gae_of(0)),
    Oracle("advantages.gae", "trlx", "gae_advantages", gae_of(0, np.ones_like)),
    Oracle("advantages.gae", "trlx", "gae_returns", gae_of(1, np.ones_like)),
    Oracle(
        "advantages.gae",
        "trlx",
        "gae_whitened",
        lambda x, p: trlx_gae_whitened(x, p),
        reading=f"whitening {BESSEL}; takes no mask",
        otherwise=lambda x, p: masking.whiten(gae_of(0)(x, p), x.mask),
    ),
    *(
        Oracle(
            "advantages.gae",
            "trl_1_12",
            f"ppo_returns_{estimator}",
            lambda x, p: ppo_gae(x, p, extended(x.mask))[1],
            reading=ON_EOS,
            otherwise=lambda x, p: ppo_gae(x, p, x.mask)[1],
        )
        for estimator in ("k1", "k3")
    ),
    *(
        Oracle(
            "advantages.gae",
            "trl_1_12",
            f"ppo_advantages_{estimator}",
            whitened_twice,
            reading=BOTH,
            otherwise=lambda x, p: masking.whiten(ppo_gae(x, p, x.mask)[0], x.mask),
        )
        for estimator in ("k1", "k3")
    ),
)


def trlx_gae_whitened(x, p):
    everything = np.ones_like(x.mask)
    return unbiased(masking.whiten(gae_of(0, np.ones_like)(x, p), everything), everything)


BASELINES = (
    Oracle("advantages.group_centered", "trl_1_16_policy", "grpo_advantages_none", lambda x, p: centered(x)),
    Oracle("advantages.group_centered", "openrlhf", "baseline_dr_grpo", lambda x, p: centered(x)),
    Oracle(
        "advantages.group_normalized",
        "trl_1_16_policy",
        "grpo_advantages_group",
        lambda x, p: advantages.group_normalized(x.scores),
    ),
    Oracle(
        "advantages.group_normalized",
        "openrlhf",
        "baseline_group_norm",
        lambda x, p: advantages.group_normalized(x.scores, eps=1e-9),
    ),
    Oracle("advantages.leave_one_out", "trl_1_16_policy", "rloo_advantages", lambda x, p: leave_one_out(x)),
    Oracle("advantages.leave_one_out", "openrlhf", "baseline_rloo", lambda x, p: leave_one_out(x)),
    *(
        Oracle(
            "advantages.reinforce_plus_plus",
            "openrlhf",
            f"reinforce_plus_plus_{gamma}",
            lambda x, p: advantages.reinforce_plus_plus(x.rewards, x.mask, gamma=p.gamma),
        )
        for gamma in (1.0, 0.9)
    ),
    Oracle("normalizer.update", "trlx", "running_moments", moments),
)


def centered(x):
    return advantages.group_centered(x.scores)


def leave_one_out(x):
    return advantages.leave_one_out(x.scores)


ORACLES = (*LOGPROBS, *KL, *MASKING, *REWARDS, *GAE, *BASELINES)
