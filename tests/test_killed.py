"""Real processes, killed, and their files damaged, at any moment: the same command ends where an unbroken run does."""

import contextlib
import os
import random
import signal
import subprocess

import pytest

from tests.faults import STEPS, Faulty, at_save, at_step


def unbroken(faulty):
    """The workdir of a run that nothing happens to."""
    done = faulty.run(faulty.folder / "whole")
    assert done.returncode == 0, done.stderr
    return faulty.folder / "whole"


def newest(workdir, stage):
    """The largest file of the stage's newest checkpoint."""
    steps = [path for path in (workdir / stage / "checkpoints").iterdir() if path.name.isdigit()]
    files = [path for path in max(steps, key=lambda path: int(path.name)).rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@contextlib.contextmanager
def disk(folder):
    """A disk of its own for a folder, of 64 MB, where the system lets one be mounted."""
    folder.mkdir()
    is_mounted = (
        os.geteuid() == 0 and not subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder]).returncode
    )
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)


def filled(path, moment):
    """At the moment the rest of the disk fills with a file; never says that the moment has come."""

    def fill(seconds):
        if not path.exists() and moment(seconds):
            with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        return False

    return fill


def test_a_run_that_is_killed_filled_up_and_damaged_ends_where_an_unbroken_one_does(tmp_path):
    """Killed while it saves, its newest checkpoint truncated; the disk full; one flipped, a finished stage damaged."""
    faulty = Faulty(tmp_path, "sft", "reward_model")
    whole = unbroken(faulty)
    with disk(tmp_path / "disk") as is_small:
        broken = tmp_path / "disk" / "broken"
        assert faulty.end(broken, at_save(broken, "sft", 12))[0] == -signal.SIGKILL
        truncate(newest(broken, "sft"))
        moment = at_step(broken, "reward_model", 10)
        filler = tmp_path / "disk" / "filler"
        code, said, _ = faulty.end(broken, filled(filler, moment) if is_small else moment)
        if is_small:
            filler.unlink()
            [line] = [line for line in said.splitlines() if line.startswith("error: ")]
            assert code == 2 and ("no disk space" in line or "no space left" in line)
            assert "Traceback" not in said
        else:
            assert code == -signal.SIGKILL
        flip(newest(broken, "reward_model"))
        flip(next(path for path in (broken / "sft" / "params").rglob("*") if path.parent.name == "d"))
        flip(broken / "tokenizer.model")
        done = faulty.run(broken)
        assert done.returncode == 0, done.stderr
        faulty.check_same(whole, broken)
        aside = {path.relative_to(broken).parent.as_posix() for path in broken.rglob("*.damaged")}
        assert aside == {".", "sft", "sft/checkpoints", "reward_model/checkpoints"}
        told = [line for line in done.stderr.splitlines() if "damaged" in line]
        named = ("tokenizer.model", "sft/params", "reward_model: the checkpoint of step")
        assert len(told) == 3 and all(name in line for name, line in zip(named, told, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_two_dozen_kills_at_random_moments(tmp_path, seed):
    """In each stage at steps and a part of a second after them, and at any second of start, compilation and reading."""
    faulty = Faulty(tmp_path, *STEPS)
    whole, draw, broken, codes = unbroken(faulty), random.Random(seed), tmp_path / "broken", []
    for stage, steps in STEPS.items():
        for step in sorted(draw.sample(range(1, steps), 6)):
            moment = shortly_after(at_step(broken, stage, step), draw.uniform(0, 0.2))
            codes.append(faulty.end(broken, moment)[0])
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
            code, said, seconds = faulty.end(broken, shortly_after(lambda _: True, draw.uniform(0, 15)), number)
            codes.append(code)
            print(f"seed {seed}: {stage}: code {code}, {seconds:.1f} s after signal {number}")
            assert code != 128 + number or said.splitlines()[-1].endswith("the same command goes on")
    print(f"seed {seed}: {codes.count(-signal.SIGKILL)} kills")
    assert codes.count(-signal.SIGKILL) >= 20
    assert set(codes) <= {-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM, 0}  # 0: it had come to its end
    done = faulty.run(broken)
    assert done.returncode == 0, done.stderr
    faulty.check_same(whole, broken)
    assert not list(broken.rglob("*.damaged*"))


def shortly_after(moment, late):
    """So many seconds after a moment."""
    seen = []

    def later(seconds):
        if not seen and moment(seconds):
            seen.append(seconds)
        return bool(seen) and seconds >= seen[0] + late

    return later
