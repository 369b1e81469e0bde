"""A finished run has every section, an unfinished one what it has; nothing that a sample says is read as markup."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.metrics import read_jsonl
from rlhf_jax.report import write

FULL = {
    "headline",
    "sft", "sft-loss",
    "reward_model", "reward_model-loss", "reward_model-accuracy", "reward_model-reliability", "reward_model-margins",
    "reward_model-length-score-heldout",
    "ppo", "ppo-path", "ppo-score-kl", "ppo-gold-kl", "ppo-score-samples", "ppo-gold-samples", "ppo-vader-samples",
    "ppo-length-samples", "ppo-length", "ppo-length-score", "ppo-samples",
    *(f"ppo-by-step-{name}" for name in ("entropy", "policy_clipped", "value_clipped", "explained_variance", "kl_coef",
                                         "ratio_deviation", "no_eos", "grad_norm", "learning_rate")),
}  # fmt: skip
VOID = {"meta", "input", "img", "br", "link", "base", "hr"}


class Page(HTMLParser):
    """What a browser would see: tags, ids, cells' texts. Every element must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.cells: list[str] = []
        self.styles: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self._open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "td" in self._open:
            self.cells[-1] += data


def page_of(workdir: Path) -> Page:
    return Page(write(workdir).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def text(tmp_path_factory, make_run) -> str:
    """The page of a finished run, drawn once for the tests that only read it."""
    workdir = make_run(tmp_path_factory.mktemp("runs") / "seed-0")
    path = write(workdir)
    assert path == workdir / "report.html" and path.stat().st_size < 3e6
    assert not list(workdir.glob("*.part"))
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


def test_a_finished_run_has_every_part(text, page):
    assert set(page.ids) >= FULL
    assert len(page.ids) == len(set(page.ids))
    assert "Unfinished" not in text and "5 min 12 s" in text and "2.31 GB" in text


def test_the_same_files_make_the_same_page(text, workdir):
    again = write(workdir).read_text(encoding="utf-8")
    one, two = (re.sub("(?<=rlhf-jax report )[^<]+", "", page) for page in (text, again))  # the folder's path
    assert one == two


def test_headline_figures_stand_before_and_after_in_one_row(page):
    cells = page.cells
    gold = cells.index("gold score P(positive)")
    assert cells[gold - 1 : gold + 4] == ["ppo", "gold score P(positive)", "0.861", "0.512", "+0.349"]
    ece = cells.index("calibration error (ECE) probability")
    assert cells[ece + 1 : ece + 4] == ["0.021", "", ""]


def test_the_page_asks_for_nothing_from_outside(text, page):
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "base", "object", "embed")
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
    (policy,) = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy
    assert not re.findall(r"url\((?!#)|@import|@font-face", text)


def test_every_reference_inside_the_page_has_its_target(text, page):
    wanted = {a["href"][1:] for _, a in page.tags if "href" in a} | set(re.findall(r"url\(#([^)]+)\)", text))
    assert wanted and wanted <= set(page.ids)


def test_colours_follow_the_readers_theme(text):
    assert "prefers-color-scheme: dark" in text
    for name in ("ink", "muted", "grid", "before", "after", "score", "gold", "kl"):
        assert len(re.findall(rf"--{name}: #", text)) == 2  # light and dark
        assert f"var(--{name})" in text.split("</style>")[1]


def test_samples_are_shown_as_they_are_and_never_run(page):
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "img" not in {tag for tag, _ in page.tags}
    for shown in (
        "<script>document.title = 'owned'</script>",
        '</td></table><img src="x" onerror="alert(1)">',
        "]]> --> <!-- &amp; &lt;",
        "emoji \U0001f3ac\U0001f468‍\U0001f469 and 映画 and עברית ‮reversed",
        "empty",
        "control \\x00\\x1b[31m and a lone \\ud83c half\\x0d\n\ttab",
        "$x^2$ \\frac{1}{2} 100% {braces} `ticks` 'quotes'",
    ):
        assert any(cell.rstrip("…") == shown for cell in page.cells), shown


