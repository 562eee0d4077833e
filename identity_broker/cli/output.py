"""What is printed: tables for people, JSON for programs, talk on stderr.

- stdout is data and nothing else; stderr is talk.
- Colour only on a terminal, and never with NO_COLOR set (no-color.org) or TERM=dumb.
- Nothing that came from elsewhere can steer the terminal: control characters are shown escaped.
- JSON keys are the values' field names; times are RFC 3339 UTC, durations whole seconds.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from enum import Enum, StrEnum
from typing import Any, TextIO

Row = Sequence["str | Text"]


class OutputFormat(StrEnum):
    """What stdout is written as."""

    TABLE = "table"
    JSON = "json"


class Style(StrEnum):
    """Select Graphic Rendition parameters (ECMA-48)."""

    HEAD = "1"
    DIM = "2"
    GOOD = "32"
    WARN = "33"
    BAD = "31"


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    """A cell that stands out."""

    text: str
    style: Style


def say(message: str = "") -> None:
    """Tell the person something."""
    print(message, file=sys.stderr)


def emit(output: OutputFormat, document: object, render: Callable[[], str]) -> None:
    """Print `document` as JSON, or what `render` makes of it."""
    text = json.dumps(to_document(document), indent=2) if output == "json" else render()
    if text:
        print(text, flush=True)


def table(columns: Sequence[str], rows: Sequence[Row], *, empty: str) -> str:
    """Aligned columns; where there is no row, `empty` goes to stderr instead."""
    if not rows:
        say(empty)
        return ""
    head: Row = [Text(column.upper(), Style.HEAD) for column in columns]
    return "\n".join(_align([head, *rows]))


def facts(pairs: Sequence[tuple[str, str | Text]], stream: TextIO | None = None) -> str:
    """One fact a line for `stream` (stdout); what follows a line break is indented."""
    rows: list[Row] = []
    for name, value in pairs:
        style = value.style if isinstance(value, Text) else None
        text = value.text if isinstance(value, Text) else value
        for index, line in enumerate(text.split("\n")):
            label = Text(name, Style.DIM) if index == 0 else ""
            rows.append([label, line if style is None else Text(line, style)])
    return "\n".join(_align(rows, stream))


def paint(text: str, style: Style, stream: TextIO | None = None) -> str:
    """`text` in colour where `stream` (stdout) shows any."""
    stream = stream or sys.stdout
    if not shows_colour(stream):
        return text
    return f"\x1b[{style.value}m{text}\x1b[0m"


def shows_colour(stream: TextIO) -> bool:
    """Whether colour may be written to `stream`."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return stream.isatty()


def mark(*, held: bool, stream: TextIO | None = None) -> str:
    """A tick or a cross, in letters where the terminal's encoding has none."""
    stream = stream or sys.stdout
    symbol, word = ("✓", "ok") if held else ("✗", "no")
    try:
        symbol.encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        symbol = word
    return paint(symbol, Style.GOOD if held else Style.BAD, stream)


def clean(text: str) -> str:
    """`text` with everything that could steer a terminal escaped; line breaks too."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def moment(value: datetime | None, *, now: datetime | None = None) -> str:
    """A time; with `now`, how far off it is as well."""
    if value is None:
        return "-"
    text = rfc3339(value)
    return text if now is None else f"{text} ({distance(value, now)})"


def distance(value: datetime | None, now: datetime) -> str:
    """How far off a time is, in its two largest units: "in 59m 30s", "2d 3h ago", "now"."""
    if value is None:
        return "-"
    seconds = round((value - now).total_seconds())
    span = duration(timedelta(seconds=abs(seconds)))
    if not seconds:
        return "now"
    return f"in {span}" if seconds > 0 else f"{span} ago"


def duration(value: timedelta | None) -> str:
    """A duration in its two largest units: "1h 30m"."""
    if value is None:
        return "-"
    left = int(value.total_seconds())
    parts = []
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count}{unit}")
    return " ".join(parts[:2]) or "0s"


def rfc3339(value: datetime) -> str:
    """A time as RFC 3339 in UTC."""
    timespec = "milliseconds" if value.microsecond else "seconds"
    return value.astimezone(UTC).isoformat(timespec=timespec).replace("+00:00", "Z")


def to_document(value: object) -> Any:
    """`value` in JSON's types; a duration's key gains the suffix "_seconds".

    Raises:
        TypeError: there is a value JSON has no word for; a bug.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
        durations = {item.name for item in dataclasses.fields(value) if "timedelta" in _named(item)}
        return {
            f"{name}_seconds" if name in durations else name: to_document(held)
            for name, held in fields.items()
        }
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, datetime):
        return rfc3339(value)
    if isinstance(value, timedelta):
        return int(value.total_seconds())
    if isinstance(value, Mapping):
        return {str(key): to_document(held) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_document(held) for held in value]
    if isinstance(value, (set, frozenset)):
        return sorted(to_document(held) for held in value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _named(item: dataclasses.Field[Any]) -> str:
    return item.type if isinstance(item.type, str) else getattr(item.type, "__name__", "")


def _align(rows: Sequence[Row], stream: TextIO | None = None) -> list[str]:
    cells = [[clean(_plain(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row, texts in zip(rows, cells, strict=True):
        padded = [text.ljust(width) for text, width in zip(texts, widths, strict=True)]
        padded[-1] = texts[-1]
        painted = [
            paint(text, cell.style, stream) if isinstance(cell, Text) else text
            for cell, text in zip(row, padded, strict=True)
        ]
        lines.append("  ".join(painted).rstrip())
    return lines


def _plain(cell: str | Text) -> str:
    return cell.text if isinstance(cell, Text) else cell
