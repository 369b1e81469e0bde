"""The numerical traps that others fell into, each with the tests that hold it; a test that goes is missed here."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
TRAPS = {
    "what a mask leaves out is 0 and harms no gradient": (
        "properties.py::test_garbage_in_the_pads_changes_no_value_and_no_gradient",
        "properties.py::test_finite_when_all_is_masked",
        "algorithms/test_ppo.py::test_an_iterations_arrays_are_those_of_the_definitions",
    ),
    "logits[t] predicts tokens[t + 1], positions come from the mask": (
        "test_logprobs.py::test_logits_predict_the_next_token_and_the_first_is_predicted_by_nothing",
        "models/test_transformer.py::test_any_padding_gives_the_numbers_of_the_text_alone",
        "models/test_transformer.py::test_packed_texts_do_not_see_each_other",
        "sampling/test_decode.py::test_rows_end_with_eos_and_hold_pad_after_it",
    ),
    "what sampling does to the logits is in the ratio, which starts at 1": (
        "sampling/test_decode.py::test_recorded_logps_are_those_of_the_training_forward",
        "algorithms/test_ppo.py::test_the_ratio_is_one_before_the_first_update",
    ),
    "rewards and scores are floats, of at least 32 bits": (
        "properties.py::test_half_precision_is_promoted_and_double_kept",
        "properties.py::test_integers_and_wrong_shapes_are_refused_by_name",
    ),
    "k1 in the reward; as losses k1, k2 and k3 have other gradients": (
        "test_kl.py::test_k1_in_the_reward_gives_the_gradient_of_the_kl",
        "test_kl.py::test_expected_gradients_as_losses",
    ),
    "the score sits on the last completion token; without EOS a penalty, by name": (
        "test_advantages.py::test_the_score_sits_on_the_last_kept_token",
        "rewards/test_shaping.py::test_shaping",
        "test_inference.py::test_rows_that_are_too_long_are_cut_and_counted",
    ),
    "microbatches are the whole batch; token mean and sequence mean differ": (
        "test_train_step.py::test_microbatches_are_the_whole_batch",
        "test_train_step.py::test_token_mean_and_sequence_mean_differ_on_unequal_rows",
    ),
    "whitening is biased, and may put the mean back": (
        "test_masking.py::test_whiten_shifts_the_mean_to_zero_or_puts_it_back",
    ),
    "IPO is over sums in the paper and over means elsewhere": (
        "losses/test_preference.py::test_ipo_is_least_at_its_margin_and_sppo_at_both",
        "oracles/test_oracles.py::test_in_the_other_reading_ours_is_another_number",
    ),
    "all that changes is state: a killed run ends where an unbroken one does": (
        "test_killed.py::test_a_run_that_is_killed_filled_up_and_damaged_ends_where_an_unbroken_one_does",
        "algorithms/test_ppo.py::test_a_stopped_run_ends_where_an_unbroken_one_does",
    ),
    "what cannot be negative never is": (
        "test_logprobs.py::test_entropy_is_never_negative_nor_above_log_v",
        "test_kl.py::test_what_cannot_be_negative_never_is",
    ),
    "nothing is traced again after the first step": (
        "test_train_step.py::test_a_step_is_traced_once",
        "algorithms/test_ppo.py::test_the_ratio_is_one_before_the_first_update",
        "algorithms/test_supervised.py::test_microbatches_on_a_mesh_take_the_same_steps",
    ),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_has_its_tests(trap):
    for place in TRAPS[trap]:
        path, _, name = place.partition("::")
        tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, place
