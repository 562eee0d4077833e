"""Durations as people write them: "45s", "15m", "1h30m", "7d".

- Units must stand in falling order, each at most once; a bare number is refused.
"""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Annotated, Final

from pydantic import AfterValidator, BeforeValidator, PlainSerializer

_DURATION: Final = re.compile(
    r"(?:(?P<days>\d{1,6})d)?(?:(?P<hours>\d{1,6})h)?(?:(?P<minutes>\d{1,6})m(?!s))?"
    r"(?:(?P<seconds>\d{1,9})s)?(?:(?P<milliseconds>\d{1,9})ms)?",
    re.ASCII,
)
_UNITS: Final = (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1))
_RULE: Final = 'must be a duration such as "45s", "15m" or "1h30m"'


def parse_duration(text: str) -> timedelta:
    """The duration that `text` names.

    Raises:
        ValueError: it names none; the message is the rule and never holds the text.
    """
    match = _DURATION.fullmatch(text)
    if match is None or not text:
        raise ValueError(_RULE)
    return timedelta(**{unit: int(n) for unit, n in match.groupdict().items() if n is not None})


def format_duration(duration: timedelta) -> str:
    """The shortest text that `parse_duration` reads back; "0s" for nothing."""
    left = duration // timedelta(milliseconds=1)
    parts = []
    for unit, size in _UNITS:
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0s"


def _read(value: object) -> timedelta:
    if isinstance(value, timedelta):
        return value
    if not isinstance(value, str):
        # pydantic turns a ValueError, and no TypeError, into a problem of the field.
        raise ValueError(_RULE)  # noqa: TRY004
    return parse_duration(value)


class _Bounds:
    """A closed range, checked and described by one object."""

    def __init__(self, shortest: str, longest: str) -> None:
        self.shortest = parse_duration(shortest)
        self.longest = parse_duration(longest)

    def __call__(self, value: timedelta) -> timedelta:
        if not self.shortest <= value <= self.longest:
            raise ValueError(f"must be {self}")
        return value

    def __str__(self) -> str:
        return f"between {format_duration(self.shortest)} and {format_duration(self.longest)}"


_reads = BeforeValidator(_read)
_writes = PlainSerializer(format_duration, return_type=str)

Seconds = Annotated[timedelta, _reads, AfterValidator(_Bounds("100ms", "5m")), _writes]
"""A time to wait for something: 100 ms to 5 minutes."""

ShortLife = Annotated[timedelta, _reads, AfterValidator(_Bounds("1s", "24h")), _writes]
"""The life of a token: a second to a day."""

SvidLife = Annotated[timedelta, _reads, AfterValidator(_Bounds("10s", "24h")), _writes]
"""The life of a workload's X.509-SVID: ten seconds to a day, as its profile says."""

NodeLife = Annotated[timedelta, _reads, AfterValidator(_Bounds("10s", "7d")), _writes]
"""The life of a node's X.509-SVID: ten seconds to a week, as its profile says."""

AuthorityLife = Annotated[timedelta, _reads, AfterValidator(_Bounds("1m", "3650d")), _writes]
"""The life of a signing authority: a minute to ten years."""

Sweep = Annotated[timedelta, _reads, AfterValidator(_Bounds("1s", "1h")), _writes]
"""How long something may stay unfinished: a second to an hour."""

Retention = Annotated[timedelta, _reads, AfterValidator(_Bounds("0s", "3650d")), _writes]
"""How long a record is kept: nothing to ten years."""


def bounds_of(metadata: object) -> str:
    """The range a field's duration must lie in, in words; empty where there is none."""
    if isinstance(metadata, AfterValidator) and isinstance(metadata.func, _Bounds):
        return str(metadata.func)
    return ""
