"""An experiment as data: read from a config file, overridden by flags, checked before anything is compiled; as JSON."""

import ast
import dataclasses
import difflib
import importlib.util
import json
import os
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import tyro
from beartype import BeartypeConf
from beartype.door import is_bearable

from rlhf_jax.algorithms.context import MAKERS, Role, StageConfig, check_field
from rlhf_jax.algorithms.earlier import check_earlier
from rlhf_jax.algorithms.made_rows import named_stages
from rlhf_jax.algorithms.onpolicy import OnPolicyConfig
from rlhf_jax.data.sources import Data
from rlhf_jax.data.texts import check_texts
from rlhf_jax.errors import UserError
from rlhf_jax.hosts import Hosts
from rlhf_jax.interop.pretrained import ModelConfig, Scratch
from rlhf_jax.sharding import MeshConfig, check_rows

# A stage's name is a folder of the workdir, a part of flags and a key of summary.json.
_STAGE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_RESERVED = ("base", "tensorboard", "seconds", "peak_memory_bytes", "params_digest")

# What a slip in a config file raises; anything else is no slip and keeps its traceback.
_SLIPS = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError, SyntaxError,
          TypeError, UserError, ValueError)  # fmt: skip


@dataclass(frozen=True)
class Experiment:
    """What a run does: a model, data, and the stages that train one after the other."""

    model: ModelConfig
    """The model that stages start from where they name no other stage."""
    data: Data
    """Texts, or the rows that stages use which name none of their own."""
    stages: Mapping[str, StageConfig]
    """By name, in the order in which they run."""
    seed: int = 0
    """Fixes everything that is random in the run."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How the devices share the work."""
    wandb: bool = False
    """Send the metrics to Weights & Biases too."""


def validate(experiment: Experiment, devices: int) -> None:
    """Raise UserError, one line that names the field, for what cannot run on so many devices; no file is read."""
    for problem in ill_typed(experiment):
        raise UserError(problem)
    if experiment.seed < 0:
        raise UserError(f"seed must be at least 0, got {experiment.seed}")
    if experiment.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("wandb: not installed; pip install 'rlhf_jax[wandb]', or leave it False")
    if not experiment.stages:
        raise UserError("stages is empty: an experiment has at least one stage")
    names = list(experiment.stages)
    for name in names:
        if not _STAGE_NAME.fullmatch(name) or name in _RESERVED:
            raise UserError(
                f"stages: {name!r} cannot name a stage; a name has letters, digits and _, and is none of "
                f"{', '.join(_RESERVED)}"
            )
    sizes, parts = experiment.mesh.resolve(devices), experiment.mesh.pipeline_microbatches
    max_len = experiment.model.spec.max_len
    for index, (name, stage) in enumerate(experiment.stages.items()):
        readings: dict[str, tuple[str, Role]] = {where: (one, "rows") for where, one in named_stages(stage).items()}
        for where, (required, role) in (stage.requires() | readings).items():
            if required not in names[:index]:
                raise UserError(f"stages.{name}.{where}: {_no_such_stage(required, name, names)}")
            made = experiment.stages[required].produces
            if made not in MAKERS[role]:
                fit = " or ".join(map(_a, MAKERS[role]))
                raise UserError(f"stages.{name}.{where}: needs a stage that makes {fit}; {required!r} makes {_a(made)}")
        check_earlier(name, experiment.stages, experiment.data)
        for where, length in stage.lengths().items():
            if length > max_len:
                raise UserError(
                    f"stages.{name}.{where}: {length} tokens, more than the model's context, "
                    f"model.spec.max_len = {max_len}"
                )
        grids = _sub_meshes(name, stage, devices) or {"mesh": (sizes, parts)}
        for where, rows in stage.batch_sizes().items():
            for whose, grid in grids.items():
                check_field(f"stages.{name}.{where}", partial(check_rows, rows, *grid, whose=whose))


def _a(kind: str) -> str:
    """With its article."""
    return kind if kind == "rows" else f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _sub_meshes(name: str, stage: StageConfig, devices: int) -> dict[str, tuple[dict[str, int], int | None]]:
    """Axes of a stage's sub-meshes and `pipeline_microbatches`, by their fields; none where it has the whole mesh."""
    if not isinstance(stage, OnPolicyConfig):
        return {}
    try:
        found = stage.placement.sizes(devices)
    except UserError as error:
        raise UserError(f"stages.{name}.placement.{error}") from None
    return {
        f"placement.{field}": (sizes, vars(stage.placement)[field].pipeline_microbatches)
        for field, sizes in found.items()
    }


