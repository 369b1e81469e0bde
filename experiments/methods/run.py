"""Run every method for three seeds, and put what came of it into README.md here: its tables and its picture.

    python experiments/methods/run.py                   # hours on two cores; the same command goes on where it stopped
    python experiments/methods/run.py --table-only      # of the runs that are finished

What runs is `rlhf-jax run` on sentiment.py and arithmetic.py beside this file.
"""

import json
import math
import random
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import tyro

from rlhf_jax.files import write_whole
from rlhf_jax.metrics import read_jsonl

HERE = Path(__file__).parent


class Method(NamedTuple):
    """Stages that make a policy, and the one that reads it, where that is another."""

    stages: tuple[str, ...]
    read: str = ""

    @property
    def reading(self) -> str:
        """The stage whose samples are the policy's before and after."""
        return self.read or self.stages[-1]


SENTIMENT = {
    "PPO": Method(("ppo",)),
    "REINFORCE": Method(("reinforce",)),
    "RLOO": Method(("rloo",)),
    "REINFORCE++": Method(("reinforce_plus_plus",)),
    "ReMax": Method(("remax",)),
    "P3O": Method(("p3o",)),
    "GRPO": Method(("grpo",)),
    "Dr. GRPO": Method(("dr_grpo",)),
    "DAPO": Method(("dapo",)),
    "GSPO": Method(("gspo",)),
    "CISPO": Method(("cispo",)),
    "GMPO": Method(("gmpo",)),
    "TRPO": Method(("trpo",)),
    "online DPO": Method(("online_dpo",)),
    "online IPO": Method(("online_ipo",)),
    "XPO": Method(("xpo",)),
    "DPO": Method(("dpo",)),
    "IPO": Method(("ipo",)),
    "KTO": Method(("kto",)),
    "SimPO": Method(("simpo",)),
    "CPL": Method(("cpl",)),
    "iterated RLHF, 2 rounds": Method(("round_1", "refreshed", "round_2"), "round_2_read"),
    "ILQL": Method(("samples", "ilql")),
    "weighted BC": Method(("samples", "weighted")),
    "filtered BC": Method(("samples", "filtered")),
    "best of 16": Method(("best_of_16",)),
    "SFT on the best of 16": Method(("best_of_16", "rejection"), "rejection_read"),
    "RAFT, 2 rounds": Method(("sample_1", "learn_1", "sample_2", "learn_2"), "raft_read"),
    "ReST": Method(("grow_1", "improve_1_1", "improve_1_2"), "rest_read"),
    "distilled from PPO": Method(("distilled",), "distilled_read"),
}
ARITHMETIC = {
    name: Method((stage,))
    for name, stage in {
        "RLOO": "rloo", "GRPO": "grpo", "Dr. GRPO": "dr_grpo", "DAPO": "dapo", "GSPO": "gspo", "CISPO": "cispo",
        "GMPO": "gmpo",
    }.items()
}  # fmt: skip
TASKS = {"sentiment": (SENTIMENT, "gold"), "arithmetic": (ARITHMETIC, "score")}
"""By its config file, the methods of a task and the reading that says how good a completion is."""


@dataclass(frozen=True)
class Row:
    """What a method came to, means over seeds."""

    name: str
    before: float
    after: float
    error: float
    kl: float
    length: float
    distinct2: float
    seconds: float
    seeds: int

    @property
    def gain(self) -> float:
        """In the reading, of a completion."""
        return self.after - self.before


def main(to: Path = Path("runs/methods"), seeds: tuple[int, ...] = (0, 1, 2), table_only: bool = False) -> None:
    """Run what is not finished, then write the tables.

    Args:
        to: The folder of the runs, a workdir for each task and seed.
        seeds: One run of each task for each.
        table_only: Run nothing.
    """
    if not table_only:
        to.mkdir(parents=True, exist_ok=True)
        write_whole(to / "sums.jsonl", sums())
        for seed in seeds:
            for task in TASKS:
                command = [sys.executable, "-m", "rlhf_jax", "run", str(HERE / f"{task}.py"), "--seed", str(seed)]
                ended = subprocess.run([*command, "--workdir", f"{task}_{seed}"], cwd=to, check=False)
                if ended.returncode:
                    sys.exit(ended.returncode)
    text = (HERE / "README.md").read_text(encoding="utf-8")
    for task, (methods, reading) in TASKS.items():
        found = rows([to / f"{task}_{seed}" for seed in seeds], methods, reading)
        text = with_block(text, task, table(found, reading))
        if task == "sentiment":
            files = (to / f"{task}_{seed}" / "best_of_16" / "evaluation.json" for seed in seeds)
            curves = [json.loads(file.read_text())["best_of_n"] for file in files if file.is_file()]
            draw(found, curves, HERE / "sentiment.png")
    write_whole(HERE / "README.md", text)


