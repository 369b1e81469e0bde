"""The figures of a stage, drawn wherever the metrics or files behind them exist, whatever the stage is called."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlhf_jax.errors import UserError
from rlhf_jax.evals.preferences import accuracy_interval, pearson
from rlhf_jax.report import canvas
from rlhf_jax.report.canvas import BY_STEP, GRID, INK, MUTED, PALETTE, WHEN
from rlhf_jax.report.labels import JUDGED, label
from rlhf_jax.report.workdir import Stage, columns_of, number, read_run


@dataclass(frozen=True)
class Panel:
    """A figure with what stands above and below it; `key` names it within its stage."""

    key: str
    title: str
    caption: str
    figure: Figure


def stage_panels(stage: Stage) -> list[Panel]:
    """The stage's main figures."""
    makers: Sequence[Callable[[Stage], Panel | None]] = (
        loss, accuracy, path, frontier("score"), frontier("gold"), before_after("score"), before_after("gold"),
        before_after("vader"), before_after("length"), length_by_step, score_by_length, reliability, margins,
        heldout_score_by_length, best_of_n, by_beta,
    )  # fmt: skip
    return [made for made in (make(stage) for make in makers) if made is not None]


SHOWN = {  # metrics that the main figures hold
    "loss", "heldout_loss", "heldout_log_loss", "accuracy", "heldout_accuracy", "score", "gold", "reward", "seq_kl",
    "seq_kl_exact", "length",
}  # fmt: skip
CLIPPED = ("policy_clipped", "value_clipped")
FIRST = ("entropy", *CLIPPED, "explained_variance", "kl_coef", "kl", "no_eos", "ratio_deviation", "sampling_deviation")


def diagnostic_panels(stage: Stage) -> list[Panel]:
    """One small panel for every metric that no main figure holds."""
    drawn_elsewhere = SHOWN if "seq_kl" in stage.metrics else SHOWN - {"score", "gold", "reward"}
    names = [name for name in stage.metrics if name not in drawn_elsewhere]
    panels = [_small(stage, name) for name in sorted(names, key=_rank)]
    return [made for made in panels if made is not None]


def _rank(name: str) -> int:
    return FIRST.index(name) if name in FIRST else len(FIRST)


def _small(stage: Stage, name: str) -> Panel | None:
    steps, values = stage.series(name)
    if not len(steps):
        return None
    figure, (ax,) = canvas.panel(2.9, 1.75)
    canvas.line(ax, steps, values, MUTED)
    known = label(name)
    canvas.name_axes(ax, "step", known.unit)
    _whole_steps(ax)
    if name in CLIPPED or name in ("entropy", "no_eos"):
        ax.set_ylim(bottom=0)
    if name.endswith("_deviation") and values.min() > 0:
        ax.set_yscale("log")
    return Panel(name, known.title, f"last {values[-1]:.4g}", figure)


def _whole_steps(ax: Axes) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10]))


def _sentence(title: str) -> str:
    return title[:1].upper() + title[1:]


def loss(stage: Stage) -> Panel | None:
    """Training loss and held-out loss by step."""
    pairs = bool({"heldout_log_loss", "accuracy"} & set(stage.metrics))
    heldout_name = "heldout_log_loss" if pairs else "heldout_loss"
    each = _judged(stage) if pairs else "token"
    return _train_and_heldout(stage, "loss", "loss", heldout_name, "Loss", f"loss (nats per {each})")


def accuracy(stage: Stage) -> Panel | None:
    """Accuracy on what was judged in the batch and on what is held out by step."""
    each = _judged(stage)
    title, axis = f"Accuracy on {each}s", f"accuracy (share of {each}s)"
    made = _train_and_heldout(stage, "accuracy", "accuracy", "heldout_accuracy", title, axis)
    if made is not None:
        ax = made.figure.axes[0]
        ax.axhline(0.5, color=MUTED, linewidth=0.8, linestyle=":")
    return made


