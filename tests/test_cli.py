import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_jax import __version__, cli, inference, run
from rlhf_jax.errors import NonFiniteError, Stopped
from tests import toys
from tests.test_config import CONFIG
from tests.toys import ToyStage


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with a config file; runs train toys, and JAX stays as it is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.py").write_text(CONFIG)
    monkeypatch.setitem(run.STAGES, ToyStage, toys.train)
    monkeypatch.setattr(run.Context, "policy_params", lambda context, name: toys.read(context.stage_dir(name)))
    monkeypatch.setattr(run, "start_backend", lambda mesh: 8)
    return tmp_path


@pytest.fixture
def call(capsys):
    """(exit code, stdout, stderr) of a command."""

    def call(*args):
        try:
            code = cli.main([str(arg) for arg in args])
        except SystemExit as end:  # tyro's way out
            code = end.code or 0
        return code, *capsys.readouterr()

    return call


def error(done) -> str:
    """The one line of an error, with exit code 2."""
    code, out, err = done
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err[len("error: ") : -1]


def fresh(*args):
    """(exit code, stdout, stderr) of a Python of its own."""
    root = Path(cli.__file__).parents[1]
    done = subprocess.run([sys.executable, *args], cwd=root, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


class TestCommands:
    def test_help(self, call):
        code, out, err = call("--help")
        assert (code, err) == (0, "")
        assert all(
            f"\n  {command} " in out for command in ("run", "plan", "sample", "score", "report", "export", "bench")
        )
        assert call()[::2] == (2, out)

    def test_unknown(self, call):
        assert error(call("rnu")) == "no command 'rnu'; did you mean 'run'?"
        assert (
            error(call("zzz")) == "no command 'zzz'; there are run, sweep, sample, score, report, plan, export, bench"
        )

    def test_version(self, call):
        assert call("--version") == (0, f"rlhf_jax {__version__}\n", "")

    @pytest.mark.parametrize("command", ["sample", "score", "report", "export"])
    def test_each_has_help(self, command, call):
        code, out, _ = call(command, "--help")
        assert code == 0
        assert f"usage: rlhf-jax {command}" in out
        assert "A run's folder" in out

    def test_help_imports_nothing_heavy(self):
        program = (
            "from rlhf_jax import cli; import sys; cli.main(['--help']); print({'jax', 'numpy'} & set(sys.modules))"
        )
        assert fresh("-c", program)[1].endswith("\nset()\n")

    def test_module(self):
        code, _, err = fresh("-m", "rlhf_jax", "rnu")
        assert (code, err) == (2, "error: no command 'rnu'; did you mean 'run'?\n")


class TestRun:
    def test_default_workdir_is_named_after_the_config(self, call):
        code, out, _ = call("run", "toy.py")
        assert (code, out) == (0, "")
        assert json.loads(Path("runs/toy/summary.json").read_text())["sft"]["steps"] == 5
        assert Path("runs/toy/report.html").exists()

    def test_flags(self, call):
        args = ("run", "toy.py", "--workdir", "elsewhere", "--stages.sft.steps", "2", "--seed", "1")
        assert call(*args)[0] == 0
        config = json.loads(Path("elsewhere/config.json").read_text())
        assert config["command"] == ["rlhf-jax", *args]
        assert (config["experiment"]["seed"], config["experiment"]["stages"]["sft"]["steps"]) == (1, 2)
        assert not Path("runs").exists()

    def test_help_begins_with_the_configs_docstring(self, call):
        code, out, _ = call("run", "toy.py", "--help")
        assert code == 0
        assert out.index("A toy experiment.") < out.index("--stages.ppo.kl.coef FLOAT") < out.index("--mesh.fsdp INT")
        assert "(default: runs/toy)" in out
        assert "rlhf-jax run CONFIG" in call("run", "--help")[1]

    @pytest.mark.parametrize("args", [(), ("--seed", "1", "toy.py")])
    def test_config_comes_first(self, args, call):
        assert error(call("run", *args)).startswith("the config file comes first")

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["toyy.py"], "toyy.py: no such config file; did you mean 'toy.py'?"),
            (["toy.py", "--stages.ppo.init", "sfft"], "stages.ppo.init: there is no stage 'sfft'; did you mean 'sft'?"),
            (["toy.py", "--stages.ppo.length", "65"], "stages.ppo.length: 65 tokens, more than the model's context"),
            (["toy.py", "--stages.sft.batch_size", "9"], "stages.sft.batch_size: 9 rows do not divide"),
            (["toy.py", "--stages.sft.path", "none.jsonl"], "none.jsonl: no such file"),
            (["toy.py", "--mesh.fsdp", "3"], "mesh asks for a multiple of 3 devices, 8 found"),
        ],
    )
    def test_wrong_experiment(self, args, message, call):
        assert message in error(call("run", *args))
        assert not Path("runs").exists()

    @pytest.mark.parametrize("flag", ["--stages.sft.stepz=3", "--stages.sft.steps=many", "--stages.sft.steps=0"])
    def test_wrong_flag(self, flag, call):
        code, out, err = call("run", "toy.py", flag)
        assert (code, out) == (2, "")
        assert "--stages.sft.steps" in err or "stages.sft: steps must be at least 1" in err
        assert not Path("runs").exists()

    def test_wrong_config(self, folder, call):
        (folder / "toy.py").write_text(CONFIG.replace("steps=5", "stepz=5"))
        assert "ToyStage has no field 'stepz'; did you mean 'steps'?" in error(call("run", "toy.py"))

    @pytest.mark.parametrize(
        ("raised", "code", "said"),
        [
            (NonFiniteError("ppo: score is nan at step 3"), 3, "error: ppo: score is nan at step 3\n"),
            (Stopped("sft: stopped after step 3", 15), 143, "error: sft: stopped after step 3\n"),
            (KeyboardInterrupt(), 130, "error: stopped; the same command goes on\n"),
            (KeyboardInterrupt(15), 143, "error: stopped; the same command goes on\n"),
            (OSError(28, "No space left on device", "a"), 2, "error: no space left on the disk for a; free some"),
        ],
    )
    def test_exit_codes(self, raised, code, said, call, monkeypatch):
        def stop(*_):
            raise raised

        monkeypatch.setitem(run.STAGES, ToyStage, stop)
        done = call("run", "toy.py")
        assert done[0] == code
        assert said in done[2]
        monkeypatch.setitem(run.STAGES, ToyStage, toys.train)
        assert call("run", "toy.py")[0] == 0  # the same command goes on

    def test_report(self, call):
        call("run", "toy.py")
        Path("runs/toy/report.html").unlink()
        assert call("report", "runs/toy") == (0, "runs/toy/report.html\n", "")
        assert Path("runs/toy/report.html").exists()
        assert error(call("report", "none")) == "none: no such folder"


