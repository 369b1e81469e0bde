"""One program compiled for a pod: what it holds, computes and sends, and how long that may take."""

import re
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from rlhf_jax import sharding
from rlhf_jax.plan import flops, hlo, traffic
from rlhf_jax.plan.chips import GIB, Chip
from rlhf_jax.plan.collectives import Collective, collectives, seconds
from rlhf_jax.plan.programs import Program
from rlhf_jax.plan.sizes import device_bytes

EFFORT = -0.3
"""How hard the compiler looks for fast programs, in [-1, 1]: below, its estimates of cycles are ten times too long."""

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NEEDED = (
    re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm"),
    re.compile(r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)"),
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Memory:
    """Bytes on one device while a program runs."""

    usable: float
    """What a program may have."""
    peak: float
    """The compiler's: arguments, results and temporaries at the worst moment; or what it would have needed."""
    arguments: dict[str, int]
    """What the program is called on, by role, and "batch" for the rest; without the padding of tiles."""
    cache: int
    """Keys and values while it decodes; a part of the temporaries."""

    @property
    def fits(self) -> bool:
        """Whether there is room for it."""
        return self.peak <= self.usable

    @property
    def working(self) -> float:
        """Activations, gradients, gathered weights, caches: all but the arguments, at the worst moment."""
        return self.peak - sum(self.arguments.values())


@dataclass(frozen=True)
class Phase:
    """Seconds of one part of a program's execution, each as if nothing else took any."""

    compute: float
    """Model: matrix products at the peak of all devices."""
    memory: float
    """Model: bytes touched at the memory's full bandwidth."""
    network: float
    """Model: bytes sent at the links' full bandwidth."""
    hidden: float
    """Of the network's, what the compiler lets other work run beside."""
    cycles: float
    """The compiler's own estimate of everything but the network."""

    @property
    def least(self) -> float:
        """Where compute, memory and network wait for nothing but the slowest of them."""
        return max(self.compute, self.memory, self.network)

    @property
    def expected(self) -> float:
        """The compiler's estimate, then the network, but for what may run beside it."""
        return max(self.cycles, self.hidden) + self.network - self.hidden


@dataclass(frozen=True)
class Estimate:
    """What is known of one program."""

    program: Program
    memory: Memory
    flops: Counter[str]
    """Of matrix products on all devices, by phase."""
    useful: int
    """Those of them that are not computed a second time to save memory."""
    sent: list[Collective]
    phases: dict[str, Phase]
    """Empty where it does not fit."""
    compile_seconds: float

    @property
    def name(self) -> str:
        """Stage and program."""
        return f"{self.program.stage}.{self.program.name}"

    @property
    def expected(self) -> float:
        """Seconds of one call."""
        return sum(phase.expected for phase in self.phases.values())

    @property
    def least(self) -> float:
        """Seconds of one call, at least."""
        return sum(phase.least for phase in self.phases.values())

    @property
    def bound(self) -> str:
        """What takes longest, phase by phase added up: compute, memory or network."""
        sums = {name: sum(vars(one)[name] for one in self.phases.values()) for name in ("compute", "memory", "network")}
        return max(sums, key=sums.__getitem__)

    def mfu(self, peak: float) -> float:
        """Share of so many FLOP/s, those of all devices, that useful matrix products take in the expected time."""
        return self.useful / (self.expected * peak)


def estimate(program: Program, useful: Program, mesh: Mesh, chip: Chip, *, options: dict[str, Any]) -> Estimate:
    """Compile a program for the mesh's devices and read what came out.

    `useful` is the same program of a model without rematerialisation, for its FLOPs alone; it is traced without the
    mesh, so that turns in which a stage of the pipeline waits are not among them.
    """
    again = useful.function.trace(*useful.args)
    with sharding.scope(mesh):
        traced = program.function.trace(*program.args)
        products = flops.count(traced.jaxpr, decode_steps=program.decode_steps, whole=program.name)
        once = flops.count(again.jaxpr, decode_steps=program.decode_steps).total()
        began = time.monotonic()
        arguments = argument_bytes(program)
        try:
            compiled = traced.lower().compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            memory = Memory(chip.usable, _needed(error), arguments, program.cache)
            return Estimate(program, memory, products, once, [], {}, time.monotonic() - began)
    took = time.monotonic() - began
    memory = Memory(chip.usable, peak_memory(compiled), arguments, program.cache)
    module = hlo.parse(compiled.as_text())
    sent = collectives(module, mesh)
    phases = _phases(module, products, sent, mesh, chip, whole=program.name)
    return Estimate(program, memory, products, once, sent, phases, took)


def peak_memory(compiled: jax.stages.Compiled) -> int:
    """Bytes on a device at the worst moment, what the program is called on included."""
    analysis: Any = compiled.memory_analysis()
    return analysis.peak_memory_in_bytes


def argument_bytes(program: Program) -> dict[str, int]:
    """Bytes on a device of what a program is called on, by role; "batch" is the rest."""
    found = {role: device_bytes(tree) for role, tree in program.roles.items()}
    return found | {"batch": device_bytes(program.args) - sum(found.values())}


def _needed(error: Exception) -> float:
    """The memory that the compiler says it needed; another error is raised again."""
    found = next((match for pattern in _NEEDED if (match := pattern.search(str(error)))), None)
    if found is None:
        raise error
    return float(found[1]) * _UNITS[found[2]]


def _phases(
    module: hlo.Module, products: Counter[str], sent: list[Collective], mesh: Mesh, chip: Chip, *, whole: str
) -> dict[str, Phase]:
    touched, cycles, network, hidden = (defaultdict[str, float](float) for _ in range(4))
    for executed in module.executed():
        where = flops.phase(executed.scope, whole)
        touched[where] += executed.times * traffic.touched(module, executed)
        if found := _CYCLES.search(executed.instruction.attributes):
            cycles[where] += executed.times * int(found[1])
    for one in sent:
        where = flops.phase(one.scope, whole)
        took = seconds(one, mesh, chip)
        network[where] += took
        hidden[where] += took if one.overlapped else 0.0
    peak = chip.peak * mesh.devices.size
    names = [name for name in (*flops.PHASES, whole) if touched[name] or products[name] or network[name]]
    return {
        name: Phase(
            compute=products[name] / peak,
            memory=touched[name] / chip.memory_bandwidth,
            network=network[name],
            hidden=hidden[name],
            cycles=cycles[name] / chip.clock,
        )
        for name in names
    }


def advice(estimate: Estimate) -> str:
    """One line for a program that does not fit: the numbers, and what to change."""
    memory, stage = estimate.memory, estimate.program.stage
    held = sum(memory.arguments.values())
    parts = ", ".join(f"{role} {size / GIB:.1f}" for role, size in memory.arguments.items())
    if held > memory.usable:
        change = "its arguments alone are too much: raise mesh.fsdp or mesh.tensor, on more devices, or use adapters"
    elif memory.cache > memory.usable - held:
        change = f"the keys and values of its rows are too much: lower stages.{stage}.batch_size, or raise mesh.tensor"
    else:
        change = f"raise stages.{stage}.num_microbatches, set the model's remat to full, or raise mesh.fsdp"
    return f"{estimate.name} needs {memory.peak / GIB:.1f} of {memory.usable / GIB:.2f} GiB ({parts}); {change}"
