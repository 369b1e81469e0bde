"""All oracles, and what stands for a function that no peer has: the test of an identity."""

import importlib
import inspect
import pkgutil

from rlhf_jax import losses
from tests.oracles import adapters_offline, adapters_policy, adapters_preference, adapters_reward, adapters_tokens
from tests.oracles.comparing import Oracle

ORACLES: tuple[Oracle, ...] = (
    *adapters_tokens.ORACLES,
    *adapters_reward.ORACLES,
    *adapters_preference.ORACLES,
    *adapters_policy.ORACLES,
    *adapters_offline.ORACLES,
)

IDENTITIES: dict[str, str] = {}

NOT_COMPARED: set[tuple[str, str]] = set()

MODULES = ("logprobs", "kl", "masking", "advantages", "importance", "normalizer")


def public() -> set[str]:
    """The public functions that the modules of layer 2 define, and the classes that hold a method of their own."""
    names = (*MODULES, *(f"losses.{module.name}" for module in pkgutil.iter_modules(losses.__path__)))
    found = set()
    for name in names:
        module = importlib.import_module(f"rlhf_jax.{name}")
        for attribute, value in vars(module).items():
            is_ours = getattr(value, "__module__", "") == module.__name__ and not attribute.startswith("_")
            if is_ours and (inspect.isfunction(value) or hasattr(value, "update")):
                found.add(f"{name}.{attribute}")
    return found
