import dataclasses
import json
from pathlib import Path

import pytest

from rlhf_jax import config, inference, run
from rlhf_jax.config import Experiment
from rlhf_jax.errors import UserError
from rlhf_jax.hosts import Hosts
from rlhf_jax.kl import AdaptiveKL, FixedKL
from rlhf_jax.optim import Optimizer
from rlhf_jax.sharding import MeshConfig
from tests.toys import SPEC, ToyModel, ToyReward, ToyStage, experiment

CONFIG = """'''A toy experiment.

    rlhf-jax run toy.py
'''

from rlhf_jax.config import Experiment
from rlhf_jax.data.reviews import MovieReviews
from rlhf_jax.kl import AdaptiveKL
from tests import toys


def get_config():
    return Experiment(
        model=toys.ToyModel(),
        data=MovieReviews(),
        stages={
            "sft": toys.ToyStage(steps=5),
            "ppo": toys.ToyStage(init="sft", kl=AdaptiveKL(coef=0.1)),
        },
    )
"""
SHIPPED = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
SFT_LINE = CONFIG.splitlines().index('            "sft": toys.ToyStage(steps=5),') + 1


def fail(call, *args) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


def refused(flags, capfd) -> str:
    """What tyro says, on one line and without its box."""
    with pytest.raises(SystemExit) as caught:
        config.parse(experiment(), flags)
    assert caught.value.code == 2
    out, err = capfd.readouterr()
    assert not out
    return " ".join(word for word in err.split() if word != "│")


