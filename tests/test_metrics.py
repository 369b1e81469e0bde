"""metrics.jsonl has each step once whatever killed the run; the progress line tells the time left of this session."""

import io
import json
import math
import os
import signal
import struct
import subprocess
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from rlhf_jax import metrics
from rlhf_jax.errors import UserError
from rlhf_jax.metrics import MetricsWriter, Progress, read_jsonl


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def events(folder: Path) -> list[Event]:
    """Every TensorBoard event of a folder, in file order (TFRecord: length, crc, bytes, crc)."""
    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return found


def test_a_line_holds_stage_step_seconds_and_finite_numbers_alone(tmp_path):
    clock = Clock()
    with MetricsWriter(tmp_path, "sft", clock=clock) as writer:
        clock.now += 2.5
        writer.write(1, {"loss": jnp.float32(0.5), "bad": math.nan, "worse": np.inf, "length": 40})
        # Flushed at once: a reader sees the line before the writer is closed.
        text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"stage": "sft", "step": 1, "seconds": 2.5, "loss": 0.5, "length": 40.0}\n'


def test_reserved_names_are_refused(tmp_path):
    with MetricsWriter(tmp_path, "sft") as writer, pytest.raises(ValueError, match="'step'"):
        writer.write(1, {"step": 3.0})


def test_resume_drops_this_stages_later_lines_and_a_torn_last_one(tmp_path):
    for stage in ("sft", "ppo"):
        with MetricsWriter(tmp_path, stage) as writer:
            for step in range(1, 6):
                writer.write(step, {"loss": step})
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"stage": "ppo", "step": 6, "sec')
    with MetricsWriter(tmp_path, "ppo", resume_step=4) as writer:
        writer.write(4, {"loss": 40})
        writer.write(5, {"loss": 50})
    rows = read_jsonl(path)
    assert [(row["stage"], row["step"]) for row in rows] == [(s, i) for s in ("sft", "ppo") for i in range(1, 6)]
    assert [row["loss"] for row in rows[5:]] == [1, 2, 3, 40, 50]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_a_stage_that_starts_afresh_drops_all_its_lines(tmp_path):
    with MetricsWriter(tmp_path, "sft") as writer:
        writer.write(1, {"loss": 1.0})
    with MetricsWriter(tmp_path, "sft") as writer:
        writer.write(1, {"loss": 2.0})
    assert [row["loss"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [2.0]


def test_a_complete_last_line_without_its_newline_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "sft", "step": 1, "seconds": 1.0}')
    with MetricsWriter(tmp_path, "sft", resume_step=2) as writer:
        writer.write(2, {})
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]


def test_seconds_go_on_across_sessions(tmp_path):
    clock = Clock()
    with MetricsWriter(tmp_path, "sft", clock=clock) as writer:
        for step in range(1, 5):
            clock.now += 10
            writer.write(step, {})
    clock.now = 5000.0
    with MetricsWriter(tmp_path, "sft", resume_step=3, clock=clock) as writer:
        clock.now += 1
        writer.write(3, {})
        assert writer.seconds == 21.0
    with MetricsWriter(tmp_path, "sft", resume_step=3, seconds=7.0, clock=clock) as writer:
        assert writer.seconds == 7.0
    assert [row["seconds"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [10.0, 20.0]


def test_a_killed_process_and_its_successor_leave_each_step_once(tmp_path):
    code = (
        "import sys, time\nfrom rlhf_jax.metrics import MetricsWriter\n"
        f"writer = MetricsWriter({str(tmp_path)!r}, 'sft')\n"
        "for step in range(1, 10**6):\n    writer.write(step, {'loss': 1 / step})\n"
        "    if step == 20: print('go', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"go\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    with MetricsWriter(tmp_path, "sft", resume_step=11) as writer:
        for step in range(11, 31):
            writer.write(step, {"loss": 1 / step})
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == list(range(1, 31))


def test_tensorboard_has_the_scalars_and_purges_what_a_resume_repeats(tmp_path):
    with MetricsWriter(tmp_path, "ppo") as writer:
        for step in range(1, 4):
            writer.write(step, {"score": step / 2, "bad": math.nan})
    with MetricsWriter(tmp_path, "ppo", resume_step=3) as writer:
        writer.write(3, {"score": 9.0})
    found = events(tmp_path / "tensorboard" / "ppo")
    scalars = [(e.step, v.tag, v.simple_value) for e in found for v in e.summary.value]
    assert scalars == [(1, "score", 0.5), (2, "score", 1.0), (3, "score", 1.5), (3, "score", 9.0)]
    assert [e.step for e in found if e.HasField("session_log")] == [0, 3]


@pytest.mark.parametrize("line", ["{oops}", "[1]", '"a"'])
def test_a_bad_line_names_the_file_and_the_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"stage": "sft", "step": 1, "seconds": 0}}\n{line}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        read_jsonl(path)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        MetricsWriter(tmp_path, "sft", resume_step=1)


def test_wandb_asked_for_but_missing_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"rlhf_jax\[wandb\]"):
        MetricsWriter(tmp_path / "new", "sft", wandb=True)
    assert not (tmp_path / "new").exists()