def _judged(stage: Stage) -> str:
    """What a stage's loss is a mean over."""
    name = stage.config.get("loss")
    return JUDGED.get(name, "pair") if isinstance(name, str) else "pair"


def _train_and_heldout(stage: Stage, key: str, train: str, heldout: str, title: str, y: str) -> Panel | None:
    curves = {"train": stage.series(train), "held-out": stage.series(heldout)}
    if not any(len(steps) for steps, _ in curves.values()):
        return None
    figure, (ax,) = canvas.panel()
    for name, (steps, values) in curves.items():
        if len(steps):
            is_train = name == "train"
            canvas.line(ax, steps, values, MUTED if is_train else PALETTE["after"], name, marks=not is_train)
    canvas.name_axes(ax, "step", y)
    _whole_steps(ax)
    canvas.legend(ax)
    last = [f"{name} {values[-1]:.3f}" for name, (steps, values) in curves.items() if len(steps)]
    return Panel(key, title, f"At the last step: {', '.join(last)}.", figure)


def path(stage: Stage) -> Panel | None:
    """Score, gold score and sequence KL by step, one above the other."""
    if "seq_kl" not in stage.metrics:
        return None
    curves = {
        "score": [("score", PALETTE["score"], "score"), ("reward", MUTED, "after KL penalty")],
        "gold": [("gold", PALETTE["gold"], "gold")],
        "KL (nats\nper sequence)": [
            ("seq_kl", PALETTE["kl"], "k1, all samples"),
            ("seq_kl_exact", MUTED, "exact, some"),
        ],
    }
    drawn = {y: [one for one in group if len(stage.series(one[0])[0])] for y, group in curves.items()}
    drawn = {y: group for y, group in drawn.items() if group}
    if not drawn:
        return None
    figure, axes = canvas.panel(height=1.55 * len(drawn) + 0.3, rows=len(drawn))
    for ax, (y, group) in zip(axes, drawn.items(), strict=True):
        for z, (name, color, text) in enumerate(group):  # the metric itself lies over its companion
            steps, values = stage.series(name)
            ax.plot(*canvas.thin(steps, values), color=color, linewidth=1.6, label=text, zorder=3 - z / 10,
                    marker="o" if len(steps) < 2 else None, markersize=3.5)  # fmt: skip
        canvas.name_axes(ax, None, y)
        if len(group) > 1:
            canvas.legend(ax)
    canvas.name_axes(axes[-1], "step", None)
    _whole_steps(axes[-1])
    figure.align_ylabels(axes)
    caption = (
        "Means over the samples of each step: what the reward model says, what the judge says that it never sees "
        "while training, and how far the policy has gone from its reference."
    )
    return Panel("path", "Score, gold score and KL by step", caption, figure)


def frontier(name: str) -> Callable[[Stage], Panel | None]:
    """A maker of `name` against sequence KL, coloured by step."""

    def make(stage: Stage) -> Panel | None:
        steps, kl, values = stage.together("seq_kl", name)
        if not len(steps):
            return None
        figure, (ax,) = canvas.panel()
        _by_step(ax, steps, kl, values)
        text = ""
        for rows in (stage.samples(when, "kl", name) for when in WHEN):
            if rows.shape[1]:
                x, y = rows.mean(axis=1)
                ax.plot(x, y, marker="D", markersize=7, color="none", markeredgecolor=INK, linestyle="none")
                text = " Diamonds: means over the held-out prompts of the samples, before and after."
        title = label(name).title
        canvas.name_axes(ax, "KL to reference (nats per sequence)", label(name).axis)
        return Panel(
            f"{name}-kl", f"{_sentence(title)} against KL", f"Grey: first step, blue: last step.{text}", figure
        )

    return make