def test_names_from_files_are_escaped_everywhere(tmp_path):
    workdir = tmp_path / "<i>run & co"
    bad = '"><script>alert(1)</script>$x$'
    workdir.mkdir()
    rows = [{"stage": bad, "step": step, "seconds": 1.0, bad: 0.5, "loss": 1.0} for step in (1, 2)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (workdir / "config.json").write_text(json.dumps({"experiment": {bad: bad}, "commit": bad, "command": [bad]}))
    (workdir / "summary.json").write_text(json.dumps({bad: {bad: bad, "list": [bad]}, "params_digest": {bad: bad}}))
    page = page_of(workdir)
    assert [tag for tag, _ in page.tags].count("script") == 1 and "i" not in {tag for tag, _ in page.tags}
    assert len(page.ids) == len(set(page.ids))
    assert html.escape(bad) in (workdir / "report.html").read_text(encoding="utf-8")


def test_stages_may_have_any_name(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join(lines[-2:]))
    for name, new in (("ppo", "ppo2 (again)"), ("reward_model", "rm")):
        (workdir / name).rename(workdir / new)
        for file in ("metrics.jsonl", "config.json", "summary.json"):
            path = workdir / file
            path.write_text(path.read_text().replace(f'"{name}"', f'"{new}"'))
    assert {"ppo2--again--path", "ppo2--again--samples", "rm-reliability"} <= set(page_of(workdir).ids)


@pytest.mark.parametrize("kept", ["config.json", "metrics.jsonl", "ppo", "reward_model", "summary.json"])
def test_any_one_file_alone_makes_a_page(workdir, kept):
    for path in workdir.iterdir():
        if path.name != kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = page_of(workdir)
    parts = {
        "config.json": set(),
        "metrics.jsonl": {"sft-loss", "reward_model-accuracy", "ppo-path", "ppo-gold-kl"},
        "ppo": {"ppo-gold-samples", "ppo-samples"},
        "reward_model": {"reward_model-reliability", "reward_model-margins"},
        "summary.json": {"headline"},
    }
    assert set(page.ids) >= parts[kept]
    assert not set(page.ids) & {one for other, some in parts.items() if other != kept for one in some}


def test_a_killed_run_shows_how_far_it_came(workdir):
    for name in ("summary.json", "reward_model/evaluation.json"):
        (workdir / name).unlink()
    (workdir / "sft").mkdir()
    (workdir / "sft" / "summary.json").write_text('{"heldout_loss": 4.0801}')
    samples = read_jsonl(workdir / "ppo" / "samples.jsonl")
    (workdir / "ppo" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples[:256]))
    metrics = (workdir / "metrics.jsonl").read_text()
    (workdir / "metrics.jsonl").write_text(metrics[: metrics.index('"step": 3, "seconds": 9.3')])  # torn in a line
    page = page_of(workdir)
    text = (workdir / "report.html").read_text(encoding="utf-8")
    assert "Unfinished: reward_model, ppo. So far: ppo at step 2." in text
    assert "4.080" in page.cells  # the finished stage's figure
    assert {"ppo-path", "ppo-samples", "ppo-gold-samples"} <= set(page.ids)
    assert "reward_model-reliability" not in page.ids
    assert "score before" in text and "score after" not in text


