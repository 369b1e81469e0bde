"""Numbers of OpenRLHF 0.11.2: its losses, KL estimators, rewards, advantages and KL controller.

python -m venv openrlhf && openrlhf/bin/pip install torch numpy
pip download --no-deps openrlhf==0.11.2 && unzip openrlhf-0.11.2-*.whl -d openrlhf-0.11.2
openrlhf/bin/python -m tests.oracles.make_openrlhf openrlhf-0.11.2/openrlhf-0.11.2.data/purelib

The package is unpacked and not installed, for it needs GPUs; `deepspeed`, which two of its files import and none of the
functions here uses, is an empty module. The losses are called as they are. GAE and the group baselines are methods of a
class whose file imports Ray: they are cut out of its source and run as they are. All float64, which the KL estimators
need `float64_throughout` for. `compute_approx_kl` also clamps to ±10, far from these inputs.
"""

import ast
import importlib.util
import sys
import textwrap
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

from tests.oracles.make_common import Recorder, by_row, float64_throughout, masked_sum

ROOT = Path(sys.argv[1]) / "openrlhf"
PAIR = "chosen_logps rejected_logps"


def load(path: str) -> ModuleType:
    """A module by its file, so that the `__init__` of its packages, which import everything, do not run."""
    for package in ("openrlhf", "openrlhf.models"):
        sys.modules.setdefault(package, ModuleType(package)).__path__ = []
    sys.modules.setdefault("deepspeed", ModuleType("deepspeed"))
    name = "openrlhf." + path.removesuffix(".py").replace("/", ".")
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


utils, losses, controllers = (
    load(f) for f in ("models/utils.py", "models/loss.py", "trainer/ppo_utils/kl_controller.py")
)


def maker_lines(first: str, last: str) -> str:
    """Lines of `compute_advantages_and_returns`, of a file that cannot be imported without Ray."""
    lines = (ROOT / "trainer/ppo_utils/experience_maker.py").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if first in line)
    stop = next(i for i, line in enumerate(lines) if i >= start and last in line)
    return textwrap.dedent("\n".join(lines[start : stop + 1]))


def maker_method(name: str):
    """A method of the experience maker, as a function."""
    tree = ast.parse((ROOT / "trainer/ppo_utils/experience_maker.py").read_text())
    method = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)
    method.decorator_list = []  # no_grad: the gradients are wanted here
    scope = {"torch": torch, "Tuple": tuple}
    exec(compile(ast.Module([method], []), name, "exec"), scope)
    return scope[name]


def policy_loss(x, *, token_level=True, sequence=False, **params):
    advantages = x.seq_advantages[:, None] if sequence else x.advantages
    made = losses.PolicyLoss(token_level_loss=token_level, **params)
    return made(x.logps, x.old_logps, advantages, x.mask)[0]


def corrected_policy_loss(x, *, level, mode, threshold):
    """PPO's loss times the correction for a sampler; what `old_logps` is to the reference serves as the sampler's."""
    made = losses.PolicyLoss(is_correction_level=level, is_correction_mode=mode, is_correction_threshold=threshold)
    return made(x.logps, x.old_logps, x.advantages, x.mask, rollout_log_probs=x.ref_logps)[0]


def value_loss(x, *, clip_eps, token_level):
    return losses.ValueLoss(clip_eps, token_level)(x.values, x.old_values, x.returns, x.mask)


def record_losses(record):
    plain = {"clip_eps_low": 0.2, "clip_eps_high": 0.28}
    record.case("policy_loss", "rollout", policy_loss, "logps", plain)
    record.case("policy_loss_sequences", "rollout", policy_loss, "logps", {**plain, "token_level": False})
    record.case("policy_loss_dual", "rollout", policy_loss, "logps", {**plain, "dual_clip": 1.2})
    gspo = {"clip_eps_low": 0.03, "clip_eps_high": 0.04, "policy_loss_type": "gspo", "sequence": True}
    record.case("policy_loss_gspo", "rollout", policy_loss, "logps", gspo)
    for level, mode in (("token", "clip"), ("token", "mask")):
        params = {"level": level, "mode": mode, "threshold": [0.7, 1.3]}
        record.case(f"policy_loss_{level}_{mode}", "rollout", corrected_policy_loss, "logps", params)
    for clip_eps in (0.2, None):
        for token_level in (True, False):
            params = {"clip_eps": clip_eps, "token_level": token_level}
            record.case(f"value_loss_{clip_eps}_{token_level}", "rollout", value_loss, "values", params)
    scores = "chosen_scores rejected_scores"
    record.case("PairWiseLoss_of_k", "ranked", all_pairs, "scores")
    for name, margins in (("PairWiseLoss", False), ("PairWiseLoss", True), ("LogExpLoss", False)):
        wrt = f"{scores} margin" if margins else scores
        record.case(f"{name}_{margins}", "scored_pairs", reward_loss, wrt, {"name": name, "margins": margins})


def all_pairs(x):
    """PairWiseLoss of all pairs of a prompt's completions, best first, as one batch a prompt: a mean over the pairs."""
    better, worse = torch.triu_indices(*([x.scores.shape[1]] * 2), offset=1)
    return by_row(x, lambda row: losses.PairWiseLoss()(row.scores[0, better], row.scores[0, worse]))


def reward_loss(x, *, name, margins):
    """A loss of reward models, of each pair alone."""
    loss = getattr(losses, name)()
    return by_row(x, lambda row: loss(row.chosen_scores, row.rejected_scores, row.margin if margins else None))