def test_wandb_gets_the_finite_scalars_under_one_run_id_a_stage(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append(("log", step, values)), finish=lambda: calls.append(("finish",))
    )
    fake = types.ModuleType("wandb")
    fake.init = lambda **fields: calls.append(("init", fields["id"], fields["resume"])) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: object())
    for step in (1, 2):
        with MetricsWriter(tmp_path, "sft", resume_step=step, wandb=True) as writer:
            writer.write(step, {"loss": 0.5, "bad": math.nan})
    run_id = (tmp_path / "wandb-sft.id").read_text()
    session = lambda step: [("init", run_id, "allow"), ("log", step, {"loss": 0.5}), ("finish",)]  # noqa: E731
    assert calls == session(1) + session(2)


def test_plain_lines_come_every_interval_and_at_the_end():
    clock, stream = Clock(), io.StringIO()
    with Progress("sft", 100, stream=stream, clock=clock) as progress:
        for step in range(1, 101):
            clock.now += 0.25
            progress.update(step, {"loss": 2.0, "tokens_per_second": 12345.0})
    assert stream.getvalue().splitlines() == [
        "sft 40/100  loss 2.000  12.3k tok/s  0:15 left",
        "sft 80/100  loss 2.000  12.3k tok/s  0:05 left",
        "sft 100/100  loss 2.000  12.3k tok/s  0:25 elapsed",
    ]


def test_time_left_counts_this_sessions_steps_without_the_compilation():
    clock = Clock()
    progress = Progress("ppo", 1000, start=900, stream=io.StringIO(), clock=clock)
    clock.now += 60  # compilation
    progress.update(901, {})
    assert progress.seconds_left is None
    for step in (902, 903):
        clock.now += 2
        progress.update(step, {})
    assert progress.seconds_left == pytest.approx(2 * 97)


def test_a_line_keeps_metrics_that_come_rarely_and_prefers_score_and_sequence_kl():
    clock, stream = Clock(), io.StringIO()
    with Progress("ppo", 3, stream=stream, clock=clock) as progress:
        progress.update(1, {"score": 0.5, "loss": 7.0, "reward": 0.4, "kl": 0.1, "seq_kl": 4.0})
        clock.now += 3700
        progress.update(2, {"loss": 7.0})
        progress.note("[a note] stands alone")
    assert stream.getvalue().splitlines() == [
        "ppo 2/3  score 0.500  reward 0.400  KL 4.00  1:01:40 left",
        "[a note] stands alone",
    ]


def test_a_terminal_shows_one_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    clock, stream = Clock(), Terminal()
    with Progress("ppo", 4, start=2, stream=stream, clock=clock) as progress:
        for step in (3, 4):
            clock.now += 1
            progress.update(step, {"score": 0.25, "kl": 0.01})
    text = stream.getvalue()
    assert "3/4" in text and "4/4" in text and "━" in text
    assert "score 0.250" in text and "KL 0.0100" in text and "0:02 elapsed" in text
    # One line, redrawn in place: the cursor goes back to its start and only the end breaks it.
    assert text.count("\n") == 1


def test_rows_are_plain_json(tmp_path):
    with MetricsWriter(tmp_path, "sft") as writer:
        writer.write(np.int32(7), {"loss": np.float32(1.5)})
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert row["step"] == 7 and row["loss"] == 1.5


def test_a_row_that_is_no_metrics_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"stage": "sft", "step": 1, "seconds": 0}\n{"stage": "sft", "seconds": 1}\n'
    )
    with pytest.raises(UserError, match=r"metrics\.jsonl, row 2: has no step"):
        MetricsWriter(tmp_path, "sft", resume_step=1)
