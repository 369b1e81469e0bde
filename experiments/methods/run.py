"""Run every method for three seeds, and put what came of it into README.md here: its tables and its picture.

    python experiments/methods/run.py                   # 140 minutes on two cores; goes on where it stopped
    python experiments/methods/run.py --table-only      # of the figures that are there

What runs is `rlhf-jax sweep` on sentiment.py and arithmetic.py beside this file, all seeds side by side. What a method
came to under a seed is a line of figures.jsonl, kept with the sources: a task whose lines are there is not run again.
"""

import itertools
import json
import math
import random
import re
import subprocess
import sys
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
    "iterated RLHF, 2 rounds": Method(("iterated_learn_1", "iterated_reward_2", "iterated_learn_2"), "iterated_read"),
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


FIGURES = HERE / "figures.jsonl"


class Figure(NamedTuple):
    """What a method came to under one seed: a line of figures.jsonl."""

    task: str
    method: str
    seed: int
    before: float
    after: float
    gain_std: float
    """Standard deviation of a prompt's gain."""
    prompts: int
    kl: float
    length: float
    distinct2: float
    seconds: float | None
    """Of its own stages, compilation and the reading before and after included."""
    curve: list[list[float]] | None
    """KL and gold score of the best of n, by n; of best of 16 alone."""
    commit: str
    """Of the sources that ran."""


class Row(NamedTuple):
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


def main(to: Path = Path("runs/methods"), seeds: int = 3, table_only: bool = False) -> None:
    """Run what has no figures, then write the tables.

    Args:
        to: The folder of the runs, a sweep for each task.
        seeds: How many, from 0.
        table_only: Run nothing.
    """
    for task, (methods, _) in TASKS.items():
        there = {(one.method, one.seed) for one in figures() if one.task == task}
        if table_only or there >= set(itertools.product(methods, range(seeds))):
            continue
        to.mkdir(parents=True, exist_ok=True)
        write_whole(to / "sums.jsonl", sums())
        command = [sys.executable, "-m", "rlhf_jax", "sweep", str(HERE / f"{task}.py"), "--seeds", str(seeds)]
        ended = subprocess.run([*command, "--to", task], cwd=to, check=False)
        for seed in range(seeds):
            keep(found(to / task / f"seed={seed}", task, seed))
        if ended.returncode:
            sys.exit(ended.returncode)
    text = (HERE / "README.md").read_text(encoding="utf-8")
    kept = figures()
    for task, (methods, reading) in TASKS.items():
        of_task = [one for one in kept if one.task == task]
        lines = [row(name, own) for name in methods if (own := [one for one in of_task if one.method == name])]
        text = with_block(text, task, table(lines, reading))
        if task == "sentiment":
            draw(lines, [one.curve for one in of_task if one.curve], HERE / "sentiment.png")
    write_whole(HERE / "README.md", text)


def figures() -> list[Figure]:
    """All that are kept."""
    return [Figure(**line) for line in read_jsonl(FIGURES)] if FIGURES.exists() else []


def keep(new: list[Figure]) -> None:
    """Put figures in the file, each in the place of an older one of its method and seed.

    Where a later session of the same sources has read again what an earlier one had made and timed, the older stays.
    """
    lines = {(one.task, one.method, one.seed): one for one in figures()}
    for one in new:
        old = lines.get((one.task, one.method, one.seed))
        if one.seconds is not None or old is None or old.commit != one.commit:
            lines[one.task, one.method, one.seed] = one
    write_whole(FIGURES, "".join(json.dumps(lines[key]._asdict()) + "\n" for key in sorted(lines)))


def found(workdir: Path, task: str, seed: int) -> list[Figure]:
    """Of each method that is finished in a workdir."""
    methods, reading = TASKS[task]
    done = {name: method for name, method in methods.items() if (workdir / method.reading / "summary.json").is_file()}
    return [figure(workdir, task, seed, name, method, reading) for name, method in done.items()]


def figure(workdir: Path, task: str, seed: int, name: str, method: Method, reading: str) -> Figure:
    """Of one method, read from the files of its run."""
    folder = workdir / method.reading
    summary = json.loads((folder / "summary.json").read_text())
    values = np.asarray([line[reading] for line in read_jsonl(folder / "samples.jsonl")]).reshape(2, -1)
    sessions = workdir / "sessions.json"  # written when a session ends
    spent = json.loads(sessions.read_text())["stage_seconds"] if sessions.is_file() else {}
    took = [spent.get(stage, 0.0) for stage in method.stages]  # 0 of what an earlier session made
    evaluation = folder / "evaluation.json"
    points = json.loads(evaluation.read_text()).get("best_of_n", []) if evaluation.is_file() else []
    return Figure(
        task=task,
        method=name,
        seed=seed,
        before=summary[f"{reading}_before"],
        after=summary[f"{reading}_after"],
        gain_std=round(float(np.std(values[1] - values[0], ddof=1)), 6),
        prompts=values.shape[1],
        kl=summary["seq_kl"],
        length=summary["length_after"],
        distinct2=summary["distinct2_after"],
        seconds=sum(took) if all(took) else None,
        curve=[[point["kl"], point["gold"]] for point in points if point["kl"]] or None,
        commit=json.loads((workdir / "config.json").read_text())["commit"],
    )


