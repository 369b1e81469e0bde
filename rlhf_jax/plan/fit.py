"""The fastest mesh, microbatches and remat that fit a pod: a search in which the compiler judges every try."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rlhf_jax.config import Experiment, validate
from rlhf_jax.errors import UserError
from rlhf_jax.interop.load import FromPretrained
from rlhf_jax.mesh import divisors
from rlhf_jax.models.spec import Remat
from rlhf_jax.plan.chips import GIB
from rlhf_jax.plan.plan import Plan, plan, stages_of
from rlhf_jax.plan.topology import Topology, find

REMATS: tuple[Remat, ...] = ("none", "dots", "full")
"""From the fastest to the smallest."""


@dataclass(frozen=True)
class Setting:
    """What the search may change."""

    data: int
    fsdp: int
    tensor: int
    remat: Remat | None
    """None for a model whose config has no such field."""
    microbatches: tuple[tuple[str, int], ...]
    """Of each stage."""

    def flags(self) -> str:
        """How `run` and `plan` are told."""
        found = [f"--mesh.{name} {vars(self)[name]}" for name in ("data", "fsdp", "tensor")]
        found += [] if self.remat is None else [f"--model.remat {self.remat}"]
        return " ".join([*found, *(f"--stages.{name}.num_microbatches {n}" for name, n in self.microbatches)])

    def apply(self, experiment: Experiment) -> Experiment:
        """The experiment, so set; raises ValueError where a stage cannot be cut so."""
        stages: dict[str, Any] = dict(experiment.stages)
        for name, number in self.microbatches:
            stages[name] = dataclasses.replace(stages[name], num_microbatches=number)
        mesh = dataclasses.replace(experiment.mesh, data=self.data, fsdp=self.fsdp, tensor=self.tensor)
        model = experiment.model
        if self.remat is not None and isinstance(model, FromPretrained):
            model = dataclasses.replace(model, remat=self.remat)
        return dataclasses.replace(experiment, mesh=mesh, stages=stages, model=model)


@dataclass(frozen=True)
class Try:
    """A setting and what the compiler made of it."""

    setting: Setting
    plan: Plan

    @property
    def cost(self) -> tuple[bool, float]:
        """What the search makes least: seconds; bytes too many where it does not fit."""
        over = max(one.memory.peak - one.memory.usable for one in self.plan.estimates)
        return (False, self.plan.seconds) if self.plan.fits else (True, over)

    def line(self) -> str:
        """For a terminal."""
        over, amount = self.cost
        text = f"{amount / GIB:.1f} GiB too many" if over else f"{amount / 3600:.3g} h"
        return f"{self.setting.flags()}: {text}"

    def as_dict(self) -> dict[str, Any]:
        """For tools."""
        over, amount = self.cost
        return {"flags": self.setting.flags(), "fits": not over, "bytes_over" if over else "seconds": amount}


def fit(
    experiment: Experiment,
    topology: str,
    *,
    num_slices: int = 1,
    stage: str | None = None,
    tries: int = 12,
    say: Callable[[str], None] = lambda line: None,
) -> list[Try]:
    """All settings that were tried, the best one first; it starts from the experiment's own, where these can be.

    A step changes one thing: half or twice the microbatches of a stage, the next remat, a factor of two from one of the
    mesh's axes data, fsdp and tensor to another. The first change that is better is kept, and the search ends where
    none is, or after `tries` settings. So it finds a good setting, which may not be the best. Other axes of the mesh
    stay as they are. Raises UserError as `plan` does.
    """
    if tries < 1:
        raise UserError(f"--tries must be at least 1, got {tries}")
    pod, compiled = find(topology, num_slices=num_slices), {}
    stages = stages_of(experiment, stage)
    best = _compile(_start(experiment, pod, stages, say), experiment, pod, compiled, say)
    done = {best.setting: best}
    say(f"try 1 of {tries} at most: {best.line()}")
    while len(done) < tries:
        for setting in _moves(best):
            if setting not in done and _possible(setting, experiment, pod):
                break
        else:
            break
        done[setting] = one = _compile(setting, experiment, pod, compiled, say)
        better = one.cost < best.cost
        say(f"try {len(done)} of {tries} at most: {one.line()}{', the best so far' if better else ''}")
        best = one if better else best
    return sorted(done.values(), key=lambda one: one.cost)


def _compile(
    setting: Setting,
    experiment: Experiment,
    pod: Topology,
    compiled: dict[Setting, Plan],
    say: Callable[[str], None],
) -> Try:
    """Stage by stage, so that one which nothing changes for is compiled once."""
    experiment, plans = setting.apply(experiment), []
    for own in setting.microbatches:
        key = dataclasses.replace(setting, microbatches=(own,))
        if key not in compiled:
            compiled[key] = plan(experiment, pod.name, num_slices=pod.num_slices, stage=own[0], say=say)
        plans.append(compiled[key])
    return Try(setting, dataclasses.replace(plans[0], estimates=[one for each in plans for one in each.estimates]))


def _start(experiment: Experiment, pod: Topology, stages: dict[str, Any], say: Callable[[str], None]) -> Setting:
    """The experiment's own setting, or where that cannot be one with the same product of mesh axes that can."""
    sizes = experiment.mesh.resolve(len(pod.devices))
    model = experiment.model
    own = Setting(
        *(sizes[name] for name in ("data", "fsdp", "tensor")),
        remat=model.remat if isinstance(model, FromPretrained) else None,
        microbatches=tuple((name, one.num_microbatches) for name, one in stages.items()),
    )
    try:
        validate(experiment, len(pod.devices))
    except UserError as error:
        other = next((one for one in _others(own) if _possible(one, experiment, pod)), None)
        if other is None:
            raise
        say(f"{error}; the search starts from {other.flags()}")
        return other
    return own


