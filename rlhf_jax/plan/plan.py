"""A whole experiment on a pod: all its programs, and the way to its end."""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from rlhf_jax import sharding
from rlhf_jax.config import Experiment, validate
from rlhf_jax.errors import UserError
from rlhf_jax.models import attention
from rlhf_jax.plan import programs
from rlhf_jax.plan.estimate import EFFORT, Estimate, estimate
from rlhf_jax.plan.topology import Topology, find


@dataclass(frozen=True)
class Plan:
    """What an experiment needs and takes on a pod."""

    topology: Topology
    mesh: Mesh
    estimates: list[Estimate]

    @property
    def fits(self) -> bool:
        """Whether every program has room."""
        return all(one.memory.fits for one in self.estimates)

    @property
    def seconds(self) -> float:
        """The loops of all stages, by the expected time; nothing of reading, checkpoints or the host's rewards."""
        return sum(one.expected * one.program.calls for one in self.estimates)

    @property
    def least(self) -> float:
        """The same, were compute, memory and network at their best."""
        return sum(one.least * one.program.calls for one in self.estimates)


def plan(
    experiment: Experiment,
    topology: str,
    *,
    num_slices: int = 1,
    stage: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Compile an experiment's programs, or one stage's, for a pod that is not there; nothing is run, read or fetched.

    `say` is told which program is being compiled. Raises UserError for a topology that there is not, a mesh that does
    not fit its devices, and a model that does not divide over the mesh or whose attention is no kernel of TPUs.
    """
    wanted = stages_of(experiment, stage)
    pod = find(topology, num_slices=num_slices)
    validate(experiment, len(pod.devices))
    mesh = sharding.make_mesh(experiment.mesh, pod.devices)
    attention.check(experiment.model.spec, "tpu")
    once = programs.programs(experiment, mesh, spec=programs.without_remat(experiment.model.spec))
    options = {"exec_time_optimization_effort": EFFORT}
    estimates = []
    for program, useful in zip(programs.programs(experiment, mesh), once, strict=True):
        if program.stage not in wanted:
            continue
        say(f"compiling {program.stage}.{program.name} for {topology}")
        estimates.append(estimate(program, useful, mesh, pod.chip, options=options))
    return Plan(pod, mesh, estimates)


def stages_of(experiment: Experiment, stage: str | None) -> dict[str, Any]:
    """All stages, or the one that is asked for; raises UserError where there is none of that name."""
    if stage is None:
        return dict(experiment.stages)
    if stage not in experiment.stages:
        raise UserError(f"--stage {stage}: there is no such stage; there are {', '.join(experiment.stages)}")
    return {stage: experiment.stages[stage]}


def compiler() -> str:
    """Who compiles."""
    return f"libtpu {importlib.metadata.version('libtpu')} of jax {jax.__version__}"