class TestFlags:
    def test_none_leaves_everything(self):
        assert config.parse(experiment(), []) == experiment()

    @pytest.mark.parametrize(
        ("flags", "stage", "changes"),
        [
            (["--stages.ppo.kl.coef", "0.3"], "ppo", {"kl": AdaptiveKL(coef=0.3)}),
            (["--stages.sft.kl.coef", "0.3"], "sft", {"kl": FixedKL(coef=0.3)}),
            (["--stages.sft.optimizer.learning_rate", "1e-3"], "sft", {"optimizer": Optimizer(learning_rate=1e-3)}),
            (["--stages.sft.value_clip", "None"], "sft", {"value_clip": None}),
            (["--stages.sft.value-clip", "0.5"], "sft", {"value_clip": 0.5}),
            (["--stages.sft.prompt_tokens", "1", "4"], "sft", {"prompt_tokens": (1, 4)}),
            (["--stages.sft.reducer", "sequence"], "sft", {"reducer": "sequence"}),
            (["--stages.sft.no_whiten"], "sft", {"whiten": False}),
            (["--stages.sft.path", "a.jsonl"], "sft", {"path": Path("a.jsonl")}),
            (["--stages.sft.steps", "7", "--stages.sft.init=x"], "sft", {"steps": 7, "init": "x"}),
        ],
    )
    def test_override_a_field_of_a_stage(self, flags, stage, changes):
        expected = experiment()
        stages = {**expected.stages, stage: dataclasses.replace(expected.stages[stage], **changes)}
        assert config.parse(experiment(), flags) == dataclasses.replace(expected, stages=stages)

    def test_a_name_is_overridden_where_a_dataclass_might_stand(self):
        quickstart = config.load_config(Path(__file__).parents[1] / "configs" / "quickstart.py")
        changed = config.parse(quickstart, ["--stages.ppo.reward", "other", "--stages.ppo.critic=third"])
        assert (changed.stages["ppo"].reward, changed.stages["ppo"].critic) == ("other", "third")
        assert type(changed.stages["ppo"]) is type(quickstart.stages["ppo"])
        assert config.parse(quickstart, []) == quickstart

    def test_an_ill_typed_config_is_told_before_any_flag(self):
        assert fail(config.parse, experiment(stages=[ToyStage()]), []).startswith("stages: expected a dict of stages")

    def test_override_what_is_not_a_stage(self):
        flags = ["--seed", "1", "--mesh.fsdp", "4", "--model.spec.d_ff", "16", "--wandb"]
        model = ToyModel(dataclasses.replace(SPEC, d_ff=16))
        assert config.parse(experiment(), flags) == experiment(seed=1, mesh=MeshConfig(fsdp=4), model=model, wandb=True)

    def test_workdir_is_a_flag_of_a_run(self):
        given = {"workdir": Path("runs/toy"), "prog": "x", "description": ""}
        assert config.parse_run(experiment(), [], **given) == (Path("runs/toy"), Hosts(), experiment())
        assert config.parse_run(experiment(), ["--workdir", "a/b"], **given)[0] == Path("a/b")

    def test_the_place_among_processes_is_three_flags_of_a_run(self):
        given = {"workdir": Path("runs/toy"), "prog": "x", "description": ""}
        flags = ["--coordinator_address", "node1:8476", "--num_processes", "2", "--process_id", "1", "--seed", "3"]
        _, place, made = config.parse_run(experiment(), flags, **given)
        assert (place, made) == (Hosts("node1:8476", 2, 1), experiment(seed=3))
        message = fail(lambda: config.parse_run(experiment(), flags[:4], **given))
        assert message == "--process_id missing: a process has all three flags, or none in a cluster"

    @pytest.mark.parametrize(
        ("flag", "nearest"),
        [
            ("--stages.ppo.kl.coeff", "--stages.ppo.kl.coef FLOAT"),
            ("--stages.sft.optimiser.learning_rate", "--stages.sft.optimizer.learning_rate FLOAT"),
            ("--stages.sfft.steps", "--stages.sft.steps INT"),
            ("--workdirr", "--workdir PATH"),
            ("--sed", "--seed INT"),
        ],
    )
    def test_misspelt(self, flag, nearest, capfd):
        message = refused([flag, "1"], capfd)
        assert f"Unrecognized options: {flag}" in message
        assert f"Perhaps you meant: {nearest}" in message

    @pytest.mark.parametrize("flag", ["--stages.sft.kl.target", "--stages.sft.kl"])
    def test_class_in_a_union_is_the_config_files_to_say(self, flag, capfd):
        assert "Unrecognized options" in refused([flag, "3"], capfd)

    @pytest.mark.parametrize(
        ("flags", "named"),
        [
            (["--stages.sft.steps", "many"], "--stages.sft.steps: invalid literal for int()"),
            (["--stages.sft.steps", "1.5"], "--stages.sft.steps"),
            (["--stages.sft.reducer", "tokens"], "--stages.sft.reducer"),
            (["--stages.sft.prompt_tokens", "1"], "'--stages.sft.prompt_tokens'. Expected 2 values"),
            (["--stages.sft.value_clip", "none"], "--stages.sft.value_clip"),
        ],
    )
    def test_ill_typed(self, flags, named, capfd):
        assert named in refused(flags, capfd)

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (["--stages.sft.optimizer.learning_rate", "-1"], "optimizer.learning_rate must lie in (0, inf), got -1"),
            (["--stages.ppo.kl.target", "0"], "stages.ppo.kl: target must lie in (0, inf), got 0"),
            (["--stages.ppo.steps", "0"], "stages.ppo: steps must be at least 1, got 0"),
            (["--mesh.fsdp", "0"], "mesh.fsdp must be at least 1"),
        ],
    )
    def test_refused_by_the_field_itself(self, flags, said, capfd):
        assert said in refused(flags, capfd)

    def test_help_has_every_fields_docstring(self, capfd):
        with pytest.raises(SystemExit) as caught:
            config.parse_run(
                experiment(), ["--help"], workdir=Path("runs/toy"), prog="rlhf-jax run toy.py", description="A toy."
            )
        assert caught.value.code == 0
        shown = capfd.readouterr().out
        assert shown.index("A toy.") < shown.index("--seed INT")
        for text in (
            "--stages.ppo.kl.coef FLOAT",
            "Fewest and most tokens of a prompt. (default: 2 8)",
            "--workdir PATH",
            "(default: runs/toy)",
            "Width of the residual stream.",
        ):
            assert text in shown


