"""The measurements as a table: medians over pairs, and what is the ratio within each of them."""

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from rlhf_jax.bench.processes import LACKING, PEERS, Bench, Measurement
from rlhf_jax.bench.work import Work

COLUMNS = ("size", "what", "by", "s", "tokens/s", "of limit", "update", "GFLOP", "MiB", "in all", "faster")
NOTES = """s: seconds of a turn (a step, an iteration, a batch of completions), the median of the pairs.
of limit: FLOPs a second over those of a plain matrix product measured in the same process; of decoding the least time
that its bytes (at the rate of a copy of as many) or its FLOPs take, over the time that it took. A peer's share is of
what our process of the same pair found. update: the same of an iteration's update alone.
GFLOP: of a turn's matrix products, ours as `rlhf-jax plan` counts them, a peer's as PyTorch's FlopCounterMode does.
MiB: the most memory while turns are timed; in all: of the process, compilation too.
faster: our tokens a second over theirs, the median of the pairs' ratios.
natural: the weights make EOS as probable at every token as ends completions at a quarter of the limit in the mean;
shared, hydra: against a peer's own iteration, which has no trunk that networks share.
cost/RxN: PPO of R completions of N tokens. sweep: 8 seeds of a short quickstart, a process each, or in one sweep;
measured once."""
MIB = 2**20


def rows(bench: Bench) -> list[dict[str, Any]]:
    """Of each row of the table what it is and, by side, its figures or {"error"}; sides not measured are left out."""
    return [{"size": work.size, "what": work.what, "work": vars(work), **_sides(bench, work)} for work in bench.works]


def _sides(bench: Bench, work: Work) -> dict[str, Any]:
    found: dict[str, list[dict[str, Any] | None]] = {
        side: [bench.found(Measurement(work, side, pair)) for pair in range(bench.pairs)]
        for side in ("ours", *bench.peers)
        if side == "ours" or work.kind in PEERS[side]
    }
    ours = found["ours"]
    sides = {side: _figures(pairs, ours) for side, pairs in found.items() if any(pairs)}
    lacking = [side for side in bench.peers if (side, work.kind) in LACKING]
    return sides | {side: {"error": LACKING[side, work.kind]} for side in lacking}


