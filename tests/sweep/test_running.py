"""What stands around the runs of a sweep: shared stages, folders, figures, stops, numbers that are not finite."""

import json
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import lockstep, run
from rlhf_jax.algorithms.loop import Loop
from rlhf_jax.checkpoint import save_params
from rlhf_jax.errors import NonFiniteError, Stopped, UserError
from rlhf_jax.mesh import MeshConfig
from rlhf_jax.metrics import read_jsonl
from rlhf_jax.sweep import sweep, table
from tests import toys
from tests.toys import ToyStage, experiment

COEF = "stages.ppo.kl.coef=0.1,0.2"


class Turn:
    """A cursor that counts."""

    def __init__(self):
        self.turn = 0

    def get_state(self):
        return {"turn": self.turn}

    def set_state(self, state):
        self.turn = state["turn"]


class Toys:
    """A stage that walks: a compiled step of seed and coefficient, in a real `Loop`. What happens in it is told."""

    def __init__(self):
        self.trained, self.breaks, self.signals = [], set(), {}

    def train(self, config, context, name):
        self.trained.append((context.workdir.name, name))
        seed, cursor = context.seed, Turn()

        def step(state, turn):
            walked = state["x"] + state["coef"] * jnp.sin(turn + state["seed"])
            return {**state, "x": walked}, {"loss": walked**2}

        program = lockstep.jit(step, donate_argnums=(0,))
        state = {"x": jnp.float32(1), "coef": jnp.float32(config.kl.coef), "seed": jnp.float32(seed)}
        with Loop(context, name, steps=config.steps, checkpoint_every=2) as loop:
            state = loop.restore(state, cursor)
            for number in loop:
                state, metrics = program(state, np.float32(cursor.turn))
                cursor.turn += 1
                if (name, number, seed) in self.breaks:
                    metrics["loss"] = jnp.float32(np.nan)
                if self.signals.pop((name, number, seed), False):
                    os.kill(os.getpid(), signal.SIGTERM)
                    while lockstep.current().group.signal is None:  # the main thread hears it
                        threading.Event().wait(0.01)
                loop.record(state, metrics, tokens=1)
        save_params(context.stage_dir(name) / "params", {"layer": {"kernel": jnp.full(4, state["x"])}})
        return {"loss": float(state["x"]) ** 2, "steps": config.steps}


@pytest.fixture
def stages(monkeypatch):
    made = Toys()
    monkeypatch.setitem(run.STAGES, ToyStage, made.train)
    monkeypatch.setattr(run.Context, "policy_params", lambda context, name: toys.read(context.stage_dir(name)))
    monkeypatch.setattr(run, "start_backend", lambda mesh, in_threads=False: jax.device_count())
    return made


def losses(workdir):
    return [(row["stage"], row["step"], row["loss"]) for row in read_jsonl(workdir / "metrics.jsonl")]


def refused(*args, **changes):
    with pytest.raises(UserError) as caught:
        sweep(experiment(**changes), *args, ["test"])
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    return str(caught.value)


def test_every_run_is_its_single_run_and_shares_what_is_the_same(stages, tmp_path):
    sweep(experiment(), 2, [COEF], tmp_path / "all", ["test"], vmapped=True)
    labels = [f"seed={seed},kl.coef={coef}" for coef in (0.1, 0.2) for seed in (0, 1)]
    # Fine-tuning does not see the coefficient: once a seed.
    assert sorted(stages.trained) == sorted(
        [*((label, "ppo") for label in labels), *((one, "sft") for one in labels[:2])]
    )
    for label in labels:
        seed, coef = int(label[5]), float(label[-3:])
        alone = experiment(seed=seed)
        kl = alone.stages["ppo"].kl.__class__(coef=coef)
        alone = experiment(seed=seed, stages={**alone.stages, "ppo": ToyStage(init="sft", kl=kl)})
        single = run.run(alone, tmp_path / "single" / label, ["test"], draws=False)
        swept = json.loads((tmp_path / "all" / label / "summary.json").read_text())
        assert swept["ppo"] == pytest.approx(single["ppo"], rel=1e-5)
        for one, other in zip(losses(tmp_path / "all" / label), losses(tmp_path / "single" / label), strict=True):
            assert one[:2] == other[:2] and one[2] == pytest.approx(other[2], rel=1e-5)
        stages.trained.clear()
        assert run.run(alone, tmp_path / "all" / label, ["test"])  # which is complete
        assert stages.trained == [] and (tmp_path / "all" / label / "report.html").exists()


def test_figures_over_seeds(stages, tmp_path):
    found = sweep(experiment(), 3, [COEF], tmp_path / "all", ["test"])
    assert found == json.loads((tmp_path / "all" / "summary.json").read_text())
    for row, coef in zip(found["rows"], (0.1, 0.2), strict=True):
        values = [
            json.loads((tmp_path / "all" / f"seed={seed},kl.coef={coef}" / "summary.json").read_text())["ppo"]["loss"]
            for seed in range(3)
        ]
        se = np.std(values, ddof=1) / np.sqrt(3)
        expected = {
            "mean": np.mean(values),
            "se": se,
            "low": np.mean(values) - 4.303 * se,
            "high": np.mean(values) + 4.303 * se,
        }
        assert row["values"] == {"stages.ppo.kl.coef": coef} and row["seeds"] == [0, 1, 2]
        assert row["ppo"]["loss"] == pytest.approx(expected, rel=1e-3)
        assert any(f"{np.mean(values):.4g}" in line for line in table(found))
    page = (tmp_path / "all" / "report.html").read_text()
    assert page.count("<svg") == 2 * 1 and "kl.coef 0.2" in page and "<script" not in page


