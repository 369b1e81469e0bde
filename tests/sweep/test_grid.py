"""Which runs a sweep is of, and what it refuses before any of them begins."""

import dataclasses

import pytest

from rlhf_jax.algorithms import best_of_n, ppo, reward_model, sft
from rlhf_jax.config import Experiment, load_config
from rlhf_jax.data.sources import FromStage, Mixture
from rlhf_jax.errors import UserError
from rlhf_jax.kl import FixedKL
from rlhf_jax.rewards.lexical import Length
from rlhf_jax.sweep.grid import groups, settings, short
from tests.toys import ToyStage, experiment


def refused(*varied, seeds=1, **changes) -> str:
    with pytest.raises(UserError) as caught:
        settings(experiment(**changes), seeds, varied)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    return str(caught.value)


def test_every_seed_of_every_combination():
    runs = settings(experiment(seed=5), 2, ["stages.ppo.kl.coef=0.1,0.2", "stages.sft.steps=3,4"])
    assert [one.label for one in runs] == [
        f"seed={seed},kl.coef={coef},steps={steps}" for coef in (0.1, 0.2) for steps in (3, 4) for seed in (5, 6)
    ]
    one = runs[-1].experiment
    assert (one.seed, one.stages["ppo"].kl.coef, one.stages["sft"].steps) == (6, 0.2, 4)
    assert runs[0].experiment.stages["ppo"] == dataclasses.replace(
        experiment().stages["ppo"], kl=dataclasses.replace(experiment().stages["ppo"].kl, coef=0.1)
    )
    assert [one.label for one in settings(experiment(), 2, [])] == ["seed=0", "seed=1"]


def test_a_field_that_may_be_none_takes_numbers():
    [one] = settings(experiment(stages={"sft": ToyStage(value_clip=None)}), 1, ["stages.sft.value_clip=0.5"])
    assert one.experiment.stages["sft"].value_clip == 0.5


def test_names_are_short_where_they_are_clear():
    assert short({"stages.ppo.kl.coef": 0, "stages.sft.steps": 0}) == {
        "stages.ppo.kl.coef": "kl.coef", "stages.sft.steps": "steps"
    }  # fmt: skip
    both = {"stages.ppo.steps": 0, "stages.sft.steps": 0}
    assert short(both) == {path: path for path in both}


def test_whole_numbers_make_groups():
    runs = settings(experiment(), 2, ["stages.ppo.kl.coef=0.1,0.2", "stages.sft.steps=3,4"])
    assert [{one.values["stages.sft.steps"] for one in some} for some in groups(runs)] == [{3}, {4}]
    assert [len(some) for some in groups(runs)] == [4, 4]


def test_stages_that_do_not_see_the_varied_field_are_shared():
    runs = settings(experiment(), 2, ["stages.ppo.kl.coef=0.1,0.2"])
    assert [len({one.share(stage) for one in runs}) for stage in ("sft", "ppo")] == [2, 4]
    runs = settings(experiment(), 1, ["stages.sft.steps=3,4"])
    assert [len({one.share(stage) for one in runs}) for stage in ("sft", "ppo")] == [2, 2]


def test_a_stage_depends_on_all_parts_of_its_mixture():
    made = best_of_n.Config(policy="base", reward=Length())
    both = sft.Config(data=Mixture((FromStage("a"), FromStage("b")), (1.0, 1.0)))
    toy = experiment()
    runs = settings(Experiment(toy.model, toy.data, {"a": made, "b": made, "both": both}), 1, ["stages.a.n=2,4"])
    assert [len({one.share(stage) for one in runs}) for stage in ("a", "b", "both")] == [2, 1, 2]


def test_a_reward_models_stage_is_not_shared_where_its_policy_varies():
    stages = {"sft": sft.Config(), "reward_model": reward_model.Config(), "ppo": ppo.Config(kl=FixedKL())}
    toy = experiment()
    runs = settings(Experiment(toy.model, toy.data, stages), 1, ["stages.sft.optimizer.learning_rate=0.1,0.2"])
    assert len({one.share("reward_model") for one in runs}) == 2


def test_what_is_refused():
    coef = "stages.ppo.kl.coef"
    assert refused(seeds=0) == "--seeds must be at least 1, got 0"
    assert "0.01" in refused(coef) and coef in refused(coef)
    assert f"no values; give them as in {coef}=0.01,0.05" in refused(f"{coef}=")
    assert "0.1 is there twice" in refused(f"{coef}=0.1,0.2,0.10")
    assert "is named twice" in refused(f"{coef}=0.1", f"{coef}=0.2")
    assert "stages.ppo has no field 'kk'; it has steps" in refused("stages.ppo.kk.coef=0.1")
    assert "stages.ppo.kl has no field 'coeff'; did you mean 'coef'?" in refused("stages.ppo.kl.coeff=0.1")
    assert "expected a number, got '0.1;0.2'" in refused(f"{coef}=0.1;0.2")
    assert "expected a whole number, got '1e2'" in refused("stages.sft.steps=1e2")
    assert "stages has no field 'dpo'; did you mean 'ppo'?" in refused("stages.dpo.steps=1")
    assert "stages.ppo.steps has no field 'x'; it has no fields" in refused("stages.ppo.steps.x=1")
    assert "is 'token'; numbers alone are varied" in refused("stages.sft.reducer=1")
    assert "is True; numbers alone" in refused("stages.sft.whiten=1")
    assert "is FixedKL; numbers alone" in refused("stages.sft.kl=1")
    assert "is ToyStage; numbers alone" in refused("stages.sft=1")
    assert "--seeds says how many" in refused("seed=1,2")
    assert "have the same axes" in refused("mesh.data=1,2")
    assert "expected a whole number, got '1.5'" in refused("stages.sft.steps=1.5")
    assert "expected a number, got 'a'" in refused(f"{coef}=0.1,a")
    assert "expected a number, got ''" in refused(f"{coef}=0.1,,0.2")
    assert "expected a finite number, got 'nan'" in refused(f"{coef}=nan")
    assert refused("stages.sft.steps=0").startswith("--vary stages.sft.steps=0: steps must be at least 1")
    assert refused(f"{coef}=-1").startswith(f"--vary {coef}=-1.0: ")


def test_the_quickstart_takes_the_example():
    experiment = load_config("configs/quickstart.py")
    assert len(settings(experiment, 8, ["stages.ppo.kl.coef=0.01,0.05,0.2"])) == 24
