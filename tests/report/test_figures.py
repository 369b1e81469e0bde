"""What is drawn is what the files say; the README's figure takes several runs."""

import json

import numpy as np
import pytest
from matplotlib.image import imread

from rlhf_jax.errors import UserError
from rlhf_jax.report import canvas, figures, readme_figure
from rlhf_jax.report.workdir import read_run


def stage_of(workdir, name):
    (found,) = [stage for stage in read_run(workdir).stages if stage.name == name]
    return found


def drawn(ax):
    return {str(line.get_label()): np.asarray(line.get_xydata()) for line in ax.get_lines()}


def test_every_metric_is_drawn_once(workdir):
    for stage in read_run(workdir).stages:
        small = {panel.key for panel in figures.diagnostic_panels(stage)}
        assert small == set(stage.metrics) - figures.SHOWN
        assert len(small) >= 3


def test_the_path_holds_score_gold_and_kl_by_step(workdir):
    stage = stage_of(workdir, "ppo")
    axes = figures.path(stage).figure.axes
    for ax, name in zip(axes, ("score", "gold", "seq_kl"), strict=True):
        line = next(iter(drawn(ax).values()))
        assert np.array_equal(line, np.transpose(stage.series(name)))
    assert "nats" in axes[2].get_ylabel() and axes[2].get_xlabel() == "step"


def test_the_frontier_holds_reward_against_kl(workdir):
    stage = stage_of(workdir, "ppo")
    ax = figures.frontier("gold")(stage).figure.axes[0]
    (dots,) = ax.collections
    assert np.array_equal(dots.get_offsets(), np.transpose([stage.series("seq_kl")[1], stage.series("gold")[1]]))
    assert np.array_equal(dots.get_array(), np.arange(1, 41))
    diamonds = [line.get_xydata()[0] for line in ax.get_lines() if line.get_marker() == "D"]
    assert np.allclose(diamonds, [stage.samples(when, "kl", "gold").mean(1) for when in ("before", "after")])
    assert ax.get_xlabel() == "KL to reference (nats per sequence)"


def test_a_metric_missing_in_some_rows_is_paired_by_row(tmp_path):
    rows = [{"stage": "p", "step": step, "seconds": 0, "seq_kl": float(step)} for step in range(1, 6)]
    for step in (2, 4):
        rows[step - 1]["gold"] = step / 10
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert np.array_equal(stage_of(tmp_path, "p").together("seq_kl", "gold"), [[2, 4], [2, 4], [0.2, 0.4]])
    assert figures.frontier("score")(stage_of(tmp_path, "p")) is None


def test_histograms_hold_shares_of_all_samples(workdir):
    stage = stage_of(workdir, "ppo")
    for name in ("gold", "length", "score"):
        panel = figures.before_after(name)(stage)
        shares = [patch.get_data().values for patch in panel.figure.axes[0].patches]
        assert len(shares) == 4 and all(share.sum() == pytest.approx(1) for share in shares)
    gold = stage.samples("after", "gold")[0].mean() - stage.samples("before", "gold")[0].mean()
    assert f"{gold:+.3f}" in figures.before_after("gold")(stage).caption


def test_whole_numbers_get_bins_of_equal_chance():
    edges = canvas.whole_edges(np.array([1.0, 100.0]))
    per_bin, _ = np.histogram(np.arange(1, 101), edges)
    assert set(per_bin[:-1]) == {3} and per_bin.sum() == 100
    assert np.array_equal(canvas.whole_edges(np.array([3.0, 5.0])), [2.5, 3.5, 4.5, 5.5])
    assert canvas.whole_edges(np.full(4, 40.0))[0] < 40 < canvas.whole_edges(np.full(4, 40.0))[-1]


def test_calibration_says_the_evaluations_error(workdir):
    stage = stage_of(workdir, "reward_model")
    bins = stage.evaluation["bins"]
    ece = sum(one["count"] * abs(one["accuracy"] - one["confidence"]) for one in bins) / stage.evaluation["n"]
    panel = figures.reliability(stage)
    assert f"ECE {ece:.3f} over 1200" in panel.caption
    line = drawn(panel.figure.axes[0])["calibrated"]
    assert np.array_equal(line[0], line[1][::-1] * 0 + 0.5) and np.array_equal(line[1], [1, 1])


