"""What a kill left of runs in step, set back to what all had saved."""

import pytest

from rlhf_jax.sweep.grid import settings
from rlhf_jax.sweep.leveling import level
from tests.toys import experiment


@pytest.fixture
def sweep(tmp_path):
    """Two seeds of two prices; fine-tuning is that of the first price's runs. Makes files, and tells what is left."""
    runs = settings(experiment(), 2, ["stages.ppo.kl.coef=0.1,0.2"])
    owners = {}
    for one in runs:
        for stage in one.experiment.stages:
            owners.setdefault(one.share(stage), one)

    def leveled(stage, *held):
        for one, names in zip(runs, held, strict=False):
            for name in names.split():
                path = tmp_path / one.label / stage / name
                path.parent.mkdir(parents=True, exist_ok=True)
                if "." in path.name:
                    path.write_text("")
                else:
                    path.mkdir()
                    (path / "digests.json").write_text("{}")
        level(runs, tmp_path, owners)
        found = []
        for one, _ in zip(runs, held, strict=False):
            folder = tmp_path / one.label / stage
            there = [p for p in folder.rglob("*") if p.name not in ("checkpoints", "digests.json", ".rows")]
            found.append(" ".join(sorted(p.relative_to(folder).as_posix() for p in there)))
        return found

    return leveled


@pytest.mark.parametrize(
    ("held", "left"),
    [
        (("checkpoints/2 checkpoints/4", "checkpoints/4 checkpoints/6"), ["checkpoints/4", "checkpoints/4"]),
        (("checkpoints/2", "reference.npz"), ["", ""]),
        (("data", "checkpoints/2 data"), ["data", "data"]),
        (
            ("checkpoints/6 params samples.jsonl summary.json", "checkpoints/6 params"),
            ["checkpoints/6 params", "checkpoints/6 params"],
        ),
        (("checkpoints/6 summary.json", "checkpoints/4 checkpoints/6 summary.json"), None),  # all have finished
        (("checkpoints/2 checkpoints/4", "checkpoints/8 checkpoints/9 summary.json"), None),  # one that had failed
        (("checkpoints/2 answers.jsonl", "checkpoints/2 reference.npz.damaged"), None),
        ((".rows/0.jsonl .rows/1.jsonl", ".rows/0.jsonl"), [".rows/0.jsonl", ".rows/0.jsonl"]),
    ],
)
def test_a_stage_goes_back_to_what_all_who_train_it_have(sweep, held, left):
    expected = [" ".join(sorted(one.split())) for one in held] if left is None else left
    assert sweep("sft", *held) == expected
