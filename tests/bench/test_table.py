"""The table of stored measurements, its numbers by hand."""

import json

import pytest

from rlhf_jax import cli
from rlhf_jax.bench import table
from rlhf_jax.bench.processes import Bench, Measurement, _digest
from rlhf_jax.bench.work import choose
from rlhf_jax.records import write_json

ALWAYS = {"versions": {"jax": "1"}, "at": "2026-01-02 03:04", "device": "two cores"}


def ours(seconds, rate, **more):
    found = {"seconds": seconds, "tokens": 100.0, "flops": 6e9, "matmul_rate": rate}
    return {**ALWAYS, **found, "peak_bytes": 2**20, "peak_bytes_compiling": 2**20, **more}


def theirs(seconds, version="1.2"):
    found = {"seconds": seconds, "tokens": 50.0, "flops": 9e9}
    memory = {"peak_bytes": 3 * 2**20, "peak_bytes_compiling": 5 * 2**20}
    return {**found, **memory, "versions": {"trl": version}, "at": "2026-01-02 03:05"}


@pytest.fixture
def bench(tmp_path):
    works = choose("tiny", "sft,decode/1,grpo", accelerator=False)
    made = Bench(works, ("trl",), 3, tmp_path, tmp_path, 1)
    sft, decode, grpo = works
    stored = {
        (sft, "ours"): [ours(2.0, 6e9), ours(1.0, 12e9), ours(4.0, 2e9)],
        (sft, "trl"): [theirs(2.0), theirs(3.0), theirs(4.0)],
        (decode, "ours"): [ours(2.0, 6e9, limit_seconds=1.0)],
        (decode, "trl"): [theirs(4.0, "1.3")],
        (grpo, "ours"): [ours(2.0, 6e9, update_flops=3e9, update_seconds=1.0)],
        (grpo, "trl"): [{"error": "no torch"}],
    }
    for (work, side), found in stored.items():
        for pair, one in enumerate(found):
            write_json(made._path(Measurement(work, side, pair)), one)
    return made


def test_medians_and_ratios_within_pairs(bench):
    sft = table.rows(bench)[0]
    assert sft["ours"]["seconds"] == 2.0
    assert sft["ours"]["tokens_per_second"] == 50.0
    assert sft["ours"]["share_of_limit"] == 0.5  # of 0.5, 0.5 and 0.75
    assert sft["ours"]["faster"] is None
    assert sft["trl"]["faster"] == 2.0  # of 50/25, 100/(50/3) = 6 and 25/12.5
    assert sft["trl"]["share_of_limit"] == pytest.approx(0.75)  # 9e9/2/6e9, 9e9/3/12e9, 9e9/4/2e9
    assert (sft["trl"]["peak_bytes"], sft["trl"]["peak_bytes_in_all"]) == (3 * 2**20, 5 * 2**20)


def test_decoding_is_beside_its_own_limit(bench):
    decode = table.rows(bench)[1]
    assert (decode["ours"]["share_of_limit"], decode["trl"]["share_of_limit"]) == (0.5, 0.25)


def test_an_update_has_a_share_of_its_own_and_a_failure_its_reason(bench):
    grpo = table.rows(bench)[2]
    assert grpo["ours"]["update_share"] == 0.5
    assert grpo["trl"] == {"error": "no torch"}
    shown = table.text(table.lines([grpo], ("ours", "trl"))).splitlines()
    assert shown[-1].split() == ["tiny", "grpo", "trl", "no", "torch"]


def test_pairs_that_are_not_there_yet_are_left_out(bench):
    later = Bench(bench.works, (*bench.peers, "tunix"), 5, bench.workdir, bench.venvs, 1)
    sft, _, grpo = table.rows(later)
    assert (sft["ours"]["pairs"], sft["ours"]["seconds"]) == (3, 2.0)
    assert "tunix" not in sft
    assert grpo["tunix"] == {"error": "google-tunix's GRPO takes functions of texts, not a network's scores"}


def test_json_and_markdown_name_the_machine_and_the_versions(bench):
    found = table.as_json(bench, table.rows(bench))
    assert json.loads(json.dumps(found))["versions"] == {"ours": {"jax": "1"}, "trl": {"trl": "1.2 and 1.3"}}
    assert (found["device"], found["date"], found["pairs"]) == ("two cores", "2026-01-02 03:05", 3)
    page = table.markdown(bench, table.rows(bench))
    assert "| tiny | sft | trl | 3 | 17 | 0.75 |  | 9.0 | 3 | 5 | 2.00× |" in page
    assert "- trl: trl 1.2 and 1.3" in page
    assert {line.count("|") for line in page.splitlines() if line.startswith("|")} == {len(table.COLUMNS) + 1}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--what", "dance"], "--what: dance is none of sft"),
        (["--sizes", "1b"], "--sizes: 1b is measured on an accelerator"),
        (["--peers", "verl"], "--peers: verl is none of trl, tunix"),
        (["--pairs", "0"], "--pairs must be at least 1, got 0"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
    ],
)
def test_flags_that_make_no_sense_are_one_line(flags, told, capsys):
    assert cli.main(["bench", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {told}")
    assert err.count("\n") == 1


def test_the_command_prints_what_is_stored(bench, tmp_path, capsys):
    write_json(tmp_path / "bench.json", {"sources": _digest()})
    flags = ["--sizes", "tiny", "--what", "sft", "--peers", "trl", "--pairs", "3", "--workdir", str(bench.workdir)]
    flags += ["--venvs", str(tmp_path)]
    assert cli.main(["bench", *flags, "--json", "--results", str(tmp_path / "RESULTS.md")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["rows"][0]["trl"]["faster"] == 2.0
    assert (tmp_path / "RESULTS.md").read_text().startswith("# Measured\n")
