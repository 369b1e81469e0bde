"""Numbers of trlx at commit 3340c2f (January 2024, its last): ILQL's four losses, PPO's, GAE, running moments.

git clone https://github.com/CarperAI/trlx && git -C trlx checkout 3340c2f3a56d1d14fdd5f13ad575121fa26b6d92
python -m venv trlx-env && trlx-env/bin/pip install torch transformers accelerate
trlx-env/bin/python -m tests.oracles.make_trlx trlx        # from the root of the repository

`ILQLConfig.loss`, `PPOConfig.loss` and `get_advantages_and_returns` are called as they are. trlx's file of ILQL imports
deepspeed and torchtyping, of which the functions here use nothing but names in annotations: both are stand-ins, and the
package's `__init__`s, which import every trainer, do not run. All float64.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

from tests.oracles.make_common import Recorder

ROOT = Path(sys.argv[1])
COMMIT = "3340c2f3a56d1d14fdd5f13ad575121fa26b6d92"


class _AnyShape:
    """torchtyping's annotation, which says a shape and checks nothing."""

    def __class_getitem__(cls, item):
        return cls


class _Anything(ModuleType):
    """A module whose every name is an empty class: for imports that are never used here."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def load(name: str) -> ModuleType:
    """A module of trlx without its packages' `__init__`s."""
    for package in ("trlx", "trlx.data", "trlx.models", "trlx.utils"):
        sys.modules.setdefault(package, ModuleType(package)).__path__ = [str(ROOT / package.replace(".", "/"))]
    for absent in ("deepspeed", "torchtyping"):
        sys.modules.setdefault(absent, ModuleType(absent)).__spec__ = ModuleSpec(absent, None)
    sys.modules["torchtyping"].TensorType = _AnyShape
    sys.modules.setdefault("trlx.models.modeling_base", _Anything("trlx.models.modeling_base"))
    return importlib.import_module(name)


ilql, ppo, modeling = (
    load(f"trlx.{name}") for name in ("models.modeling_ilql", "models.modeling_ppo", "utils.modeling")
)
ILQLBatch = load("trlx.data.ilql_types").ILQLBatch


def ilql_config(*, tau, gamma, beta, cql_scale=0.1, awac_scale=1.0):
    return ilql.ILQLConfig(
        name="ilqlconfig",
        tau=tau,
        gamma=gamma,
        cql_scale=cql_scale,
        awac_scale=awac_scale,
        alpha=0.005,
        beta=beta,
        steps_for_target_q_sync=1,
        two_qs=True,
        gen_kwargs={},
    )


def ilql_batch(x):
    """`input_ids[t + 1]` is action t; `dones` is 1 at each state that an action follows, and 0 at the last."""
    count = x.mask.shape[1]
    ends = torch.zeros_like(x.mask[:, :1])
    return ILQLBatch(
        input_ids=torch.cat([torch.zeros_like(x.actions[:, :1]), x.actions], 1),
        attention_mask=torch.ones(len(x.mask), count + 1),
        rewards=x.rewards,
        states_ixs=torch.arange(count + 1).expand(len(x.mask), -1),
        actions_ixs=torch.arange(count).expand(len(x.mask), -1),
        dones=torch.cat([x.mask, ends], 1).to(torch.int64),
    )


def ilql_loss(x, **params):
    """The sum of all four, each with its scale."""
    outputs = (x.logits, (list(x.qs), list(x.target_qs), x.values[..., None]))
    return ilql_config(**params).loss(outputs, ilql_batch(x))[0]


def ilql_term(x, *, term, **params):
    """One of the four, as a difference of sums that differ in its scale, or, for Q and V, with other inputs' held."""
    if term == "cql":
        return ilql_loss(x, cql_scale=1.0, awac_scale=0.0, **params) - ilql_loss(
            x, cql_scale=0.0, awac_scale=0.0, **params
        )
    if term == "awac":
        return ilql_loss(x, cql_scale=0.0, awac_scale=1.0, **params) - ilql_loss(
            x, cql_scale=0.0, awac_scale=0.0, **params
        )
    return ilql_loss(x, cql_scale=0.0, awac_scale=0.0, **params)


def record_ilql(record):
    params = {"tau": 0.7, "gamma": 0.99, "beta": 0.8}
    leaves = "logits qs values"
    record.case("ilql", "offline", ilql_loss, leaves, {**params, "cql_scale": 0.1, "awac_scale": 1.0})
    record.case("ilql_q_and_v", "offline", ilql_term, "qs values", {**params, "term": "q_and_v"})
    record.case("ilql_cql", "offline", ilql_term, "qs", {**params, "term": "cql"})
    record.case("ilql_awac", "offline", ilql_term, "logits", {**params, "term": "awac"})


def ppo_config(**params):
    """Only what the two methods read."""
    return SimpleNamespace(
        **{"gamma": 0.97, "lam": 0.9, "cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1, **params}
    )


def ppo_loss(x, **params):
    args = (x.logps, x.values, x.old_logps, x.old_values, x.advantages, x.returns, x.mask.double())
    return ppo.PPOConfig.loss(ppo_config(**params), *args)[0]


def ppo_gae(x, *, output, whiten, **params):
    """On rows that are kept as a whole: trlx has no mask here."""
    width = x.rewards.shape[1]
    method = ppo.PPOConfig.get_advantages_and_returns
    return method(ppo_config(**params), x.values, x.rewards, width, use_whitening=whiten)[output]


def record_ppo(record):
    record.case(
        "ppo_loss", "rollout", ppo_loss, "logps values", {"cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1}
    )
    gae = {"gamma": 0.97, "lam": 0.9}
    record.case("gae_advantages", "rollout", ppo_gae, "", {**gae, "output": 0, "whiten": False})
    record.case("gae_whitened", "rollout", ppo_gae, "", {**gae, "output": 0, "whiten": True})
    record.case("gae_returns", "rollout", ppo_gae, "rewards values", {**gae, "output": 1, "whiten": False})
    for shift_mean in (True, False):
        record.case(
            f"whiten_{shift_mean}",
            "rollout",
            lambda x, shift_mean: modeling.whiten(x.rewards, shift_mean=shift_mean),
            "rewards",
            {"shift_mean": shift_mean},
        )
    record.case("logprobs", "logits", lambda x: modeling.logprobs_of_labels(x.logits, x.tokens), "logits")


def running_moments(x):
    """(mean, biased variance, unbiased std) after each batch."""
    moments, rows = modeling.RunningMoments(), []
    for batch in x.scores:
        moments.update(batch)
        rows.append(torch.stack([torch.as_tensor(m) for m in (moments.mean, moments.var, moments.std)]))
    return torch.stack(rows)


def controller(x, *, init, target, horizon, n_steps):
    """The coefficient after each of a stream of KLs."""
    made, coefs = ppo.AdaptiveKLController(init, target, horizon), []
    for kl in x.scores.abs().mean(-1).tolist():
        made.update(kl, n_steps)
        coefs.append(float(made.value))
    return torch.tensor(coefs)


def main():
    record = Recorder("trlx", ["torch", "transformers", "numpy"], trlx=COMMIT)
    record_ilql(record)
    record_ppo(record)
    record.case("running_moments", "stream", running_moments)
    params = {"init": 0.15, "target": 0.8, "horizon": 10_000, "n_steps": 512}
    record.case("adaptive_kl", "stream", controller, "", params)
    record.write()


if __name__ == "__main__":
    main()