class TestFile:
    @pytest.fixture
    def write(self, tmp_path, monkeypatch):
        def write(old="", new="", name="toy.py"):
            monkeypatch.chdir(tmp_path)
            assert old in CONFIG
            Path(name).write_text(CONFIG.replace(old, new))
            return name

        return write

    def test_loads(self, write):
        loaded = config.load_config(write())
        assert list(loaded.stages) == ["sft", "ppo"]
        assert loaded.stages["sft"].steps == 5
        assert config.describe("toy.py").startswith("A toy experiment.\n")

    def test_may_define_dataclasses_of_its_own(self, write):
        text = "@dataclasses.dataclass(frozen=True)\nclass Mine(toys.ToyStage):\n    extra: int = 1\n"
        write("def get_config", f"import dataclasses\n{text}\n\ndef get_config")
        Path("toy.py").write_text(Path("toy.py").read_text().replace("toys.ToyStage(steps", "Mine(extra=2, steps"))
        parsed = config.parse(config.load_config("toy.py"), ["--stages.sft.extra", "3"])
        assert (parsed.stages["sft"].steps, parsed.stages["sft"].extra) == (5, 3)

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("steps=5", "stepz=5", "ToyStage has no field 'stepz'; did you mean 'steps'?"),
            ("steps=5", "zzz=5", "ToyStage has no field 'zzz'; it has steps, init, batch_size"),
            ("steps=5", 'steps="5"', "steps: expected int, got '5'"),
            ("steps=5", "steps=0", "steps must be at least 1, got 0"),
            ("steps=5", "kl=AdaptiveKL(coef=-1)", "coef must lie in (0, inf), got -1"),
            ("steps=5", 'kl=AdaptiveKL(coef="x")', "coef: expected float, got 'x'"),
            ("steps=5", "steps=1 / 0", "ZeroDivisionError: division by zero"),
            ("ToyStage(steps=5)", "ToyStag()", "module 'tests.toys' has no attribute 'ToyStag'"),
            ("steps=5)", "steps=5))", "closing parenthesis ')' does not match opening parenthesis '{'"),
        ],
    )
    def test_slip_names_file_line_and_field(self, old, new, message, write):
        said = fail(config.load_config, write(old, new))
        assert said.startswith(f"toy.py, line {SFT_LINE}: ")
        assert message in said

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("def get_config", "def get_confg", "toy.py: no get_config(); a config file defines get_config()"),
            ("return Experiment(", "return dict(", "toy.py: get_config() returned dict, not an Experiment"),
            ("import AdaptiveKL", "import AdaptivKL", "toy.py, line 8: cannot import name 'AdaptivKL'"),
            ("stages={", "stagez={", "Experiment has no field 'stagez'; did you mean 'stages'?"),
        ],
    )
    def test_wrong_as_a_whole(self, old, new, message, write):
        assert message in fail(config.load_config, write(old, new))

    def test_no_file(self, write):
        write()
        assert fail(config.load_config, "toyy.py") == "toyy.py: no such config file; did you mean 'toy.py'?"
        assert fail(config.load_config, "elsewhere/x.py") == "elsewhere/x.py: no such config file"
        assert "its name ends in .py" in fail(config.load_config, write(name="toy.txt"))


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "configs").glob("*.py")), ids=lambda path: path.stem
)
def test_shipped_config(path):
    """Runs on its mesh and on four devices, says what it is for, and comes back from config.json."""
    loaded = config.load_config(path)
    config.validate(loaded, loaded.mesh.fixed_devices)
    config.validate(config.parse(loaded, ["--mesh.fsdp", "4"]), 4)
    assert f"rlhf-jax run configs/{path.name}" in config.describe(path)
    assert config.from_dict(config.to_dict(loaded), [*inference.MODELS, *run.STAGES]) == loaded


def stages(**changes):
    return {"stages": {"sft": ToyStage(), "ppo": ToyStage(**changes)}}