def sums() -> str:
    """All sums of two numbers below 30 as JSON lines, shuffled."""
    pairs = [(a, b) for a in range(30) for b in range(30)]
    random.Random(0).shuffle(pairs)
    lines = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}", "answer": a + b} for a, b in pairs]
    return "".join(json.dumps(line) + "\n" for line in lines)


def rows(workdirs: list[Path], methods: dict[str, Method], reading: str) -> list[Row]:
    """A row for each method that is finished for some seed."""
    found = []
    for name, method in methods.items():
        finished = [workdir for workdir in workdirs if (workdir / method.reading / "summary.json").is_file()]
        if finished:
            found.append(row(name, method, reading, finished))
    return found


def row(name: str, method: Method, reading: str, workdirs: list[Path]) -> Row:
    """The standard error is that over prompts, all seeds together, or over seeds, where that is larger."""
    figures, gains, seconds = [], [], []
    for workdir in workdirs:
        folder = workdir / method.reading
        figures.append(json.loads((folder / "summary.json").read_text()))
        samples = read_jsonl(folder / "samples.jsonl")
        values = np.asarray([line[reading] for line in samples]).reshape(2, -1)
        gains.append(values[1] - values[0])
        sessions = workdir / "sessions.json"  # written when a session ends
        spent = json.loads(sessions.read_text())["stage_seconds"] if sessions.is_file() else {}
        seconds.append(sum(spent.get(stage, math.nan) for stage in method.stages))
    pooled = np.concatenate(gains)
    errors = [pooled.std(ddof=1) / math.sqrt(len(pooled))]
    if len(gains) > 1:
        errors.append(np.std([own.mean() for own in gains], ddof=1) / math.sqrt(len(gains)))

    def mean(figure: str) -> float:
        return float(np.mean([one[figure] for one in figures]))

    return Row(
        name=name,
        before=mean(f"{reading}_before"),
        after=mean(f"{reading}_after"),
        error=float(max(errors)),
        kl=mean("seq_kl"),
        length=mean("length_after"),
        distinct2=mean("distinct2_after"),
        seconds=float(np.mean(seconds)),
        seeds=len(gains),
    )


def table(found: list[Row], reading: str) -> str:
    """In Markdown; a gain of less than two standard errors is marked."""
    if not found:
        return "Not run yet."
    titles = f"| method | {reading} before | after | gain | KL, nats | length | distinct-2 | seconds | seeds |"
    lines = [titles, "|---|" + "---|" * 8]
    for one in found:
        mark = "" if one.gain > 2 * one.error else " (within noise)"
        cells = (
            one.name,
            f"{one.before:.3f}",
            f"{one.after:.3f}",
            f"{one.gain:+.3f} ± {one.error:.3f}{mark}",
            f"{one.kl:.1f}",
            f"{one.length:.1f}",
            f"{one.distinct2:.2f}",
            f"{one.seconds:.0f}" if math.isfinite(one.seconds) else "",
            str(one.seeds),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def with_block(text: str, name: str, block: str) -> str:
    """The text with another block between a name's two markers."""
    marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
    pattern = re.compile(f"({re.escape(marks[0])}\n).*?({re.escape(marks[1])})", re.DOTALL)
    return pattern.sub(lambda match: f"{match[1]}{block}\n{match[2]}", text)


def draw(found: list[Row], curves: list[list[dict[str, float]]], path: Path) -> None:
    """Gold score over KL: a point a method, and the best of n for n from 2 to 16, a line a seed."""
    figure, ax = plt.subplots(figsize=(9, 6))
    for points in curves:
        ax.plot([p["kl"] for p in points if p["kl"]], [p["gold"] for p in points if p["kl"]], color="grey", lw=1)
    taken: list[tuple[float, float]] = []
    for one in sorted(found, key=lambda one: one.after):
        ax.errorbar(one.kl, one.after, yerr=2 * one.error, fmt="o", ms=5, lw=1)
        x, y = math.log(one.kl), one.after
        while any(abs(x - u) < 0.6 and abs(y - v) < 0.018 for u, v in taken):  # of labels about here
            y += 0.003
        taken.append((x, y))
        line = {"arrowstyle": "-", "lw": 0.4, "color": "grey"}  # to labels that had to move
        ax.annotate(one.name, (one.kl, one.after), xytext=(1.09 * one.kl, y - 0.004), fontsize=8, arrowprops=line)
    if found:
        ax.axhline(float(np.mean([one.before for one in found])), color="grey", lw=1, ls=":")
    ax.set_xscale("log")
    ax.set_xlim(right=2.5 * max((one.kl for one in found), default=1.0))
    ax.set_xlabel("sequence KL to the SFT policy (nats)")
    ax.set_ylabel("gold score, P(positive)")
    ax.set_title("Every method on the quickstart's task; bars: two standard errors of the gain; line: best of 2 to 16")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    tyro.cli(main)
