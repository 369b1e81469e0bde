"""The cache folder: XDG's variable where it is set, ~/.cache where it is not, one line where neither can be written."""

from pathlib import Path

import pytest

from rlhf_jax.cache import cache_dir
from rlhf_jax.errors import UserError


def test_xdg_cache_home_is_followed_and_the_folder_made(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = cache_dir("gold", "v1")
    assert folder == tmp_path / "cache" / "rlhf_jax" / "gold" / "v1"
    assert folder.is_dir()
    assert cache_dir("gold", "v1") == folder  # a second call finds it


@pytest.mark.parametrize("value", [None, "", "relative/cache"])
def test_without_an_absolute_xdg_cache_home_it_is_dot_cache(value, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    if value is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert cache_dir("xla") == Path(tmp_path) / ".cache" / "rlhf_jax" / "xla"


def test_a_file_in_the_way_is_one_clear_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"file/rlhf_jax/gold: .*set XDG_CACHE_HOME"):
        cache_dir("gold")
