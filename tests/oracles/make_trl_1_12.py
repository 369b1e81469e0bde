"""Numbers of TRL 1.12, the last with PPO: its rewards, GAE, whitening and losses; PRM, BCO and GSPO-token, gone too.

python -m venv trl112 && trl112/bin/pip install trl==1.12.0 transformers accelerate datasets torch
trl112/bin/python -m tests.oracles.make_trl_1_12        # from the root of the repository

PPO's computations stand in the middle of `PPOTrainer.train`: these lines are cut out of the installed source and run as
they are. `PRMTrainer` has no loss of its own: it is the token classification loss of transformers, with labels at the
last token of each step and −100 elsewhere. BCO and GSPO-token are the trainers' own methods on instances that were
never constructed. All float64, which BCO's running mean and PRM's logits need `float64_throughout` for.
"""

from types import SimpleNamespace

import torch
from transformers.loss.loss_utils import ForTokenClassification
from trl.experimental.bco import bco_trainer
from trl.experimental.gspo_token.grpo_trainer import GRPOTrainer
from trl.experimental.ppo import ppo_trainer
from trl.experimental.prm.prm_trainer import PRMTrainer

from tests.oracles.make_common import (
    Recorder,
    accelerator,
    float64_throughout,
    lines_of,
    masked_sum,
    policy_inputs,
    policy_trainer,
    run_lines,
    trainer,
)

TRAIN = ppo_trainer.PPOTrainer.train


def padding(mask):
    """(padding_mask, padding_mask_p1) as `train` has them: the second lets one more token through."""
    columns, last = torch.arange(mask.shape[1])[None], mask.sum(1, keepdim=True) - 1
    return columns > last, columns > last + 1


def ppo_rewards_and_advantages(x, *, kl_coef, kl_estimator, gamma, lam, whiten_rewards):
    """Everything between the rollout and the epochs, from `logprobs` to whitened advantages."""
    padding_mask, padding_mask_p1 = padding(x.mask)
    source = lines_of(TRAIN, "# 4. compute rewards", "advantages = torch.masked_fill(advantages, padding_mask, 0)")
    args = SimpleNamespace(
        kl_coef=kl_coef, kl_estimator=kl_estimator, gamma=gamma, lam=lam, whiten_rewards=whiten_rewards
    )
    lengths = x.mask.sum(1) - 1
    return run_lines(
        source,
        ppo_trainer,
        args=args,
        logprobs=torch.masked_fill(x.old_logps, padding_mask, ppo_trainer.INVALID_LOGPROB),
        ref_logprobs=torch.masked_fill(x.ref_logps, padding_mask, ppo_trainer.INVALID_LOGPROB),
        values=torch.masked_fill(x.old_values, padding_mask_p1, 0),
        scores=x.scores,
        sequence_lengths=lengths,
        sequence_lengths_p1=lengths + 1,
        responses=x.mask,
        padding_mask=padding_mask,
        padding_mask_p1=padding_mask_p1,
    )


def ppo_step(x, *, cliprange=0.2, cliprange_value=0.2, vf_coef=0.1):
    """The loss lines of one microbatch: `pg_loss`, `vf_loss` and their sum."""
    padding_mask, padding_mask_p1 = padding(x.mask)
    source = lines_of(TRAIN, "vpredclipped = torch.clamp(", "loss = pg_loss + args.vf_coef * vf_loss")
    return run_lines(
        source,
        ppo_trainer,
        args=SimpleNamespace(cliprange=cliprange, cliprange_value=cliprange_value, vf_coef=vf_coef),
        vpred=torch.masked_fill(x.values, padding_mask_p1, 0),
        mb_values=x.old_values,
        mb_return=x.returns,
        new_logprobs=torch.masked_fill(x.logps, padding_mask, ppo_trainer.INVALID_LOGPROB),
        mb_logprobs=torch.masked_fill(x.old_logps, padding_mask, ppo_trainer.INVALID_LOGPROB),
        mb_advantage=x.advantages,
        padding_mask=padding_mask,
        padding_mask_p1=padding_mask_p1,
        micro_batch_inds=torch.arange(len(x.mask)),
    )