def test_lines_are_thinned_without_losing_spikes():
    x, y = np.arange(100_000), np.zeros(100_000)
    y[71_234], y[5] = 50, -3
    few_x, few_y = canvas.thin(x, y)
    assert len(few_x) <= canvas.MOST_POINTS and few_y.max() == 50 and few_y.min() == -3
    assert (np.diff(few_x) > 0).all()


def test_svg_names_are_the_figures_own(workdir):
    figure = figures.loss(stage_of(workdir, "sft")).figure
    one, two = (canvas.to_svg(figure, name, "Loss") for name in ("one", "two"))
    assert one.startswith('<svg viewBox="') and 'aria-label="Loss"' in one
    assert "http" not in one and "<style" not in one and "metadata" not in one
    assert one.count("one-") == two.count("two-") > 10
    assert "loss (nats per token)</text>" in one  # text stays text


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_readme_figure_of_one_run_or_several(make_run, tmp_path, seeds):
    workdirs = [make_run(tmp_path / str(seed), seed) for seed in range(seeds)]
    readme_figure(workdirs, tmp_path / "figure.png")
    pixels = imread(tmp_path / "figure.png")
    assert 1200 < pixels.shape[1] < 1500 and 350 < pixels.shape[0] < 600
    assert (pixels[0, 0, :3] == 1).all() and pixels.std() > 0.05
    assert 30_000 < (tmp_path / "figure.png").stat().st_size < 200_000


def test_the_readme_figure_takes_runs_of_unequal_length_and_refuses_others(make_run, tmp_path):
    workdirs = [make_run(tmp_path / str(seed), seed) for seed in range(2)]
    lines = (workdirs[1] / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdirs[1] / "metrics.jsonl").write_text("".join(lines[:-7]))
    readme_figure(workdirs, tmp_path / "figure.png")
    (workdirs[0] / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="seq_kl"):
        readme_figure(workdirs, tmp_path / "figure.png")


def test_decoding_by_values_is_drawn_against_its_kl(tmp_path):
    points = [
        {"beta": b, "seq_kl": b / 4, "gold": 0.5 + b / 8, "gold_low": 0.4, "gold_high": 0.9} for b in (0.0, 0.5, 2.0)
    ]
    (tmp_path / "ilql").mkdir()
    (tmp_path / "ilql" / "evaluation.json").write_text(json.dumps({"betas": points}))
    (panel,) = figures.stage_panels(stage_of(tmp_path, "ilql"))
    (ax,) = panel.figure.axes
    line = next(line.get_xydata() for line in ax.get_lines() if line.get_marker() == "o")
    assert np.allclose(line, [[0.0, 0.5], [0.125, 0.5625], [0.5, 0.75]])
    assert [text.get_text() for text in ax.texts] == ["0", "0.5", "2"]
    assert panel.key == "betas" and "gold from 0.500 to 0.750" in panel.caption


def test_the_best_of_n_is_drawn_against_its_kl(tmp_path):
    points = [
        {"n": n, "kl": kl, "score": kl, "score_low": kl - 0.1, "score_high": kl + 0.2, "gold": 0.5, "gold_low": 0.4,
         "gold_high": 0.6}
        for n, kl in ((1, 0.0), (2, 0.19), (3, 0.43))
    ]  # fmt: skip
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "evaluation.json").write_text(json.dumps({"best_of_n": points}))
    (panel,) = figures.stage_panels(stage_of(tmp_path, "best"))
    upper, lower = panel.figure.axes
    for ax, name in ((upper, "score"), (lower, "gold")):
        line = next(line.get_xydata() for line in ax.get_lines() if line.get_marker() == "o")
        assert np.allclose(line, [[point["kl"], point[name]] for point in points])
        assert [text.get_text() for text in ax.texts] == ["1", "2", "3"]
    assert "gold from 0.500 to 0.500" in panel.caption and "nats" in lower.get_xlabel()