class TestValidate:
    def test_passes(self):
        assert config.validate(experiment(), 1) is None
        assert config.validate(experiment(mesh=MeshConfig(data=2, fsdp=2, tensor=2)), 8) is None

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                stages(init="sfft"),
                "stages.ppo.init: there is no stage 'sfft'; did you mean 'sft'? (earlier: sft)",
            ),
            (stages(init="ppo"), "stages.ppo.init: a stage cannot build on itself (earlier: sft)"),
            (
                {"stages": {"sft": ToyStage(init="ppo"), "ppo": ToyStage()}},
                "stages.sft.init: the stage 'ppo' runs after 'sft' (no stage comes before it; 'base' is the model)",
            ),
            (
                {"stages": {"sft": ToyReward(), "ppo": ToyStage(init="sft")}},
                "stages.ppo.init: needs a stage that makes a policy; 'sft' makes a reward",
            ),
            (stages(length=65), "stages.ppo.length: 65 tokens, more than the model's context, model.spec.max_len = 64"),
            (
                stages(batch_size=6) | {"mesh": MeshConfig(data=2, fsdp=4)},
                "stages.ppo.batch_size: 6 rows do not divide over the 8 batch shards of the mesh, data 2 × fsdp 4",
            ),
            ({"mesh": MeshConfig(fsdp=3)}, "mesh asks for a multiple of 3 devices, 8 found"),
            ({"stages": {}}, "stages is empty"),
            ({"stages": {"a/b": ToyStage()}}, "stages: 'a/b' cannot name a stage"),
            ({"stages": {"base": ToyStage()}}, "stages: 'base' cannot name a stage"),
            ({"stages": [ToyStage()]}, "stages: expected a dict of stages by name"),
            ({"stages": {"sft": 3}}, "stages: expected names with a stage's Config each, got 'sft': 3"),
            ({"model": "gpt2"}, "model: expected ModelConfig, got 'gpt2'"),
            ({"seed": "0"}, "seed: expected int, got '0'"),
            ({"seed": -1}, "seed must be at least 0, got -1"),
            ({"wandb": True}, "wandb: not installed; pip install 'rlhf_jax[wandb]'"),
            (stages(reducer="tokens"), "stages.ppo.reducer: expected Literal['token', 'sequence'], got 'tokens'"),
            (stages(prompt_tokens=(2, 8, 9)), "stages.ppo.prompt_tokens: expected tuple[int, int], got (2, 8, 9)"),
            (stages(kl=0.1), "stages.ppo.kl: expected FixedKL | AdaptiveKL, got 0.1"),
            (stages(path="a.jsonl"), "stages.ppo.path: expected Path | None, got 'a.jsonl'"),
        ],
    )
    def test_one_line_that_names_the_field(self, changes, message):
        assert fail(config.validate, experiment(**changes), 8).startswith(message)

    def test_files_are_looked_at_apart(self):
        lost = experiment(**stages(path=Path("none.jsonl")))
        assert config.validate(lost, 8) is None
        assert fail(config.check_inputs, lost) == "stages.ppo.path: none.jsonl: no such file"

    def test_an_int_is_a_float(self):
        assert config.validate(experiment(**stages(value_clip=1)), 8) is None


class TestJson:
    def test_there_and_back(self):
        original = experiment(seed=3, **stages(path=Path("a/b.jsonl"), value_clip=None))
        plain = json.loads(json.dumps(config.to_dict(original)))
        assert config.from_dict(plain, [ToyModel, ToyStage]) == original

    def test_names_the_class_where_the_type_does_not(self):
        plain = config.to_dict(experiment())
        assert "class" not in plain
        assert plain["model"]["class"] == "ToyModel"
        assert plain["stages"]["ppo"]["class"] == "ToyStage"
        assert plain["stages"]["ppo"]["kl"] == {"class": "AdaptiveKL", "coef": 0.1, "target": 6.0, "horizon": 10000}
        assert "class" not in plain["stages"]["ppo"]["optimizer"]

    def test_a_stages_config_has_its_module_in_its_name(self):
        from rlhf_jax.algorithms import pretrain

        assert config.class_name(pretrain.Config) == "pretrain.Config"

    def test_unknown_class_or_field(self):
        plain = config.to_dict(experiment())
        assert fail(config.from_dict, plain, [ToyModel]).startswith("config.json: no class 'ToyStage' here")
        plain["mesh"]["pipelines"] = 2
        message = fail(config.from_dict, plain, [ToyModel, ToyStage])
        assert message == "config.json: MeshConfig has no field 'pipelines'; another version wrote it"

    def test_differences(self):
        old = config.to_dict(experiment())
        new = config.to_dict(
            Experiment(
                model=ToyModel(), data=experiment().data, seed=2, stages={"ppo": ToyStage(init="sft", kl=AdaptiveKL())}
            )
        )
        assert config.differences(old, old) == []
        assert config.differences(old, new) == [
            "stages.sft: only there",
            "stages.ppo.kl.coef: 0.1 there, 0.15 here",
            "seed: 0 there, 2 here",
        ]

    def test_another_class_is_a_difference(self):
        old, new = (config.to_dict(experiment(**stages(kl=kl))) for kl in (FixedKL(0.1), AdaptiveKL(0.1)))
        assert 'stages.ppo.kl.class: "FixedKL" there, "AdaptiveKL" here' in config.differences(old, new)
