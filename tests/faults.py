"""A run of seconds in real processes, for tests that kill it and damage its files."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from rlhf_jax.metrics import read_jsonl

ROOT = Path(__file__).parents[1]
STEPS = {"sft": 30, "reward_model": 30, "ppo": 20}
CONFIG = '''"""Three stages of a tiny model from nothing."""

from pathlib import Path

from rlhf_jax.algorithms import ppo, reward_model, sft
from rlhf_jax.config import Experiment
from rlhf_jax.data.sources import Jsonl
from rlhf_jax.interop.pretrained import Scratch
from rlhf_jax.kl import AdaptiveKL
from rlhf_jax.models import ModelSpec
from rlhf_jax.optim import Optimizer


def get_config():
    spec = ModelSpec(vocab_size=320, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=32, max_len=40)
    pairs = reward_model.SampledPairs(prompts=32, heldout_prompts=16, completion_tokens=12, batch_size=48)
    optimizer = Optimizer(schedule="linear", bad_steps="skip", spike_sigmas=6.0, spike_window=8)
    stages = {
        "sft": sft.Config(steps=30, data=sft.Openings(completion_tokens=12), row_length=32, batch_size=8,
                          heldout_rows=8, checkpoint_every=4, optimizer=optimizer),
        "reward_model": reward_model.Config(pairs=pairs, length=21, steps=30, batch_size=8, checkpoint_every=4,
                                            optimizer=optimizer),
        "ppo": ppo.Config(steps=20, batch_size=8, completion_tokens=12, kl=AdaptiveKL(), checkpoint_every=3,
                          evaluation_prompts=16, exact_kl_rows=8, epochs=2, minibatches=2, optimizer=optimizer),
    }
    data = Jsonl(Path(__file__).with_name("texts.jsonl"), heldout=0.3)
    return Experiment(model=Scratch(spec), data=data, stages={name: stages[name] for name in NAMES})
'''
WORDS = {0: "dull weak bad slow empty", 1: "bright strong good fresh moving"}


class Faulty:
    """The command of the tiny run's first stages, on one device, with caches of its own beside its config."""

    def __init__(self, folder: Path, *stages: str, config: str = CONFIG, steps: Mapping[str, int] = STEPS) -> None:
        """`steps`: of the config's stages, 0 of those that write no line a step."""
        draw = random.Random(0)
        # letters, so that a judge has a token for each
        texts = [
            (f"{_sentence(draw, label)}: {' '.join('BA'[label] * 3)}", label) for label in (0, 1) for _ in range(200)
        ]
        rows = [{"text": text, "label": label} for text, label in texts]
        draw.shuffle(rows)
        (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "tiny.py").write_text(f"{config}\n\nNAMES = {stages}\n")
        self.folder, self.stages, self.steps = folder, stages, steps
        self.env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        self.env |= {"XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        self.env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # of programs that run for seconds

    def command(self, workdir: Path, *flags: str) -> list[str]:
        return [
            sys.executable,
            "-m",
            "rlhf_jax",
            "run",
            str(self.folder / "tiny.py"),
            "--workdir",
            str(workdir),
            *flags,
        ]

    def run(self, workdir: Path, *flags: str) -> subprocess.CompletedProcess:
        """To its end, whatever that is."""
        command = self.command(workdir, *flags)
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=900)

    def end(self, workdir: Path, moment, number: int = signal.SIGKILL) -> tuple[int, str, float]:
        """Start, and send the signal when `moment(seconds so far)` is true; code, stderr, seconds from it on."""
        with (self.folder / "stderr").open("w+") as said:
            process = subprocess.Popen(self.command(workdir), env=self.env, stdout=subprocess.DEVNULL, stderr=said)
            began = time.monotonic()
            while process.poll() is None and not moment(time.monotonic() - began):
                time.sleep(0.002)
                assert time.monotonic() - began < 900
            sent = time.monotonic()
            process.send_signal(number)
            code = process.wait(timeout=300)
            said.seek(0)
            return code, said.read(), time.monotonic() - sent

    def check_same(self, whole: Path, broken: Path) -> None:
        """The same figures and digests, every step's line once and with the same numbers, the same samples."""
        assert figures(whole) == figures(broken)
        assert set(figures(broken)["params_digest"]) == set(self.stages)
        lines = []
        for workdir in (whole, broken):
            rows = read_jsonl(workdir / "metrics.jsonl")
            lines.append([{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows])
        assert lines[0] == lines[1]
        expected = [(name, step) for name in self.stages for step in range(1, self.steps[name] + 1)]
        assert [(line["stage"], line["step"]) for line in lines[1]] == expected
        for made in (*whole.glob("*/samples.jsonl"), *whole.glob("*/rows/rows.jsonl")):
            assert made.read_text() == (broken / made.relative_to(whole)).read_text()


def _sentence(draw: random.Random, label: int) -> str:
    words = [draw.choice(["the film", "a story", "the cast", "this plot", "an ending"]) for _ in range(3)]
    return ". ".join(
        f"{word} is {draw.choice(WORDS[label].split())} and {draw.choice(WORDS[label].split())}" for word in words
    )


def at_step(workdir: Path, stage: str, step: int):
    """The moment when the stage has written its `step`th line."""
    path = workdir / "metrics.jsonl"
    return lambda _: path.exists() and any(line["stage"] == stage and line["step"] >= step for line in read_jsonl(path))


def at_save(workdir: Path, stage: str, step: int):
    """The moment when the checkpoint of a step, or a later one, is being written."""
    folder = workdir / stage / "checkpoints"
    return lambda _: any(int(path.name.split(".")[1]) >= step for path in folder.glob(".[0-9]*.part"))


def figures(workdir: Path) -> dict:
    """What summary.json holds, without times and memory."""
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary.pop("seconds") > 0 and summary.pop("peak_memory_bytes") > 1e8
    return summary
