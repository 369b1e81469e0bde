"""The page of a run: headline figures, a section a stage, its configuration. Every text of a file is escaped."""

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.report import canvas
from rlhf_jax.report.assets import SCRIPT, STYLE
from rlhf_jax.report.figures import Panel, diagnostic_panels, stage_panels
from rlhf_jax.report.labels import label
from rlhf_jax.report.samples import samples_table
from rlhf_jax.report.text import escape, figure_text
from rlhf_jax.report.workdir import Run, Stage, number

PAGE_BYTES = 2_900_000  # what the sample tables fill up to, when there are that many samples
SAMPLES_BYTES = 200_000, 1_200_000  # least and most of all sample tables together


def render(run: Run) -> str:
    """The whole page, which reads nothing from anywhere else."""
    name = escape(run.path.resolve().name)
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    # The browser itself holds the page to it: no network, and no script but the report's own.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    identifiers = _identifiers([stage.name for stage in run.stages])
    figures = [_stage_figures(stage, identifiers[stage.name]) for stage in run.stages]
    left = PAGE_BYTES - sum(len(one) for pair in figures for one in pair)
    with_samples = sum(bool(stage.before or stage.after) for stage in run.stages)
    share = min(max(left, SAMPLES_BYTES[0]), SAMPLES_BYTES[1]) // max(with_samples, 1)
    sections = [
        _stage_section(stage, identifiers[stage.name], drawn, share)
        for stage, drawn in zip(run.stages, figures, strict=True)
    ]
    links = [
        f'<a href="#{identifiers[stage.name]}">{escape(stage.name)}</a>'
        for stage, section in zip(run.stages, sections, strict=True)
        if section
    ]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{name}: RLHF run</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            f"<header><h1>{name}</h1>{_facts(run)}</header>",
            f'<nav aria-label="Sections">{"".join(links)}</nav>' if links else "",
            f"<main>{_headline(run)}{''.join(sections)}{_configuration(run)}</main>",
            f'<footer class="muted"><p>Drawn from the run\'s files by <code>rlhf-jax report {escape(run.path)}</code>'
            "; it can be drawn anew at any time.</p></footer>",
            f"<script>{SCRIPT}</script>\n</body>\n</html>\n",
        ]
    )


def _identifiers(names: Sequence[str]) -> dict[str, str]:
    """For each name its own word that an HTML id and a CSS selector can hold."""
    found: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9_-]", "-", name) or "stage"
        taken = set(found.values())
        found[name] = next(word for word in (plain, *(f"{plain}-{k}" for k in range(len(names)))) if word not in taken)
    return found


def _facts(run: Run) -> str:
    """Where the run comes from, what it took, and whether it is finished."""
    facts = []
    command = run.config.get("command")
    if isinstance(command, list) and command:
        facts.append(f"<code>{escape(' '.join(map(str, command)))}</code>")
    seconds, memory = number(run.summary.get("seconds")), number(run.summary.get("peak_memory_bytes"))
    if seconds is not None:
        facts.append(f"{int(seconds // 60)} min {seconds % 60:.0f} s")
    if memory is not None:
        facts.append(f"{memory / 1e9:.2f} GB peak memory")
    commit = run.config.get("commit")
    if commit:
        facts.append(f"commit <code>{escape(str(commit)[:12])}</code>")
    versions = run.config.get("versions")
    if isinstance(versions, dict):
        facts += [escape(f"{name} {versions[name]}") for name in ("jax", "rlhf_jax") if name in versions]
    line = f'<p class="muted">{" · ".join(facts)}</p>' if facts else ""
    if not run.unfinished:
        return line
    last = [f"{stage.name} at step {stage.rows[-1]['step']}" for stage in run.stages if stage.rows][-1:]
    so_far = f" So far: {escape(last[0])}." if last else ""
    return f'{line}<p class="notice">Unfinished: {escape(", ".join(run.unfinished))}.{so_far}</p>'


