"""Make the environments of the libraries that `rlhf-jax bench` measures beside this one.

    python benchmarks/make_venvs.py [--venvs DIR] [trl trl_ppo tunix]

`trl` is the newest TRL, `trl_ppo` the last that has PPO, `tunix` google-tunix. An environment that is there is left as
it is; remove it to have it made anew. For PyTorch without CUDA name its index in PIP_EXTRA_INDEX_URL first.
"""

import argparse
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from rlhf_jax.cache import cache_dir

TORCH = ("torch", "transformers", "accelerate", "datasets")
PACKAGES = {
    "trl": ("trl", *TORCH),
    "trl_ppo": ("trl==1.12.0", *TORCH),
    "tunix": ("google-tunix",),
}
"""What pip installs in each."""


def main() -> int:
    """Make those that are named; the exit code is 1 where pip could not install one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venvs", type=Path, help="the folder; without it that in the user's cache")
    parser.add_argument("names", nargs="*", help="trl, trl_ppo or tunix; all of them without")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in PACKAGES]
    if unknown:
        parser.error(f"{', '.join(unknown)}: there are {', '.join(PACKAGES)}")
    folder, failed = args.venvs or cache_dir("bench"), False
    for name in args.names or PACKAGES:
        place = folder / name
        if place.exists():
            print(f"{place} is there")
            continue
        venv.create(place, with_pip=True)
        done = subprocess.run([place / "bin" / "python", "-m", "pip", "install", *PACKAGES[name]], check=False)
        if done.returncode:
            shutil.rmtree(place)  # the next try begins anew
            print(f"{name}: pip could not install {' '.join(PACKAGES[name])}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
