"""Every run of a sweep is its single run: in turns bit for bit, at once to 1e-5, whatever the stage."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from rlhf_jax.mesh import MeshConfig
from rlhf_jax.metrics import read_jsonl
from rlhf_jax.plan.collectives import collectives
from rlhf_jax.plan.hlo import parse
from rlhf_jax.replicas import Groups
from tests.faults import CONFIG, Faulty

# Adam's eps as in the meshes' tests: near 0 a gradient's last bit is the sign of a step.
SHORT = CONFIG.replace(
    'Optimizer(schedule="linear", bad_steps="skip", spike_sigmas=6.0, spike_window=8)',
    'Optimizer(schedule="linear", eps=1e-3)',
)
SHORT = (
    SHORT.replace("steps=30", "steps=6")
    .replace("steps=20", "steps=3")
    .replace("checkpoint_every=4", "checkpoint_every=3")
)

MORE = """
import dataclasses
from pathlib import Path
from rlhf_jax.algorithms import best_of_n, compare, distill, offline, online_preference, policy, preference
from rlhf_jax.algorithms.comparisons import SampledPairs
from rlhf_jax.algorithms.offline_ilql import Ilql
from rlhf_jax.algorithms.offline_methods import Filtered
from rlhf_jax.algorithms.onpolicy import ValueHead
from rlhf_jax.algorithms.policy_methods import METHODS
from rlhf_jax.algorithms.preference_losses import Term
from rlhf_jax.data.sources import FromStage
from rlhf_jax.models.spec import Lora
from rlhf_jax.rewards.python import PythonReward
from rlhf_jax.rewards.verifiers import AnswerChecker
from rlhf_jax.sampling import Turns
from rlhf_jax.sharding import MeshConfig

HERE = Path(__file__).parent
_whole = get_config


def get_config():
    whole, optimizer = _whole(), Optimizer(learning_rate=1e-3, eps=1e-3)
    sampled = {"steps": 2, "batch_size": 8, "completion_tokens": 12, "evaluation_prompts": 16, "checkpoint_every": 2,
               "optimizer": optimizer}
    on_policy = {"policy": "sft", "reward": "reward_model", "exact_kl_rows": 8, "minibatches": 2, **sampled}
    pairs = SampledPairs(prompts=16, heldout_prompts=16, completions=2, completion_tokens=12, batch_size=32)
    read = {"steps": 3, "batch_size": 8, "evaluate_every": 3, "checkpoint_every": 3, "optimizer": optimizer}
    offline_rows = {"row_length": 32, "completion_tokens": 12, "evaluation_prompts": 16}
    best = best_of_n.Config(policy="sft", reward="reward_model", n=4, keep=2, prompts=16, completion_tokens=12,
                            evaluation_prompts=16, batch_size=16)
    sums = {"data": Jsonl(HERE / "sums.jsonl", heldout=0.5)}
    more = {
        "checked": policy.Config(**{**on_policy, **sums, "reward": AnswerChecker(), "turns": Turns(4, 1)},
                                 **METHODS["grpo"] | {"group_size": 4}),
        "counted": ppo.Config(**{**on_policy, **sums, "reward": PythonReward(HERE / "mine.py")}, critic=ValueHead()),
        "grpo": policy.Config(**on_policy, **METHODS["grpo"] | {"group_size": 4}),
        "trpo": policy.Config(**{**on_policy, "minibatches": 1}, **METHODS["trpo"]),
        "online": online_preference.Config(policy="sft", reward="reward_model", exact_kl_rows=8, **sampled),
        "dpo": preference.Config(init="sft", pairs=pairs, length=21, losses=(Term("dpo", beta=0.1),), **read),
        "kto": preference.Config(init="sft", pairs=pairs, length=21, losses=(Term("kto", beta=0.1),), **read),
        "best": best,
        "ilql": offline.Config(init="sft", **offline_rows, data=FromStage("best"), method=Ilql(), **read),
        "filtered": offline.Config(init="sft", **offline_rows, data=FromStage("best"), method=Filtered(top=0.5),
                                   **read),
        "distilled": distill.Config(student="sft", teacher="ppo", **sampled),
        "read": compare.Config(policy="filtered", reward="reward_model", completion_tokens=12, evaluation_prompts=16),
    }
    model = Scratch(dataclasses.replace(whole.model.spec, lora=LORA))
    stages = {**whole.stages, **{name: more[name] for name in ALSO}}
    return dataclasses.replace(whole, model=model, mesh=MESH, stages=stages)
"""

SCRIPT = """
import sys
from pathlib import Path
import jax
from rlhf_jax.config import load_config
from rlhf_jax.replicas import Groups
from rlhf_jax.run import run, start_backend
from rlhf_jax.sweep import sweep
from rlhf_jax.sweep.grid import settings

config, folder, seeds, each, *varied = sys.argv[1:]
experiment, folder = load_config(config), Path(folder)
start_backend(experiment.mesh)
for name, vmapped in (("vmap", True), ("turns", False)):
    sweep(experiment, int(seeds), varied, folder / name, [], vmapped=vmapped)
mesh = Groups(experiment.mesh, jax.devices()).meshes[0]
for one in settings(experiment, int(seeds), varied)[:: int(each)]:
    run(one.experiment, folder / "single" / one.label, [], draws=False, mesh=mesh)
