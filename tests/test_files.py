"""Files that are whole or not there."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from rlhf_jax.files import write_whole


def test_text_and_bytes_replace_what_was_there(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_whole(path, "¾ one\n")
    assert path.read_text(encoding="utf-8") == "¾ one\n"
    write_whole(path, b"\x00two")
    assert path.read_bytes() == b"\x00two"
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_killed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    write_whole(path, "before")
    program = f"""
        import os, signal
        from pathlib import Path
        from rlhf_jax import files
        os.fsync = lambda number: os.kill(os.getpid(), signal.SIGKILL)
        files.write_whole(Path({str(path)!r}), "after" * 100_000)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)])
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "before"
    assert all(file.name == "a.txt" or file.name.startswith(".") for file in tmp_path.iterdir())


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "a.txt", "text")
    assert not list(tmp_path.iterdir())
