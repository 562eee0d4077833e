"""Durations in settings, each kind with the range it must lie in."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, PlainSerializer

from identity_broker.domain.duration import RULE, format_duration, parse_duration


def _read(value: object) -> timedelta:
    if isinstance(value, timedelta):
        return value
    if not isinstance(value, str):
        # pydantic turns a ValueError, and no TypeError, into a problem of the field.
        raise ValueError(RULE)  # noqa: TRY004
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
