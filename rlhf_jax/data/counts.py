"""What became of the rows of a source: said in a line, kept in summary.json."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Counts:
    """Rows by what became of them."""

    train: int = 0
    heldout: int = 0
    merged: int = 0
    """Stood twice, or are held out too, and were left out."""
    dropped: int = 0
    """Were too short or too long, or told nothing apart, and were left out."""
    cut: int = 0
    """Were too long, and lost tokens."""

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    def figures(self) -> dict[str, int]:
        """For summary.json."""
        return {f"rows_{name}": count for name, count in asdict(self).items()}

    def line(self) -> str:
        """For a reader.

        >>> Counts(1140, 60, cut=12).line()
        '1,140 rows to train on, 60 held out; 12 cut to length'
        """
        lost = {"merged with others": self.merged, "dropped": self.dropped, "cut to length": self.cut}
        told = [f"{count:,} {what}" for what, count in lost.items() if count]
        return "; ".join([f"{self.train:,} rows to train on, {self.heldout:,} held out", *told])
