"""What made a run: versions of packages, the commit of the checkout, the command."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

from rlhf_jax import __version__

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "scikit-learn")


def provenance(command: list[str]) -> dict[str, Any]:
    """What made a run: versions, commit, command."""
    return {"versions": versions(), "commit": _commit(), "command": command}


def versions() -> dict[str, str]:
    """Of this package, of Python, and of the packages that numbers depend on."""
    own = {"rlhf_jax": __version__, "python": platform.python_version()}
    return own | {package: importlib.metadata.version(package) for package in _PACKAGES}


def _commit() -> str | None:
    """The commit of the checkout that the package is run or was installed from; "+" after it where files differ.

    An installed package is of the checkout in the current folder if all its sources are the same.
    """
    here = Path(__file__).parent
    for folder in (here, Path.cwd() / here.name):
        try:
            if _sources(folder) == _sources(here) and _git(folder, "ls-files", "__init__.py"):
                return _git(folder, "rev-parse", "HEAD") + ("+" if _git(folder, "status", "--porcelain", ".") else "")
        except (OSError, subprocess.SubprocessError):
            continue
    return None


def _sources(package: Path) -> dict[str, bytes]:
    return {str(path.relative_to(package)): path.read_bytes() for path in package.rglob("*.py")}


def _git(folder: Path, *args: str) -> str:
    command = ["git", *args]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
