"""What a run says while it trains: `metrics.jsonl`, TensorBoard events, Weights & Biases on request, a progress line.

`metrics.jsonl` holds an object a line, `{"stage", "step", "seconds", name: number, …}`, and is the report's source.
A number that is not finite is left out, since JSON has no word for it: to a reader the metric is absent.
"""

import importlib.util
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, SupportsFloat, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

from rlhf_jax import hosts, lockstep
from rlhf_jax.errors import UserError
from rlhf_jax.files import write_whole

_EVENT: Any = vars(event_pb2)["Event"]  # made at run time: type checkers do not see it
RESERVED = ("stage", "step", "seconds")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a last line without its newline that does not parse is left out.

    Such a line is what a killed process leaves behind. Raises `UserError` with the file and the line for any other line
    that is not a JSON object. Empty lines are skipped.
    """
    rows = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
        rows.append(row)
    return rows


def _keep_before(path: Path, stage: str, resume_step: int) -> float:
    """Rewrite metrics.jsonl without this stage's lines from `resume_step` on; returns the last kept line's seconds."""
    if not path.exists():
        return 0.0
    try:
        rows = read_jsonl(path)
    except UserError as error:
        raise UserError(f"{error}; without that line the run goes on") from None
    for number, row in enumerate(rows, start=1):
        if not row.keys() >= set(RESERVED):
            raise UserError(f"{path}, row {number}: has no {', '.join(set(RESERVED) - row.keys())}")
    kept = [row for row in rows if row["stage"] != stage or row["step"] < resume_step]
    write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
    return max((row["seconds"] for row in kept if row["stage"] == stage), default=0.0)


class MetricsWriter:
    """Writes one stage's metrics to `workdir/metrics.jsonl` and `workdir/tensorboard/<stage>`, and to W&B if asked.

    `resume_step` is the first step that this session will write: the stage's lines from there on are dropped first, so
    that a killed and resumed run has every step once (0, the default, starts the stage afresh). `seconds` in a
    line is the time spent in the stage over all its sessions; it goes on from the last kept line, or from `seconds`.

    Raises `UserError` when W&B is asked for and is not installed, or when a line of metrics.jsonl is not JSON.
    """

    def __init__(
        self,
        workdir: Path | str,
        stage: str,
        *,
        resume_step: int = 0,
        seconds: float | None = None,
        wandb: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if wandb and importlib.util.find_spec("wandb") is None:
            raise UserError("wandb=True, but wandb is not installed; pip install 'rlhf_jax[wandb]', or set wandb=False")
        self.workdir, self.stage = Path(workdir), stage
        self.workdir.mkdir(parents=True, exist_ok=True)
        path = self.workdir / "metrics.jsonl"
        kept_seconds = _keep_before(path, stage, resume_step)
        self._offset = kept_seconds if seconds is None else seconds
        self._clock, self._start = clock, clock()
        self._file = path.open("a", encoding="utf-8")
        folder = self.workdir / "tensorboard" / stage
        folder.mkdir(parents=True, exist_ok=True)
        # Not tensorboardX's SummaryWriter: its thread dies of a full disk, and its queue then waits for ever. The
        # suffix keeps two sessions that begin within one second in two files, in order.
        self._tensorboard = EventsWriter(str(folder / "events"), f".{resume_step:09d}")
        # Of what an earlier session wrote readers drop what is from this step on.
        self._tensorboard.write_event(_EVENT(step=resume_step, session_log={"status": "START"}))
        self._wandb = _wandb_run(self.workdir, stage) if wandb else None

    @property
    def seconds(self) -> float:
        """Seconds spent in this stage so far, earlier sessions included."""
        return self._offset + self._clock() - self._start

    def write(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Append one line, whole and flushed, and the same scalars to the other writers; non-finite ones are left out.

        Raises `ValueError` for a metric called `stage`, `step` or `seconds`.
        """
        taken = [name for name in metrics if name in RESERVED]
        if taken:
            raise ValueError(f"a metric cannot be called {taken[0]!r}: {RESERVED} belong to the line itself")
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(float(value))}
        line = {"stage": self.stage, "step": int(step), "seconds": round(self.seconds, 3), **finite}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        values = [{"tag": name, "simple_value": value} for name, value in finite.items()]
        self._tensorboard.write_event(_EVENT(step=int(step), wall_time=time.time(), summary={"value": values}))
        self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(finite, step=int(step))

    def sync(self) -> None:
        """Wait until the lines so far are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close every writer."""
        self._file.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _wandb_run(workdir: Path, stage: str) -> Any:
    """Start or continue the W&B run of one stage; its id lives in the workdir, so a new workdir is a new run."""
    import wandb  # pyright: ignore[reportMissingImports]  # an optional extra, imported only when a run asks for it

    id_file = workdir / f"wandb-{stage}.id"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex)
    return wandb.init(
        project="rlhf_jax",
        group=workdir.name,
        name=f"{workdir.name}/{stage}",
        id=id_file.read_text(),
        resume="allow",
        dir=str(workdir),
    )


