"""All oracles, and what stands for a function that no peer has: the test of an identity."""

import importlib
import inspect
import pkgutil

from rlhf_jax import losses
from tests.oracles import (
    adapters_offline,
    adapters_policy,
    adapters_preference,
    adapters_reward,
    adapters_tokens,
    adapters_unpaired,
)
from tests.oracles.comparing import Oracle

ORACLES: tuple[Oracle, ...] = (
    *adapters_tokens.ORACLES,
    *adapters_reward.ORACLES,
    *adapters_preference.ORACLES,
    *adapters_unpaired.ORACLES,
    *adapters_policy.ORACLES,
    *adapters_offline.ORACLES,
)

IDENTITIES: dict[str, str] = {
    "advantages.remax": "tests/test_advantages.py::test_remax_is_what_a_sample_has_over_the_greedy_completion",
    "kl.FixedKL": "tests/test_kl.py::test_fixed_kl_stays",
    "logprobs.ratio_deviation": "tests/test_logprobs.py::test_ratio_deviation_is_the_largest_either_way",
    "losses.distillation.jensen_shannon": (
        "tests/losses/test_distillation.py::test_jensen_shannon_is_the_entropy_that_mixing_adds"
    ),
    "losses.offline.perturbed_logits": (
        "tests/losses/test_offline.py::test_the_extracted_policy_weighs_the_behaviour_policy_by_the_advantage"
    ),
    "losses.policy.p3o": "tests/losses/test_policy.py::test_p3os_gradient_is_the_pairwise_policy_gradient",
    "losses.policy.trust_region_penalty": "tests/losses/test_policy.py::test_a_trust_region_taxes_what_lies_outside",
    "losses.regularizers.elastic_weight_consolidation": (
        "tests/losses/test_regularizers.py::test_consolidation_with_a_fisher_of_one_is_half_the_squared_distance"
    ),
    "losses.regularizers.fisher_diagonal": (
        "tests/losses/test_regularizers.py::test_fisher_of_softmax_logits_is_p_times_one_minus_p"
    ),
    "losses.regularizers.pretraining_mix": (
        "tests/losses/test_regularizers.py::test_pretraining_is_cross_entropy_at_its_price"
    ),
    "masking.keep": "tests/properties.py::test_garbage_in_the_pads_changes_no_value_and_no_gradient",
    "masking.last_index": "tests/test_masking.py::test_last_index_of_any_padding",
    "masking.positions": "tests/test_masking.py::test_positions_count_the_kept_tokens_before",
    "normalizer.normalize": "tests/test_normalizer.py::test_scores_come_out_with_mean_zero_and_variance_one",
}
"""What no peer has, with the test of something that it must obey."""

MODULES = ("logprobs", "kl", "masking", "advantages", "importance", "normalizer")


def public() -> set[str]:
    """The public functions of layer 2, and its classes that hold an `update`, by the module that they are read from.

    A function is public if it is `@typed`: what is not checks arguments or is shared among modules. What a module lists
    in its `__all__` is its own, wherever it is defined.
    """
    names = (*MODULES, *(f"losses.{module.name}" for module in pkgutil.iter_modules(losses.__path__)))
    modules = {name: importlib.import_module(f"rlhf_jax.{name}") for name in names}
    listed = {getattr(m, attribute): name for name, m in modules.items() for attribute in getattr(m, "__all__", ())}
    found = set()
    for name, module in modules.items():
        for attribute, value in vars(module).items():
            is_typed = inspect.isfunction(value) and hasattr(value, "__wrapped__")
            is_state = inspect.isclass(value) and hasattr(value, "update")
            if attribute.startswith("_") or not (is_typed or is_state):
                continue
            if listed.get(value, name if value.__module__ == module.__name__ else None) == name:
                found.add(f"{name}.{attribute}")
    return found