def _by_step(ax: Axes, steps: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
    """A path through (x, y) whose dots go from grey to blue; its two ends say their steps."""
    kept = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 200)).astype(int))
    ax.plot(x[kept], y[kept], color=GRID, linewidth=1.2, zorder=2)
    ax.scatter(x[kept], y[kept], c=steps[kept], cmap=BY_STEP, s=16, zorder=3)
    for index in dict.fromkeys((0, len(steps) - 1)):
        ax.annotate(f"step {steps[index]:.0f}", (x[index], y[index]), xytext=(5, -9), textcoords="offset points",
                    fontsize=7.5, color=INK)  # fmt: skip
    ax.margins(x=0.12, y=0.1)


def before_after(name: str) -> Callable[[Stage], Panel | None]:
    """A maker of the distribution of `name` over the samples, before and after."""

    def make(stage: Stage) -> Panel | None:
        found = {when: stage.samples(when, name)[0] for when in WHEN}
        found = {when: values for when, values in found.items() if len(values)}
        if not found:
            return None
        figure, (ax,) = canvas.panel()
        if name == "length":
            edges = canvas.whole_edges(*found.values())
        else:
            edges = canvas.edges(0.0, 1.0) if name == "gold" else canvas.edges(*canvas.limits_of(*found.values()))
        canvas.histogram(ax, found, WHEN, edges)
        known = label(name)
        canvas.name_axes(ax, known.axis, "share of samples")
        canvas.legend(ax)
        means = [float(values.mean()) for values in found.values()]
        change = f" The mean changes by {means[1] - means[0]:+.3f}." if len(means) == 2 else ""
        counts = " and ".join(f"{len(values)} {when}" for when, values in found.items())
        return Panel(f"{name}-samples", f"{_sentence(known.title)} of the samples", f"{counts}.{change}", figure)

    return make


def length_by_step(stage: Stage) -> Panel | None:
    """Mean completion length by step."""
    steps, values = stage.series("length")
    if not len(steps):
        return None
    figure, (ax,) = canvas.panel()
    canvas.line(ax, steps, values, INK)
    ax.set_ylim(0, 1.08 * values.max())
    canvas.name_axes(ax, "step", label("length").axis)
    _whole_steps(ax)
    return Panel("length", "Completion length by step", f"From {values[0]:.1f} to {values[-1]:.1f} tokens.", figure)


def score_by_length(stage: Stage) -> Panel | None:
    """Score against length of the samples."""
    found = {when: stage.samples(when, "length", "score") for when in WHEN}
    return _clouds({when: both for when, both in found.items() if both.shape[1]}, "length-score", "of the samples")


def heldout_score_by_length(stage: Stage) -> Panel | None:
    """Score against length of the reward model's held-out completions."""
    columns = [_numbers(stage, name) for name in ("lengths", "scores")]
    if not len(columns[0]) or len(columns[0]) != len(columns[1]):
        return None
    clouds = {"held-out completions": np.stack(columns)}
    return _clouds(clouds, "length-score-heldout", "of held-out completions", " Scores as trained, not yet normalised.")


def _clouds(clouds: dict[str, np.ndarray], key: str, of: str, note: str = "") -> Panel | None:
    if not clouds:
        return None
    figure, (ax,) = canvas.panel()
    texts = []
    jitter = np.random.default_rng(0)  # lengths are whole numbers: dots would lie on each other
    for name, (lengths, scores) in clouds.items():
        kept = np.unique(np.linspace(0, len(scores) - 1, min(len(scores), canvas.MOST_POINTS)).astype(int))
        x = lengths[kept] + jitter.uniform(-0.3, 0.3, len(kept))
        ax.plot(x, scores[kept], linestyle="none", marker="o", markersize=3, markeredgewidth=0, alpha=0.55,
                color=WHEN.get(name, PALETTE["score"]), label=name)  # fmt: skip
        texts.append(f"{name} {pearson(lengths, scores):+.2f}")
    canvas.name_axes(ax, label("length").axis, label("score").axis)
    canvas.legend(ax)
    return Panel(key, f"Score against length {of}", f"Correlation: {', '.join(texts)}.{note}", figure)


