"""The command `rlhf-jax`: run experiments, sample from them, score with them, draw reports, export models."""

import argparse
import contextlib
import difflib
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from rlhf_jax import __version__
from rlhf_jax.errors import NO_ROOM, UserError
from rlhf_jax.usage import PLAN_USAGE, RUN_USAGE, SWEEP_USAGE, USAGE

T = TypeVar("T")

_BEGAN = time.monotonic()  # importing JAX and the like is part of what a run takes


@dataclass(frozen=True)
class SampleArgs:
    """Complete a prompt with a run's policy, the base model in the package, or a pretrained model."""

    workdir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="WORKDIR|MODEL|bundled")]
    """A run's folder; a .gguf file or a Hugging Face folder; or "bundled", the base model in the package."""
    prompt: str
    """The text to go on from."""
    chat: tyro.conf.FlagCreatePairsOff[bool] = False
    """The prompt is the user's turn, put into the model's chat template."""
    n: int = 4
    """Completions."""
    stage: str | None = None
    """The stage to sample; none: the last finished one that made a policy."""
    max_tokens: int = 40
    """Most tokens of a completion."""
    temperature: float = 1.0
    """Divides the logits."""
    top_k: int = 0
    """Keeps the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keeps the fewest most probable tokens whose probabilities reach p; 1 keeps all."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion, which they are then a part of."""
    seed: int = 0
    """Seed of the draws."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one line of JSON on stdout, and all else on stderr."""


@dataclass(frozen=True)
class ScoreArgs:
    """How well a run's reward model ranks the rows of a file."""

    workdir: tyro.conf.Positional[Path]
    """A run's folder."""
    input: Path
    """JSONL rows of prompt, chosen and rejected, of text and score, or of prompt, completion and rating or label; or
    of prompt, completions and labels, a label a step."""
    fields: str = "{}"
    """The rows' own names of fields, where they differ, as JSON: '{"prompt": "question"}'."""
    stage: str | None = None
    """The reward model's stage; none: the last finished one."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one line of JSON on stdout, and all else on stderr."""


@dataclass(frozen=True)
class ReportArgs:
    """Draw a run's report.html again, from the files in its folder."""

    workdir: tyro.conf.Positional[Path]
    """A run's folder."""


@dataclass(frozen=True)
class ExportArgs:
    """Write a stage's model as a folder that transformers loads: config.json, safetensors, tokenizer."""

    workdir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="WORKDIR|bundled")]
    """A run's folder; or "bundled", the base model in the package."""
    to: Path
    """The folder to make; one that is not empty is left as it is."""
    stage: str | None = None
    """The stage, of either kind; none: the last finished one that made a policy."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights."""
    adapter: tyro.conf.FlagCreatePairsOff[bool] = False
    """Write the adapters alone, as PEFT loads them over the base model; without it they are merged."""


@dataclass(frozen=True)
class BenchArgs:
    """Time what the stages do against what the machine can do, and against other libraries, in turn.

    Each measurement is a process of its own; the same command goes on where it stopped, and tries again what failed.
    """

    sizes: str = "tiny,small"
    """Models, by commas: tiny, small, smollm2, and on an accelerator 1b and 8b."""
    what: str = "sft,rm,dpo,decode,ppo,grpo,cost,cold,sweep"
    """Kinds of work, by commas, or single variants: decode/1, decode/batch, ppo/natural, ppo/shared, ppo/hydra …"""
    peers: str = "trl,tunix"
    """Libraries beside, by commas, in the environments that benchmarks/make_venvs.py makes; or "none"."""
    pairs: int = 5
    """How often each side is measured, in turn."""
    workdir: Path = Path("runs/bench")
    """Where measurements, logs and models are kept."""
    venvs: Path | None = None
    """The folder of the libraries' environments; none: that in the user's cache."""
    results: Path | None = None
    """A file of Markdown to write, such as benchmarks/RESULTS.md; the curves of cost are drawn beside it."""
    limit: float = 1800.0
    """Seconds that a measurement may take."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one line of JSON on stdout in place of the table, and all else on stderr."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, 2 for wrong input, 3 for numbers not finite, 128 + a signal's number."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(args)
    except (UserError, KeyboardInterrupt, OSError) as error:
        explained = _explain(error)
        if explained is None:
            raise
        print(f"error: {explained[0]}", file=sys.stderr)
        return explained[1]


def _explain(error: BaseException) -> tuple[str, int] | None:
    """An error's line and exit code; None for what is to be seen with its traceback."""
    if isinstance(error, UserError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):  # of SIGINT, or of the signal that it names
        return "stopped; the same command goes on", 128 + next(iter(error.args), signal.SIGINT)
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        where = f" for {error.filename}" if error.filename else ""
        return f"no space left on the disk{where}; free some and repeat the command", 2
    return None


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="", file=sys.stdout if args else sys.stderr)
        return 0 if args else 2
    if args[0] == "--version":
        print(f"rlhf_jax {__version__}")
        return 0
    command, rest = args[0], args[1:]
    if command not in _COMMANDS:
        close = difflib.get_close_matches(command, _COMMANDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(_COMMANDS)}"
        raise UserError(f"no command {command!r}{hint}")
    _COMMANDS[command](rest)
    return 0