def _figures(pairs: Sequence[dict[str, Any] | None], ours: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """A side's medians, over the pairs that it has."""
    good = [(one, own) for one, own in zip(pairs, ours, strict=True) if one is not None and "error" not in one]
    if not good:
        return {"error": next(one["error"] for one in pairs if one is not None)}
    both = [(one, own) for one, own in good if own is not None and "error" not in own]
    shares = {
        "share_of_limit": [_share(one, own) for one, own in both],
        "update_share": [_update_share(one) for one, _ in both],
        "faster": [_rate(own) / _rate(one) for one, own in both if one is not own and one["tokens"]],
    }
    return {
        "pairs": len(good),
        "seconds": _median([one["seconds"] for one, _ in good]),
        "tokens_per_second": _median([_rate(one) for one, _ in good]),
        "flops": _median([one["flops"] for one, _ in good]) or None,
        "peak_bytes": max((one["peak_bytes"] for one, _ in good if "peak_bytes" in one), default=None),
        "peak_bytes_in_all": max((_in_all(one) for one, _ in good if "peak_bytes" in one), default=None),
        **{name: _median([share for share in found if share]) for name, found in shares.items()},
        "versions": good[-1][0]["versions"],
    }


def _in_all(one: dict[str, Any]) -> int:
    return max(one["peak_bytes"], one["peak_bytes_compiling"])


def _rate(one: dict[str, Any]) -> float:
    return one["tokens"] / one["seconds"]


def _share(one: dict[str, Any], own: dict[str, Any]) -> float:
    if "limit_seconds" in own:
        return own["limit_seconds"] / one["seconds"]
    return one["flops"] / one["seconds"] / own["matmul_rate"] if "matmul_rate" in own else 0.0


def _update_share(one: dict[str, Any]) -> float:
    return one["update_flops"] / one["update_seconds"] / one["matmul_rate"] if "update_seconds" in one else 0.0


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def lines(table: Sequence[dict[str, Any]], sides: Sequence[str]) -> list[list[str]]:
    """The table's cells, a line a side; of what failed the reason stands in the fourth."""
    return [[row["size"], row["what"], side, *_cells(row[side])] for row in table for side in sides if side in row]


def _cells(figures: dict[str, Any]) -> list[str]:
    if "error" in figures:
        return [figures["error"]]
    shown: dict[str, Callable[[float], str]] = {
        "seconds": lambda x: f"{x:.3g}",
        "tokens_per_second": lambda x: f"{x:,.0f}" if x else "",
        "share_of_limit": lambda x: f"{x:.2f}",
        "update_share": lambda x: f"{x:.2f}",
        "flops": lambda x: f"{x / 1e9:,.1f}",
        "peak_bytes": lambda x: f"{x / MIB:,.0f}",
        "peak_bytes_in_all": lambda x: f"{x / MIB:,.0f}",
        "faster": lambda x: f"{x:.2f}×",
    }
    return ["" if figures[name] is None else show(figures[name]) for name, show in shown.items()]


def text(cells: Sequence[Sequence[str]]) -> str:
    """In columns, for a terminal."""
    whole = [COLUMNS, *(line for line in cells if len(line) == len(COLUMNS))]
    widths = [max(len(line[i]) for line in whole) for i in range(len(COLUMNS))]

    def line(row: Sequence[str]) -> str:
        left = "  ".join(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=False))
        figures = (
            row[3:]
            if len(row) < len(COLUMNS)
            else [cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True)]
        )
        return "  ".join([left, *figures]).rstrip()

    return "\n".join(map(line, [COLUMNS, *cells]))


def as_json(bench: Bench, table: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All of it, with the machine's name and date."""
    return {**about(bench), "rows": list(table)}


def about(bench: Bench) -> dict[str, Any]:
    """The machine, the day, the versions of what was measured."""
    found = [
        (one.side, result) for one in bench.measurements() if (result := bench.found(one)) and "versions" in result
    ]
    device = next((result["device"] for _, result in found if "device" in result), "")
    return {
        "machine": platform.node(),
        "device": device,
        "date": max((result["at"] for _, result in found), default=time.strftime("%Y-%m-%d %H:%M")),
        "pairs": bench.pairs,
        "versions": {side: _versions([one["versions"] for by, one in found if by == side]) for side, _ in found},
    }


def _versions(told: Sequence[dict[str, str]]) -> dict[str, str]:
    """Of each package all versions that there are among a side's environments."""
    return {
        name: " and ".join(sorted({one[name] for one in told if name in one}))
        for name in dict.fromkeys(name for one in told for name in one)
    }


def markdown(bench: Bench, table: Sequence[dict[str, Any]]) -> str:
    """benchmarks/RESULTS.md."""
    told, cells = about(bench), lines(table, ("ours", *bench.peers))
    versions = [
        f"- {side}: " + ", ".join(f"{name} {version}" for name, version in found.items())
        for side, found in told["versions"].items()
    ]
    width = len(COLUMNS)
    body = [f"| {' | '.join([*line, *[''] * (width - len(line))])} |" for line in cells]
    return "\n".join(
        [
            "# Measured",
            "",
            f"By `rlhf-jax bench` on {told['machine']} ({told['device']}), {told['date']}: medians of {told['pairs']}",
            "pairs run in turn, each side a process of its own.",
            "",
            f"| {' | '.join(COLUMNS)} |",
            "|" + "---|" * 3 + "---:|" * (width - 3),
            *body,
            "",
            NOTES,
            "",
            *versions,
            "",
        ]
    )