class TestInference:
    """The arguments and the output; tests/test_inference.py has what is between them."""

    @pytest.fixture
    def asked(self, monkeypatch):
        """What the command asked of `inference`, which answers with fixed figures and chatters on stdout."""
        asked = {}

        def sample(run, prompt, **given):
            print("chatter")
            asked.update(given, run=run, prompt=prompt)
            return {"completions": [{"text": " was good\nfun", "ended": True}, {"text": " bad", "ended": False}]}

        def score(run, path, **given):
            print("chatter")
            asked.update(given, run=run, path=path)
            figures = {"n": 2, "accuracy": 0.5, "interval": [0.1, 0.9], "mean_margin": 0.25}
            return {**figures, "cut": 1, "stage": "reward_model"}

        for function in (sample, score):
            monkeypatch.setattr(inference, function.__name__, function)
        for name in ("open_run", "open_scored"):
            monkeypatch.setattr(inference, name, lambda workdir: workdir)
        return asked

    def test_sample(self, asked, call):
        args = ("--n", 2, "--stage", "ppo", "--temperature", 0.5, "--max-tokens", 7, "--seed", 3, "--top_k", 5)
        code, out, err = call("sample", "runs/toy", "--prompt", "It", *args, "--json")
        assert code == 0
        assert out.count("\n") == 1
        assert json.loads(out)["completions"][0]["text"] == " was good\nfun"
        assert err == "chatter\n"
        sampling = asked.pop("sampling")
        assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 5, 1.0)
        expected = {"run": Path("runs/toy"), "prompt": "It", "n": 2, "stage": "ppo", "max_tokens": 7, "seed": 3}
        expected["chat"] = False
        assert asked == expected

    def test_sample_for_people(self, asked, call):
        out = call("sample", "bundled", "--prompt", "It")[1]
        assert out == "It| was good\nfun\n\nIt| bad …\n\n"

    def test_sample_wrong(self, asked, call):
        assert error(call("sample", "x", "--prompt", "a", "--n", 0)) == "--n must be at least 1, got 0"
        assert "--temperature must lie in (0, inf)" in error(call("sample", "x", "--prompt", "a", "--temperature", 0))
        code, _, err = call("sample", "x")
        assert code == 2
        assert "--prompt" in err

    def test_score(self, asked, call):
        code, out, err = call("score", "runs/toy", "--input", "pairs.jsonl", "--json")
        assert (code, err) == (0, "chatter\n")
        assert out.count("\n") == 1
        assert json.loads(out)["interval"] == [0.1, 0.9]
        assert asked == {"run": Path("runs/toy"), "path": Path("pairs.jsonl"), "stage": None, "fields": {}}

    def test_score_with_other_names_of_fields(self, asked, call):
        call("score", "runs/toy", "--input", "pairs.jsonl", "--fields", '{"prompt": "question"}')
        assert asked["fields"] == {"prompt": "question"}
        for wrong in ("prompt=question", "[]", '{"prompt": 1}'):
            message = error(call("score", "runs/toy", "--input", "pairs.jsonl", "--fields", wrong))
            assert message.startswith("--fields must be names by names as JSON")

    def test_score_for_people(self, asked, call):
        out = call("score", "runs/toy", "--input", "pairs.jsonl")[1]
        assert out == "accuracy 0.500 [0.100, 0.900] on 2 pairs, mean margin 0.250, 1 rows cut (stage reward_model)\n"
