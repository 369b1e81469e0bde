"""Every kind of stage, killed twice: the same command ends where an unbroken run does, bit for bit."""

import random
import signal

import pytest

from rlhf_jax import run
from tests.faults import Faulty, at_step

STEPS = {
    "sft": 6, "reward_model": 6, "ppo": 4, "dpo": 6, "grpo": 4, "online": 4, "best": 0, "rejection": 4, "ilql": 6,
    "weighted": 4, "distilled": 4, "beside": 0, "judged": 0, "revised": 0,
}  # fmt: skip
CONFIG = '''"""A stage of each kind, of a tiny model from nothing."""

from pathlib import Path

from rlhf_jax.algorithms import (
    ai_feedback, best_of_n, compare, constitutional, distill, offline, online_preference, policy, ppo, preference,
    reward_model, sft,
)
from rlhf_jax.algorithms.offline_ilql import Ilql
from rlhf_jax.algorithms.offline_methods import Weighted
from rlhf_jax.config import Experiment
from rlhf_jax.data.sources import FromStage, Jsonl
from rlhf_jax.interop.pretrained import Scratch
from rlhf_jax.models import ModelSpec
from rlhf_jax.rewards.judging import LocalJudge

HERE = Path(__file__).parent


def get_config():
    spec = ModelSpec(vocab_size=320, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=32, max_len=320)
    pairs = reward_model.SampledPairs(prompts=16, heldout_prompts=8, completion_tokens=12, batch_size=48)
    written = {"completion_tokens": 12, "batch_size": 8, "evaluation_prompts": 16}
    on_policy = {**written, "steps": 4, "checkpoint_every": 2, "exact_kl_rows": 8}
    supervised = {"row_length": 32, "batch_size": 8, "heldout_rows": 8, "checkpoint_every": 2}
    scored = {**supervised, "data": FromStage("best"), "evaluation_prompts": 16, "completion_tokens": 12}
    stages = {
        "sft": sft.Config(steps=6, data=sft.Openings(completion_tokens=12), **supervised),
        "reward_model": reward_model.Config(pairs=pairs, length=21, steps=6, batch_size=8, checkpoint_every=2),
        "ppo": ppo.Config(epochs=2, minibatches=2, **on_policy),
        "dpo": preference.Config(pairs=pairs, length=24, steps=6, batch_size=8, checkpoint_every=2,
                                 evaluation_prompts=16, completion_tokens=12),
        "grpo": policy.Config(group_size=4, minibatches=2, **on_policy),
        "online": online_preference.Config(minibatches=2, **on_policy),
        "best": best_of_n.Config(n=4, prompts=16, **written),
        "rejection": sft.Config(init="sft", data=FromStage("best"), steps=4, **supervised),
        "ilql": offline.Config(method=Ilql(curve=(0.0,)), steps=6, **scored),
        "weighted": offline.Config(method=Weighted(), steps=4, **scored),
        "distilled": distill.Config(student="sft", teacher="ppo", steps=4, checkpoint_every=2, **written),
        "beside": compare.Config(policy="dpo", **written),
        "judged": ai_feedback.Config(judge=LocalJudge(length=300, batch_size=8), principles=("The kinder one.",),
                                     prompts=16, **written),
        "revised": constitutional.Config(policy="sft", constitution=str(HERE / "constitution.json"), prompts=16,
                                         batch_size=8, answer_tokens=8, critique_tokens=8, length=200),
    }
    data = Jsonl(HERE / "texts.jsonl", heldout=0.3)
    return Experiment(model=Scratch(spec), data=data, stages={name: stages[name] for name in NAMES})
'''
CONSTITUTION = '[{"critique": "Bad?", "revision": "Fix it.", "preference": "Good?"}]'


@pytest.mark.slow
def test_each_kind_of_stage_killed_twice_ends_where_an_unbroken_one_does(tmp_path):
    """As soon as it is there, and in its midst: at a step, or where a part of its rows is made."""
    faulty = Faulty(tmp_path, *STEPS, config=CONFIG, steps=STEPS)
    (tmp_path / "constitution.json").write_text(CONSTITUTION)
    done = faulty.run(tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    broken, draw, kills = tmp_path / "broken", random.Random(0), 0
    for stage, steps in STEPS.items():
        for moment in (begun(broken / stage, draw.uniform(0, 3)), amid(broken, stage, steps)):
            code, said, _ = faulty.end(broken, moment)
            assert code in (-signal.SIGKILL, 0), said
            kills += code == -signal.SIGKILL
    assert kills >= 2 * len(STEPS) - 3  # a stage of a moment may be over before
    done = faulty.run(broken)
    assert done.returncode == 0, done.stderr
    faulty.check_same(tmp_path / "whole", broken)
    assert not list(broken.rglob("*.damaged*"))


def begun(folder, late):
    """So many seconds after the stage's folder is there."""
    seen = []

    def moment(seconds):
        if not seen and folder.is_dir():
            seen.append(seconds)
        return bool(seen) and seconds >= seen[0] + late

    return moment


def amid(workdir, stage, steps):
    """At the stage's middle step; of one that makes rows, where the first batch of these, or all, are made."""
    if steps:
        return at_step(workdir, stage, steps // 2)
    folder = workdir / stage
    return lambda _: any(folder.glob(".rows/*.jsonl")) or (folder / "rows").is_dir()


def test_no_kind_of_stage_is_left_out():
    """But pretraining, which is supervised fine-tuning's loop on other rows."""
    namespace = {"__file__": __file__, "NAMES": tuple(STEPS)}
    exec(compile(CONFIG, "config", "exec"), namespace)
    kinds = {type(stage) for stage in namespace["get_config"]().stages.values()}
    assert {kind.__module__.rsplit(".", 1)[-1] for kind in set(run.STAGES) - kinds} == {"pretrain"}
