"""The report of a run: one HTML page, drawn from the files in its workdir alone, finished or not."""

from pathlib import Path

from rlhf_jax.files import write_whole
from rlhf_jax.report.figures import readme_figure
from rlhf_jax.report.page import render
from rlhf_jax.report.workdir import read_run

__all__ = ["readme_figure", "write"]


def write(workdir: Path) -> Path:
    """Write `workdir/report.html`, a page that needs no other file and no network; returns its path.

    Of an unfinished run it shows what there is. Raises `UserError` where the folder holds no run or a file is broken.
    """
    workdir = Path(workdir)
    target = workdir / "report.html"
    write_whole(target, render(read_run(workdir)))
    return target