def check_inputs(experiment: Experiment) -> None:
    """Raise UserError, one line that names the stage's field, for rows or files that a stage cannot use.

    A stage that reads what an earlier one makes is asked when it begins.
    """
    for name, stage in experiment.stages.items():
        if not named_stages(stage):
            check_stage_inputs(name, stage, experiment.data)
    if isinstance(experiment.model, Scratch):
        _check_tokenizer_texts(experiment.data)


def check_stage_inputs(name: str, stage: StageConfig, data: Data) -> None:
    """Raise UserError, one line that names the stage's field, for rows or files that it cannot use."""
    try:
        stage.check_inputs(data)
    except UserError as error:
        raise UserError(f"stages.{name}.{error}") from None


def _check_tokenizer_texts(data: Data) -> None:
    try:
        check_texts(data, labelled=False)
    except UserError as error:
        raise UserError(f"model: Scratch trains its tokenizer on the experiment's texts: data: {error}") from None


def _no_such_stage(required: str, name: str, names: Sequence[str]) -> str:
    earlier = names[: names.index(name)]
    choices = f"earlier: {', '.join(earlier)}" if earlier else "no stage comes before it; 'base' is the model"
    if required == name:
        return f"a stage cannot build on itself ({choices})"
    if required in names:
        return f"the stage {required!r} runs after {name!r} ({choices})"
    return f"there is no stage {required!r}{_nearest(required, earlier)} ({choices})"


def _nearest(word: str, words: Sequence[str]) -> str:
    """`; did you mean 'steps'?`, or nothing where no word is near."""
    close = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def ill_typed(config: Any, path: str = "") -> Iterator[str]:
    """A line for each field, in dataclasses inside too, whose value is not of its declared type; an int is a float."""
    hints = typing.get_type_hints(type(config))
    for one in dataclasses.fields(config):
        where, value, hint = f"{path}{one.name}", getattr(config, one.name), hints[one.name]
        if hint is ModelConfig:
            fits = dataclasses.is_dataclass(value)
        elif hint == Mapping[str, StageConfig]:
            yield from _ill_typed_stages(value)
            continue
        else:
            fits = is_bearable(value, hint, conf=BeartypeConf(is_pep484_tower=True))
        if not fits:
            yield f"{where}: expected {_type_name(hint)}, got {value!r}"
        elif dataclasses.is_dataclass(value):
            yield from ill_typed(value, f"{where}.")


def _ill_typed_stages(stages: Any) -> Iterator[str]:
    if not isinstance(stages, Mapping):
        yield f"stages: expected a dict of stages by name, got {stages!r}"
        return
    for name, stage in stages.items():
        if not isinstance(name, str) or not dataclasses.is_dataclass(stage):
            yield f"stages: expected names with a stage's Config each, got {name!r}: {stage!r}"
        else:
            yield from ill_typed(stage, f"stages.{name}.")


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else re.sub(r"(\w+\.)+(?=\w)", "", str(hint))


def load_config(path: Path | str) -> Experiment:
    """Run a config file and take the Experiment that its `get_config()` returns.

    Raises UserError, one line with file, line and field, for whatever is wrong with it.
    """
    path = Path(path)
    if not path.is_file():
        siblings = [str(path.with_name(other.name)) for other in path.parent.glob("*.py")]
        raise UserError(f"{path}: no such config file{_nearest(str(path), siblings)}")
    source = Path(os.path.abspath(path))  # as frames name it
    spec = importlib.util.spec_from_file_location(f"rlhf_jax_config_{path.stem}", source)
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: a config is a Python file, its name ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses of the file's own look for their names
    try:
        spec.loader.exec_module(module)
        if not callable(vars(module).get("get_config")):
            raise UserError("no get_config(); a config file defines get_config() -> Experiment")
        experiment = module.get_config()
    except _SLIPS as error:
        raise UserError(f"{path}{_explain(error, source)}") from error
    if not isinstance(experiment, Experiment):
        raise UserError(f"{path}: get_config() returned {type(experiment).__name__}, not an Experiment")
    return experiment