def test_one_step_and_missing_or_odd_values_are_no_trouble(tmp_path):
    rows = [
        {"stage": "ppo", "step": 1, "seconds": 1, "seq_kl": 0.0, "score": 0.1, "note": "text", "flag": True},
        {"stage": "sft", "step": 1, "seconds": 1, "loss": float("nan"), "grad_norm": None},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "ppo").mkdir()
    samples = [
        {"when": when, "prompt": "a", "completion": None, "score": None, "gold": 0.5} for when in ("before", "x")
    ]
    (tmp_path / "ppo" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    (tmp_path / "ppo" / "evaluation.json").write_text('{"n": 0, "bins": [], "scores": [], "margins": null}')
    ids = set(page_of(tmp_path).ids)
    assert {"ppo-path", "ppo-score-kl", "ppo-samples", "ppo-gold-samples"} <= ids
    assert "sft" not in ids and "ppo-reliability" not in ids and "ppo-score-samples" not in ids


def test_a_large_run_stays_below_three_megabytes(workdir):
    metrics = [row for row in read_jsonl(workdir / "metrics.jsonl") if row["stage"] == "ppo"]
    names = ("stage", "seconds", "seq_kl", "gold", "entropy")
    few = [{name: row[name] for name in names} for row in metrics]
    long = [{**few[step % 40], "step": step, "score": step % 97} for step in range(1, 10_001)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    samples = read_jsonl(workdir / "ppo" / "samples.jsonl")
    rows = [
        {**row, "prompt": f"{k} {row['prompt']}", "completion": "long & wide " * 400}
        for k in range(4)
        for row in samples
    ]
    (workdir / "ppo" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = write(workdir)
    assert path.stat().st_size < 3e6
    assert re.search(r"The first \d+ of 1024 prompts", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{", r"config\.json: not JSON"),
        ("summary.json", "[1]", r"summary\.json: expected a JSON object, found list"),
        ("reward_model/evaluation.json", "\x00", r"evaluation\.json: not JSON"),
        ("metrics.jsonl", '{"step": 1}\n', r"metrics\.jsonl, row 1: no 'stage'"),
        ("ppo/samples.jsonl", '{"when": "before", "prompt": ""}\n', r"samples\.jsonl, row 1: no 'completion'"),
        ("ppo/samples.jsonl", "oops\n", r"samples\.jsonl, line 1: not JSON"),
    ],
)
def test_a_broken_file_is_named_and_the_old_report_stays(workdir, file, content, message):
    (workdir / "report.html").write_text("old")
    (workdir / file).write_text(content)
    with pytest.raises(UserError, match=message):
        write(workdir)
    assert (workdir / "report.html").read_text() == "old"


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no run here"):
        write(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        write(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


CLICKS = """
const read = column => [...document.querySelectorAll('.samples tbody tr')].filter(row => !row.hidden)
  .map(row => row.cells[column].dataset.value ?? row.cells[column].textContent);
const heads = [...document.querySelectorAll('.samples thead th')], found = {};
const column = heads.findIndex(head => head.textContent === 'gold after');
heads[column].querySelector('button').click(); found.descending = read(column);
heads[column].querySelector('button').click(); found.ascending = read(column);
heads[0].querySelector('button').click(); found.prompts = read(0);
const filter = document.querySelector('.controls input');
filter.value = 'SCRIPT owned'; filter.dispatchEvent(new Event('input')); found.filtered = read(2);
found.shown = document.querySelector('.shown').textContent; found.title = document.title;
const result = document.createElement('pre'); result.id = 'found'; result.textContent = JSON.stringify(found);
document.body.append(result);
"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_sorts_and_filters_the_samples(text, workdir, tmp_path):
    def dump(path: Path) -> str:
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        done = subprocess.run([*command, "--dump-dom", path.as_uri()], capture_output=True, timeout=60, check=True)
        return done.stdout.decode("utf-8")

    report = tmp_path / "report.html"
    report.write_text(text, encoding="utf-8")
    # The policy lets the report's own script run: only it fills in the count.
    assert "256 of 256 prompts" in dump(report)
    assert "<meta http-equiv" in text
    clicked = tmp_path / "clicked.html"
    clicked.write_text(
        re.sub("<meta http-equiv[^>]*>", "", text).replace("</body>", f"<script>{CLICKS}</script></body>")
    )
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', dump(clicked), re.DOTALL)[1]))
    gold = [row["gold"] for row in read_jsonl(workdir / "ppo" / "samples.jsonl") if row["when"] == "after"]
    assert [float(value) for value in found["ascending"]] == sorted(gold)
    assert [float(value) for value in found["descending"]] == sorted(gold, reverse=True)
    assert len(found["prompts"]) == 256 and found["prompts"][0].startswith("a")
    assert [one.strip("…") for one in found["filtered"]] == ["<script>document.title = 'owned'</script>"]
    assert found["shown"] == "1 of 256 prompts" and found["title"] == "seed-0: RLHF run"
