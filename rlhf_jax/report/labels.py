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
    "changed": Label("answers changed by revision", "share"),
    "chose_a": Label("mean probability of the first place", "0.5 without bias"),
    "confidence": Label("judge's mean probability of its choice", "probability"),
    "critic_grad_norm": Label("gradient norm, critic"),
    "distinct2": Label("distinct bigrams", "share"),
    "draws": Label("batches sampled an iteration"),
    "ece": Label("calibration error (ECE)", "probability"),
    "entropy": Label("entropy", "nats per token"),
    "equal_groups": Label("groups of equal scores", "share"),
    "explained_variance": Label("explained variance of returns", "share"),
    "external_accuracy": Label("accuracy on labelled sentences", "share"),
    "flipped": Label("verdicts that change with the order", "share"),
    "gold": Label("gold score", "P(positive)"),
    "grad_norm": Label("gradient norm"),
    "heldout_accuracy": Label("held-out accuracy", "share"),
    "heldout_log_loss": Label("held-out loss", "nats per pair"),
    "heldout_loss": Label("held-out loss", "nats per token"),
    "judge_dollars": Label("price of the judge's answers", "dollars"),
    "judge_requests": Label("judge's answers", "count"),
    "judge_tokens": Label("judge's tokens", "count"),
    "kl": Label("KL to reference", "nats per token"),
    "kl_coef": Label("KL coefficient", "score per nat"),
    "learning_rate": Label("learning rate"),
    "load_balance": Label("load balance of experts", "k at best"),
    "length": Label("completion length", "tokens"),
    "length_correlation": Label("correlation of score and length"),
    "log_loss": Label("log loss on pairs", "nats per pair"),
    "margin": Label("margin", "score"),
    "no_eos": Label("completions without EOS", "share"),
    "policy_clipped": Label("policy ratios clipped", "share of tokens"),
    "policy_loss": Label("policy loss"),
    "ptx_loss": Label("loss on pretraining texts", "nats per token"),
    "ratio_deviation": Label("largest |ratio − 1| before update"),
    "reward": Label("reward after KL penalty", "score"),
    "rows_cut": Label("rows cut", "count"),
    "rows_dropped": Label("rows dropped", "count"),
    "rows_heldout": Label("rows held out", "count"),
    "rows_merged": Label("rows merged, standing twice", "count"),
    "rows_train": Label("rows to train on", "count"),
    "sampling_deviation": Label("largest |ratio to the sampler − 1|"),
    "score": Label("reward-model score"),
    "score_drawn": Label("score of all that was sampled"),
    "score_mean": Label("mean of scores as trained"),
    "score_std": Label("standard deviation of scores as trained"),
    "seq_kl": Label("KL to reference", "nats per sequence"),
    "seq_kl_exact": Label("KL to reference, summed over the vocabulary", "nats per sequence"),
    "skipped": Label("bad updates left out", "count"),
    "skipped_updates": Label("updates skipped", "count"),
    "stale_kl": Label("KL from the policy that wrote to the one that learns", "nats per token"),
    "staleness": Label("age of rollouts", "optimiser steps"),
    "step_share": Label("longest natural step taken", "share"),
    "steps": Label("steps"),
    "tokens_per_second": Label("speed", "tokens per second"),
    "vader": Label("VADER", "compound, −1 to 1"),
    "value_clipped": Label("values clipped", "share of tokens"),
    "value_loss": Label("value loss"),
    "weights_cut": Label("importance weights cut", "share of tokens"),
}


def label(name: str) -> Label:
    """The label of a metric; one without an entry is called by its own name."""
    return LABELS.get(name, Label(name))