def describe(path: Path | str) -> str:
    """The docstring of a config file."""
    return ast.get_docstring(ast.parse(Path(path).read_bytes())) or ""


def _explain(error: Exception, source: Path) -> str:
    """What follows the file's name in the one line about an error inside it: the line, and what would be right."""
    if isinstance(error, SyntaxError) and error.filename == str(source):
        return f", line {error.lineno}: {error.msg}"
    line, message = "", " ".join(str(error).split())
    unknown = re.search(r"__init__\(\) got an unexpected keyword argument '(\w+)'", message)
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        if frame.f_code.co_name == "__post_init__":
            # A wrong type makes a check fail in words that do not name the field.
            message = next(ill_typed(frame.f_locals["self"]), message)
        elif frame.f_code.co_filename == str(source):
            line = f", line {trace.tb_lineno}"
            if unknown and trace.tb_next is None:
                message = _unknown_field(unknown[1], _called(trace, source)) or message
        trace = trace.tb_next
    speaks_for_itself = isinstance(error, UserError | ValueError | TypeError | ImportError) and message
    return f"{line}: {message}" if speaks_for_itself else f"{line}: {type(error).__name__}: {message}".rstrip(": ")


def _unknown_field(name: str, called: Any) -> str | None:
    if not (isinstance(called, type) and dataclasses.is_dataclass(called)):
        return None
    fields = [one.name for one in dataclasses.fields(called)]
    return f"{called.__name__} has no field {name!r}{_nearest(name, fields) or '; it has ' + ', '.join(fields)}"