def _run(args: list[str]) -> None:
    if args and args[0] in ("-h", "--help"):
        print(RUN_USAGE, end="")
        return
    if not args or args[0].startswith("-"):
        raise UserError("the config file comes first, such as: rlhf-jax run configs/quickstart.py [--FIELD VALUE …]")
    from rlhf_jax.config import describe, load_config, parse_run

    path = Path(args[0])
    workdir, place, experiment = parse_run(
        load_config(path),
        args[1:],
        workdir=Path("runs") / path.stem,
        prog=f"rlhf-jax run {path}",
        description=describe(path),
    )
    from rlhf_jax import hosts
    from rlhf_jax.run import run

    hosts.join(place)
    with hosts.Parting(_explain):
        run(experiment, workdir, ["rlhf-jax", "run", *args], began=_BEGAN)


def _sweep(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print(SWEEP_USAGE, end="")
        return
    if args[0].startswith("-"):
        raise UserError("the config file comes first, such as: rlhf-jax sweep configs/quickstart.py --seeds 8")
    path = Path(args[0])
    options = _options()
    options.add_argument("--seeds", type=int, default=1)
    options.add_argument("--vary", action="append", default=[])
    options.add_argument("--to", type=Path, default=Path("runs") / f"{path.stem}-sweep")
    options.add_argument("--calls", choices=("auto", "vmap", "turns"), default="auto")
    a, flags = _known(options, args[1:])
    if any(flag.split("=")[0] == "--workdir" for flag in flags):
        raise UserError("--workdir is a single run's; --to names the folder of a sweep")
    from rlhf_jax.config import load_config, parse
    from rlhf_jax.sweep import sweep, table

    vmapped = {"auto": None, "vmap": True, "turns": False}[a.calls]
    experiment = parse(load_config(path), flags)
    found = sweep(experiment, a.seeds, a.vary, a.to, ["rlhf-jax", "sweep", *args], vmapped=vmapped)
    print("\n".join(table(found)))


def _options() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)


