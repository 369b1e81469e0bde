"""Rows that one stage makes and another learns from: files, digests, and what is said where they do not fit."""

import json
from dataclasses import dataclass, field

import jax
import pytest

from rlhf_jax import report, run
from rlhf_jax.algorithms import made_rows
from rlhf_jax.data import formats
from rlhf_jax.data.reading import read, read_examples
from rlhf_jax.data.sources import FromStage, Jsonl, Mixture, Source
from rlhf_jax.errors import UserError
from tests import toys
from tests.toys import ToyStage, experiment

ROWS = [{"prompt": f"number {i}", "completion": f"is ü{i}", "score": i / 7} for i in range(20)]


@dataclass(frozen=True)
class Maker(ToyStage):
    """A stage that makes rows."""

    wanted: str = "completion"
    """The field of what it writes."""

    @property
    def produces(self):
        return "rows"


@dataclass(frozen=True)
class Learner(ToyStage):
    """A stage that reads them."""

    data: Source = field(default_factory=lambda: FromStage("maker"))
    """Its rows."""

    def check_inputs(self, data):
        try:
            read(self.data, formats.example)
        except UserError as error:
            raise UserError(f"data: {error}") from None


def make(config, context, name):
    with (context.workdir / "trained.txt").open("a") as file:
        file.write(f"{name}\n")
    named = {"completion": config.wanted}
    made_rows.write(context, name, [{named.get(key, key): value for key, value in row.items()} for row in ROWS])
    return {"rows": len(ROWS)}


def learn(config, context, name):
    train, heldout = read_examples(config.data)
    return {**toys.train(config, context, name), "train": len(train), "heldout": len(heldout)}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    for stage, train in ((Maker, make), (Learner, learn)):
        monkeypatch.setitem(run.STAGES, stage, train)
    monkeypatch.setattr(run.Context, "policy_params", lambda context, name: toys.read(context.stage_dir(name)))
    monkeypatch.setattr(run, "start_backend", lambda mesh: jax.device_count())
    monkeypatch.setattr(report, "write", lambda workdir: workdir / "report.html")


def go(workdir, **stages):
    (workdir.parent / "report.html").touch()
    return run.run(experiment(stages=stages), workdir, [])


def test_a_stage_learns_from_what_an_earlier_one_has_made(tmp_path):
    summary = go(tmp_path / "run", maker=Maker(), learner=Learner(data=FromStage("maker", heldout=0.25)))
    assert (summary["learner"]["train"], summary["learner"]["heldout"]) == (15, 5)
    lines = (tmp_path / "run" / "maker" / "rows" / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == ROWS
    assert len(summary["params_digest"]["maker"]) == 64


def test_rows_of_several_sources_are_mixed(tmp_path):
    (tmp_path / "mine.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i}", "completion": "yes"}) + "\n" for i in range(8))
    )
    mixture = Mixture((FromStage("maker"), Jsonl(tmp_path / "mine.jsonl")), (1.0, 2.0))
    config = made_rows.resolved(Learner(data=mixture), tmp_path)
    assert [part.path for part in config.data.parts] == [tmp_path / "maker/rows/rows.jsonl", tmp_path / "mine.jsonl"]
    summary = go(tmp_path / "run", maker=Maker(), learner=Learner(data=mixture))
    assert summary["learner"]["train"] + summary["learner"]["heldout"] == 28


def test_damaged_rows_are_made_again(tmp_path):
    workdir, stages = tmp_path / "run", {"maker": Maker(), "learner": Learner()}
    first = go(workdir, **stages)
    file = workdir / "maker" / "rows" / "rows.jsonl"
    file.write_text(file.read_text().replace("number 3", "number 4"))
    assert go(workdir, **stages)["params_digest"] == first["params_digest"]
    assert (workdir / "maker" / "rows.damaged").is_dir()
    assert (workdir / "trained.txt").read_text().split() == ["maker", "learner", "maker"]


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ({"learner": Learner()}, "stages.learner.data.stage: there is no stage 'maker'"),
        ({"maker": ToyStage(), "learner": Learner()},
         "stages.learner.data.stage: needs a stage that makes rows; 'maker' makes a policy"),
        ({"maker": Maker(), "learner": ToyStage(init="maker")},
         "stages.learner.init: needs a stage that makes a policy; 'maker' makes rows"),
        ({"maker": Maker(wanted="texts"), "learner": Learner()}, "stages.learner.data: .*rows.jsonl.*completion"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_are_one_line(tmp_path, stages, said):
    with pytest.raises(UserError, match=said) as caught:
        go(tmp_path / "run", **stages)
    assert "\n" not in str(caught.value)


def test_before_there_are_any_nobody_reads_them():
    with pytest.raises(UserError, match="the rows of stage 'maker' can be read by a later stage's own data alone"):
        read_examples(FromStage("maker"))