def _numbers(stage: Stage, name: str) -> np.ndarray:
    """A list of numbers in evaluation.json; empty where it is missing or holds anything else."""
    values = [number(value) for value in stage.evaluation.get(name) or []]
    return np.asarray([] if None in values else values, np.float64)


def reliability(stage: Stage) -> Panel | None:
    """Accuracy against confidence of the reward model, with 95% intervals and the calibration error."""
    confidence, won, count = columns_of(stage.evaluation.get("bins") or [], "confidence", "accuracy", "count")
    if not len(count) or count.min() < 1:
        return None
    figure, (ax,) = canvas.panel()
    ax.plot([0.5, 1], [0.5, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 2)), label="calibrated")
    intervals = np.array([accuracy_interval(a * n, int(n)) for a, n in zip(won, count, strict=True)])
    errors = np.clip(np.abs(intervals.T - won), 0, None)
    ax.errorbar(confidence, won, errors, color=PALETTE["score"], linewidth=1.2, marker="o", markersize=4,
                elinewidth=0.9, label="reward model")  # fmt: skip
    low = min(0.4, float(intervals.min()) - 0.02)
    ax.bar(confidence, (0.96 - low) * 0.25 * count / count.max(), bottom=low, width=0.03, color=MUTED, alpha=0.35,
           label="pairs")  # fmt: skip
    ax.set_ylim(low, 1.02)
    canvas.name_axes(ax, "confidence, P(preferred wins)", "accuracy (share of pairs)")
    canvas.legend(ax)
    ece = float((count * np.abs(won - confidence)).sum() / count.sum())
    caption = (
        f"ECE {ece:.3f} over {count.sum():.0f} held-out pairs, the mean distance from the diagonal; 95% intervals."
    )
    return Panel("reliability", "Calibration of the reward model", caption, figure)


def margins(stage: Stage) -> Panel | None:
    """How far the winners of held-out pairs lead."""
    values = _numbers(stage, "margins")
    if not len(values):
        return None
    figure, (ax,) = canvas.panel()
    canvas.histogram(ax, {"pairs": values}, {"pairs": PALETTE["score"]}, canvas.edges(*canvas.limits_of(values)))
    ax.axvline(0, color=INK, linewidth=0.8)
    canvas.name_axes(ax, "score(winner) − score(loser)", "share of pairs")
    canvas.legend(ax)
    won = float(np.where(values == 0, 0.5, values > 0).mean())
    low, high = accuracy_interval(won * len(values), len(values))
    caption = f"{won:.1%} of {len(values)} pairs lie right of 0 (95% interval {low:.1%} to {high:.1%})."
    return Panel("margins", "Margins of held-out pairs", caption, figure)


def best_of_n(stage: Stage) -> Panel | None:
    """What the best of n completions is worth against its KL, with 95% intervals over prompts."""
    texts = "The best of n completions", "KL of the best of n", "an n"
    return _worth(stage, "best_of_n", ("n", "kl"), *texts)


def by_beta(stage: Stage) -> Panel | None:
    """What decoding by values is worth at each β, with 95% intervals over prompts."""
    texts = "Decoding by log π + β (Q − V)", "KL to the policy at the start", "a β"
    return _worth(stage, "betas", ("beta", "seq_kl"), *texts)