def _headline(run: Run) -> str:
    """The figures of every stage's summary; one that was measured before and after has both in its row."""
    rows = [row for stage in run.stages for row in _summary_rows(stage)]
    if not rows:
        return ""
    head = "".join(f'<th class="number">{name}</th>' for name in ("value", "before", "change"))
    return (
        '<section id="headline"><h2>Headline figures</h2><table class="headline"><thead><tr><th>stage</th>'
        f"<th>figure</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></section>"
    )


def _summary_rows(stage: Stage) -> list[str]:
    rows: list[str] = []
    for name, value in stage.summary.items():
        if name == "steps":
            continue  # the stage's own section says it
        base = name.removesuffix("_after")
        if name.endswith("_before") and name.removesuffix("_before") + "_after" in stage.summary:
            continue  # told with its "after"
        before = number(stage.summary.get(f"{base}_before")) if base != name else None
        known, after = label(base), number(value)
        change = f"{after - before:+.3f}" if after is not None and before is not None else ""
        shown = escape(figure_text(value) if after is not None or isinstance(value, str) else json.dumps(value))
        unit = f' <span class="muted">{escape(known.unit)}</span>' if known.unit else ""
        cells = (shown, figure_text(before) if before is not None else "", change)
        numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        first = "" if rows else escape(stage.name)
        rows.append(f"<tr><td>{first}</td><td>{escape(known.title)}{unit}</td>{numbers}</tr>")
    return rows


def _stage_figures(stage: Stage, identifier: str) -> tuple[str, str]:
    """The main figures, and one for every other metric."""
    return (
        _figures(stage_panels(stage), identifier, "grid"),
        _figures(diagnostic_panels(stage), f"{identifier}-by-step", "grid small", "Diagnostics by step"),
    )


def _stage_section(stage: Stage, identifier: str, figures: tuple[str, str], samples_bytes: int) -> str:
    """Figures, samples and diagnostics of a stage; nothing where it has written nothing."""
    main, diagnostics = figures
    parts = [main, samples_table(stage, identifier, samples_bytes), diagnostics]
    if not any(parts):
        return ""
    facts = [escape(stage.config["class"])] if isinstance(stage.config.get("class"), str) else []
    if stage.rows:
        facts.append(f"{len(stage.rows)} steps logged")
        seconds = number(stage.rows[-1].get("seconds"))
        facts += [f"{seconds:.0f} s"] if seconds is not None else []
    external = stage.evaluation.get("external")
    if isinstance(external, dict) and number(external.get("accuracy")) is not None:
        told = f"{external['accuracy']:.3f} on {figure_text(external.get('n'))} pairs"
        facts.append(f"accuracy on text labelled by people: {escape(told)}")
    return (
        f'<section id="{identifier}"><h2>{escape(stage.name)}</h2><p class="muted">{" · ".join(facts)}</p>'
        f"{''.join(parts)}</section>"
    )


def _figures(panels: Sequence[Panel], identifier: str, layout: str, title: str = "") -> str:
    if not panels:
        return ""
    drawn = [_figure(panel, f"{identifier}-{key}") for key, panel in _keyed(panels).items()]
    head = f"<h3>{title}</h3>" if title else ""
    return f'{head}<div class="{layout}">{"".join(drawn)}</div>'


def _keyed(panels: Sequence[Panel]) -> Mapping[str, Panel]:
    words = _identifiers([panel.key for panel in panels])
    return {words[panel.key]: panel for panel in panels}


def _figure(panel: Panel, identifier: str) -> str:
    svg = canvas.to_svg(panel.figure, identifier, escape(panel.title))
    caption = f"<figcaption>{escape(panel.caption)}</figcaption>"
    width, height = panel.figure.get_size_inches()
    kind = ' class="tall"' if height > width else ""
    return f'<figure id="{identifier}"{kind}><b>{escape(panel.title)}</b>{svg}{caption}</figure>'


def _configuration(run: Run) -> str:
    """config.json and the digests of the parameters, folded."""
    shown: list[tuple[str, Any]] = [("Configuration", run.config), ("Parameters", run.summary.get("params_digest"))]
    blocks = [(title, escape(json.dumps(value, indent=2, ensure_ascii=False))) for title, value in shown if value]
    return "".join(f"<details><summary>{title}</summary><pre>{text}</pre></details>" for title, text in blocks)
