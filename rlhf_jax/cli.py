"""The command `rlhf-jax`: run an experiment, sample from it, score with it, draw its report."""

import difflib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from rlhf_jax.errors import UserError

_USAGE = """usage: rlhf-jax COMMAND …

  run CONFIG [--workdir DIR] [--FIELD VALUE …]     train an experiment, or go on with it (config: a Python file)
  sample WORKDIR --prompt TEXT [--n 4] [--json]    completions from a run's newest policy, or from the model "bundled"
  score WORKDIR --input FILE [--json]              a run's reward model on pairs, or on scored texts, of a JSONL file
  report WORKDIR                                   draw report.html again

rlhf-jax COMMAND --help says more; rlhf-jax run CONFIG --help lists every field of the experiment.
"""


@dataclass(frozen=True)
class SampleArgs:
    """Print completions of a prompt."""

    workdir: tyro.conf.Positional[Path]
    """A run's folder, or "bundled", the base model in the package."""
    prompt: str
    """The text to go on from."""
    n: int = 4
    """Completions."""
    stage: str | None = None
    """The stage to sample; the last finished policy where none is given."""
    max_tokens: int = 40
    """Most tokens of a completion."""
    temperature: float = 1.0
    """Divides the logits."""
    top_k: int = 0
    """Keeps the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keeps the fewest most probable tokens whose probabilities reach p."""
    seed: int = 0
    """Seed of the draws."""
    json: bool = False
    """Print one line of JSON on stdout, and all else on stderr."""


@dataclass(frozen=True)
class ScoreArgs:
    """How well a run's reward model ranks the rows of a file."""

    workdir: tyro.conf.Positional[Path]
    """A run's folder."""
    input: Path
    """JSONL rows of prompt, chosen and rejected, or of text and score."""
    stage: str | None = None
    """The reward_model stage; the last finished one where none is given."""
    json: bool = False
    """Print one line of JSON on stdout, and all else on stderr."""


@dataclass(frozen=True)
class ReportArgs:
    """Draw a run's report.html from its files."""

    workdir: tyro.conf.Positional[Path]
    """A run's folder."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, 2 for wrong input, 3 for numbers not finite, 128 + a signal's number."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0 if args else 2
    command, rest = args[0], args[1:]
    try:
        if command not in _COMMANDS:
            close = difflib.get_close_matches(command, _COMMANDS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UserError(f"no command {command!r}{hint} (rlhf-jax --help)")
        _COMMANDS[command](rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _run(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print("usage: rlhf-jax run CONFIG [--workdir DIR] [--FIELD VALUE …]\n\nrlhf-jax run CONFIG --help: all fields")
        if not args:
            raise UserError("run needs a config file, such as configs/quickstart.py")
        return
    from rlhf_jax.config import Experiment, load_config, parse
    from rlhf_jax.run import run

    path = Path(args[0])
    experiment, description = load_config(path)
    # The experiment's fields beside one more: flags come without a prefix.
    with_workdir = make_dataclass(
        "Run",
        [
            ("workdir", Annotated[Path, tyro.conf.arg(help="The run's folder; the same command goes on in it.")]),
            ("experiment", tyro.conf.OmitArgPrefixes[Experiment]),
        ],
        frozen=True,
    )
    default = with_workdir(Path("runs") / path.stem, experiment)
    chosen = parse(default, args[1:], prog=f"rlhf-jax run {path}", description=description)
    run(chosen.experiment, chosen.workdir, ["rlhf-jax", "run", *args])


def _sample(args: list[str]) -> None:
    from rlhf_jax import inference
    from rlhf_jax.config import parse_class
    from rlhf_jax.sampling import Sampling

    a = parse_class(SampleArgs, args, prog="rlhf-jax sample")
    for name, value in (("--n", a.n), ("--max-tokens", a.max_tokens)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    try:
        sampling = Sampling(a.temperature, a.top_k, a.top_p)
    except ValueError as error:
        raise UserError(str(error).replace("sampling.", "--")) from None
    _start()
    run = inference.open_run(a.workdir)
    result = inference.sample(
        run, a.prompt, stage=a.stage, n=a.n, max_tokens=a.max_tokens, sampling=sampling, seed=a.seed
    )
    if a.json:
        print(json.dumps(result))
        return
    for completion in result["completions"]:
        print(f"{a.prompt}|{completion['text']}{'' if completion['ended'] else ' …'}\n")


def _score(args: list[str]) -> None:
    from rlhf_jax import inference
    from rlhf_jax.config import parse_class

    a = parse_class(ScoreArgs, args, prog="rlhf-jax score")
    _start()
    result = inference.score(inference.open_run(a.workdir), a.input, stage=a.stage)
    if a.json:
        print(json.dumps(result))
        return
    low, high = result["interval"]
    print(f"{a.input}: accuracy {result['accuracy']:.3f} [{low:.3f}, {high:.3f}] over {result['n']} rows,", end=" ")
    print(f"mean margin {result['mean_margin']:.3f}, {result['cut']} rows cut ({result['stage']})")


def _report(args: list[str]) -> None:
    from rlhf_jax import report
    from rlhf_jax.config import parse_class

    a = parse_class(ReportArgs, args, prog="rlhf-jax report")
    if not (a.workdir / "config.json").is_file():
        raise UserError(f"{a.workdir}: no run (it has no config.json)")
    print(report.write(a.workdir))


def _start() -> None:
    from rlhf_jax.run import start_backend
    from rlhf_jax.sharding import MeshConfig

    start_backend(MeshConfig())


_COMMANDS: dict[str, Callable[[list[str]], Any]] = {"run": _run, "sample": _sample, "score": _score, "report": _report}
