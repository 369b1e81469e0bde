"""The page of a sweep: its figures, and of each stage every metric by step, a line a combination, mean and interval."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rlhf_jax.metrics import read_jsonl
from rlhf_jax.report import canvas
from rlhf_jax.report.assets import STYLE
from rlhf_jax.report.labels import label
from rlhf_jax.report.text import escape
from rlhf_jax.report.workdir import Stage
from rlhf_jax.sweep.grid import Setting, short
from rlhf_jax.sweep.summary import by_values, half_width, summarise, table

_SKIPPED = ("tokens_per_second",)
_COLORS = tuple(canvas.PALETTE[name] for name in ("after", "gold", "score", "kl", "before", "ink"))
_DASHES = ("-", "--", ":", "-.")


def render(folder: Path, runs: Sequence[Setting]) -> str:
    """The whole page, which reads nothing from anywhere else; of an unfinished sweep what there is."""
    name, stages = escape(folder.resolve().name), list(runs[0].experiment.stages)
    rows = {one.label: _rows(folder / one.label / "metrics.jsonl") for one in runs}
    lines = "\n".join(table(summarise(runs, folder)))
    sections = "".join(_section(stage, number, runs, rows) for number, stage in enumerate(stages))
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    told = "Lines are means over seeds, shaded: their 95% intervals (Student's t), of the runs that got to a step."
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}: RLHF sweep</title>\n<style>{STYLE}</style>\n</head>\n<body>"
        f'<header><h1>{name}</h1><p class="muted">{len(runs)} runs. {told}</p></header>'
        f'<main><section id="figures"><h2>Figures</h2><pre>{escape(lines)}</pre></section>{sections}</main>'
        "\n</body>\n</html>\n"
    )


def _rows(path: Path) -> list[dict]:
    return read_jsonl(path) if path.exists() else []


def _section(stage: str, number: int, runs: Sequence[Setting], rows: dict[str, list[dict]]) -> str:
    """A stage's figures; nothing where no run has written a line of it."""
    own = {
        label: Stage(stage, [row for row in some if row["stage"] == stage], [], [], {}, {}, {})
        for label, some in rows.items()
    }
    metrics = dict.fromkeys(name for one in own.values() for name in one.metrics if name not in _SKIPPED)
    figures = [_figure(name, f"s{number}-{k}", runs, own) for k, name in enumerate(metrics)]
    if not figures:
        return ""
    return f'<section><h2>{escape(stage)}</h2><div class="grid">{"".join(figures)}</div></section>'


def _figure(metric: str, identifier: str, runs: Sequence[Setting], stages: dict[str, Stage]) -> str:
    known = label(metric)
    figure, (ax,) = canvas.panel()
    for turn, (values, some) in enumerate(by_values(runs)):
        steps, curves = _together([stages[one.label].series(metric) for one in some])
        if not len(steps):
            continue
        mean, half = _mean_and_half(curves)
        color, dash = _COLORS[turn % len(_COLORS)], _DASHES[turn // len(_COLORS) % len(_DASHES)]
        named = ", ".join(f"{name} {values[path]}" for path, name in short(values).items())
        style = {"color": color, "linestyle": dash, "marker": "o" if len(steps) < 2 else None}
        ax.plot(steps, mean, linewidth=1.6, markersize=3.5, label=named or None, **style)
        ax.fill_between(steps, mean - half, mean + half, color=color, alpha=0.18, linewidth=0)
    canvas.name_axes(ax, "step", known.unit)
    if runs[0].values:
        canvas.legend(ax)
    svg = canvas.to_svg(figure, identifier, escape(known.title))
    return f'<figure id="{identifier}"><b>{escape(known.title)}</b>{svg}</figure>'


def _together(series: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Steps of any run, and [runs, steps] values, NaN where a run has none."""
    steps = np.unique(np.concatenate([one[0] for one in series]))
    curves = np.full((len(series), len(steps)), np.nan)
    for curve, (own, values) in zip(curves, series, strict=True):
        curve[np.searchsorted(steps, own)] = values
    return steps, curves


def _mean_and_half(curves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean by step, and half of its interval; 0 where there is one value."""
    counts = np.isfinite(curves).sum(0)
    mean = np.nansum(curves, 0) / counts
    variance = np.nansum((curves - mean) ** 2, 0) / np.maximum(counts - 1, 1)
    widths = np.asarray([half_width(n) if n > 1 else 0.0 for n in counts])
    return mean, widths * np.sqrt(variance / counts)