def _known(options: argparse.ArgumentParser, args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """A command's own options, and the experiment's flags."""
    try:
        return options.parse_known_args(args)
    except argparse.ArgumentError as error:
        raise UserError(str(error).removeprefix("argument ")) from None


def _plan(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print(PLAN_USAGE, end="")
        return
    if args[0].startswith("-"):
        raise UserError("the config file comes first, such as: rlhf-jax plan configs/quickstart.py --topology v5e:2x2")
    options = _options()
    options.add_argument("--topology", default="")
    options.add_argument("--num_slices", type=int, default=1)
    options.add_argument("--stage")
    options.add_argument("--fit", action="store_true")
    options.add_argument("--tries", type=int, default=12)
    options.add_argument("--json", action="store_true")
    a, flags = _known(options, args[1:])
    import jax

    jax.config.update("jax_platforms", "cpu")  # whatever this machine has: the pod's devices are libtpu's words
    from rlhf_jax.config import load_config, parse
    from rlhf_jax.plan import show
    from rlhf_jax.plan.fit import fit
    from rlhf_jax.plan.plan import plan

    with contextlib.redirect_stdout(sys.stderr):
        experiment = parse(load_config(Path(args[0])), flags)
        asked = {"num_slices": a.num_slices, "stage": a.stage, "say": _say}
        tried = fit(experiment, a.topology, tries=a.tries, **asked) if a.fit else []
        found = tried[0].plan if tried else plan(experiment, a.topology, **asked)
    print(json.dumps(show.as_dict(found, tried)) if a.json else "\n".join(show.lines(found, tried)))
    if not found.fits:
        raise UserError(show.problem(found))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _sample(args: list[str]) -> None:
    a = _parse(SampleArgs, "sample", args)
    for name, value in (("--n", a.n), ("--max_tokens", a.max_tokens)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    from rlhf_jax import inference
    from rlhf_jax.sampling import Sampling

    try:
        sampling = Sampling(a.temperature, a.top_k, a.top_p, stop=a.stop)
    except ValueError as error:
        raise UserError(str(error).replace("sampling.", "--")) from None
    with contextlib.redirect_stdout(sys.stderr):
        _start()
        run = inference.open_run(a.workdir)
        result = inference.sample(
            run,
            a.prompt,
            stage=a.stage,
            n=a.n,
            max_tokens=a.max_tokens,
            sampling=sampling,
            seed=a.seed,
            chat=a.chat,
        )
    if a.json:
        print(json.dumps(result))
        return
    for completion in result["completions"]:
        print(f"{a.prompt}|{completion['text']}{'' if completion['ended'] else ' …'}\n")


def _score(args: list[str]) -> None:
    a = _parse(ScoreArgs, "score", args)
    from rlhf_jax import inference

    with contextlib.redirect_stdout(sys.stderr):
        _start()
        fields = _names(a.fields)
        result = inference.score(inference.open_scored(a.workdir), a.input, stage=a.stage, fields=fields)
    if a.json:
        print(json.dumps(result))
        return
    if "mean_margin" not in result:
        figures = (f"{name} {value:.4g}" for name, value in result.items() if name not in ("cut", "stage"))
        print(f"{'  '.join(figures)}, {result['cut']} rows cut (stage {result['stage']})")
        return
    low, high = result["interval"]
    print(f"accuracy {result['accuracy']:.3f} [{low:.3f}, {high:.3f}] on {result['n']} pairs", end="")
    print(f", mean margin {result['mean_margin']:.3f}, {result['cut']} rows cut (stage {result['stage']})")


def _names(text: str) -> dict[str, str]:
    """The names of fields in a flag's JSON."""
    try:
        names = json.loads(text)
    except ValueError:
        names = None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f'--fields must be names by names as JSON, such as \'{{"prompt": "question"}}\', got {text!r}')
    return names


def _report(args: list[str]) -> None:
    a = _parse(ReportArgs, "report", args)
    from rlhf_jax import report

    if not a.workdir.is_dir():
        raise UserError(f"{a.workdir}: no such folder")
    print(report.write(a.workdir))


def _export(args: list[str]) -> None:
    a = _parse(ExportArgs, "export", args)
    from rlhf_jax import inference

    with contextlib.redirect_stdout(sys.stderr):
        _start()
        run = inference.open_run(a.workdir)
        stage, note = inference.export_stage(run, a.to, stage=a.stage, dtype=a.dtype, adapter=a.adapter)
    print(f"{a.to}: the {'adapter' if a.adapter else 'model'} of stage {stage}" + (f"\n{note}" if note else ""))


def _bench(args: list[str]) -> None:
    a = _parse(BenchArgs, "bench", args)
    from rlhf_jax.bench import command
    from rlhf_jax.signals import terminable

    with contextlib.redirect_stdout(sys.stderr), terminable():
        bench = command.prepared(a)
        bench.run()
    print(command.shown(bench, results=a.results, as_json=a.json))


def _parse(arguments: type[T], command: str, args: list[str]) -> T:
    return tyro.cli(arguments, prog=f"rlhf-jax {command}", args=args, use_underscores=True)


def _start() -> None:
    from rlhf_jax.run import start_backend
    from rlhf_jax.sharding import MeshConfig

    start_backend(MeshConfig())


_COMMANDS: dict[str, Callable[[list[str]], Any]] = {
    "run": _run,
    "sweep": _sweep,
    "sample": _sample,
    "score": _score,
    "report": _report,
    "plan": _plan,
    "export": _export,
    "bench": _bench,
}