def dpo_loss(x, *, beta=0.3, **params):
    """DPOLoss of each pair alone, on sums over its tokens."""
    sums = SimpleNamespace(
        **{
            f"{ref}{side}": masked_sum(getattr(x, f"{ref}{side}_logps"), getattr(x, f"{side}_mask"))
            for ref in ("", "ref_")
            for side in ("chosen", "rejected")
        }
    )
    loss = losses.DPOLoss(beta, **params)
    return by_row(sums, lambda row: loss(row.chosen, row.rejected, row.ref_chosen, row.ref_rejected)[0])


def record_preferences(record):
    record.case("dpo", "pairs", dpo_loss, PAIR, {"beta": 0.3})
    record.case("cdpo", "pairs", dpo_loss, PAIR, {"beta": 0.3, "label_smoothing": 0.1})
    record.case("ipo", "pairs", dpo_loss, PAIR, {"beta": 0.3, "ipo": True})
    for token_level in (True, False):
        record.case(
            f"sft_{token_level}",
            "rollout",
            lambda x, token_level: losses.SFTLoss(token_level)(x.logps, x.mask),
            "logps",
            {"token_level": token_level},
        )
    record.case("gpt_lm", "logits", lambda x: losses.GPTLMLoss()(x.logits, x.tokens), "logits")


def record_rewards(record):
    with float64_throughout():
        for estimator in ("k1", "k2", "k3"):
            record.case(
                estimator,
                "rollout",
                lambda x, kl_estimator: utils.compute_approx_kl(x.logps, x.ref_logps, kl_estimator=kl_estimator),
                "logps ref_logps",
                {"kl_estimator": estimator},
            )
    record.case(
        "rewards",
        "rollout",
        lambda x, kl_coef: utils.compute_reward(x.scores, kl_coef, (x.logps - x.ref_logps) * x.mask, x.mask),
        "scores logps ref_logps",
        {"kl_coef": 0.3},
    )
    gae = maker_method("get_advantages_and_returns")
    for output, name in enumerate(("gae_advantages", "gae_returns")):
        record.case(
            name,
            "rollout",
            lambda x, output, gamma, lam: gae(None, x.values, x.rewards, x.mask, gamma, lam)[output],
            "rewards values" if name == "gae_returns" else "",  # the peer detaches the advantages
            {"output": output, "gamma": 0.97, "lam": 0.9},
        )
    record.case(
        "log_probs", "logits", lambda x: utils.log_probs_from_logits(x.logits, x.tokens, temperature=1.0), "logits"
    )


def baseline(x, *, estimator):
    """The reward shaping of one estimator, in groups of a prompt."""
    source = maker_lines('if args.algo.advantage.estimator == "rloo":', "rewards = rewards - rewards.mean()")
    args = SimpleNamespace(
        algo=SimpleNamespace(advantage=SimpleNamespace(estimator=estimator)),
        rollout=SimpleNamespace(n_samples_per_prompt=x.scores.shape[1]),
    )
    scope = {"args": args, "rewards": x.scores}
    exec(source, scope)  # the peer's own lines
    return scope["rewards"]


def whiten(advantages, mask):
    """What ends its advantages: whitening over all tokens of the batch that the mask keeps, by the biased variance."""
    source = maker_lines("all_advantages = torch.cat(", "exp.advantages = (exp.advantages - mean) * rstd")
    args = SimpleNamespace(algo=SimpleNamespace(advantage=SimpleNamespace(no_std_norm=False)))
    experience = SimpleNamespace(advantages=advantages, action_mask=mask)
    with float64_throughout():
        exec(source, {"args": args, "experiences": [experience], "torch": torch})  # the peer's own lines
    return experience.advantages * mask


def reinforce_plus_plus(x, *, gamma):
    """Rewards summed from the end, whitened."""
    return whiten(maker_method("get_cumulative_returns")(None, x.rewards, x.mask, gamma), x.mask)


def record_advantages(record):
    for estimator in ("rloo", "dr_grpo", "group_norm"):
        record.case(f"baseline_{estimator}", "groups", baseline, "scores", {"estimator": estimator})
    record.case("whiten", "rollout", lambda x: whiten(x.rewards, x.mask), "rewards")
    for gamma in (1.0, 0.9):
        record.case(f"reinforce_plus_plus_{gamma}", "rollout", reinforce_plus_plus, "rewards", {"gamma": gamma})


def controller(x, *, init, target, horizon, n_steps):
    """The coefficient after each of a stream of KLs."""
    made, coefs = controllers.AdaptiveKLController(init, target, horizon), []
    for kl in x.scores.abs().mean(-1).tolist():
        made.update(kl, n_steps)
        coefs.append(float(made.value))
    return torch.tensor(coefs)


def main():
    metadata = next(ROOT.parents[2].glob("*.dist-info/METADATA")).read_text()
    installed = next(line for line in metadata.splitlines() if line.startswith("Version: ")).removeprefix("Version: ")
    record = Recorder("openrlhf", ["torch", "numpy"], openrlhf=installed)
    record_losses(record)
    record_preferences(record)
    record_rewards(record)
    record_advantages(record)
    for target in (0.8, 4.0):
        params = {"init": 0.15, "target": target, "horizon": 10_000, "n_steps": 512}
        record.case(f"adaptive_kl_{target}", "stream", controller, "", params)
    record.write()


if __name__ == "__main__":
    main()
