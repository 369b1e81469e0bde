"""All oracles, and what stands for a function that no peer has: the test of an identity."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable

from rlhf_jax import losses
from tests.oracles import adapters_policy, adapters_reward, adapters_tokens
from tests.oracles.comparing import Oracle

ORACLES: tuple[Oracle, ...] = (*adapters_tokens.ORACLES, *adapters_reward.ORACLES, *adapters_policy.ORACLES)

IDENTITIES: dict[str, tuple[str, str]] = {
    "logprobs.ratio_deviation": ("tests/test_logprobs.py", ""),
}

MODULES = (
    "logprobs",
    "kl",
    "masking",
    "advantages",
    *(f"losses.{m.name}" for m in pkgutil.iter_modules(losses.__path__)),
)


def public() -> dict[str, Callable]:
    """The public functions and classes that the modules of layer 2 define, by name."""
    found = {}
    for name in MODULES:
        module = importlib.import_module(f"rlhf_jax.{name}")
        for attribute, value in vars(module).items():
            ours = inspect.isfunction(value) or inspect.isclass(value)
            if ours and value.__module__ == module.__name__ and not attribute.startswith("_"):
                found[f"{name}.{attribute}"] = value
    return found