def _others(own: Setting) -> Iterator[Setting]:
    """Meshes of as many devices, with little tensor parallelism first and much FSDP; microbatches as they are, or 1."""
    devices = own.data * own.fsdp * own.tensor
    for tensor in divisors(devices):
        for data in divisors(devices // tensor):
            mesh = {"data": data, "fsdp": devices // tensor // data, "tensor": tensor}
            for one in (own, dataclasses.replace(own, microbatches=tuple((name, 1) for name, _ in own.microbatches))):
                yield dataclasses.replace(one, **mesh)


def _possible(setting: Setting, experiment: Experiment, pod: Topology) -> bool:
    try:
        validate(setting.apply(experiment), len(pod.devices))
    except (UserError, ValueError):
        return False
    spec = experiment.model.spec
    whole = (spec.n_heads, spec.n_kv_heads, spec.d_ff, spec.vocab_size)
    return (
        setting.data % pod.num_slices == 0
        and spec.d_model % setting.fsdp == 0
        and not any(size % setting.tensor for size in whole)
    )


def _moves(best: Try) -> Iterator[Setting]:
    """Settings a step away, the most promising first: faster ones of what fits, smaller ones of what does not."""
    setting, small = best.setting, not best.plan.fits
    worst = max(best.plan.estimates, key=lambda one: one.memory.peak - one.memory.usable).program.stage
    for i, (name, number) in enumerate(setting.microbatches):
        changed = number * 2 if small else number // 2
        if changed and (name == worst or not small):
            before, after = setting.microbatches[:i], setting.microbatches[i + 1 :]
            yield dataclasses.replace(setting, microbatches=(*before, (name, changed), *after))
    if setting.remat is not None:
        at = REMATS.index(setting.remat) + (1 if small else -1)
        if 0 <= at < len(REMATS):
            yield dataclasses.replace(setting, remat=REMATS[at])
    smaller = (("data", "fsdp"), ("fsdp", "tensor"), ("data", "tensor"))
    others = (("tensor", "fsdp"), ("fsdp", "data"), ("tensor", "data"))
    for giver, taker in smaller if small else (*smaller, *others):
        if vars(setting)[giver] % 2 == 0:
            sizes = {giver: vars(setting)[giver] // 2, taker: vars(setting)[taker] * 2}
            yield dataclasses.replace(setting, **sizes)
