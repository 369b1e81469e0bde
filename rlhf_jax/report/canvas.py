"""Bare axes in the report's colours, lines and histograms on them, and a figure as SVG for a page or as PNG.

Matplotlib's objects alone: no pyplot, no state between figures.
"""

import io
import re
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

# A meaning has one colour in every figure; each is also a CSS variable, so that a page can darken or lighten it.
PALETTE = {
    "ink": "#1f2328",
    "muted": "#6e7781",
    "grid": "#d5dae0",
    "before": "#8c959f",
    "after": "#0969da",
    "score": "#8250df",
    "gold": "#b7791f",
    "kl": "#0f766e",
}
INK, MUTED, GRID = PALETTE["ink"], PALETTE["muted"], PALETTE["grid"]
WHEN = {"before": PALETTE["before"], "after": PALETTE["after"]}
BY_STEP = LinearSegmentedColormap.from_list("by_step", [PALETTE["before"], PALETTE["after"]])

WIDTH, HEIGHT = 4.4, 2.9  # inches of a panel
MOST_POINTS = 600  # of one line or cloud


def panel(width: float = WIDTH, height: float = HEIGHT, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with `rows` styled axes above each other that share x."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])
    for ax in axes:
        style(ax)
    return figure, axes


def style(ax: Axes) -> None:
    """Light grid, no box."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(MUTED)
    ax.grid(True, color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=8, color=MUTED, labelcolor=INK)
    ax.margins(x=0.02)


def name_axes(ax: Axes, x: str | None, y: str | None) -> None:
    """Axis labels; "$" and the like would be read as mathematics, so names from files do not belong here."""
    if x is not None:
        ax.set_xlabel(x, fontsize=8.5, color=INK)
    if y is not None:
        ax.set_ylabel(y, fontsize=8.5, color=INK)


def legend(ax: Axes) -> None:
    """Above the axes, where it hides nothing."""
    ax.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.2,
        ncols=3,
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        handlelength=1.4,
        columnspacing=1.2,
    )


def thin(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points of a line: the least and the greatest of each stretch, so that spikes stay."""
    if len(x) <= most:
        return x, y
    stretches = np.array_split(np.arange(len(x)), most // 2)
    kept = np.unique([part[pick(y[part])] for part in stretches for pick in (np.argmin, np.argmax)])
    return x[kept], y[kept]


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` values, over fewer at both ends.

    >>> running_mean(np.array([0.0, 3.0, 6.0, 0.0]), 3)
    array([1.5, 3. , 3. , 3. ])
    """
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones_like(values), ones, "same")


def line(ax: Axes, x: np.ndarray, y: np.ndarray, color: str, name: str | None = None, *, marks: bool = False) -> None:
    """A line by step; a long noisy one is faint under its running mean."""
    marker = "o" if marks or len(x) < 2 else None
    if marks or len(x) < 60 or not _noisy(y):
        ax.plot(*thin(x, y), color=color, linewidth=1.6, marker=marker, markersize=3.5, label=name)
        return
    window = 2 * (len(x) // 60) + 1
    ax.plot(*thin(x, y), color=color, linewidth=0.8, alpha=0.35)
    smooth = running_mean(y, window)
    ax.plot(*thin(x, smooth), color=color, linewidth=1.6, label=name and f"{name}, mean of {window} steps")


def _noisy(y: np.ndarray) -> bool:
    """Whether it goes up and down much more than it goes anywhere: a schedule, for one, does not."""
    return bool(np.abs(np.diff(y)).sum() > 3 * np.ptp(y))


def histogram(ax: Axes, values: dict[str, np.ndarray], colors: dict[str, str], edges: np.ndarray) -> None:
    """Outlines of shares over the same bins, with a dashed line at each mean."""
    for name, numbers in values.items():
        counts, _ = np.histogram(np.clip(numbers, edges[0], edges[-1]), edges)
        color, share = colors[name], counts / len(numbers)
        text = f"{name}, mean {numbers.mean():.3g}"
        ax.stairs(share, edges, color=color, linewidth=1.5, fill=False, label=text)
        ax.stairs(share, edges, color=color, fill=True, alpha=0.22)
        ax.axvline(numbers.mean(), color=color, linewidth=1.2, linestyle=(0, (4, 2)))
    ax.set_ylim(bottom=0)


def edges(low: float, high: float) -> np.ndarray:
    """Thirty bins."""
    return np.linspace(low, high, 31)


def whole_edges(*values: np.ndarray) -> np.ndarray:
    """About thirty bins, each around equally many whole numbers: what is counted would else fall between bins."""
    low, high = limits_of(*values)
    width = max(1, round((high - low) / 30))
    return np.arange(np.floor(low), high + width + 0.5, width) - 0.5


def limits_of(*values: np.ndarray) -> tuple[float, float]:
    """From the least to the greatest of all; a constant gets room on both sides."""
    together = np.concatenate(values)
    low, high = float(together.min()), float(together.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def to_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an `<svg>` element: text as text, colours as CSS variables, ids that begin with `name`.

    `name` and `description` go into attributes as they are.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # a rule for every path and line of the page
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    opening = f'<svg {box[0]} role="img" aria-label="{description}">'
    text = re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1)
    # Matplotlib numbers ids in each figure anew; several share a page.
    text = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", text).replace("xlink:href", "href")
    text = _slim(text)
    for variable, color in PALETTE.items():
        text = text.replace(color, f"var(--{variable})")
    return text


def _slim(text: str) -> str:
    """The same picture in about half the bytes: a page holds dozens."""
    text = re.sub(r'(?<= d=")[^"]+', lambda path: " ".join(path[0].split()), text)
    text = re.sub(r">\s+<", "><", text)
    text = re.sub(r'(?<= [dxy]=")[^"]+', lambda numbers: re.sub(r"(\.\d\d)\d+", r"\1", numbers[0]), text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r" ?font-family: [^;]*;", "", text)  # the page's own
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    return re.sub(r"<g([^>]*)>((?:<use [^>]*/>)+)</g>", _one_style, text)


def _one_style(group: re.Match[str]) -> str:
    """A group of marks that look alike says so once."""
    styles = set(re.findall(r' style="[^"]*"', group[2]))
    if len(styles) != 1 or "style" in group[1]:
        return group[0]
    style = styles.pop()
    return f"<g{group[1]}{style}>{group[2].replace(style, '')}</g>"


def to_png(figure: Figure, path: Path) -> None:
    """The figure on white."""
    figure.savefig(path, format="png", dpi=120, facecolor="white", metadata={"Software": None})
