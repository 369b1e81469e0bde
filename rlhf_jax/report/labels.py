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
    "confidence": Label("judge's mean probability of its choice", "probability"),
    "correlation": Label("correlation of score and rating"),
    "critic_grad_norm": Label("gradient norm, critic"),
    "distinct2": Label("distinct bigrams", "share"),
    "ece": Label("calibration error (ECE)", "probability"),
    "entropy": Label("entropy", "nats per token"),
    "explained_variance": Label("explained variance of returns", "share"),
    "external_accuracy": Label("accuracy on labelled sentences", "share"),
    "flipped": Label("verdicts that change with the order", "share"),
    "gold": Label("gold score", "P(positive)"),
    "grad_norm": Label("gradient norm"),
    "heldout_accuracy": Label("held-out accuracy", "share"),
    "heldout_auc": Label("held-out area under the ROC curve", "share"),
    "heldout_log_loss": Label("held-out loss", "nats"),
    "heldout_loss": Label("held-out loss", "nats per token"),
    "heldout_rmse": Label("held-out error", "root of mean square"),
    "judge_dollars": Label("price of the judge's answers", "dollars"),
    "judge_requests": Label("judge's answers", "count"),
    "judge_tokens": Label("judge's tokens", "count"),
    "kl": Label("KL to reference", "nats per token"),
    "kl_coef": Label("KL coefficient", "score per nat"),
    "learning_rate": Label("learning rate"),
    "load_balance": Label("load balance of experts", "k at best"),
    "length": Label("completion length", "tokens"),
    "length_correlation": Label("correlation of score and length"),
    "log_loss": Label("log loss", "nats"),
    "log_loss_low": Label("… its 95% interval from", "nats"),
    "log_loss_high": Label("… to", "nats"),
    "log_loss_baseline": Label("… of a constant", "nats"),
    "margin": Label("margin", "score"),
    "members_accuracy": Label("mean accuracy of members", "share"),
    "members_auc": Label("mean area of members", "share"),
    "members_rmse": Label("mean error of members", "root of mean square"),
    "no_eos": Label("completions without EOS", "share"),
    "policy_clipped": Label("policy ratios clipped", "share of tokens"),
    "policy_loss": Label("policy loss"),
    "ratio_deviation": Label("largest |ratio − 1| before update"),
    "reward": Label("reward after KL penalty", "score"),
    "rmse": Label("error", "root of mean square"),
    "rmse_low": Label("… its 95% interval from", "root of mean square"),
    "rmse_high": Label("… to", "root of mean square"),
    "rmse_baseline": Label("… of a constant", "root of mean square"),
    "rows_cut": Label("rows cut", "count"),
    "rows_dropped": Label("rows dropped", "count"),
    "rows_heldout": Label("rows held out", "count"),
    "rows_merged": Label("rows merged, standing twice", "count"),
    "rows_train": Label("rows to train on", "count"),
    "sampling_deviation": Label("largest |ratio to the sampler − 1|"),
    "score": Label("reward-model score"),
    "score_mean": Label("mean of scores as trained"),
    "score_std": Label("standard deviation of scores as trained"),
    "seq_kl": Label("KL to reference", "nats per sequence"),
    "solution_auc_last": Label("right solutions found, by the last step", "area"),
    "solution_auc_min": Label("right solutions found, by the worst step", "area"),
    "solution_auc_product": Label("right solutions found, by the product of steps", "area"),
    "solution_auc_product_low": Label("… its 95% interval from", "area"),
    "solution_auc_product_high": Label("… to", "area"),
    "solutions_right": Label("solutions all of whose steps are right", "share"),
    "skipped": Label("bad updates left out", "count"),
    "skipped_updates": Label("updates skipped", "count"),
    "stale_kl": Label("KL from the policy that wrote to the one that learns", "nats per token"),
    "staleness": Label("age of rollouts", "optimiser steps"),
    "steps": Label("steps"),
    "tokens_per_second": Label("speed", "tokens per second"),
    "uncertainty": Label("standard deviation among an ensemble's members", "score"),
    "vader": Label("VADER", "compound, −1 to 1"),
    "value_clipped": Label("values clipped", "share of tokens"),
    "value_loss": Label("value loss"),
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
    """The label of a metric; one without an entry is called by its own name."""
    return LABELS.get(name, Label(name))
