"""What the README tells a reader to type is what continuous integration runs."""

import os
import re
import subprocess
from pathlib import Path

import pytest

import rlhf_jax
from rlhf_jax import config

ROOT = Path(__file__).parents[1]
COMMANDS = ("pip", "rlhf-jax", "pytest")


def readme_commands() -> list[str]:
    """The lines of the README's ```bash blocks that begin by installing."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    return [line for block in blocks for line in block.splitlines() if line.startswith("pip install")]


def ci_commands() -> list[str]:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith("pip install")]


def test_ci_runs_the_readmes_commands_word_for_word():
    assert len(ci_commands()) == 2
    assert readme_commands()[:2] == ci_commands()


@pytest.mark.parametrize("fails", ["none", "pip", "rlhf-jax", "pytest"])
def test_ci_stops_at_the_first_failure(fails, tmp_path):
    """A Python that makes an environment whose commands say their names, and one of them fails."""
    commands = "".join(f'{name}() {{ echo {name} "$@"; [ {name} != {fails} ]; }}\n' for name in COMMANDS)
    (tmp_path / "commands").write_text(commands)
    python = tmp_path / "python"
    make = f'mkdir -p "$3/bin" && cp {tmp_path}/commands "$3/bin/activate"'
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] || {{ {make}; }}\n')
    python.chmod(0o755)
    env = {**os.environ, "PYTHON": str(python), "TMPDIR": str(tmp_path)}
    done = subprocess.run([ROOT / ".ci" / "run"], env=env, capture_output=True, text=True, timeout=60)
    said = ["pip install .", "rlhf-jax run configs/quickstart.py", "pip install .[test]", "pytest"]
    last = {"none": 4, "pip": 1, "rlhf-jax": 2, "pytest": 4}[fails]
    assert done.stdout.splitlines() == said[:last], done.stderr
    assert (done.returncode == 0) == (fails == "none")
    assert {path.name for path in tmp_path.iterdir()} == {"commands", "python"}  # the environment is gone


def test_the_config_that_the_readme_runs_is_there():
    (path,) = re.findall(r"rlhf-jax run (\S+\.py)", ci_commands()[0])
    assert list(config.load_config(ROOT / path).stages) == ["sft", "reward_model", "ppo"]


def test_version_and_licence():
    assert f"## {rlhf_jax.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f'version="{rlhf_jax.__version__}"' in (ROOT / "setup.py").read_text(encoding="utf-8")
    assert "Apache License\n                           Version 2.0" in (ROOT / "LICENSE").read_text(encoding="utf-8")
