"""A run's folder as the stages write it, from made-up numbers that look like a real run's."""

import json
from pathlib import Path

import numpy as np
import pytest

# What a tokenizer with byte fallback may come up with, and what would harm a careless page.
NASTY = (
    "<script>document.title = 'owned'</script>",
    '</td></table><img src="x" onerror="alert(1)">',
    "]]> --> <!-- &amp; &lt;",
    "emoji \U0001f3ac\U0001f468‍\U0001f469 and 映画 and עברית ‮reversed",
    "",
    "control \x00\x1b[31m and a lone \ud83c half\r\n\ttab",
    "$x^2$ \\frac{1}{2} 100% {braces} `ticks` 'quotes'",
)
WORDS = ["a", "the", "film", "is", "movie", "of", "and", "wonderful", "dull", "plot", "acting", "never", "funny"]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def supervised_rows(rng: np.random.Generator, stage: str, steps: int, every: int) -> list[dict]:
    rows = []
    for step in range(1, steps + 1):
        clean = 4.05 + 0.45 * np.exp(-step / 40)
        row = {"stage": stage, "step": step, "seconds": 0.4 * step, "loss": clean + rng.normal(0, 0.05)}
        row |= {"learning_rate": 1e-3 * (1 - step / (steps + 1)), "grad_norm": rng.gamma(9, 0.1)}
        row["tokens_per_second"] = rng.normal(15_000, 900)
        if step % every == 0:
            row["heldout_loss"] = clean + 0.03
        rows.append(row)
    return rows


def reward_rows(rng: np.random.Generator, stage: str, steps: int, every: int) -> list[dict]:
    rows = supervised_rows(rng, stage, steps, every)
    for row in rows:
        row.pop("heldout_loss", None)
        progress = 1 - np.exp(-row["step"] / 60)
        row["loss"] = 0.69 - 0.22 * progress + rng.normal(0, 0.03)
        row |= {"accuracy": 0.5 + 0.33 * progress + rng.normal(0, 0.03), "margin": 1.4 * progress}
        if row["step"] % every == 0:
            row |= {"heldout_accuracy": 0.5 + 0.31 * progress, "heldout_log_loss": 0.69 - 0.2 * progress}
    return rows


def ppo_rows(rng: np.random.Generator, stage: str, steps: int) -> list[dict]:
    rows = []
    for step in range(1, steps + 1):
        done = 1 - np.exp(-(step - 1) / 14)
        kl = max(0.0, 13 * done + rng.normal(0, 0.3) * (step > 1))
        score = 1.6 * done + rng.normal(0, 0.06)
        row = {"stage": stage, "step": step, "seconds": 3.1 * step, "score": score, "seq_kl": kl, "kl": kl / 38}
        row |= {"gold": 0.5 + 0.36 * done + rng.normal(0, 0.015), "reward": score - 0.05 * kl, "kl_coef": 0.05}
        row |= {"seq_kl_exact": kl * rng.normal(1, 0.04), "entropy": 4.4 - 1.2 * done}
        row |= {"ratio_deviation": 4e-6, "sampling_deviation": 9e-6}
        row |= {"policy_loss": -0.04 * rng.random(), "value_loss": 0.2 - 0.1 * done, "approx_kl": 0.01 * rng.random()}
        row |= {"policy_clipped": 0.12 * rng.random(), "value_clipped": 0.3 * rng.random()}
        row |= {"explained_variance": 0.7 * done - 0.1, "length": 37.5 + rng.normal(0, 0.3), "no_eos": 0.9}
        row |= {"learning_rate": 1e-4, "grad_norm": rng.gamma(9, 0.04), "tokens_per_second": rng.normal(1800, 60)}
        rows.append(row)
    return rows


def sample_rows(rng: np.random.Generator, prompts: int, step: int) -> list[dict]:
    rows = []
    for when, shift in (("before", 0.0), ("after", 1.5)):
        for index in range(prompts):
            prompt = " ".join(WORDS[(index * k) % len(WORDS)] for k in (1, 3, 5, 7)[: 1 + index % 4])
            text = " " + " ".join(rng.choice(WORDS, rng.integers(8, 34)))
            if when == "after" and index < len(NASTY):
                text = NASTY[index]
            score, length = rng.normal(shift, 1 - shift / 4), int(np.clip(rng.normal(37, 6), 1, 40))
            row = {"when": when, "step": step if when == "after" else 0, "prompt": prompt, "completion": text}
            row |= {"ended": length < 40, "length": length, "kl": float(rng.gamma(9, 1.4)) if shift else 0.0}
            gold = float(1 / (1 + np.exp(-1.6 * score + rng.normal())))
            rows.append({**row, "score": float(score), "gold": gold, "vader": float(np.tanh(score + rng.normal()))})
    return rows


def evaluation(rng: np.random.Generator, pairs: int = 1200) -> dict:
    margins = rng.normal(1.1, 1.3, pairs)
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    inside = np.minimum((confidence - 0.5) * 20, 9).astype(int)
    bins = [
        {"confidence": float(confidence[one].mean()), "accuracy": float((margins[one] > 0).mean()),
         "count": int(one.sum())}
        for one in (inside == k for k in range(10)) if one.any()
    ]  # fmt: skip
    lengths = np.clip(rng.normal(36, 7, 1600), 1, 40).astype(int)
    scores = rng.normal(0, 1, 1600) + 0.02 * lengths
    external = {"n": 250_000, "sentences": 1000, "accuracy": 0.781}
    lists = {"scores": scores.tolist(), "lengths": lengths.tolist(), "margins": margins.tolist()}
    return {"n": pairs, "bins": bins, "external": external, **lists}


def full_run(workdir: Path, seed: int = 0) -> Path:
    """A finished run of three stages."""
    rng = np.random.default_rng(seed)
    rows = supervised_rows(rng, "sft", 200, 50) + reward_rows(rng, "reward_model", 160, 40) + ppo_rows(rng, "ppo", 40)
    write_jsonl(workdir / "metrics.jsonl", rows)
    classes = {"sft": "SFTConfig", "reward_model": "RewardModelConfig", "ppo": "PPOConfig"}
    stages = {name: {"class": kind, "steps": 40} for name, kind in classes.items()}
    config = {"experiment": {"seed": seed, "stages": stages}, "versions": {"jax": "0.10.2", "rlhf_jax": "0.1.0"}}
    write_json(workdir / "config.json", {**config, "commit": "0123456789abcdef", "command": ["rlhf-jax", "run", "<b>"]})
    write_jsonl(workdir / "ppo" / "samples.jsonl", sample_rows(rng, 256, 40))
    write_json(workdir / "reward_model" / "evaluation.json", evaluation(rng))
    figures = {
        "sft": {"heldout_loss": 4.0801, "steps": 200},
        "reward_model": {"accuracy": 0.8127, "log_loss": 0.4312, "ece": 0.0214, "external_accuracy": 0.781},
        "ppo": {"gold_before": 0.512, "gold_after": 0.861, "length_before": 37.6, "length_after": 37.1, "seq_kl": 12.9,
                "distinct2_before": 0.71, "distinct2_after": 0.66, "ratio_deviation": 4e-6,
                "sampling_deviation": 9e-6, "steps": 40},
        "seconds": 312.4, "peak_memory_bytes": 2_310_000_000, "params_digest": {"sft": "ab" * 32},
    }  # fmt: skip
    write_json(workdir / "summary.json", figures)
    return workdir


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    return full_run(tmp_path / "seed-0")


@pytest.fixture(scope="session")
def make_run():
    """The function, since test files cannot import this one."""
    return full_run
