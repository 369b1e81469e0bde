import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from rlhf_jax import report, run
from rlhf_jax.algorithms import policy
from rlhf_jax.algorithms.truncation import Truncation
from rlhf_jax.errors import NonFiniteError, Stopped, UserError
from rlhf_jax.interop.pretrained import Bundled
from rlhf_jax.rewards.verifiers import PatternMatch
from rlhf_jax.sharding import MeshConfig
from tests import toys
from tests.toys import ToyModel, ToyReward, ToyStage, experiment


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """Toy stages, a digest of what they wrote, a report that is quick, and no cache of compiled programs."""
    monkeypatch.setitem(run.STAGES, ToyStage, toys.train)
    monkeypatch.setattr(run.Context, "policy_params", lambda context, name: toys.read(context.stage_dir(name)))
    monkeypatch.setattr(run, "start_backend", lambda mesh: jax.device_count())

    def write_report(workdir: Path) -> Path:
        path = workdir / "report.html"
        path.write_text("report")
        return path

    monkeypatch.setattr(report, "write", write_report)


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / "runs" / "toy"


def go(workdir, command=("rlhf-jax", "run", "toy.py"), **changes):
    return run.run(experiment(**changes), workdir, list(command))


def trained(workdir) -> list[str]:
    return (workdir / "trained.txt").read_text().split()


def read(path):
    return json.loads(path.read_text())


def refused(workdir, **changes) -> str:
    with pytest.raises(UserError) as caught:
        go(workdir, **changes)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return str(caught.value)


class TestWhole:
    def test_writes_what_a_run_promises(self, workdir):
        summary = go(workdir)
        assert trained(workdir) == ["sft", "ppo"]
        assert summary == read(workdir / "summary.json")
        assert list(summary) == ["sft", "ppo", "seconds", "peak_memory_bytes", "params_digest"]
        assert summary["sft"] == {"loss": 1 / 3, "steps": 3}
        assert summary["seconds"] > 0
        assert 50e6 < summary["peak_memory_bytes"] < 50e9
        assert summary["params_digest"]["sft"] == summary["params_digest"]["ppo"]
        assert (workdir / "report.html").exists()

    def test_config_json_is_resolved(self, workdir):
        go(workdir, seed=4)
        config = read(workdir / "config.json")
        assert config["command"] == ["rlhf-jax", "run", "toy.py"]
        assert config["experiment"]["seed"] == 4
        assert config["experiment"]["stages"]["ppo"]["kl"]["class"] == "AdaptiveKL"
        assert config["versions"]["jax"] == jax.__version__
        assert {"rlhf_jax", "python", "flax", "optax", "orbax-checkpoint"} <= set(config["versions"])

    def test_commit_of_the_checkout(self, workdir):
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(run.__file__).parent, capture_output=True, text=True
        )
        if commit.returncode:
            pytest.skip("not a checkout")
        go(workdir)
        assert read(workdir / "config.json")["commit"].rstrip("+") == commit.stdout.strip()

    def test_leaves_no_half_written_file(self, workdir):
        go(workdir)
        assert not list(workdir.rglob("*.part"))


