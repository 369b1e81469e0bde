"""The page of a sweep: its settings best first, every figure of each, and every metric by step, mean and interval."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.metrics import read_jsonl
from rlhf_jax.report import canvas
from rlhf_jax.report.assets import STYLE
from rlhf_jax.report.labels import label
from rlhf_jax.report.text import escape, figure_text
from rlhf_jax.report.workdir import Stage
from rlhf_jax.sweep.grid import Setting, short
from rlhf_jax.sweep.summary import (
    READINGS,
    by_values,
    half_width,
    main_reading,
    ranked,
    stages_of,
    summarise,
    telling,
    told_figure,
)

_SKIPPED = ("tokens_per_second",)
_COLORS = tuple(canvas.PALETTE[name] for name in ("after", "gold", "score", "kl", "before", "ink"))
_DASHES = ("-", "--", ":", "-.")
_NO_VALUES = "as in the config"

Row = dict[str, Any]
"""A summary, or of its rows one: a setting with its figures."""


def render(folder: Path, runs: Sequence[Setting]) -> str:
    """The whole page, which reads nothing from anywhere else; of an unfinished sweep what there is."""
    name, summary = escape(folder.resolve().name), summarise(runs, folder)
    rows = {one.label: _rows(folder / one.label / "metrics.jsonl") for one in runs}
    stages = list(runs[0].experiment.stages)
    sections = "".join(_section(stage, number, runs, rows) for number, stage in enumerate(stages))
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}: RLHF sweep</title>\n<style>{STYLE}</style>\n</head>\n<body>"
        f"<header><h1>{name}</h1>{_facts(runs, summary)}</header>"
        f"<main>{_results(summary)}{_figures(summary)}{sections}</main>"
        "\n</body>\n</html>\n"
    )


def _rows(path: Path) -> list[dict]:
    return read_jsonl(path) if path.exists() else []


def _named(values: Mapping[str, Any]) -> str:
    """A setting in words."""
    return ", ".join(f"{name} {values[path]}" for path, name in short(values).items()) or _NO_VALUES


def _facts(runs: Sequence[Setting], summary: Row) -> str:
    """What is varied, how many runs there are, and which are not finished."""
    seeds = sorted({one.experiment.seed for one in runs})
    vary = {path: dict.fromkeys(str(one.values[path]) for one in runs) for path in runs[0].values}
    settings = "1 setting" if not runs[0].values else f"{len(summary['rows'])} settings, each"
    of_seeds = f"{len(seeds)} seeds ({seeds[0]} to {seeds[-1]})" if len(seeds) > 1 else f"seed {seeds[0]}"
    lines = [
        f"{len(runs)} runs: {settings} with {of_seeds}, of the stages {', '.join(runs[0].experiment.stages)}.",
        *(f"Varied: {path} = {', '.join(values)}." for path, values in vary.items()),
    ]
    left = [
        f"{_named(row['values'])}: seeds {', '.join(map(str, row['unfinished']))}"
        for row in summary["rows"]
        if row["unfinished"]
    ]
    notice = f'<p class="notice">Unfinished, and not in the tables: {escape("; ".join(left))}.</p>' if left else ""
    return "".join(f'<p class="muted">{escape(line)}</p>' for line in lines) + notice


def _results(summary: Row) -> str:
    """The settings by the main reading, best first, with standard error, interval and number of seeds."""
    main = main_reading(summary)
    if main is None:
        return ""
    stage, name = main
    known, better = label(name.removesuffix("_after")), "more" if READINGS[name] > 0 else "less"
    after = " at the end" if name.endswith("_after") else ""
    fields = list(short(summary["rows"][0]["values"]).values()) or ["setting"]
    heads = [*fields, "mean", "standard error", "95% interval", "seeds"]
    lines = [_result(row, row[stage].get(name)) for row in ranked(summary)]
    unit = f" ({escape(known.unit)})" if known.unit else ""
    apart = "; settings whose intervals overlap much are not told apart by these seeds" if len(lines) > 1 else ""
    return (
        f'<section id="results"><h2>Results</h2><p>Settings by the {escape(known.title)}{unit} of stage '
        f"{escape(stage)}{after}, best first: {better} is better. Mean over seeds, its standard error, and its 95% "
        f"interval by Student's t{apart}.</p>{_html_table(heads, lines)}</section>"
    )


def _result(row: Row, figure: Mapping[str, float] | None) -> list[str]:
    values = [str(value) for value in row["values"].values()] or [_NO_VALUES]
    if figure is None:
        return [*values, "–", "–", "–", "0"]
    error = figure_text(figure["se"]) if "se" in figure else "–"
    interval = f"{figure_text(figure['low'])} to {figure_text(figure['high'])}" if "se" in figure else "–"
    return [*values, figure_text(figure["mean"]), error, interval, str(len(row["seeds"]))]


def _figures(summary: Row) -> str:
    """Of each stage every figure that says something, a column a setting."""
    rows = [row for row in ranked(summary) if row["seeds"]]
    parts = []
    for stage in stages_of(summary):
        lines = []
        for name in telling(summary, stage):
            known = label(name.removesuffix("_before").removesuffix("_after"))
            when = next((f" {when}" for when in ("before", "after") if name.endswith(f"_{when}")), "")
            unit = f" ({known.unit})" if known.unit else ""
            cells = [told_figure(row[stage][name]) if name in row[stage] else "–" for row in rows]
            lines.append([f"{known.title}{when}{unit}", *cells])
        if lines:
            heads = ["figure", *(_named(row["values"]) for row in rows)]
            parts.append(f"<h3>{escape(stage)}</h3>{_html_table(heads, lines)}")
    if not parts:
        return ""
    told = "Mean ± standard error over seeds, settings in the order above; what is the same in all runs is left out."
    return f'<section id="figures"><h2>Figures of each stage</h2><p class="muted">{told}</p>{"".join(parts)}</section>'


def _html_table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Of texts; all columns but the first are numbers."""
    kinds = ["", *[' class="number"'] * (len(heads) - 1)]
    top = "".join(f"<th{kind}>{escape(head)}</th>" for kind, head in zip(kinds, heads, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{kind}>{escape(cell)}</td>' for kind, cell in zip(kinds, line, strict=True))}</tr>"
        for line in lines
    )
    return f'<table class="headline"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


def _section(stage: str, number: int, runs: Sequence[Setting], rows: dict[str, list[dict]]) -> str:
    """A stage's curves; nothing where no run has written a line of it."""
    own = {
        label: Stage(stage, [row for row in some if row["stage"] == stage], [], [], {}, {}, {})
        for label, some in rows.items()
    }
    metrics = dict.fromkeys(name for one in own.values() for name in one.metrics if name not in _SKIPPED)
    told = [name for name in metrics if _varies(name, own)]
    figures = [_figure(name, f"s{number}-{k}", runs, own) for k, name in enumerate(told)]
    if not figures:
        return ""
    said = "Lines are means over seeds, shaded: their 95% intervals (Student's t), of the runs that got to a step."
    return (
        f'<section><h2>{escape(stage)} by step</h2><p class="muted">{said}</p>'
        f'<div class="grid">{"".join(figures)}</div></section>'
    )


def _varies(metric: str, stages: dict[str, Stage]) -> bool:
    """Whether a metric is not one number in all steps of all runs; of a single one it is what there is."""
    values = np.concatenate([one.series(metric)[1] for one in stages.values()])
    return len(values) == 1 or len(np.unique(values)) > 1


def _figure(metric: str, identifier: str, runs: Sequence[Setting], stages: dict[str, Stage]) -> str:
    known = label(metric)
    figure, (ax,) = canvas.panel()
    for turn, (values, some) in enumerate(by_values(runs)):
        steps, curves = _together([stages[one.label].series(metric) for one in some])
        if not len(steps):
            continue
        mean, half = _mean_and_half(curves)
        color, dash = _COLORS[turn % len(_COLORS)], _DASHES[turn // len(_COLORS) % len(_DASHES)]
        style = {"color": color, "linestyle": dash, "marker": "o" if len(steps) < 2 else None}
        ax.plot(steps, mean, linewidth=1.6, markersize=3.5, label=_named(values), **style)
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
