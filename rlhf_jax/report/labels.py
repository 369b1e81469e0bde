"""What the report calls a metric, and the unit that stands on its axis."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Label:
    """A name for people, and a unit."""

    title: str
    unit: str = ""

    @property
    def axis(self) -> str:
        """`title (unit)`."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


LABELS = {
    "accuracy": Label("accuracy", "share"),
    "accuracy_low": Label("… its 95% interval from", "share"),
    "accuracy_high": Label("… to", "share"),
    "accuracy_baseline": Label("… of a constant", "share"),
    "advantage": Label("min Q − V of the data's tokens", "standard deviations of the score"),
    "agreement": Label("pairs judged as the gold score does", "share"),
    "agreement_low": Label("… its 95% interval from", "share"),
    "agreement_high": Label("… to", "share"),
    "approx_kl": Label("KL to behaviour policy", "nats per token"),
    "auc": Label("area under the ROC curve", "share"),
    "auc_low": Label("… its 95% interval from", "share"),
    "auc_high": Label("… to", "share"),
    "auc_baseline": Label("… of a constant", "share"),
    "best_accuracy": Label("best completion found", "share of prompts"),
    "best_accuracy_low": Label("… its 95% interval from", "share of prompts"),
    "best_accuracy_high": Label("… to", "share of prompts"),
    "best_accuracy_baseline": Label("… of a constant", "share of prompts"),
    "changed": Label("answers changed by revision", "share"),
    "chose_a": Label("mean probability of the first place", "0.5 without bias"),
    "chosen_logps": Label("log-prob of chosen completions", "nats per completion"),
    "chosen_reward": Label("implicit reward of chosen completions", "nats times β"),
    "confidence": Label("judge's mean probability of its choice", "probability"),
    "correlation": Label("correlation of score and rating"),
    "cql_loss": Label("conservative term of Q", "nats a head"),
    "critic_grad_norm": Label("gradient norm, critic"),
    "delta": Label("reward shift δ", "nats times β"),
    "desirable_reward": Label("implicit reward of liked completions", "nats times β"),
    "distinct2": Label("distinct bigrams", "share"),
    "draws": Label("batches sampled an iteration"),
    "ece": Label("calibration error (ECE)", "probability"),
    "entropy": Label("entropy", "nats per token"),
    "equal_groups": Label("groups of equal scores", "share"),
    "ewc_penalty": Label("price of moved parameters (EWC)"),
    "explained_variance": Label("explained variance of returns", "share"),
    "external_accuracy": Label("accuracy on labelled sentences", "share"),
    "flipped": Label("verdicts that change with the order", "share"),
    "gold": Label("gold score", "P(positive)"),
    "gold_after_low": Label("gold score after, 95% interval from", "P(positive)"),
    "gold_after_high": Label("… to", "P(positive)"),
    "gold_teacher": Label("gold score of the teacher", "P(positive)"),
    "grad_norm": Label("gradient norm"),
    "heldout_accuracy": Label("held-out accuracy", "share"),
    "heldout_accuracy_low": Label("… its 95% interval from", "share"),
    "heldout_accuracy_high": Label("… to", "share"),
    "heldout_accuracy_baseline": Label("… of a constant", "share"),
    "heldout_accuracy_by_length": Label("held-out accuracy of length alone", "share"),
    "heldout_auc": Label("held-out area under the ROC curve", "0.5 of a constant"),
    "heldout_auc_low": Label("… its 95% interval from"),
    "heldout_auc_high": Label("… to"),
    "heldout_auc_baseline": Label("… of a constant"),
    "heldout_auc_by_length": Label("held-out area of length alone", "0.5 of a constant"),
    "heldout_log_loss": Label("held-out loss", "nats"),
    "heldout_loss": Label("held-out loss", "nats per token"),
    "heldout_margin": Label("held-out margin", "nats times β"),
    "heldout_margin_low": Label("… its 95% interval from", "nats times β"),
    "heldout_margin_high": Label("… to", "nats times β"),
    "heldout_rmse": Label("held-out error", "root of mean square"),
    "judge_dollars": Label("price of the judge's answers", "dollars"),
    "judge_requests": Label("judge's answers", "count"),
    "judge_tokens": Label("judge's tokens", "count"),
    "kl": Label("KL to reference", "nats per token"),
    "kl_baseline": Label("KL to reference, beside other prompts", "nats per completion"),
    "kl_coef": Label("KL coefficient", "score per nat"),
    "learning_rate": Label("learning rate"),
    "left_out": Label("left out", "count"),
    "length": Label("completion length", "tokens"),
    "length_correlation": Label("correlation of score and length"),
    "load_balance": Label("load balance of experts", "k at best"),
    "log_loss": Label("log loss", "nats"),
    "log_loss_low": Label("… its 95% interval from", "nats"),
    "log_loss_high": Label("… to", "nats"),
    "log_loss_baseline": Label("… of a constant", "nats"),
    "log_odds_ratio": Label("log odds of chosen against rejected"),
    "margin": Label("margin", "score"),
    "members_accuracy": Label("mean accuracy of members", "share"),
    "members_auc": Label("mean area of members", "share"),
    "members_rmse": Label("mean error of members", "root of mean square"),
    "network_score": Label("reward-model score beside a function's"),
    "no_eos": Label("completions without EOS", "share"),
    "pairs": Label("pairs", "count"),
    "pairs_tied": Label("pairs left out, as equally good", "count"),
    "policy_clipped": Label("policy ratios clipped", "share of tokens"),
    "policy_loss": Label("policy loss"),
    "ptx_loss": Label("loss on pretraining texts", "nats per token"),
    "q_loss": Label("error of Q, squared, all heads"),
    "ratio_deviation": Label("largest |ratio − 1| before update"),
    "rejected_logps": Label("log-prob of rejected completions", "nats per completion"),
    "rejected_reward": Label("implicit reward of rejected completions", "nats times β"),
    "reward": Label("reward after KL penalty", "score"),
    "rmse": Label("error", "root of mean square"),
    "rmse_low": Label("… its 95% interval from", "root of mean square"),
    "rmse_high": Label("… to", "root of mean square"),
    "rmse_baseline": Label("… of a constant", "root of mean square"),
    "rows_cut": Label("rows cut", "count"),
    "rows_dropped": Label("rows dropped", "count"),
    "rows_heldout": Label("rows held out", "count"),
    "rows": Label("rows", "count"),
    "rows_kept": Label("rows kept", "count"),
    "rows_learnt": Label("rows learnt from", "count"),
    "rows_merged": Label("rows merged, standing twice", "count"),
    "rows_train": Label("rows to train on", "count"),
    "same_choice": Label("student and teacher prefer the same token", "share"),
    "sampling_deviation": Label("largest |ratio to the sampler − 1|"),
    "score": Label("reward-model score"),
    "score_after_low": Label("reward-model score after, 95% interval from", "score"),
    "score_after_high": Label("… to", "score"),
    "score_drawn": Label("score of all that was sampled"),
    "score_kept": Label("reward-model score of rows kept"),
    "score_mean": Label("mean of scores as trained"),
    "score_std": Label("standard deviation of scores as trained"),
    "seq_kl": Label("KL to reference", "nats per sequence"),
    "seq_kl_exact": Label("KL to reference, summed over the vocabulary", "nats per sequence"),
    "skipped": Label("bad updates left out", "count"),
    "skipped_updates": Label("updates skipped", "count"),
    "solution_auc_last": Label("right solutions found, by the last step", "area"),
    "solution_auc_min": Label("right solutions found, by the worst step", "area"),
    "solution_auc_product": Label("right solutions found, by the product of steps", "area"),
    "solution_auc_product_low": Label("… its 95% interval from", "area"),
    "solution_auc_product_high": Label("… to", "area"),
    "solutions_right": Label("solutions all of whose steps are right", "share"),
    "stale_kl": Label("KL from the policy that wrote to the one that learns", "nats per token"),
    "staleness": Label("age of rollouts", "optimiser steps"),
    "step_share": Label("longest natural step taken", "share"),
    "steps": Label("steps"),
    "student_writes": Label("batches that the student writes", "share"),
    "teacher_kl": Label("KL to the teacher", "nats per sequence"),
    "tokens_per_second": Label("speed", "tokens per second"),
    "uncertainty": Label("standard deviation among an ensemble's members", "score"),
    "undesirable_reward": Label("implicit reward of completions not liked", "nats times β"),
    "unread": Label("judge's answers that are no letter", "count"),
    "questions_cut": Label("judge's questions without the start of their prompt", "count"),
    "judge_unread": Label("judge's answers that are no letter", "share"),
    "judge_cut": Label("judge's questions without the start of their prompt", "share"),
    "v_loss": Label("expectile error of V, squared"),
    "vader": Label("VADER", "compound, −1 to 1"),
    "vader_after_low": Label("VADER after, 95% interval from", "compound, −1 to 1"),
    "vader_after_high": Label("… to", "compound, −1 to 1"),
    "vader_teacher": Label("VADER of the teacher", "compound, −1 to 1"),
    "value_clipped": Label("values clipped", "share of tokens"),
    "value_loss": Label("value loss"),
    "values": Label("V before the data's tokens", "standard deviations of the score"),
    "win_rate": Label("probability that the judge prefers the last policy's completion", "0.5 of a tie"),
    "win_rate_low": Label("… its 95% interval from"),
    "win_rate_high": Label("… to"),
    "weights_cut": Label("importance weights cut", "share of tokens"),
}

JUDGED = {
    **dict.fromkeys(("k_wise", "plackett_luce", "best_of_k"), "prompt"),
    **dict.fromkeys(("scalar_rating", "ordinal_rating"), "rating"),
    "outcome_bce": "completion",
    "process_bce": "step",
}
"""What a reward model's loss is a mean over, where that is not pairs."""


def label(name: str) -> Label:
    """The label of a metric; one without an entry is called by its own name.

    What was read held out, or at one of ILQL's β, is named by what it is a reading of.
    """
    base, at_beta, beta = name.partition("_at_beta_")
    if at_beta:
        return Label(f"{label(base).title} at β = {beta}", label(base).unit)
    held = name.removeprefix("heldout_")
    if name not in LABELS and held != name and held in LABELS:
        return Label(f"held-out {LABELS[held].title}", LABELS[held].unit)
    return LABELS.get(name, Label(name))