class TestAgain:
    def test_says_complete_and_trains_nothing(self, workdir, capsys):
        first = go(workdir)
        capsys.readouterr()
        assert go(workdir) == first
        captured = capsys.readouterr()
        assert "complete" in captured.err
        assert captured.out == ""
        assert trained(workdir) == ["sft", "ppo"]

    def test_draws_a_report_that_is_missing(self, workdir):
        go(workdir)
        (workdir / "report.html").unlink()
        go(workdir)
        assert (workdir / "report.html").exists()

    def test_goes_on_after_a_stop_and_ends_as_an_unbroken_run(self, workdir, monkeypatch, capsys):
        def stop(config, context, name):
            if name == "ppo":
                raise Stopped("ppo: stopped after step 1", 15)
            return toys.train(config, context, name)

        whole = go(workdir.with_name("whole"))
        with monkeypatch.context() as patch:
            patch.setitem(run.STAGES, ToyStage, stop)
            with pytest.raises(Stopped):
                go(workdir)
        assert not (workdir / "summary.json").exists()
        before = read(workdir / "sessions.json")
        assert set(before["stage_seconds"]) == {"sft", "ppo"}  # the second was begun
        before["seconds"] += 100
        before["stage_seconds"]["ppo"] += 50
        (workdir / "sessions.json").write_text(json.dumps(before))
        summary = go(workdir, command=["another", "word"])
        assert trained(workdir) == ["sft", "ppo"]
        assert "sft: finished before" in capsys.readouterr().err
        assert summary["seconds"] >= 100
        assert read(workdir / "sessions.json")["stage_seconds"]["ppo"] >= 50
        same = ("sft", "ppo", "params_digest")
        assert [summary[name] for name in same] == [whole[name] for name in same]
        assert read(workdir / "config.json")["command"] == ["rlhf-jax", "run", "toy.py"]

    def test_another_mesh_is_no_other_experiment(self, workdir, capsys):
        go(workdir)
        (workdir / "ppo" / "summary.json").unlink()
        go(workdir, mesh=MeshConfig(fsdp=4))
        assert "begun on another mesh: mesh.fsdp: 1 there, 4 here" in capsys.readouterr().err
        assert trained(workdir) == ["sft", "ppo", "ppo"]

    def test_a_stage_killed_before_its_summary_runs_again(self, workdir):
        go(workdir)
        (workdir / "summary.json").unlink()
        (workdir / "ppo" / "summary.json").unlink()
        go(workdir)
        assert trained(workdir) == ["sft", "ppo", "ppo"]

    @pytest.mark.parametrize(
        ("damaged", "again"),
        [("sft/params/_METADATA", ["sft"]), ("ppo/summary.json", ["ppo"]), ("summary.json", []), ("sessions.json", [])],
    )
    def test_what_is_damaged_is_set_aside_and_made_again(self, damaged, again, workdir, capsys):
        whole = go(workdir)
        path = workdir / damaged
        path.write_bytes(path.read_bytes()[:-9])
        if damaged == "sessions.json":
            (workdir / "summary.json").unlink()
        capsys.readouterr()
        summary = go(workdir)
        assert trained(workdir) == ["sft", "ppo", *again]
        aside = workdir / damaged.replace("params/_METADATA", "params")
        [line] = [line for line in capsys.readouterr().err.splitlines() if "made again" in line]
        assert str(path) in line and f"{aside.name}.damaged" in line
        assert aside.with_name(f"{aside.name}.damaged").exists()
        same = ("sft", "ppo", "params_digest")
        assert [summary[name] for name in same] == [whole[name] for name in same]
        assert go(workdir) == summary and trained(workdir) == ["sft", "ppo", *again]

    def test_sigterm_where_nothing_is_to_be_saved_ends_the_run_at_once(self, workdir, monkeypatch):
        before = signal.getsignal(signal.SIGTERM)
        monkeypatch.setitem(run.STAGES, ToyStage, lambda *_: [os.kill(os.getpid(), signal.SIGTERM), time.sleep(60)])
        with pytest.raises(KeyboardInterrupt) as caught:
            go(workdir)
        assert caught.value.args == (signal.SIGTERM,) and signal.getsignal(signal.SIGTERM) is before
        assert read(workdir / "sessions.json")["seconds"] < 30

    def test_keyboard_interrupt_between_stages_passes(self, workdir, monkeypatch):
        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setitem(run.STAGES, ToyStage, interrupt)
        with pytest.raises(KeyboardInterrupt):
            go(workdir)
        assert read(workdir / "sessions.json")["seconds"] >= 0


