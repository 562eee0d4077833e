"""Durations as people write them: "45s", "15m", "1h30m", "7d".

- Units must stand in falling order, each at most once; a bare number is refused.
"""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Final

RULE: Final = 'must be a duration such as "45s", "15m" or "1h30m"'

_DURATION: Final = re.compile(
    r"(?:(?P<days>\d{1,6})d)?(?:(?P<hours>\d{1,6})h)?(?:(?P<minutes>\d{1,6})m(?!s))?"
    r"(?:(?P<seconds>\d{1,9})s)?(?:(?P<milliseconds>\d{1,9})ms)?",
    re.ASCII,
)
_UNITS: Final = (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1))


def parse_duration(text: str) -> timedelta:
    """The duration that `text` names.

    Raises:
        ValueError: it names none; the message is the rule and never holds the text.
    """
    match = _DURATION.fullmatch(text)
    if match is None or not text:
        raise ValueError(RULE)
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
