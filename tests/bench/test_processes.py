"""Processes in turn, and what is kept of them; the peers here are shell scripts."""

import json
import sys

import pytest

from rlhf_jax.bench.processes import Bench, Measurement, _digest
from rlhf_jax.bench.work import choose
from rlhf_jax.errors import UserError
from rlhf_jax.records import write_json

OURS = {"seconds": 2.0, "tokens": 100.0, "flops": 4e9, "matmul_rate": 4e9, "versions": {"jax": "1"}, "at": "2026-01-01"}


def bench(tmp_path, *, what="sft", peers=("trl",), pairs=2, limit=30.0):
    works = choose("tiny", what, accelerator=False)
    made = Bench(works, peers, pairs, tmp_path / "bench", tmp_path / "venvs", limit)
    (tmp_path / "bench" / "models" / works[0].weights).mkdir(parents=True, exist_ok=True)
    write_json(tmp_path / "bench" / "bench.json", {"sources": _digest()})
    for work in works:
        for pair in range(pairs):
            write_json(made._path(Measurement(work, "ours", pair)), OURS)
    return made


def peer(tmp_path, body):
    python = tmp_path / "venvs" / "trl" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\necho $2 >> {tmp_path}/calls\n{body}\n")
    python.chmod(0o755)


def calls(tmp_path):
    path = tmp_path / "calls"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_sides_take_turns():
    works = choose("tiny", "sft,rm", accelerator=False)
    order = [(one.pair, one.work.what, one.side) for one in Bench(works, ["trl"], 2, None, None, 1).measurements()]
    assert order == [(p, what, side) for p in (0, 1) for what in ("sft", "rm") for side in ("ours", "trl")]


def test_variants_without_a_peer_of_their_own_share_one():
    works = choose("tiny", "ppo", accelerator=False)
    made = Bench(works, ["trl"], 1, None, None, 1).measurements()
    assert [one.side for one in made].count("ours") == 4
    assert len({one.key for one in made if one.side == "trl"}) == 2  # that run to the limit, and that end


def test_sweeps_are_measured_once():
    works = choose("tiny", "sft,sweep", accelerator=False)
    made = Bench(works, [], 3, None, None, 1).measurements()
    assert [one.done.what for one in made] == ["sft", "sweep/apart", "sweep/together", "sft", "sft"]


def test_what_is_there_is_not_measured_again(tmp_path):
    peer(tmp_path, """echo words; echo '{"seconds": 4.0, "tokens": 100.0, "flops": 4, "versions": {}}'""")
    made = bench(tmp_path)
    made.run()
    assert calls(tmp_path) == 2
    found = made.found(made.measurements()[1])
    assert (found["seconds"], made.found(made.measurements()[0])) == (4.0, OURS)
    made._path(made.measurements()[3]).unlink()
    made.run()
    assert calls(tmp_path) == 3


def test_a_half_written_measurement_is_made_again(tmp_path, capsys):
    peer(tmp_path, """echo '{"seconds": 4.0, "tokens": 100.0, "flops": 4, "versions": {}}'""")
    made = bench(tmp_path, pairs=1)
    made.run()
    made._path(made.measurements()[1]).write_text('{"seconds": 4')
    made.run()
    assert made.found(made.measurements()[1])["seconds"] == 4.0
    assert "damaged" in capsys.readouterr().err


def test_what_fails_says_why_and_is_tried_once_a_command(tmp_path):
    peer(tmp_path, "echo 'trace' >&2; echo \"ImportError: no 'trl'\" >&2; echo bye >&2; exit 1")
    made = bench(tmp_path)
    made.run()
    assert calls(tmp_path) == 1
    assert made.found(made.measurements()[1]) == {"error": "ImportError: no 'trl'"}
    made.run()
    assert calls(tmp_path) == 2


def test_a_process_that_hangs_is_ended(tmp_path):
    made = bench(tmp_path, limit=1.0)
    hangs = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert made._process(hangs, "hangs", {}) == {"error": "over --limit 1 seconds"}


def test_a_process_that_is_killed_says_by_what(tmp_path):
    made = bench(tmp_path)
    killed = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    assert made._process(killed, "killed", {}) == {"error": "ended by signal 9"}


def test_a_peer_that_is_not_installed(tmp_path):
    made = bench(tmp_path, pairs=1)
    made.run()
    python = tmp_path / "venvs" / "trl" / "bin" / "python"
    assert made.found(made.measurements()[1]) == {"error": f"no {python}: python benchmarks/make_venvs.py makes it"}


def test_figures_of_other_sources_are_refused(tmp_path):
    made = bench(tmp_path)
    (tmp_path / "bench" / "bench.json").write_text(json.dumps({"sources": "other"}))
    with pytest.raises(UserError, match="of other source files"):
        made.run()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    made = bench(tmp_path)
    (tmp_path / "bench" / "bench.json").unlink()
    with pytest.raises(UserError, match="holds files and no benchmark"):
        made.run()
