"""Our value and gradient beside every peer's, in float64, to 1e-6 relative."""

import pytest

from tests.oracles.comparing import TOLERANCE, compare
from tests.oracles.table import ORACLES

pytestmark = pytest.mark.usefixtures("float64", "compile_quickly")


@pytest.mark.parametrize("oracle", ORACLES, ids=str)
def test_value_and_gradient_equal_the_peers(oracle):
    errors = compare(oracle)
    assert errors.value <= TOLERANCE
    assert errors.gradient is None or errors.gradient <= TOLERANCE


@pytest.mark.parametrize("oracle", [oracle for oracle in ORACLES if oracle.plain], ids=str)
def test_where_a_peer_departs_from_the_paper_ours_is_another_number(oracle):
    assert compare(oracle, oracle.plain).value > 1e-3
