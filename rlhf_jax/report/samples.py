"""The table of samples: a row a prompt, its completions before and after side by side, and their readings."""

import numpy as np

from rlhf_jax.report.labels import label
from rlhf_jax.report.text import escape
from rlhf_jax.report.workdir import Row, Stage, number

READINGS = {"score": "score", "gold": "gold", "vader": "VADER", "kl": "KL", "length": "tokens"}
MOST_CHARACTERS = 3_000  # of one text


def samples_table(stage: Stage, identifier: str, most_bytes: int) -> str:
    """The table with its filter, of as many prompts as fit into `most_bytes`; empty where there are no samples."""
    pairs = stage.pairs()
    if not pairs:
        return ""
    sides = [when for when, rows in (("before", stage.before), ("after", stage.after)) if rows]
    # The KL before training is 0 but for rounding, and a column that says nothing is left out.
    columns = [
        (name, when) for name in READINGS for when in sides if (np.abs(stage.samples(when, name)[0]) >= 5e-3).any()
    ]
    lines, size = [], 0
    for prompt, before, after in pairs:
        text = _row(prompt, {"before": before, "after": after}, sides, columns)
        size += len(text.encode("utf-8"))
        if size > most_bytes and lines:
            break
        lines.append(text)
    cut = f" The first {len(lines)} of {len(pairs)} prompts." if len(lines) < len(pairs) else ""
    heads = [_head("prompt"), *(_head(when) for when in sides)]
    heads += [_head(f"{READINGS[name]} {when}", numeric=True, title=label(name).axis) for name, when in columns]
    return (
        f'<div class="table" id="{identifier}-samples"><h3>Samples</h3><p class="muted">The same prompts before and '
        f"after. A column's name sorts by it; … marks a completion that did not end.{cut}</p>"
        '<div class="controls" hidden><input type="search" placeholder="words in prompt or completion" '
        'aria-label="Filter"><span class="shown muted" role="status"></span></div>'
        f'<div class="scroll" tabindex="0"><table class="samples"><thead><tr>{"".join(heads)}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div></div>"
    )


def _head(name: str, *, numeric: bool = False, title: str = "") -> str:
    kind = ' class="number"' if numeric else ""
    tip = f' title="{escape(title)}"' if title else ""
    return f'<th scope="col"{kind}{tip}><button type="button">{name}</button></th>'


def _row(prompt: str, by_when: dict[str, Row | None], sides: list[str], columns: list[tuple[str, str]]) -> str:
    cells = [f'<td class="text" dir="auto" data-label="prompt">{_text(prompt)}</td>']
    for when in sides:
        cells.append(f'<td class="text completion" dir="auto" data-label="{when}">{_completion(by_when[when])}</td>')
    for name, when in columns:
        row = by_when[when]
        value = number(row.get(name)) if row is not None else None
        exact, shown = ("", "") if value is None else (repr(value), f"{value:.{0 if name == 'length' else 2}f}")
        kind = "number after" if when == "after" else "number was"
        data = f'data-value="{exact}" data-label="{READINGS[name]} {when}"'
        cells.append(f'<td class="{kind}" {data}>{shown}</td>')
    return f"<tr>{''.join(cells)}</tr>"


def _completion(row: Row | None) -> str:
    if row is None:
        return ""
    text = _text(row["completion"]) if row["completion"] else '<i class="muted">empty</i>'
    return text if row.get("ended", True) else f'{text}<span class="muted" title="did not end">…</span>'


def _text(text: object) -> str:
    whole = str(text)
    return escape(whole if len(whole) <= MOST_CHARACTERS else whole[:MOST_CHARACTERS] + "… (cut)")
