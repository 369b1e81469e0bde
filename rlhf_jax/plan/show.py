"""A plan in words and as JSON: what was counted, what the compiler says and what is a model stand apart."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from rlhf_jax.plan.chips import GIB
from rlhf_jax.plan.estimate import EFFORT, Estimate, advice
from rlhf_jax.plan.fit import Try
from rlhf_jax.plan.plan import Plan, compiler

DAY = 86_400


def lines(plan: Plan, tried: Sequence[Try] = ()) -> list[str]:
    """For a terminal: a few lines a program, the whole, and the settings that a search tried."""
    chip, devices = plan.topology.chip, plan.mesh.devices.size
    mesh = " × ".join(f"{name} {size}" for name, size in plan.mesh.shape.items() if size > 1) or "one device"
    slices = f", {plan.topology.num_slices} slices" if plan.topology.num_slices > 1 else ""
    found = [
        f"{plan.topology.name}{slices}: {plan.topology.chips} chips, {devices} devices as {mesh}",
        f"Nothing was run. Counted: from the traced programs. Compiler: {compiler()}, effort {EFFORT}. Model: the",
        f"compiled text and published figures of {chip.name}, {chip.peak / 1e12:.0f} TFLOP/s, "
        f"{chip.memory_bandwidth / 1e9:.0f} GB/s, {chip.link_bandwidth / 1e9:.0f} GB/s a link, a device.",
    ]
    for one in plan.estimates:
        found += ["", *_program(one, plan)]
    settings = ["", "tried, best first:", *(f"  {one.line()}" for one in tried)] if tried else []
    return [*found, "", *_whole(plan), *settings]


def problem(plan: Plan) -> str:
    """One line for a plan that does not fit: its worst program, and what to change."""
    worst = max(plan.estimates, key=lambda one: one.memory.peak)
    return f"{plan.topology.name}: {advice(worst)}"


def _program(one: Estimate, plan: Plan) -> list[str]:
    memory, program = one.memory, one.program
    held = ", ".join(f"{role} {_gib(size)}" for role, size in memory.arguments.items())
    cache = f"; keys and values while it decodes {_gib(memory.cache)}" if memory.cache else ""
    again = one.flops.total() / one.useful - 1 if one.useful else 0.0
    found = [
        f"{one.name}, {program.calls} times",
        f"  counted   GiB that a device holds: {held}{cache}",
        f"  counted   {one.flops.total() / 1e15:.3g} PFLOP of matrix products, {again:.0%} of them computed again",
        f"  compiler  {_gib(memory.peak)} of {memory.usable / GIB:.2f} GiB at the worst moment, "
        f"{_gib(memory.working)} beside what is held; compiled in {one.compile_seconds:.0f} s",
    ]
    if not memory.fits:
        return [*found[:-1], f"  compiler  does not fit: {advice(one)}"]
    for (kind, axes, overlapped), (times, total) in _sent(one).items():
        beside = " beside other work" if overlapped else ""
        found.append(f"  compiler  {kind} over {'+'.join(axes)}, {times} times{beside}: {total / 1e9:.3g} GB a device")
    for name, phase in one.phases.items():
        found.append(
            f"  model     {name}: {phase.expected:.3g} s; the compiler's cycles {phase.cycles:.3g}, at full rate "
            f"compute {phase.compute:.3g}, memory {phase.memory:.3g}, network {phase.network:.3g}"
        )
    peak = plan.topology.chip.peak * plan.mesh.devices.size
    found.append(
        f"  model     {one.expected:.3g} s a call, {one.least:.3g} s at best; MFU {one.mfu(peak):.1%}; "
        f"bound by {one.bound}; {program.tokens / one.expected:,.0f} tokens/s"
    )
    return found


def _whole(plan: Plan) -> list[str]:
    if not plan.fits:
        return [f"It does not fit on {plan.topology.name}."]
    devices = plan.mesh.devices.size
    hours = plan.seconds / 3600 * devices
    return [
        f"model     all loops: {plan.seconds / DAY:.3g} days, {hours:,.3g} device-hours "
        f"({plan.least / DAY:.3g} days at best); not counted: reading, checkpoints, rewards on the host"
    ]


def as_dict(plan: Plan, tried: Sequence[Try] = ()) -> dict[str, Any]:
    """For tools; bytes, seconds and FLOPs without units; `tried` is what a search compiled."""
    chip, devices = plan.topology.chip, plan.mesh.devices.size
    return {
        "topology": plan.topology.name,
        "num_slices": plan.topology.num_slices,
        "chips": plan.topology.chips,
        "devices": devices,
        "mesh": dict(plan.mesh.shape),
        "compiler": compiler(),
        "effort": EFFORT,
        "fits": plan.fits,
        "programs": {one.name: _program_dict(one, chip.peak * devices) for one in plan.estimates},
        "model": {
            "seconds": plan.seconds,
            "seconds_at_best": plan.least,
            "days": plan.seconds / DAY,
            "device_hours": plan.seconds / 3600 * devices,
        }
        if plan.fits
        else None,
        "tried": [one.as_dict() for one in tried],
    }


def _program_dict(one: Estimate, peak: float) -> dict[str, Any]:
    memory = one.memory
    return {
        "calls": one.program.calls,
        "fits": memory.fits,
        "problem": None if memory.fits else advice(one),
        "counted": {
            "arguments": memory.arguments,
            "cache": memory.cache,
            "flops": one.flops.total(),
            "useful_flops": one.useful,
            "tokens": one.program.tokens,
        },
        "compiler": {
            "peak_memory": memory.peak,
            "usable_memory": memory.usable,
            "working_memory": memory.working,
            "compile_seconds": round(one.compile_seconds, 1),
            "cycles_seconds": sum(phase.cycles for phase in one.phases.values()),
            "collectives": [
                {"kind": kind, "axes": axes, "overlapped": overlapped, "times": times, "bytes": total}
                for (kind, axes, overlapped), (times, total) in _sent(one).items()
            ],
        },
        "model": {
            "seconds": one.expected,
            "seconds_at_best": one.least,
            "mfu": one.mfu(peak),
            "bound": one.bound,
            "phases": {name: vars(phase) for name, phase in one.phases.items()},
        }
        if memory.fits
        else None,
    }


def _sent(one: Estimate) -> dict[tuple[str, tuple[str, ...], bool], tuple[int, float]]:
    """(kind, axes, overlapped) -> (executions a call, bytes that a device sends), largest first."""
    times: defaultdict[tuple[str, tuple[str, ...], bool], int] = defaultdict(int)
    total: defaultdict[tuple[str, tuple[str, ...], bool], float] = defaultdict(float)
    for exchange in one.sent:
        key = (exchange.kind, exchange.axes, exchange.overlapped)
        times[key] += exchange.times
        total[key] += exchange.total
    return {key: (times[key], total[key]) for key in sorted(total, key=total.__getitem__, reverse=True)}


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
