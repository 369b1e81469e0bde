"""Our value and gradient beside every peer's, in float64, to 1e-6 relative."""

import pytest

from tests.oracles.comparing import ROOT, TOLERANCE, compare, defines_test, numbers, peers
from tests.oracles.table import IDENTITIES, ORACLES, public

pytestmark = pytest.mark.usefixtures("float64", "compile_quickly")


@pytest.mark.parametrize("oracle", ORACLES, ids=str)
def test_value_and_gradient_equal_the_peers(oracle):
    errors = compare(oracle)
    assert errors.value <= TOLERANCE
    assert errors.gradient is None or errors.gradient <= TOLERANCE


@pytest.mark.parametrize("oracle", [oracle for oracle in ORACLES if oracle.reading], ids=str)
def test_in_the_other_reading_ours_is_another_number(oracle):
    assert compare(oracle, oracle.otherwise).value > 1e-3


def test_no_function_without_an_oracle_or_an_identity():
    """Whoever adds a function adds a peer's numbers, or names the test of an identity that it obeys."""
    known = {oracle.function for oracle in ORACLES} | set(IDENTITIES)
    assert public() == known


@pytest.mark.parametrize("function", IDENTITIES)
def test_the_identity_that_stands_for_a_function_is_tested(function):
    path, test = IDENTITIES[function].split("::")
    assert defines_test(ROOT / path, test)


def test_every_case_is_compared():
    """No number is stored for nothing."""
    compared = {(oracle.peer, oracle.case) for oracle in ORACLES}
    assert {(peer, case) for peer in peers() for case in numbers(peer)["cases"]} - compared == set()