"""


def swept(folder, stages, seeds, *varied, also=(), lora="None", mesh="MeshConfig()", each=1, flags=""):
    """Every `each`th single run, with those of the two sweeps, after a process that makes all; what it said."""
    faulty = Faulty(folder, *stages, config=f"{SHORT}\n{MORE}\nALSO, LORA, MESH = {also}, {lora}, {mesh}\n")
    faulty.env["XLA_FLAGS"] = flags
    sums = [{"prompt": f"the sum of {n} and 3 is", "answer": n + 3} for n in range(32)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    (folder / "mine.py").write_text(
        "def reward(prompts, completions, metadata):\n    return [len(set(text)) / 10 for text in completions]\n"
    )
    command = [sys.executable, "-c", SCRIPT, str(folder / "tiny.py"), str(folder), str(seeds), str(each), *varied]
    done = subprocess.run(command, env=faulty.env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    singles = sorted((folder / "single").iterdir())
    assert len(singles) > 1
    return [(one, folder / "vmap" / one.name, folder / "turns" / one.name) for one in singles], done.stderr


def lines(workdir):
    """metrics.jsonl without what a clock says."""
    skipped = ("seconds", "tokens_per_second")
    return [{k: v for k, v in row.items() if k not in skipped} for row in read_jsonl(workdir / "metrics.jsonl")]


def digests(workdir):
    return json.loads((workdir / "summary.json").read_text())["params_digest"]


def check(runs, apart):
    """`apart`: fields in which the runs must differ from each other at the end, of the last stage's line."""
    for single, mapped, turns in runs:
        assert digests(single) == digests(turns) and lines(single) == lines(turns)
        assert len(lines(single)) == len(lines(mapped))
        for one, other in zip(lines(single), lines(mapped), strict=True):
            assert one.keys() == other.keys() and (one["stage"], one["step"]) == (other["stage"], other["step"])
            for name in one.keys() - {"stage", "step"}:
                np.testing.assert_allclose(
                    other[name], one[name], rtol=1e-5, atol=1e-5, err_msg=f"{one['stage']} {name}"
                )
    for name in apart:
        values = [lines(single)[-1][name] for single, _, _ in runs]
        assert len(set(values)) == len(values), name


def test_fine_tuning_by_seed_and_learning_rate(tmp_path):
    runs, said = swept(tmp_path, ("sft",), 2, "stages.sft.optimizer.learning_rate=0.001,0.03", each=3)
    check(runs, ["loss"])
    [told] = [line for line in said.splitlines() if "made at once" in line]
    assert told.split("of ")[1].split()[0] == told.split()[-5], told  # every compiled call


@pytest.mark.slow
@pytest.mark.parametrize(
    ("varied", "apart"),
    [
        (("stages.ppo.kl.coef=0.1,1.0", "stages.ppo.optimizer.learning_rate=0.001,0.002"), ["reward", "policy_loss"]),
        (("stages.ppo.critic_optimizer.learning_rate=0.001,0.002", "stages.ppo.gamma=0.9,1.0"), ["value_loss"]),
        (("stages.ppo.clip_eps=0.0001,0.2", "stages.ppo.value_clip=0.0001,0.2"), ["policy_loss", "value_loss"]),
    ],
)
def test_ppo_by_numbers_of_its_state_and_one_that_is_compiled_in(tmp_path, varied, apart):
    runs, _ = swept(tmp_path, ("sft", "reward_model", "ppo"), 1, *varied)
    check(runs, [])
    for name in apart:
        assert len({lines(single)[-1][name] for single, _, _ in runs}) > 1, name


@pytest.mark.slow
def test_every_stage_of_the_table_of_methods(tmp_path):
    also = ("grpo", "trpo", "online", "dpo", "kto", "best", "ilql", "filtered", "distilled", "read")
    runs, _ = swept(tmp_path, ("sft", "reward_model", "ppo"), 2, also=also)
    check(runs, [])


@pytest.mark.slow
def test_adapters_a_function_of_texts_and_rows_that_take_turns(tmp_path):
    """With a program's state between the two halves of an iteration, and a frozen base that all networks share."""
    runs, _ = swept(tmp_path, ("sft",), 2, also=("checked", "counted"), lora="Lora(rank=2)")
    check(runs, [])


@pytest.mark.slow
def test_a_mesh_that_every_run_has_the_whole_of(tmp_path):
    runs, _ = swept(tmp_path, ("sft", "reward_model", "ppo"), 2, mesh="MeshConfig(data=1, fsdp=2, tensor=2)")
    check(runs, [])


def check_apart(folder, mesh):
    """Of the programs of all replicas, dumped there: nothing is sent along their axis but a loop's condition."""
    paths = list(folder.glob("*of_groups.cpu_after_optimizations.txt"))
    assert len(paths) > 5
    for path in paths:
        module = parse(path.read_text())
        assert not [one for one in collectives(module, mesh) if "replica" in one.axes]
        loops = [one for each in module.computations.values() for one in each.values() if one.opcode == "while"]
        for loop in loops:  # whether any replica still samples
            sent = [one for one in module.computations[loop.calls["condition"]].values() if one.opcode == "all-reduce"]
            assert all(one.bytes <= 1 for one in sent)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "seeds"),
    [("MeshConfig(data=1, replica=4)", 4), ("MeshConfig(data=1, fsdp=2, replica=2)", 4)],
)
def test_runs_that_are_split_over_groups_of_devices(tmp_path, mesh, seeds):
    """Each is its single run on such devices, and between groups nothing is sent that is an array of a replica."""
    dumped = tmp_path / "dumped"
    flags = f"--xla_dump_to={dumped} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*of_groups.*"
    runs, said = swept(tmp_path, ("sft", "reward_model", "ppo"), seeds, mesh=mesh, each=seeds - 1, flags=flags)
    check(runs, [])
    [told] = [line for line in said.splitlines() if "made at once" in line]
    calls, at_once = int(told.split("of ")[1].split()[0]), int(told.split()[-5])
    assert calls - at_once <= seeds, told  # but a call of each: a reward model's new head has its key compiled in
    check_apart(dumped, Groups(eval(mesh, {"MeshConfig": MeshConfig}), jax.devices()[:4]).whole)