def record_ppo(record):
    leaves = "old_logps ref_logps old_values scores"
    for estimator in ("k1", "k3"):
        params = {"kl_coef": 0.3, "kl_estimator": estimator, "gamma": 0.97, "lam": 0.9, "whiten_rewards": False}
        names = {"rewards": leaves.replace("old_values ", ""), "returns": leaves, "advantages": leaves}
        for output, wrt in names.items():
            record.case(
                f"ppo_{output}_{estimator}",
                "rollout",
                lambda x, output=output, **p: vars(ppo_rewards_and_advantages(x, **p))[output],
                wrt,
                params,
            )
    whitened = {"kl_coef": 0.3, "kl_estimator": "k1", "gamma": 0.97, "lam": 0.9, "whiten_rewards": True}
    record.case(
        "ppo_rewards_whitened",
        "rollout",
        lambda x, **p: ppo_rewards_and_advantages(x, **p).rewards,
        "old_logps ref_logps scores",
        whitened,
    )
    for shift_mean in (True, False):
        record.case(
            f"masked_whiten_{shift_mean}",
            "rollout",
            lambda x, shift_mean: ppo_trainer.masked_whiten(x.rewards, x.mask, shift_mean) * x.mask,
            "rewards",
            {"shift_mean": shift_mean},
        )
    record.case("masked_mean", "rollout", lambda x: ppo_trainer.masked_mean(x.rewards, x.mask), "rewards")
    for unbiased in (True, False):
        record.case(
            f"masked_var_{unbiased}",
            "rollout",
            lambda x, unbiased: ppo_trainer.masked_var(x.rewards, x.mask, unbiased),
            "rewards",
            {"unbiased": unbiased},
        )
    record.case("ppo_policy_loss", "rollout", lambda x, **p: ppo_step(x, **p).pg_loss, "logps", {"cliprange": 0.2})
    record.case(
        "ppo_value_loss", "rollout", lambda x, **p: ppo_step(x, **p).vf_loss, "values", {"cliprange_value": 0.2}
    )
    both = {"cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1}
    record.case("ppo_loss", "rollout", lambda x, **p: ppo_step(x, **p).loss, "logps values", both)


def prm_loss(x):
    """Cross-entropy of two logits at each labelled token, a mean over them."""
    labels = torch.where(x.mask, x.labels.long(), -100)
    return ForTokenClassification(x.logits, labels, SimpleNamespace(num_labels=2))


def record_prm(record):
    assert "compute_loss" not in vars(PRMTrainer)
    with float64_throughout():
        record.case("prm", "steps", prm_loss, "logits")


def bco_losses(x, *, beta, what="losses"):
    """BCOTrainer.bco_loss of two batches in turn, the second of half the size: its losses, or δ after each batch."""
    moments = bco_trainer.RunningMoments(accelerator())
    made = trainer(bco_trainer.BCOTrainer, beta=beta, running=moments, embedding_func=None)
    logps, ref = masked_sum(x.logps, x.mask), masked_sum(x.ref_logps, x.mask)
    deltas = []
    for rows in (slice(0, 6), slice(2, 5)):
        wanted, unwanted = x.desirable[rows], ~x.desirable[rows]
        now, then = logps[rows], ref[rows]
        losses, _, _, delta = made.bco_loss(now[wanted], now[unwanted], then[wanted], then[unwanted], None, None)
        deltas.append(delta)
    return losses if what == "losses" else torch.stack(deltas)


def gspo_token_loss(x, **params):
    return policy_trainer(GRPOTrainer, x, **params)._compute_loss(None, policy_inputs(x))


def main():
    record = Recorder("trl_1_12", ["trl", "torch", "transformers", "accelerate", "numpy"])
    record_ppo(record)
    record_prm(record)
    with float64_throughout():
        for what, wrt in (("losses", "logps"), ("deltas", "")):
            record.case(f"bco_{what}", "unpaired", bco_losses, wrt, {"beta": 0.3, "what": what})
    for high in (0.04, 0.5):
        params = {"level": "sequence_token", "low": 0.03, "high": high}
        record.case(f"gspo_token_{high}", "rollout", gspo_token_loss, "logps", params)
    record.write()


if __name__ == "__main__":
    main()
