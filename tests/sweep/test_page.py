"""The page of a sweep: for who did not run it; settings best first, and nothing that says nothing."""

import json
import re

import pytest

from rlhf_jax.sweep.grid import settings
from rlhf_jax.sweep.page import render
from rlhf_jax.sweep.summary import main_reading, ranked, summarise, table, telling
from tests.toys import experiment

VARY = "stages.ppo.kl.coef=0.1,0.2,0.4"
GOLD = {0.1: (0.5, 0.7), 0.2: (0.8, 0.9), 0.4: (0.6, 0.6)}


@pytest.fixture
def swept(tmp_path):
    """Runs of two seeds a setting with files as a run's, and their folder; one run is not finished."""
    runs = settings(experiment(), 2, [VARY])
    for one in runs:
        coef, seed = one.values["stages.ppo.kl.coef"], one.experiment.seed
        folder = tmp_path / "all" / one.label
        folder.mkdir(parents=True)
        lines = [
            {"stage": "ppo", "step": step, "seconds": 1.0, "score": coef * step + seed, "skipped": 0.0}
            for step in (1, 2, 3)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if (coef, seed) == (0.4, 1):
            continue
        gold = GOLD[coef][seed]
        ppo = {"gold_before": 0.4 + 0.01 * seed, "gold_after": gold, "gold_after_low": gold - 0.1, "steps": 8}
        summary = {"sft": {"heldout_loss": 2.0, "rows_train": 64, "length": 3.0 + seed}, "ppo": ppo}
        (folder / "summary.json").write_text(json.dumps(summary))
    return tmp_path / "all", runs


def text_of(html):
    return re.sub(r"\s+", " ", re.sub(r"<(svg|style).*?</\1>|<[^>]*>", " ", html, flags=re.DOTALL))


def test_settings_stand_best_first_by_the_last_stages_reading(swept):
    folder, runs = swept
    summary = summarise(runs, folder)
    assert main_reading(summary) == ("ppo", "gold_after")
    assert [row["values"]["stages.ppo.kl.coef"] for row in ranked(summary)] == [0.2, 0.1, 0.4]
    summary["rows"][0]["seeds"] = []
    assert [row["values"]["stages.ppo.kl.coef"] for row in ranked(summary)] == [0.2, 0.4, 0.1]


def test_less_is_better_where_it_is_a_loss():
    def row(coef, loss):
        return {"values": {"lr": coef}, "seeds": [0], "unfinished": [], "sft": {"heldout_loss": {"mean": loss}}}

    summary = {"rows": [row(1, 2.5), row(2, 2.1), row(3, 3.0)]}
    assert [one["values"]["lr"] for one in ranked(summary)] == [2, 1, 3]
    assert table(summary)[0].endswith("best first by sft's heldout_loss")


def test_what_is_the_same_in_all_runs_is_left_out_but_results(swept):
    folder, runs = swept
    summary = summarise(runs, folder)
    assert telling(summary, "ppo") == ["gold_before", "gold_after"]
    assert telling(summary, "sft") == ["heldout_loss", "length"]  # a result, though it is one number
    lines = "\n".join(table(summary))
    assert "steps" not in lines and "± 0" not in lines.replace("± 0.", "") and "rows_train" not in lines
    alone = summarise(runs[:1], folder)
    assert "steps" in telling(alone, "ppo")


def test_the_page_tells_who_did_not_run_it(swept):
    folder, runs = swept
    page = render(folder, runs)
    told = text_of(page)
    assert "6 runs: 3 settings, each with 2 seeds (0 to 1), of the stages sft, ppo." in told
    assert "Varied: stages.ppo.kl.coef = 0.1, 0.2, 0.4." in told
    assert "Unfinished, and not in the tables: kl.coef 0.4: seeds 1." in told
    assert "gold score (P(positive)) of stage ppo at the end, best first: more is better" in told
    assert "0.2 0.850 0.050 0.215 to 1.485 2" in told and "0.4 0.600 – – 1" in told
    assert told.index("0.2 0.850") < told.index("0.1 0.600")
    assert page.count("<svg") == 1  # of the score: skipped is 0 everywhere
    for named in ("kl.coef 0.1", "kl.coef 0.2", "kl.coef 0.4"):
        assert named in page[page.index("<svg") :]
    assert "rows to train on" not in told and "<script" not in page


def test_a_sweep_of_seeds_alone_has_a_page(tmp_path):
    runs = settings(experiment(), 2, [])
    for one in runs:
        folder = tmp_path / one.label
        folder.mkdir()
        ppo = {"score_after": 1.0 + one.experiment.seed}
        (folder / "summary.json").write_text(json.dumps({"sft": {}, "ppo": ppo}))
    told = text_of(render(tmp_path, runs))
    assert "2 runs: 1 setting with 2 seeds (0 to 1)" in told and "as in the config" in told
