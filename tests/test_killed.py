"""Real processes, killed, and their files damaged, at any moment: the same command ends where an unbroken run does."""

import random
import signal

import pytest

from tests.faults import STEPS, Faulty, at_save, at_step, check_same


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    return Faulty(tmp_path_factory.mktemp("faulty"))


@pytest.fixture(scope="module")
def whole(faulty):
    """An unbroken run."""
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


def test_a_run_that_is_killed_and_damaged_in_every_stage_ends_where_an_unbroken_one_does(faulty, whole):
    """Killed while it saves, its newest checkpoint truncated; killed, one flipped; stopped, finished stages damaged."""
    broken = faulty.folder / "broken"
    assert faulty.end(broken, at_save(broken, "sft", 12))[0] == -signal.SIGKILL
    truncate(newest(broken, "sft"))
    assert faulty.end(broken, at_step(broken, "reward_model", 18))[0] == -signal.SIGKILL
    flip(newest(broken, "reward_model"))
    code, said, _ = faulty.end(broken, at_step(broken, "ppo", 8), signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    [stopped] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "the same command goes on" in stopped
    flip(next(path for path in (broken / "sft" / "params").rglob("*") if path.parent.name == "d"))
    truncate(broken / "reward_model" / "summary.json")
    done = faulty.run(broken)
    assert done.returncode == 0, done.stderr
    check_same(whole, broken)
    aside = {path.relative_to(broken).as_posix() for path in broken.rglob("*.damaged")}
    assert {"sft/params.damaged", "reward_model/summary.json.damaged"} <= aside
    assert {path.rpartition("/")[0] for path in aside} >= {"sft/checkpoints", "reward_model/checkpoints"}
    assert sum("made again" in line for line in done.stderr.splitlines()) == 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_two_dozen_kills_at_random_moments(faulty, whole, seed):
    """In each stage at steps and a part of a second after them, and at any second of start, compilation and reading."""
    draw, broken, kills = random.Random(seed), faulty.folder / f"kills{seed}", 0
    for stage, steps in STEPS.items():
        for step in sorted(draw.sample(range(1, steps), 6)):
            late, ready = draw.uniform(0, 0.2), at_step(broken, stage, step)
            seen = []

            def moment(seconds, ready=ready, late=late, seen=seen):
                if not seen and ready(seconds):
                    seen.append(seconds)
                return bool(seen) and seconds >= seen[0] + late

            kills += faulty.end(broken, moment)[0] == -signal.SIGKILL
        for _ in range(2):
            after = draw.uniform(0, 15)
            kills += faulty.end(broken, lambda seconds, after=after: seconds >= after)[0] == -signal.SIGKILL
    print(f"seed {seed}: {kills} kills")
    assert kills >= 20
    done = faulty.run(broken)
    assert done.returncode == 0, done.stderr
    check_same(whole, broken)
    assert not list(broken.rglob("*.damaged*"))
