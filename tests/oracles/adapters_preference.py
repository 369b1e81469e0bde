"""Losses of pairs of completions, with a reference and without one, from log-probabilities a token."""

from rlhf_jax import logprobs, losses
from tests.oracles.comparing import Oracle


def sums(x, ref=False):
    """(chosen, rejected) log-probabilities of whole completions, of the policy or of the reference."""
    chosen, rejected = (x.ref_chosen_logps, x.ref_rejected_logps) if ref else (x.chosen_logps, x.rejected_logps)
    return logprobs.sequence_logps(chosen, x.chosen_mask), logprobs.sequence_logps(rejected, x.rejected_mask)


def means(x):
    """The same of the policy, averaged over tokens."""
    chosen, rejected = sums(x)
    return chosen / x.chosen_mask.sum(-1), rejected / x.rejected_mask.sum(-1)


def ratios(x):
    """(chosen, rejected) log-ratios to the reference, summed over tokens."""
    return tuple(now - then for now, then in zip(sums(x), sums(x, ref=True), strict=True))


def mean_ratios(x):
    """The same averaged over tokens."""
    return tuple(r / mask.sum(-1) for r, mask in zip(ratios(x), (x.chosen_mask, x.rejected_mask), strict=True))


def paired(name, of=ratios, **scalars):
    """A loss of two log-ratios (or of two log-probabilities), a value a pair; `scalars` names the case's parameters."""

    def ours(x, p):
        given = {ours: vars(p)[theirs] for ours, theirs in scalars.items()}
        return getattr(losses.preference, name)(*of(x), beta=p.beta, **given)[0]

    return ours


def sorting(name):
    """A loss that sorts the batch; TRL tells its mean."""

    def ours(x, p):
        of_batch = getattr(losses.preference, name)
        return of_batch(*sums(x), *sums(x, ref=True), beta=p.beta, label_smoothing=p.label_smoothing)[0].mean()

    return ours


def f_dpo(divergence, alpha=lambda coef: 0.5):
    """DPO with another divergence than the reverse KL; `alpha` makes the paper's α of TRL's coefficient."""
    return lambda x, p: losses.preference.f_dpo(*ratios(x), beta=p.beta, divergence=divergence, alpha=alpha(p.alpha))[0]


IPO = "divides each log-ratio by its completion's length; equal on mean log-ratios"

WITH_REFERENCE = (
    Oracle("losses.preference.dpo", "trl_1_16", "dpo_sigmoid", paired("dpo")),
    Oracle("losses.preference.dpo", "trl_1_16", "dpo_sigmoid_norm", paired("dpo", mean_ratios)),
    Oracle("losses.preference.dpo", "openrlhf", "dpo", paired("dpo")),
    Oracle("losses.preference.dpo", "openrlhf", "cdpo", paired("dpo", label_smoothing="label_smoothing")),
    Oracle(
        "losses.preference.robust_dpo",
        "trl_1_16",
        "dpo_robust",
        paired("robust_dpo", label_smoothing="label_smoothing"),
    ),
    Oracle("losses.preference.ipo", "openrlhf", "ipo", paired("ipo")),
    Oracle(
        "losses.preference.ipo",
        "trl_1_16",
        "dpo_ipo",
        paired("ipo", mean_ratios),
        reading=IPO,
        otherwise=paired("ipo"),
    ),
    Oracle(
        "losses.preference.exo_pair", "trl_1_16", "dpo_exo_pair", paired("exo_pair", label_smoothing="label_smoothing")
    ),
    *(
        Oracle(f"losses.preference.{name}", "trl_1_16", f"dpo_{name}", paired(name))
        for name in ("hinge", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop")
    ),
    *(
        Oracle(f"losses.preference.{name}", "trl_1_16", f"dpo_{name}_{smoothing}", sorting(name))
        for name in ("aot", "aot_unpaired")
        for smoothing in (0.0, 0.1)
    ),
    Oracle("losses.preference.f_dpo", "trl_1_16", "dpo_sigmoid_forward_kl", f_dpo("forward_kl")),
    Oracle("losses.preference.f_dpo", "trl_1_16", "dpo_sigmoid_js_divergence", f_dpo("js")),
    Oracle(
        "losses.preference.f_dpo",
        "trl_1_16",
        "dpo_sigmoid_alpha_divergence",
        f_dpo("alpha", lambda coef: 1 - coef),
        reading="names 1 − α what the paper names α",
        otherwise=f_dpo("alpha", lambda coef: coef),
    ),
)

WITHOUT_REFERENCE = (
    Oracle("losses.preference.simpo", "trl_1_16", "simpo", paired("simpo", means, gamma="gamma")),
    *(
        Oracle(
            "losses.preference.alpha_po",
            "trl_1_16",
            f"alpha_po_{alpha}",
            paired("alpha_po", means, gamma="gamma", alpha="alpha"),
        )
        for alpha in (0.25, -0.5)
    ),
    Oracle("losses.preference.orpo", "trl_1_16", "orpo_odds_ratio", paired("orpo", means)),
    Oracle("losses.preference.cpo", "trl_1_16", "cpo_sigmoid", paired("cpo", sums)),
    Oracle(
        "losses.preference.cpo",
        "trl_1_16",
        "cpo_sigmoid_smoothed",
        paired("cpo", sums, label_smoothing="label_smoothing"),
    ),
    Oracle("losses.preference.cpl", "trl_1_16", "cpo_sigmoid", paired("cpl", sums)),
)


ORACLES = (*WITH_REFERENCE, *WITHOUT_REFERENCE)
