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
    "accuracy": Label("accuracy on pairs", "share"),
    "accuracy_low": Label("… its 95% interval from", "share"),
    "accuracy_high": Label("… to", "share"),
    "agreement": Label("pairs judged as the gold score does", "share"),
    "agreement_low": Label("… its 95% interval from", "share"),
    "agreement_high": Label("… to", "share"),
    "approx_kl": Label("KL to behaviour policy", "nats per token"),
    "chosen_logps": Label("log-prob of chosen completions", "nats per completion"),
    "chosen_reward": Label("implicit reward of chosen completions", "nats times β"),
    "changed": Label("answers changed by revision", "share"),
    "chose_a": Label("mean probability of the first place", "0.5 without bias"),
    "confidence": Label("judge's mean probability of its choice", "probability"),
    "critic_grad_norm": Label("gradient norm, critic"),
    "delta": Label("reward shift δ", "nats times β"),
    "desirable_reward": Label("implicit reward of liked completions", "nats times β"),
    "distinct2": Label("distinct bigrams", "share"),
    "ece": Label("calibration error (ECE)", "probability"),
    "entropy": Label("entropy", "nats per token"),
    "explained_variance": Label("explained variance of returns", "share"),
    "external_accuracy": Label("accuracy on labelled sentences", "share"),
    "flipped": Label("verdicts that change with the order", "share"),
    "gold": Label("gold score", "P(positive)"),
    "grad_norm": Label("gradient norm"),
    "heldout_accuracy": Label("held-out accuracy", "share"),
    "heldout_accuracy_baseline": Label("held-out accuracy of a constant", "share"),
    "heldout_accuracy_by_length": Label("held-out accuracy of length alone", "share"),
    "heldout_accuracy_high": Label("… to", "share"),
    "heldout_accuracy_low": Label("… its 95% interval from", "share"),
    "heldout_auc": Label("held-out area under the ROC curve", "0.5 of a constant"),
    "heldout_auc_baseline": Label("held-out area of a constant"),
    "heldout_auc_by_length": Label("held-out area of length alone", "0.5 of a constant"),
    "heldout_auc_high": Label("… to"),
    "heldout_auc_low": Label("… its 95% interval from"),
    "heldout_log_loss": Label("held-out loss", "nats per pair"),
    "heldout_loss": Label("held-out loss", "nats per token"),
    "heldout_margin": Label("held-out margin", "nats times β"),
    "heldout_margin_high": Label("… to", "nats times β"),
    "heldout_margin_low": Label("… its 95% interval from", "nats times β"),
    "judge_dollars": Label("price of the judge's answers", "dollars"),
    "judge_requests": Label("judge's answers", "count"),
    "judge_tokens": Label("judge's tokens", "count"),
    "kl": Label("KL to reference", "nats per token"),
    "kl_baseline": Label("KL to reference, beside other prompts", "nats per completion"),
    "kl_coef": Label("KL coefficient", "score per nat"),
    "learning_rate": Label("learning rate"),
    "load_balance": Label("load balance of experts", "k at best"),
    "length": Label("completion length", "tokens"),
    "length_correlation": Label("correlation of score and length"),
    "log_loss": Label("log loss on pairs", "nats per pair"),
    "log_odds_ratio": Label("log odds of chosen against rejected"),
    "margin": Label("margin", "score"),
    "no_eos": Label("completions without EOS", "share"),
    "policy_clipped": Label("policy ratios clipped", "share of tokens"),
    "policy_loss": Label("policy loss"),
    "ratio_deviation": Label("largest |ratio − 1| before update"),
    "rejected_logps": Label("log-prob of rejected completions", "nats per completion"),
    "rejected_reward": Label("implicit reward of rejected completions", "nats times β"),
    "reward": Label("reward after KL penalty", "score"),
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
    "skipped": Label("bad updates left out", "count"),
    "skipped_updates": Label("updates skipped", "count"),
    "stale_kl": Label("KL from the policy that wrote to the one that learns", "nats per token"),
    "staleness": Label("age of rollouts", "optimiser steps"),
    "steps": Label("steps"),
    "tokens_per_second": Label("speed", "tokens per second"),
    "undesirable_reward": Label("implicit reward of completions not liked", "nats times β"),
    "vader": Label("VADER", "compound, −1 to 1"),
    "value_clipped": Label("values clipped", "share of tokens"),
    "value_loss": Label("value loss"),
    "weights_cut": Label("importance weights cut", "share of tokens"),
}


def label(name: str) -> Label:
    """The label of a metric; one without an entry is called by its own name."""
    return LABELS.get(name, Label(name))