def _called(trace: types.TracebackType, source: Path) -> Any:
    """What the failed call in a frame of the config file calls; the compiler keeps each call's place in the file."""
    place = list(trace.tb_frame.f_code.co_positions())[trace.tb_lasti // 2]
    for node in ast.walk(ast.parse(source.read_bytes())):
        if isinstance(node, ast.Call) and place == (node.lineno, node.end_lineno, node.col_offset, node.end_col_offset):
            name = ast.unparse(node.func)
            if re.fullmatch(r"[\w.]+", name):  # a name or an attribute: looking it up again runs nothing
                return eval(name, trace.tb_frame.f_globals, trace.tb_frame.f_locals)
    return None


def parse(experiment: Experiment, flags: Sequence[str]) -> Experiment:
    """The experiment with fields overridden by flags such as `--stages.ppo.kl.coef 0.1`.

    Which class stands in a union is the config's to say. A wrong flag ends the process with tyro's message and code 2.
    """
    return parse_run(experiment, flags, workdir=Path("runs"), prog="rlhf-jax run", description="")[2]


def parse_run(
    experiment: Experiment, flags: Sequence[str], *, workdir: Path, prog: str, description: str
) -> tuple[Path, Hosts, Experiment]:
    """Flags of `rlhf-jax run CONFIG`: workdir, place among the processes, the experiment's fields; UserError for an
    ill-typed one.
    """
    for problem in ill_typed(experiment):
        raise UserError(problem)
    workdir_type = typing.Annotated[Path, tyro.conf.arg(help="Folder of the run's files.")]
    # Classes in place of protocols: tyro makes flags from what the values are.
    hosts_type = typing.Annotated[Hosts, tyro.conf.arg(name="")]
    fields = [("workdir", workdir_type), ("hosts", hosts_type), ("model", type(experiment.model)), ("stages", dict)]
    arguments = dataclasses.make_dataclass("Arguments", fields, bases=(Experiment,), frozen=True, kw_only=True)
    stages = {name: _as_flags(stage) for name, stage in experiment.stages.items()}
    parsed = tyro.cli(
        arguments,
        args=list(flags),
        default=arguments(workdir=workdir, hosts=Hosts(), **{**_shallow(experiment), "stages": stages}),
        prog=prog,
        description=description,
        config=(tyro.conf.AvoidSubcommands,),
        use_underscores=True,
    )
    rebuilt = {name: type(experiment.stages[name])(**_shallow(stage)) for name, stage in parsed.stages.items()}
    return (
        parsed.workdir,
        parsed.hosts,
        Experiment(**{**{name: vars(parsed)[name] for name in _shallow(experiment)}, "stages": rebuilt}),
    )


def _as_flags(stage: Any) -> Any:
    """The stage, its fields that hold a name where a dataclass might stand typed as names, whose flags tyro shows."""
    names = [
        (name, str)
        for name, hint in typing.get_type_hints(type(stage)).items()
        if isinstance(vars(stage)[name], str) and any(map(dataclasses.is_dataclass, typing.get_args(hint)))
    ]
    if not names:
        return stage
    cls = dataclasses.make_dataclass(type(stage).__name__, names, bases=(type(stage),), frozen=True)
    return cls(**_shallow(stage))


def _shallow(config: Any) -> dict[str, Any]:
    return {one.name: getattr(config, one.name) for one in dataclasses.fields(config)}


def to_dict(experiment: Experiment) -> dict[str, Any]:
    """All fields as JSON has them; where a field's type leaves the class open, "class" names it."""
    return json.loads(json.dumps(_plain(experiment, Experiment)))


def _plain(value: Any, hint: Any) -> Any:
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        plain = {name: _plain(inner, hints[name]) for name, inner in _shallow(value).items()}
        return plain if hint is type(value) else {"class": class_name(type(value)), **plain}
    if isinstance(value, Mapping):
        return {name: _plain(inner, Any) for name, inner in value.items()}
    if isinstance(value, tuple):
        return [_plain(inner, Any) for inner in value]
    return str(value) if isinstance(value, Path) else value


def class_name(cls: type) -> str:
    """How `to_dict` names a class: a stage's `Config` by its module too, such as "sft.Config"."""
    return f"{cls.__module__.rpartition('.')[2]}.Config" if cls.__name__ == "Config" else cls.__name__


def from_dict(plain: Mapping[str, Any], classes: Sequence[type]) -> Experiment:
    """Undo `to_dict`; `classes` are those that may stand for the model and the stages.

    Raises UserError for a class that is not among them.
    """
    return _rebuild(plain, Experiment, {class_name(cls): cls for cls in classes})


def _rebuild(plain: Any, hint: Any, classes: Mapping[str, type]) -> Any:
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(plain, Mapping) and hint == Mapping[str, StageConfig]:
        return {name: _rebuild(inner, StageConfig, classes) for name, inner in plain.items()}
    if isinstance(plain, Mapping) and typing.get_origin(hint) is Mapping:
        return dict(plain)
    if isinstance(plain, Mapping):
        fields = dict(plain)
        known = {**classes, **{class_name(member): member for member in members if isinstance(member, type)}}
        name = fields.pop("class", class_name(hint) if isinstance(hint, type) else None)
        if name is None:
            raise UserError(f"config.json: one of {', '.join(known)} is not named; another version wrote it")
        if name not in known:
            raise UserError(f"config.json: no class {name!r} here; known: {', '.join(known)}")
        hints = typing.get_type_hints(known[name])
        unknown = set(fields) - set(hints)
        if unknown:
            raise UserError(f"config.json: {name} has no field {min(unknown)!r}; another version wrote it")
        return known[name](**{key: _rebuild(inner, hints[key], classes) for key, inner in fields.items()})
    if isinstance(plain, list):
        return tuple(_rebuild(inner, _element(members), classes) for inner in plain)
    return Path(plain) if isinstance(plain, str) and Path in members and str not in members else plain


def _element(members: Sequence[Any]) -> Any:
    """What a tuple among the types holds, where it holds one kind of thing."""
    for member in members:
        if typing.get_origin(member) is tuple:
            first, *others = typing.get_args(member)
            return first if set(others) <= {first, ...} else Any
    return Any


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    """The fields in which two results of `to_dict` differ, such as "stages.ppo.kl.coef: 0.05 there, 0.1 here"."""
    found = []
    for name in dict.fromkeys([*old, *new]):
        where = f"{path}{name}"
        if name not in old or name not in new:
            found.append(f"{where}: only {'there' if name in old else 'here'}")
        elif isinstance(old[name], Mapping) and isinstance(new[name], Mapping):
            found += differences(old[name], new[name], f"{where}.")
        elif old[name] != new[name]:
            found.append(f"{where}: {json.dumps(old[name])} there, {json.dumps(new[name])} here")
    return found
