"""Numbers of TRL 1.16's policy losses: GRPO and its kin, CISPO, GSPO, GMPO, RLOO, their advantages, sampler correction.

Made as `make_trl_1_16` says. The losses are the trainers' own `_compute_loss`, in evaluation mode (no accumulation), on
instances that were never constructed; `_get_per_token_logps_and_entropies` hands out the log-probabilities in the
inputs. Advantages and the correction of a sampler's log-probabilities are lines of `_generate_and_score_completions`
and are cut out of the installed source. All float64.
"""

import math

import torch
from trl.experimental.gmpo.gmpo_trainer import GMPOTrainer
from trl.trainer import grpo_trainer, rloo_trainer

from tests.oracles.make_common import (
    Recorder,
    SimpleNamespace,
    identity,
    lines_of,
    masked_sum,
    policy_inputs,
    policy_trainer,
    run_lines,
)


def grpo_loss(x, **params):
    return policy_trainer(grpo_trainer.GRPOTrainer, x, **params)._compute_loss(None, policy_inputs(x))


def grpo_token_advantages(x, **params):
    """GRPO's loss takes an advantage a token as well, which is what PPO's has."""
    inputs = policy_inputs(x, advantages=x.advantages)
    return policy_trainer(grpo_trainer.GRPOTrainer, x, **params)._compute_loss(None, inputs)


def gmpo_loss(x, **params):
    return policy_trainer(GMPOTrainer, x, **params)._compute_loss(None, policy_inputs(x))


def rloo_loss(x, **params):
    """RLOO's clips the ratio of whole sequences."""
    inputs = policy_inputs(x, old_logps=masked_sum(x.old_logps, x.mask))
    return policy_trainer(rloo_trainer.RLOOTrainer, x, **params)._compute_loss(None, inputs)


def record_losses(record):
    for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo"):
        params = {"loss_type": loss_type, "low": 0.2, "high": 0.28, "max_length": 10}
        record.case(f"grpo_{loss_type}", "rollout", grpo_loss, "logps", params)
    record.case("grpo_token_advantages", "rollout", grpo_token_advantages, "logps", {"loss_type": "bnpo"})
    record.case("grpo_delta", "rollout", grpo_token_advantages, "logps", {"loss_type": "bnpo", "delta": 1.3})
    unclipped = {"loss_type": "bnpo", "low": 1.0, "high": 1e6}
    record.case("grpo_unclipped", "rollout", grpo_token_advantages, "logps", unclipped)
    record.case("grpo_kl", "rollout", grpo_loss, "logps", {"loss_type": "grpo", "beta": 0.04})
    record.case("gspo", "rollout", grpo_loss, "logps", {"level": "sequence", "low": 0.03, "high": 0.04})
    record.case("cispo", "rollout", grpo_loss, "logps", {"loss_type": "cispo", "high": 1.28})
    for low, high in ((0.4, 0.4), (0.05, 0.1)):
        record.case(f"gmpo_{low}", "rollout", gmpo_loss, "logps", {"low": low, "high": high})
    record.case("rloo_loss", "rollout", rloo_loss, "logps", {"low": 0.2, "high": 0.2})


def grpo_advantages(x, *, scale):
    """(r − mean) / (std + 1e-4), or without the division."""
    source = lines_of(
        grpo_trainer.GRPOTrainer._generate_and_score_completions,
        "mean_grouped_rewards = torch.nanmean",
        "advantages = advantages / (std_rewards + 1e-4)",
    )
    num_generations = x.scores.shape[1]
    names = {"self": SimpleNamespace(scale_rewards=scale), "rewards": x.scores.reshape(-1)}
    return run_lines(source, grpo_trainer, num_generations=num_generations, **names).advantages.view(x.scores.shape)


def rloo_advantages(x):
    source = lines_of(
        rloo_trainer.RLOOTrainer._generate_and_score_completions,
        "grouped_rewards = rewards.view(-1, num_generations)",
        "advantages = torch.zeros_like(rewards)",
    )
    names = {"rewards": x.scores.reshape(-1), "num_generations": x.scores.shape[1]}
    return run_lines(source, rloo_trainer, **names).advantages.view(x.scores.shape)


def rloo_rewards(x, *, beta):
    """A score a sequence less its KL, summed over tokens."""
    source = lines_of(
        rloo_trainer.RLOOTrainer._generate_and_score_completions,
        "per_token_kl = old_per_token_logps - ref_per_token_logps",
        "rewards = rewards - self.beta * kl",
    )
    names = {
        "old_per_token_logps": x.old_logps,
        "ref_per_token_logps": x.ref_logps,
        "completion_mask": x.mask.to(torch.int64),
        "rewards": x.scores,
        "gather": identity,
    }
    return run_lines(source, rloo_trainer, self=SimpleNamespace(beta=beta), **names).rewards


def sampler_correction(x, *, mode, low=None, high=2.0):
    """π_trainer/π_sampler, truncated or set to 0 outside the bounds, of a token or of the whole sequence."""
    source = lines_of(
        grpo_trainer.GRPOTrainer._generate_and_score_completions,
        "per_token_logps_diff = (old_per_token_logps - sampling_per_token_logps) * mask",
        "invalid_mis_mask, value=0.0",
    )
    made = SimpleNamespace(
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=high,
    )
    names = {
        "mask": x.mask.to(torch.int64),
        "old_per_token_logps": x.logps,
        "sampling_per_token_logps": x.old_logps,
        "math": math,
    }
    # The cut ends inside a call, whose closing bracket is on the next line.
    return run_lines(f"{source}\n)", grpo_trainer, self=made, **names).vllm_importance_sampling_ratio


def record_advantages(record):
    for scale in ("group", "none"):
        record.case(f"grpo_advantages_{scale}", "groups", grpo_advantages, "scores", {"scale": scale})
    record.case("rloo_advantages", "groups", rloo_advantages, "scores")
    record.case("rloo_rewards", "rollout", rloo_rewards, "scores old_logps ref_logps", {"beta": 0.05})
    for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
        record.case(f"sampler_{mode}", "sampler", sampler_correction, "", {"mode": mode, "high": 1.5})
        both = {"mode": mode, "low": 0.7 if mode.startswith("token") else 0.95, "high": 1.5}
        record.case(f"sampler_{mode}_both", "sampler", sampler_correction, "", both)


def main():
    record = Recorder("trl_1_16_policy", ["trl", "torch", "transformers", "accelerate", "numpy"])
    record_losses(record)
    record_advantages(record)
    record.write()


if __name__ == "__main__":
    main()
