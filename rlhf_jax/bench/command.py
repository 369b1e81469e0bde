"""The command `rlhf-jax bench`: what its flags ask for, and what it prints."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_jax.bench import curves, table
from rlhf_jax.bench.processes import PEERS, Bench
from rlhf_jax.bench.work import SIZES, choose, names
from rlhf_jax.cache import cache_dir
from rlhf_jax.errors import UserError
from rlhf_jax.files import write_whole

if TYPE_CHECKING:
    from rlhf_jax.cli import BenchArgs

CURVES = "cost.png"


def prepared(args: "BenchArgs") -> Bench:
    """The measurements that are asked for; UserError for a flag that makes no sense."""
    for name, value in (("--pairs", args.pairs), ("--limit", args.limit)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    peers = [] if args.peers == "none" else names("--peers", args.peers, tuple(PEERS))
    return Bench(
        choose(args.sizes, args.what, accelerator=_has_accelerator(args.sizes)),
        peers,
        args.pairs,
        args.workdir,
        cache_dir("bench") if args.venvs is None else args.venvs,
        args.limit,
    )


def shown(bench: Bench, *, results: Path | None, as_json: bool) -> str:
    """The table, or the JSON, of what was measured; `results` is written with it, and beside it the curves of cost."""
    found = table.rows(bench)
    if results is not None:
        drawn = curves.draw(found, results.with_name(CURVES))
        write_whole(results, table.markdown(bench, found) + (f"\n![Cost against work]({CURVES})\n" if drawn else ""))
    if as_json:
        return json.dumps(table.as_json(bench, found))
    return f"{table.text(table.lines(found, ('ours', *bench.peers)))}\n\n{table.NOTES}"


def _has_accelerator(sizes: str) -> bool:
    """Whether JAX has more than a CPU here; asked of a process that ends, for JAX takes an accelerator's memory."""
    if not any(size in SIZES and SIZES[size].accelerator for size in sizes.split(",")):
        return False
    command = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)
    return done.stdout.strip() not in ("", "cpu")
