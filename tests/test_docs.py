"""The pages of docs/ are what the code says, and the notebook runs."""

import contextlib
import importlib.util
import io
import json
import re
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).parents[1]


def test_the_page_of_losses_is_what_its_script_writes():
    spec = importlib.util.spec_from_file_location("docs_losses", ROOT / "docs" / "losses.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "stale: python docs/losses.py"


def test_the_contents_of_the_page_of_losses_lead_to_its_headings():
    text = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    headings = re.findall(r"^##+ `?([\w.]+)`?$", text, re.M)
    anchors = [heading.lower().replace(".", "") for heading in headings]
    assert len(anchors) == len(set(anchors)) > 90
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) == set(anchors)


def told(text: str) -> list[float]:
    """The numbers in what a cell printed."""
    return [float(number) for number in re.findall(r"-?\d+\.?\d*", text)]


def test_the_notebook_of_losses_runs_and_gives_what_it_shows(monkeypatch):
    """Each cell, top to bottom, in one namespace, as Jupyter does; what they assert holds.

    After a change: jupyter nbconvert --to notebook --execute --inplace docs/notebooks/losses.ipynb
    """
    notebook = json.loads((ROOT / "docs" / "notebooks" / "losses.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    namespace, pictures = {"__name__": "__main__"}, 0
    with matplotlib.rc_context({"backend": "agg"}):
        for number, cell in enumerate(cells, start=1):
            source, printed = "".join(cell["source"]), io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(source, f"losses.ipynb, cell {number}", "exec"), namespace)
            stored = "".join(line for output in cell["outputs"] for line in output.get("text", []))
            np.testing.assert_allclose(told(printed.getvalue()), told(stored), rtol=0.01, atol=0.02)
            drawn = sum("image/png" in output.get("data", {}) for output in cell["outputs"])
            assert drawn == source.count("plt.show()")
            pictures += drawn
    assert pictures == 4
