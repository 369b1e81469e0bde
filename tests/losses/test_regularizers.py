"""Terms that are added to another loss."""

import numpy as np

from rlhf_jax.losses.regularizers import entropy_bonus
from tests.properties import Case, Properties, normal


class TestProperties(Properties):
    cases = (Case(entropy_bonus, normal("entropy")),)


def test_less_entropy_costs_more():
    loss, diagnostics = entropy_bonus(np.float32([0.5, 2.0]))
    assert loss.tolist() == [-0.5, -2.0] and diagnostics == {}
