"""Where what is computed once is kept between runs: the user's cache folder."""

import os
from pathlib import Path

from rlhf_jax.errors import UserError


def cache_dir(*parts: str) -> Path:
    """`$XDG_CACHE_HOME/rlhf_jax/<parts>`, or below `~/.cache` where the variable is unset; made where missing.

    A relative XDG_CACHE_HOME counts as unset, as the XDG base directory specification says.
    Raises `UserError` where the folder cannot be made.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not root.is_absolute():
        root = Path.home() / ".cache"
    folder = root.joinpath("rlhf_jax", *parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: the cache folder cannot be made ({error.strerror}); set XDG_CACHE_HOME") from None
    return folder