def test_the_same_command_again_trains_nothing_and_another_is_refused(stages, tmp_path):
    folder = tmp_path / "all"
    first = sweep(experiment(), 2, [COEF], folder, ["test"])
    stages.trained.clear()
    assert sweep(experiment(), 2, [COEF], folder, ["test"]) == first
    assert stages.trained == []
    assert "is of another sweep: vary.stages.ppo.kl.coef" in refused(2, ["stages.ppo.kl.coef=0.1,0.3"], folder)
    assert "is of another sweep: seeds: 2 there, 3 here" in refused(3, [COEF], folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("")
    assert "holds files and no sweep" in refused(2, [COEF], tmp_path / "full")
    assert "is a file" in refused(2, [COEF], tmp_path / "full" / "notes.txt")
    assert stages.trained == []


def test_what_cannot_run_is_told_before_anything_is_written(stages, tmp_path):
    said = refused(2, ["stages.sft.length=16,100"], tmp_path / "all")
    assert "stages.sft.length: 100 tokens" in said and "--vary stages.sft.length=100" in said
    said = refused(3, [], tmp_path / "all", mesh=MeshConfig(replica=2))
    assert said.startswith("mesh.replica=2 does not divide 3, the runs that go together") and "1 or 3 would" in said
    assert "does not divide the 8 devices" in refused(3, [], tmp_path / "all", mesh=MeshConfig(replica=3))
    assert refused(2, [], tmp_path / "all", wandb=True).startswith("wandb: a process sends one run")
    assert not (tmp_path / "all").exists() and stages.trained == []


@pytest.mark.parametrize("vmapped", [True, False])
def test_a_stopped_sweep_goes_on_to_where_an_unbroken_one_ends(stages, tmp_path, vmapped, capsys):
    whole = sweep(experiment(), 2, [COEF], tmp_path / "whole", ["test"], vmapped=vmapped)
    stages.signals = {("sft", 2, 1): True, ("ppo", 1, 0): True}
    for stage, step in (("sft", 2), ("ppo", 1)):
        with pytest.raises(Stopped) as caught:
            sweep(experiment(), 2, [COEF], tmp_path / "broken", ["test"], vmapped=vmapped)
        assert caught.value.exit_code == 143 and "the same command goes on" in str(caught.value)
        # It is heard at a call, and so by all in the step after.
        last = {losses(one)[-1][:2] for one in (tmp_path / "broken").glob("seed=*") if (one / "metrics.jsonl").exists()}
        assert len(last) == 1 and last.pop() == (stage, step + 1)
    assert sweep(experiment(), 2, [COEF], tmp_path / "broken", ["test"], vmapped=vmapped) == whole
    for one in (tmp_path / "whole").glob("seed=*"):
        assert losses(one) == losses(tmp_path / "broken" / one.name)
    assert "Traceback" not in capsys.readouterr().err


def test_a_run_that_is_not_finite_stops_alone(stages, tmp_path, capsys):
    stages.breaks = {("ppo", 2, 1)}
    with pytest.raises(NonFiniteError) as caught:
        sweep(experiment(), 3, [], tmp_path / "all", ["test"], vmapped=True)
    assert caught.value.exit_code == 3 and "1 of 3 runs" in str(caught.value) and "seed=1" in str(caught.value)
    assert "[seed=1] ppo: loss is nan at step 2" in capsys.readouterr().err
    [row] = json.loads((tmp_path / "all" / "summary.json").read_text())["rows"]
    assert row["seeds"] == [0, 2] and row["unfinished"] == [1]
    assert (tmp_path / "all" / "report.html").exists()


def test_a_run_whose_shared_stage_is_not_finished_says_whose_it_was(stages, tmp_path, capsys):
    stages.breaks = {("sft", 2, 1)}
    with pytest.raises(NonFiniteError, match="2 of 4 runs"):
        sweep(experiment(), 2, [COEF], tmp_path / "all", ["test"])
    told = capsys.readouterr().err
    assert "[seed=1,kl.coef=0.2] sft: it is that of seed=1,kl.coef=0.1, which did not finish it" in told


def test_groups_of_other_shapes_run_one_after_another(stages, tmp_path):
    sweep(experiment(), 1, ["stages.ppo.steps=2,3", COEF], tmp_path / "all", ["test"], vmapped=True)
    [first, second] = [next(i for i, (label, _) in enumerate(stages.trained) if f"steps={n}" in label) for n in (2, 3)]
    assert first < second and not any("steps=2" in label for label, _ in stages.trained[second:])
    assert [name for _, name in stages.trained].count("sft") == 1
