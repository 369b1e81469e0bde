"""Put the figures of finished quickstart runs into README.md: its picture, its table and its samples.

for seed in 0 1 2; do rlhf-jax run configs/quickstart.py --seed $seed --workdir runs/quickstart$seed; done
python docs/readme.py runs/quickstart0 runs/quickstart1 runs/quickstart2
"""

import json
import re
import sys
from pathlib import Path

from rlhf_jax.metrics import read_jsonl
from rlhf_jax.report.figures import readme_figure

ROOT = Path(__file__).parents[1]
ROWS = (
    ("SFT: held-out loss, nats a token", "sft.heldout_loss", "{:.2f}"),
    ("reward model: accuracy on held-out pairs", "reward_model.accuracy", "{:.3f}"),
    ("… on pairs of unseen Rotten Tomatoes sentences of opposite label", "reward_model.external_accuracy", "{:.3f}"),
    ("… expected calibration error", "reward_model.ece", "{:.3f}"),
    ("… correlation of score and length", "reward_model.length_correlation", "{:+.2f}"),
    ("PPO: gold score, SFT", "ppo.gold_before", "{:.3f}"),
    ("… after", "ppo.gold_after", "**{:.3f}**"),
    ("VADER, which nothing was trained on, SFT", "ppo.vader_before", "{:.2f}"),
    ("… after", "ppo.vader_after", "{:.2f}"),
    ("sequence KL to the SFT policy, nats", "ppo.seq_kl", "{:.1f}"),
    ("distinct-2 at equal token counts, SFT", "ppo.distinct2_before", "{:.3f}"),
    ("… after", "ppo.distinct2_after", "{:.3f}"),
    ("mean length in tokens, SFT", "ppo.length_before", "{:.1f}"),
    ("… after", "ppo.length_after", "{:.1f}"),
    ("largest deviation from 1, before an update, of the ratio in the loss", "ppo.ratio_deviation", "{:.1e}"),
    ("… of the ratio to the log-probs that the sampler read with its cache", "ppo.sampling_deviation", "{:.1e}"),
    ("minutes", "seconds", "{:.1f}"),
    ("peak memory, GB", "peak_memory_bytes", "{:.1f}"),
)
PROMISES = (  # what the README says of every seed
    ("reward model on held-out pairs", lambda s: s["reward_model"]["accuracy"] >= 0.80),
    ("reward model on unseen sentences", lambda s: s["reward_model"]["external_accuracy"] >= 0.77),
    ("gold score", lambda s: s["ppo"]["gold_after"] - s["ppo"]["gold_before"] >= 0.30),
    ("VADER", lambda s: s["ppo"]["vader_after"] - s["ppo"]["vader_before"] >= 0.2),
    ("sequence KL", lambda s: s["ppo"]["seq_kl"] <= 16),
    ("distinct-2", lambda s: s["ppo"]["distinct2_after"] >= 0.9 * s["ppo"]["distinct2_before"]),
    ("length", lambda s: s["ppo"]["length_after"] >= 0.9 * s["ppo"]["length_before"]),
    ("ratio", lambda s: s["ppo"]["ratio_deviation"] <= 1e-5),
    ("memory", lambda s: s["peak_memory_bytes"] < 4e9),
)
UNITS = {"seconds": 60, "peak_memory_bytes": 1e9}


def table(workdirs: list[Path]) -> str:
    """A row a figure, a column a run."""
    summaries = [json.loads((workdir / "summary.json").read_text()) for workdir in workdirs]
    seeds = [json.loads((workdir / "config.json").read_text())["experiment"]["seed"] for workdir in workdirs]
    lines = ["| | " + " | ".join(f"seed {seed}" for seed in seeds) + " |", "|---|" + "---|" * len(seeds)]
    for label, path, form in ROWS:
        cells = []
        for summary in summaries:
            value = summary
            for part in path.split("."):
                value = value[part]
            cells.append(form.format(value / UNITS.get(path, 1)))
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def samples(workdir: Path, count: int = 3) -> str:
    """The first prompts of samples.jsonl, not picked, with what follows before and after."""
    rows = read_jsonl(workdir / "ppo" / "samples.jsonl")
    before, after = ([row for row in rows if row["when"] == when][:count] for when in ("before", "after"))
    parts = []
    for a, b in zip(before, after, strict=True):
        parts += [
            f"{a['prompt']} |",
            f"   SFT  {a['gold']:.2f} {a['completion']}",
            f"   PPO  {b['gold']:.2f} {b['completion']}",
        ]
    return "```\n" + "\n".join(parts) + "\n```"


def check(workdir: Path) -> None:
    """Exit where a run does not show what it is said to show."""
    summary = json.loads((workdir / "summary.json").read_text())
    broken = [name for name, holds in PROMISES if not holds(summary)]
    if broken:
        sys.exit(f"{workdir}: not as promised: {', '.join(broken)}")


def main(workdirs: list[Path]) -> None:
    """Check the runs, draw docs/quickstart.png and rewrite what stands between the markers."""
    for workdir in workdirs:
        check(workdir)
    readme_figure(workdirs, ROOT / "docs" / "quickstart.png")
    commits = {json.loads((workdir / "config.json").read_text())["commit"] for workdir in workdirs}
    made = f"Made at commit {', '.join(str(commit)[:10] for commit in sorted(commits, key=str))}."
    title = "The first held-out prompts, with the gold score of what follows:"
    block = f"\n{table(workdirs)}\n\n{made} {title}\n\n{samples(workdirs[0])}\n\n"
    between = re.compile(r"(?<=<!-- from docs/readme.py -->\n).*?(?=<!-- end -->)", flags=re.S)
    text = between.sub(lambda _: block, (ROOT / "README.md").read_text())
    (ROOT / "README.md").write_text(text)


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
