"""Numbers of TRL 1.16: DPO's fifteen losses and its f-divergences, KTO, reward models, ORPO, CPO, SimPO, AlphaPO.

python -m venv trl116 && trl116/bin/pip install trl==1.16.0 transformers accelerate datasets torch
trl116/bin/python -m tests.oracles.make_trl_1_16        # from the root of the repository; make_trl_1_16_policy likewise

The trainers' own `_compute_loss`, `cpo_loss` and `odds_ratio_loss` run on instances that were never constructed. DPO's
and KTO's model is a function that returns the log-probabilities in the inputs. Everything is float64. Three things are
not so in TRL by itself and are made so by `float64_throughout`: ORPO casts to float32; DPO's alpha divergence does, and
knows no clamp for float64 (80, float32's, then holds, far from these inputs); so is the sum of a mask.
"""

from types import SimpleNamespace

import torch
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo import orpo_trainer
from trl.trainer import dpo_trainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer

from tests.oracles.make_common import (
    Recorder,
    by_row,
    float64_throughout,
    masked_mean,
    masked_sum,
    shifted,
    trainer,
    zeros_like_tokens,
)

BETA = 0.3
PAIR = "chosen_logps rejected_logps"


def dpo_loss(x, *, loss_type, beta=BETA, label_smoothing=0.0, divergence="reverse_kl", alpha=0.5, tau=0.05):
    """DPOTrainer._compute_loss on one batch: the mean over its pairs."""
    made = trainer(
        dpo_trainer.DPOTrainer,
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=label_smoothing,
        f_divergence_type=divergence,
        f_alpha_divergence_coef=alpha,
        args=SimpleNamespace(discopop_tau=tau),
        ld_alpha=None,
        use_weighting=False,
        precompute_ref_logps=True,
    )
    mask = shifted(torch.cat([x.chosen_mask, x.rejected_mask]))
    logps = torch.cat([x.chosen_logps, x.rejected_logps]) * mask[:, 1:]
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": masked_sum(x.ref_chosen_logps, x.chosen_mask),
        "ref_rejected_logps": masked_sum(x.ref_rejected_logps, x.rejected_mask),
    }
    return made._compute_loss(lambda **kwargs: zeros_like_tokens(logps), inputs, return_outputs=False)


def dpo_rows(x, **params):
    return by_row(x, lambda row: dpo_loss(row, **params))


def record_dpo(record):
    """Row by row, but for the two losses that sort a batch and for the cross-entropy, which weighs tokens."""
    row_losses = [
        "sigmoid",
        "sigmoid_norm",
        "hinge",
        "ipo",
        "nca_pair",
        "bco_pair",
        "sppo_hard",
        "apo_zero",
        "apo_down",
    ]
    for loss_type in [*row_losses, "discopop"]:
        beta = 1.0 if loss_type == "hinge" else BETA  # at which it is 0 for some pairs
        record.case(f"dpo_{loss_type}", "pairs", dpo_rows, PAIR, {"loss_type": loss_type, "beta": beta})
    for loss_type in ("exo_pair", "robust"):
        params = {"loss_type": loss_type, "beta": BETA, "label_smoothing": 0.1}
        record.case(f"dpo_{loss_type}", "pairs", dpo_rows, PAIR, params)
    for loss_type in ("aot", "aot_unpaired"):
        for smoothing in (0.0, 0.1):
            params = {"loss_type": loss_type, "beta": BETA, "label_smoothing": smoothing}
            record.case(f"dpo_{loss_type}_{smoothing}", "pairs", dpo_loss, PAIR, params)
    record.case("dpo_sft", "pairs", dpo_loss, "chosen_logps", {"loss_type": "sft"})
    for divergence in ("forward_kl", "js_divergence", "alpha_divergence"):
        params = {"loss_type": "sigmoid", "beta": BETA, "divergence": divergence, "alpha": 0.3}
        with float64_throughout(dpo_trainer):
            record.case(f"dpo_sigmoid_{divergence}", "pairs", dpo_rows, PAIR, params)


def kto_loss(x, *, loss_type="kto", beta=BETA, desirable_weight=1.0, undesirable_weight=1.0):
    """KTOTrainer._compute_loss, with the KL from the mismatched completions; the mean over the batch."""
    made = trainer(
        KTOTrainer,
        loss_type=loss_type,
        calculate_KL=loss_type == "kto",
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        precompute_ref_logps=True,
    )
    mask, kl_mask = shifted(x.mask), shifted(x.kl_mask)
    batch = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "KL_input_ids": torch.ones_like(kl_mask),  # tells the model below which log-probabilities are asked for
        "KL_attention_mask": torch.ones_like(kl_mask),
        "KL_completion_mask": kl_mask,
        "label": x.desirable,
        "ref_logps": masked_sum(x.ref_logps, x.mask),
        "ref_KL_logps": masked_sum(x.ref_kl_logps, x.kl_mask),
    }

    def model(input_ids, **kwargs):
        mismatched = bool(input_ids.any())
        return zeros_like_tokens(x.kl_logps * kl_mask[:, 1:] if mismatched else x.logps * mask[:, 1:])

    return made._compute_loss(model, batch, return_outputs=False)