def _worth(stage: Stage, key: str, columns: tuple[str, str], title: str, axis: str, dot: str) -> Panel | None:
    points = stage.evaluation.get(key) or []
    curves = {name: columns_of(points, *columns, name, f"{name}_low", f"{name}_high") for name in ("score", "gold")}
    curves = {name: columns for name, columns in curves.items() if columns.shape[1]}
    if not curves:
        return None
    figure, axes = canvas.panel(height=1.55 * len(curves) + 0.6, rows=len(curves))
    ends = []
    for ax, (name, (counts, kl, values, low, high)) in zip(axes, curves.items(), strict=True):
        errors = np.clip([values - low, high - values], 0, None)
        ax.errorbar(kl, values, errors, color=PALETTE[name], linewidth=1.2, marker="o", markersize=4, elinewidth=0.9)
        for n, x, y in zip(counts, kl, values, strict=True):
            ax.annotate(f"{n:g}", (x, y), xytext=(4, -10), textcoords="offset points", fontsize=7.5, color=INK)
        ax.margins(x=0.06, y=0.12)
        canvas.name_axes(ax, None, label(name).axis.replace(" (", "\n("))
        ends.append(f"{name} from {values[0]:.3f} to {values[-1]:.3f}")
    canvas.name_axes(axes[-1], f"{axis} (nats per sequence)", None)
    figure.align_ylabels(axes)
    caption = f"Each dot {dot}, with its 95% interval over held-out prompts: {', '.join(ends)}."
    return Panel(key.replace("_", "-"), title, caption, figure)


def readme_figure(workdirs: Sequence[Path], path: Path) -> None:
    """One PNG of several runs: score and gold by step, gold against KL, gold before and after.

    Of each run the last stage that reports `seq_kl`; thin lines are runs, thick ones their mean where all have the same
    steps. Raises `UserError` where a workdir has no such stage.
    """
    stages = [_policy_stage(Path(workdir)) for workdir in workdirs]
    figure = Figure(figsize=(11, 3.5), layout="constrained")
    grid = figure.add_gridspec(2, 3)
    top, bottom = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
    middle, right = figure.add_subplot(grid[:, 1]), figure.add_subplot(grid[:, 2])
    for ax in (top, bottom, middle, right):
        canvas.style(ax)
    for ax, name in ((top, "gold"), (bottom, "score")):
        _seeds(ax, [stage.series(name) for stage in stages], PALETTE[name])
        canvas.name_axes(ax, None, label(name).axis.replace(" (", "\n("))
        _whole_steps(ax)
    top.tick_params(labelbottom=False)
    canvas.name_axes(bottom, "step", None)
    figure.align_ylabels([top, bottom])
    for stage in stages:
        steps, kl, gold = stage.together("seq_kl", "gold")
        middle.plot(kl, gold, color=GRID, linewidth=1, zorder=2)
        middle.scatter(kl, gold, c=steps, cmap=BY_STEP, s=14, zorder=3)
    canvas.name_axes(middle, "KL to the SFT policy (nats per sequence)", label("gold").axis)
    middle.set_title("each dot a step, from grey to blue", fontsize=8.5, color=INK, loc="left")
    pooled = {when: np.concatenate([stage.samples(when, "gold")[0] for stage in stages]) for when in WHEN}
    pooled = {when: values for when, values in pooled.items() if len(values)}
    if pooled:
        canvas.histogram(right, pooled, WHEN, canvas.edges(0.0, 1.0))
        canvas.legend(right)
    canvas.name_axes(right, "gold score of held-out samples (P(positive))", "share of samples")
    runs = f"{len(stages)} seeds, thick: mean" if len(stages) > 1 else "PPO"
    top.set_title(runs, fontsize=8.5, color=INK, loc="left")
    canvas.to_png(figure, path)


def _policy_stage(workdir: Path) -> Stage:
    found = [stage for stage in read_run(workdir).stages if "seq_kl" in stage.metrics]
    if not found:
        raise UserError(f"{workdir}: no stage there reports seq_kl, so there is no reward and KL to draw")
    return found[-1]


def _seeds(ax: Axes, curves: list[tuple[np.ndarray, np.ndarray]], color: str) -> None:
    alone = len(curves) == 1
    for steps, values in curves:
        ax.plot(*canvas.thin(steps, values), color=color, linewidth=2 if alone else 0.8, alpha=1 if alone else 0.5)
    same = all(np.array_equal(steps, curves[0][0]) for steps, _ in curves)
    if same and not alone:
        ax.plot(curves[0][0], np.mean([values for _, values in curves], axis=0), color=color, linewidth=2.2)