def sums() -> str:
    """All sums of three digits as JSON lines, shuffled; each answered rightly, and again, after "about", by a guess."""
    terms = list(itertools.product(range(10), repeat=3))
    draw = random.Random(0)
    draw.shuffle(terms)
    rows = []
    for a, b, c in terms:
        right = a + b + c
        guess = max(0, right + draw.choice([-5, -4, -3, -2, -1, 1, 2, 3, 4, 5]))
        rows += [
            {"prompt": f"{a} + {b} + {c} =", "completion": text, "answer": right}
            for text in (f" {right}", f" about {guess}")
        ]
    return "".join(json.dumps(line) + "\n" for line in rows)


def row(name: str, seeds: list[Figure]) -> Row:
    """The standard error is that over prompts, all seeds together, or over seeds, where that is larger."""
    gains = np.asarray([one.after - one.before for one in seeds])
    prompts = np.asarray([one.prompts for one in seeds])
    errors = [math.sqrt(sum(prompts * [one.gain_std**2 for one in seeds])) / sum(prompts)]
    if len(seeds) > 1:
        errors.append(float(np.std(gains, ddof=1)) / math.sqrt(len(seeds)))

    def mean(values: list[float]) -> float:
        return float(np.mean(values)) if values else math.nan

    return Row(
        name=name,
        before=mean([one.before for one in seeds]),
        after=mean([one.after for one in seeds]),
        error=max(errors),
        kl=mean([one.kl for one in seeds]),
        length=mean([one.length for one in seeds]),
        distinct2=mean([one.distinct2 for one in seeds]),
        seconds=mean([one.seconds for one in seeds if one.seconds is not None]),
        seeds=len(seeds),
    )


def table(rows: list[Row], reading: str) -> str:
    """In Markdown; a gain of less than two standard errors is marked."""
    if not rows:
        return "Not run yet."
    titles = f"| method | {reading} before | after | gain | KL, nats | length | distinct-2 | seconds | seeds |"
    lines = [titles, "|---|" + "---|" * 8]
    for one in rows:
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


LETTER, LINE, GAP = 0.05, 0.018, 0.08
"""Of a label a letter (log KL), the height (gold score), and the distance from its point (log KL), in the picture."""


def free_place(
    name: str,
    point: tuple[float, float],
    points: list[tuple[float, float]],
    taken: list[tuple[float, float, float]],
) -> tuple[float, float]:
    """Where a label begins, the nearest place beside its point that no point and no label (added to `taken`) is in."""
    width = LETTER * len(name)
    sides = point[0] + GAP, point[0] - GAP - width
    heights = [point[1] + sign * LINE / 2 * step for step in range(40) for sign in (1, -1)]
    for y, x in itertools.product(heights, sides):
        on_point = any(x - GAP / 2 < u < x + width and abs(y - v) < LINE / 2 for u, v in points)
        on_label = any(x < u + w and u < x + width and abs(y - v) < LINE for u, v, w in taken)
        if not on_point and not on_label:
            break
    taken.append((x, y, width))
    return x, y


def draw(rows: list[Row], curves: list[list[list[float]]], path: Path) -> None:
    """Gold score over KL: a point a method, and the best of n for n from 2 to 16, a line a seed."""
    figure, ax = plt.subplots(figsize=(11, 7))
    for points in curves:
        ax.plot(*zip(*points, strict=True), color="grey", lw=1)
    points = [(math.log(one.kl), one.after) for one in rows]
    taken: list[tuple[float, float, float]] = []
    for one in sorted(rows, key=lambda one: one.after):
        ax.errorbar(one.kl, one.after, yerr=2 * one.error, fmt="o", ms=5, lw=1)
        x, y = free_place(one.name, (math.log(one.kl), one.after), points, taken)
        line = {"arrowstyle": "-", "lw": 0.4, "color": "grey"} if abs(y - one.after) > LINE / 2 else None
        label = (math.exp(x), y)
        ax.annotate(one.name, (one.kl, one.after), xytext=label, fontsize=8, va="center", arrowprops=line)
    if rows:
        ax.axhline(float(np.mean([one.before for one in rows])), color="grey", lw=1, ls=":")
    ax.set_xscale("log")
    ax.set_xlim(right=2.5 * max((one.kl for one in rows), default=1.0))
    ax.set_xlabel("sequence KL to the SFT policy (nats)")
    ax.set_ylabel("gold score, P(positive)")
    ax.set_title("Every method on the quickstart's task; bars: two standard errors of the gain; line: best of 2 to 16")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    tyro.cli(main)
