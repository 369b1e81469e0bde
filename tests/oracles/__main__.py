"""The table of oracles: python -m tests.oracles, from the root of the repository.

Each public function of layer 2 with the peer's case that vouches for it, or the test of an identity where no peer has
it, and the largest relative errors of value and gradient over its cases. Exit code 1 if any is above the tolerance or a
function has neither.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import sys
from collections import defaultdict

import jax

from tests.oracles.comparing import TOLERANCE, Errors, Oracle, compare, numbers, peers
from tests.oracles.table import IDENTITIES, ORACLES, public


def rows() -> list[tuple[str, str, str, str, bool]]:
    """(function, what vouches for it, value error, gradient error, whether it holds), in the order of the modules."""
    of = defaultdict(list)
    for oracle in ORACLES:
        of[oracle.function].append(oracle)
    made = []
    for function in sorted(public() | set(of)):
        if function in of:
            made.append((function, *measured(of[function])))
        elif function in IDENTITIES:
            made.append((function, f"identity: {IDENTITIES[function]}", "", "", True))
        else:
            made.append((function, "NOTHING", "", "", False))
    return made


def measured(oracles: list[Oracle]) -> tuple[str, str, str, bool]:
    """The cases of one function and the largest of their errors."""
    errors = [compare(oracle) for oracle in oracles]
    value = max(e.value for e in errors)
    gradients = [e.gradient for e in errors if e.gradient is not None]
    by_peer = defaultdict(list)
    for oracle in oracles:
        by_peer[oracle.peer].append(oracle.case + "*" * bool(oracle.reading))
    cases = "; ".join(f"{peer}: {', '.join(names)}" for peer, names in by_peer.items())
    worst = Errors(value, max(gradients, default=None))
    holds = max(value, worst.gradient or 0) <= TOLERANCE
    return cases, f"{value:.1e}", "" if worst.gradient is None else f"{worst.gradient:.1e}", holds


def main() -> int:
    for peer in peers():
        print(f"{peer}: {', '.join(f'{name} {version}' for name, version in numbers(peer)['versions'].items())}")
    print(f"\n{'function':44} {'value':>8} {'gradient':>8}  oracle (* in a reading of its own, below)")
    jax.config.update("jax_disable_most_optimizations", True)  # every program here runs once
    with jax.enable_x64(True):
        made = rows()
    for function, oracle, value, gradient, _ in made:
        print(f"{function:44} {value:>8} {gradient:>8}  {oracle}")
    print()
    for oracle in ORACLES:
        if oracle.reading:
            print(f"* {oracle.peer}: {oracle.case} {oracle.reading}")
    failed = [function for function, *_, holds in made if not holds]
    print(f"\n{len(made)} functions, {len(ORACLES)} comparisons; tolerance {TOLERANCE:.0e}; failed: {failed or 'none'}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
