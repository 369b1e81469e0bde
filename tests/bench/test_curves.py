"""The picture of cost against work: which points are drawn, and its straight line."""

import pytest
from matplotlib.figure import Figure

from rlhf_jax.bench import curves


def row(rows, completion, **ours):
    what = f"cost/{rows}x{completion}"
    return {"what": what, "work": {"rows": rows, "completion": completion}, "ours": ours}


@pytest.fixture
def drawn(monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: figures.append(self))
    return figures


def test_points_are_milliseconds_a_token_and_seconds_by_length(tmp_path, drawn):
    table = [
        row(8, 48, seconds=1.0, tokens_per_second=500.0),
        row(16, 48, seconds=1.0, tokens_per_second=1000.0),
        row(32, 48, error="killed"),
        row(16, 64, seconds=1.0, tokens_per_second=1.0),
        row(16, 128, seconds=3.0, tokens_per_second=1.0),
        {"what": "sft", "work": {"rows": 8, "completion": 48}, "ours": {"seconds": 1.0, "tokens_per_second": 9.0}},
    ]
    assert curves.draw(table, tmp_path / "cost.png")
    by_rows, by_length = drawn[0].axes
    assert by_rows.lines[0].get_xydata().tolist() == [[8, 2.0], [16, 1.0]]
    assert by_rows.patches[0].get_extents().height > 0  # the band about 1.5
    line, points = by_length.lines
    assert points.get_xydata().tolist() == [[64, 1.0], [128, 3.0]]
    slope = (64 * 1 + 128 * 3) / (64**2 + 128**2)  # least squares through the origin
    assert line.get_ydata() == pytest.approx([64 * slope, 128 * slope])


def test_without_points_there_is_no_picture(tmp_path):
    assert not curves.draw([row(8, 48, error="killed"), {"what": "sft", "work": {}, "ours": {}}], tmp_path / "cost.png")
    assert not (tmp_path / "cost.png").exists()


def test_the_picture_is_a_file(tmp_path):
    assert curves.draw([row(8, 48, seconds=1.0, tokens_per_second=500.0)], tmp_path / "cost.png")
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