def _clock_text(seconds: float) -> str:
    """65 -> '1:05', 3700 -> '1:01:40'."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _rate_text(tokens_per_second: float) -> str:
    """1234 -> '1.2k tok/s'."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if tokens_per_second >= size:
            return f"{tokens_per_second / size:.1f}{unit} tok/s"
    return f"{tokens_per_second:.0f} tok/s"


def summary_line(metrics: Mapping[str, float]) -> str:
    """The metrics that a progress line shows: score (else loss), reward, KL (of a sequence, else of a token), tokens/s.

    >>> summary_line({"score": 0.5, "loss": 9.0, "reward": 0.25, "kl": 0.1, "seq_kl": 3.0, "tokens_per_second": 1234.0})
    'score 0.500  reward 0.250  KL 3.00  1.2k tok/s'
    """
    parts = [f"{name} {metrics[name]:.3f}" for name in ("score", "loss") if name in metrics][:1]
    if "reward" in metrics:
        parts.append(f"reward {metrics['reward']:.3f}")
    parts += [f"KL {metrics[name]:.{digits}f}" for name, digits in (("seq_kl", 2), ("kl", 4)) if name in metrics][:1]
    if "tokens_per_second" in metrics:
        parts.append(_rate_text(metrics["tokens_per_second"]))
    return "  ".join(parts)


class Progress:
    """One line for a stage on stderr: name, bar, step/total, the metrics of `summary_line`, time left.

    Where stderr is no terminal, a plain line every `interval` seconds and at the end instead. The time left counts the
    steps after this session's first update alone, so that neither a resume nor compilation distorts it.
    """

    def __init__(
        self,
        stage: str,
        total: int,
        *,
        start: int = 0,
        stream: TextIO | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stage, self.total, self.step = stage, total, start
        name = lockstep.name()
        quiet = not hosts.is_writer() if name is None else not name.speaks
        shared = None if lockstep.NAME.get() is None else False  # other processes write where a bar would be drawn
        self._console = Console(file=sys.stderr if stream is None else stream, quiet=quiet, force_interactive=shared)
        self._interval, self._clock, self._began = interval, clock, clock()
        self._first: tuple[int, float] | None = None
        self._latest: dict[str, float] = {}
        self._drawn_step, self._drawn_at = start, self._began
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if self._console.is_interactive:
            # Redrawn from `update`, without a thread. stdout is left alone: `--json` promises exactly one line on it.
            self._bar = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[shown]}", markup=False),
                console=self._console,
                auto_refresh=False,
                redirect_stdout=False,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.stage, total=self.total, completed=self.step, shown="")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._draw()
            self._bar.stop()
        elif self.step != self._drawn_step:
            self._draw()

    @property
    def seconds_left(self) -> float | None:
        """Estimate from the steps between the session's first update and now; None before there are two updates."""
        if self._first is None or self.step <= self._first[0]:
            return None
        seconds_per_step = (self._clock() - self._first[1]) / (self.step - self._first[0])
        return seconds_per_step * max(self.total - self.step, 0)

    def update(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Say that `step` steps of the stage are done; a metric that is absent keeps the value it had before."""
        self.step = step
        now = self._clock()
        if self._first is None:
            self._first = (step, now)
        self._latest.update({name: float(value) for name, value in metrics.items()})
        if now - self._drawn_at >= (self._interval if self._bar is None else 0.1):
            self._draw()

    def note(self, text: str) -> None:
        """Print a line of its own, above the bar where there is one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _draw(self) -> None:
        self._drawn_step, self._drawn_at = self.step, self._clock()
        shown = "  ".join(part for part in (summary_line(self._latest), self._time_text()) if part)
        if self._bar is None or self._task is None:
            self.note(f"{self.stage} {self.step}/{self.total}  {shown}")
            return
        self._bar.update(self._task, completed=self.step, shown=shown)
        self._bar.refresh()

    def _time_text(self) -> str:
        if self.step >= self.total:
            return f"{_clock_text(self._clock() - self._began)} elapsed"
        left = self.seconds_left
        return "" if left is None else f"{_clock_text(left)} left"
