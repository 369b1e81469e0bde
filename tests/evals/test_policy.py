"""What is said of samples before and after."""

import json

import pytest

from rlhf_jax.evals.policy import Row, compare, write_samples


def row(tokens, kl, gold, prompt="It is", completion=" fine"):
    return Row(prompt, completion, tuple(tokens), tokens[-1] == 3, {"kl": kl, "score": gold * 2, "gold": gold})


BEFORE = [row([5, 6, 5, 6, 5, 6], 0.0, 0.2), row([7, 8], 0.0, 0.4)]
AFTER = [row([5, 6, 7, 3], 3.0, 0.9), row([8, 9], 1.0, 0.7)]


def test_compare_by_hand():
    figures = compare(BEFORE, AFTER)
    assert figures["gold_before"] == pytest.approx(0.3) and figures["gold_after"] == pytest.approx(0.8)
    assert figures["score_after"] == pytest.approx(1.6) and figures["seq_kl"] == pytest.approx(2.0)
    assert figures["length_before"] == 4 and figures["length_after"] == 3
    # Six tokens of each: 5 6 5 6 5 6 has 2 distinct bigrams of 5; 5 6 7 3 and 8 9 have 4 of 4.
    assert figures["distinct2_before"] == pytest.approx(2 / 5) and figures["distinct2_after"] == 1
    assert "kl_before" not in figures


def test_samples_are_written_in_order(tmp_path):
    awkward = row([5, 3], 0.5, 0.5, completion=' "quoted"\n¾ 漢字 🎬')
    write_samples(tmp_path / "ppo" / "samples.jsonl", [awkward], [AFTER[0]], step=7)
    lines = [json.loads(line) for line in (tmp_path / "ppo" / "samples.jsonl").read_text("utf-8").splitlines()]
    assert [(line["when"], line["step"]) for line in lines] == [("before", 0), ("after", 7)]
    assert lines[0]["completion"] == awkward.completion and lines[0]["ended"] and lines[0]["length"] == 2
    assert {"prompt", "completion", "score", "gold", "kl"} <= lines[1].keys()
