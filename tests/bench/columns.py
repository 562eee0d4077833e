"""Text in columns, and medians."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence


def median(values: Iterable[float]) -> float:
    """The median; NaN of nothing."""
    found = list(values)
    return statistics.median(found) if found else math.nan


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column left, the others right."""
    widths = [max(len(row[at]) for row in (head, *rows)) for at in range(len(head))]

    def line(row: Sequence[str]) -> str:
        first, *others = zip(row, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(t.rjust(w) for t, w in others)]).rstrip()

    return "\n".join([line(head), line(["-" * w for w in widths]), *map(line, rows)])