def record_kto(record):
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
    record.case("kto", "unpaired", kto_loss, "logps", {"beta": BETA, **weights})
    record.case("kto_negative_kl", "unpaired_below", kto_loss, "logps", {"beta": BETA, **weights})
    record.case("apo_zero_unpaired", "unpaired", kto_loss, "logps", {"loss_type": "apo_zero_unpaired", "beta": BETA})


def orpo_terms(x, *, beta=BETA):
    """ORPOTrainer.odds_ratio_loss of mean log-probabilities, negated as the trainer does when it adds it up."""
    chosen, rejected = masked_mean(x.chosen_logps, x.chosen_mask), masked_mean(x.rejected_logps, x.rejected_mask)
    return -trainer(orpo_trainer.ORPOTrainer, beta=beta).odds_ratio_loss(chosen, rejected)[0]


def cpo_terms(x, *, loss_type, beta=BETA, gamma=0.0, alpha=0.0, label_smoothing=0.0):
    """CPOTrainer.cpo_loss: of sums, but for SimPO (and AlphaPO, built on it) and IPO, which take means."""
    made = trainer(
        CPOTrainer, loss_type=loss_type, beta=beta, simpo_gamma=gamma, alpha=alpha, label_smoothing=label_smoothing
    )
    reduce = masked_mean if loss_type in ("simpo", "ipo") else masked_sum
    return made.cpo_loss(reduce(x.chosen_logps, x.chosen_mask), reduce(x.rejected_logps, x.rejected_mask))[0]


def record_without_reference(record):
    with float64_throughout():
        record.case("orpo_odds_ratio", "pairs", orpo_terms, PAIR, {"beta": BETA})
    record.case("cpo_sigmoid", "pairs", cpo_terms, PAIR, {"loss_type": "sigmoid", "beta": BETA})
    smoothed = {"loss_type": "sigmoid", "beta": BETA, "label_smoothing": 0.1}
    record.case("cpo_sigmoid_smoothed", "pairs", cpo_terms, PAIR, smoothed)
    record.case("simpo", "pairs", cpo_terms, PAIR, {"loss_type": "simpo", "beta": 2.0, "gamma": 0.6})
    for alpha in (0.25, -0.5):
        params = {"loss_type": "simpo", "beta": 2.0, "gamma": 0.6, "alpha": alpha}
        record.case(f"alpha_po_{alpha}", "pairs", cpo_terms, PAIR, params)
    for average in (False, True):
        record.case(f"batch_logps_{average}", "logits", batch_logps, "logits", {"average": average})


def batch_logps(x, *, average):
    """CPOTrainer.get_batch_logps: log-probabilities of a sequence's labelled tokens from logits, and the shift."""
    labels = torch.where(x.mask, x.tokens, -100)
    return CPOTrainer.get_batch_logps(x.logits, labels, average_log_prob=average)


def reward_loss(x, *, margins=False, centering=None):
    """RewardTrainer.compute_loss of one batch, whose model returns the scores."""
    made = trainer(RewardTrainer, args=SimpleNamespace(center_rewards_coefficient=centering))
    scores = torch.cat([x.chosen_scores, x.rejected_scores])[:, None]
    inputs = {"attention_mask": torch.ones(1)} | ({"margin": x.margin} if margins else {})
    return made.compute_loss(lambda **kwargs: SimpleNamespace(logits=scores), inputs)


def reward_rows(x, **params):
    return by_row(x, lambda row: reward_loss(row, **params))


def record_reward(record):
    scores = "chosen_scores rejected_scores"
    record.case("reward", "scored_pairs", reward_rows, scores, {})
    record.case("reward_margin", "scored_pairs", reward_rows, f"{scores} margin", {"margins": True})
    record.case("reward_centering", "scored_pairs", reward_rows, scores, {"centering": 0.01})


def main():
    record = Recorder("trl_1_16", ["trl", "torch", "transformers", "accelerate", "numpy"])
    record_dpo(record)
    record_kto(record)
    record_without_reference(record)
    record_reward(record)
    record.write()


if __name__ == "__main__":
    main()
