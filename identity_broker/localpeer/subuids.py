"""Which uids are one user's: the ranges of `/etc/subuid` (subuid(5)).

- Whoever has a range can connect as each of its 65,536 uids; for shares they are one user.
- Ranges that overlap are one. A line that cannot be understood is passed over.
- The file is looked at again when it has changed, at most once a minute. Without one (or in a
  container, which does not see its host's) every uid is a user of its own.
"""

from __future__ import annotations

import re
import time
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import Final

from identity_broker.telemetry.logs import get_logger

_log = get_logger("localpeer")
_PAUSE: Final = 60.0
_MOST_BYTES: Final = 4 << 20
_NUMBER: Final = re.compile(r"[0-9]{1,10}")  # below 2^32


class SubordinateUids:
    """The ranges of one file.

    Args:
        path: of the file.
        now: seconds of a clock that never goes back.
    """

    def __init__(
        self, path: Path = Path("/etc/subuid"), *, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._path = path
        self._now = now
        self._next_look = float("-inf")
        self._version: tuple[int, int, int] | None = None
        self._starts: list[int] = []
        self._ends: list[int] = []

    def user_of(self, uid: int) -> int:
        """The first uid of the range that `uid` lies in; itself if it lies in none."""
        now = self._now()
        if now >= self._next_look:
            self._next_look = now + _PAUSE
            self._look()
        index = bisect_right(self._starts, uid) - 1
        return self._starts[index] if index >= 0 and uid < self._ends[index] else uid

    def _look(self) -> None:
        try:
            found = self._path.stat()
            version = (found.st_ino, found.st_mtime_ns, found.st_size)
            if version == self._version:
                return
            with self._path.open("rb") as file:
                text = file.read(_MOST_BYTES).decode(errors="replace")
        except FileNotFoundError:
            version, text = None, ""
        except OSError as exc:
            _log.warning("subordinate uids unreadable", error=str(exc))
            return  # What was known goes on counting.
        self._version = version
        self._starts, self._ends = _merged(_ranges(text))


def _ranges(text: str) -> list[tuple[int, int]]:
    """First uid and the one after the last, of every line "owner:first:count"."""
    found = []
    for line in text.splitlines():
        words = line.split(":")
        if len(words) == 3 and all(map(_NUMBER.fullmatch, words[1:])):
            first, count = int(words[1]), int(words[2])
            if count:
                found.append((first, first + count))
    return found


def _merged(ranges: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    starts: list[int] = []
    ends: list[int] = []
    for start, end in sorted(ranges):
        if ends and start < ends[-1]:
            ends[-1] = max(ends[-1], end)
        else:
            starts.append(start)
            ends.append(end)
    return starts, ends