class TestRefuses:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"stages": {"ppo": ToyStage(init="sft")}}, "stages.ppo.init: there is no stage 'sft'"),
            ({"stages": {"sft": ToyStage(batch_size=4)}}, "stages.sft.batch_size: 4 rows do not divide"),
            ({"stages": {"sft": ToyStage(length=65)}}, "stages.sft.length: 65 tokens, more than the model's context"),
            ({"stages": {"sft": ToyStage(path=Path("none.jsonl"))}}, "none.jsonl: no such file"),
            ({"stages": {"sft": ToyReward()}}, "stages.sft: ToyReward is no stage's Config; there are pretrain, sft,"),
            ({"mesh": MeshConfig(fsdp=3)}, "mesh asks for a multiple of 3 devices"),
            (
                {"mesh": MeshConfig(tensor=8), "model": ToyModel()},
                "mesh.tensor=8 does not divide 2",  # 2 heads over 8 devices
            ),
        ],
    )
    def test_and_leaves_no_folder(self, changes, message, workdir):
        assert message in refused(workdir, **changes)
        assert not workdir.exists()
        assert not workdir.parent.exists()

    def test_a_workdir_of_another_config(self, workdir):
        go(workdir)
        before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
        stages = {"sft": ToyStage(steps=4), "ppo": ToyStage(init="sft", kl=experiment().stages["ppo"].kl)}
        message = refused(workdir, seed=1, stages=stages)
        assert (
            f"{workdir} was made by another config: stages.sft.steps: 3 there, 4 here; seed: 0 there, 1 here."
            in message
        )
        assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before

    def test_a_workdir_in_use(self, workdir):
        workdir.mkdir(parents=True)
        with (workdir / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert f"another run works in {workdir}" in refused(workdir)
        go(workdir)

    def test_a_folder_of_something_else(self, workdir):
        workdir.mkdir(parents=True)
        (workdir / "thesis.tex").write_text("")
        assert "holds files and no run" in refused(workdir)
        assert [path.name for path in workdir.iterdir()] == ["thesis.tex"]

    def test_a_file(self, workdir):
        workdir.parent.mkdir()
        workdir.write_text("")
        assert "is a file, not a folder" in refused(workdir)

    @pytest.mark.parametrize("text", ["{", "[]", "{}"])
    def test_a_damaged_config(self, text, workdir):
        workdir.mkdir(parents=True)
        (workdir / "config.json").write_text(text)
        assert "config.json is damaged" in refused(workdir)

    def test_what_the_tokenizer_lacks_before_any_stage_begins(self, workdir):
        cut = policy.Config(policy="sft", reward=PatternMatch("e"), truncate=Truncation("ß!", after=2))
        message = refused(workdir, model=Bundled(), stages={"sft": ToyStage(), "later": cut})
        assert message == "stages.later.truncate.at: no token of the vocabulary is 'ß!'"
        assert not workdir.exists()
        go(workdir)

    def test_at_a_later_stage_and_keeps_what_there_is(self, workdir, monkeypatch):
        def refuse(config, context, name):
            if name == "ppo":
                raise UserError("ppo: no")
            return toys.train(config, context, name)

        monkeypatch.setitem(run.STAGES, ToyStage, refuse)
        assert refused(workdir) == "ppo: no"
        assert (workdir / "config.json").exists() and (workdir / "sft" / "params").is_dir()

    def test_figures_that_are_not_finite(self, workdir, monkeypatch):
        monkeypatch.setitem(run.STAGES, ToyStage, lambda *_: {"loss": float("nan")})
        with pytest.raises(NonFiniteError, match="sft: loss is nan"):
            go(workdir)
        assert not (workdir / "sft" / "summary.json").exists()


class TestDigest:
    def test_sees_names_types_shapes_and_values(self):
        base = {"a": np.arange(4, dtype=np.float32), "b": np.zeros((2, 2), np.float32)}
        different = [
            base,
            {"a": base["a"], "c": base["b"]},
            {"a": base["a"].astype(np.float64), "b": base["b"]},
            {"a": base["a"].reshape(2, 2), "b": base["b"]},
            {"a": base["a"] + np.float32(1e-6), "b": base["b"]},
            {"a": {"b": base["b"]}},
        ]
        digests = [run.params_digest(params) for params in different]
        assert len(set(digests)) == len(digests)
        assert run.params_digest({"b": jax.numpy.zeros((2, 2)), "a": jax.numpy.arange(4.0)}) == digests[0]


def test_backend_in_a_fresh_process(tmp_path):
    """Four devices for a mesh of four, and a cache of every compiled program in the user's cache folder."""
    program = (
        "import jax\nfrom rlhf_jax import run\nfrom rlhf_jax.sharding import MeshConfig\n"
        "print(run.start_backend(MeshConfig(fsdp=2, tensor=2)))\njax.jit(lambda x: x + 1)(1.0).block_until_ready()\n"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith(("XLA", "JAX"))}
    env |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout == "4\n", done.stderr
    assert list((tmp_path / "rlhf_jax" / "xla").iterdir())


def test_a_first_step_does_not_wait_for_what_only_reports_and_the_gold_score_import():
    script = "import sys, rlhf_jax.run; print(*({'sklearn', 'scipy.stats', 'matplotlib', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
