"""The pages of docs/ are what the code says, and the notebook runs."""

import importlib.util
import re
from pathlib import Path

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
