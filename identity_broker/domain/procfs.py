"""What the kernel writes of a process under /proc, read strictly.

- Pure: bytes in, values out. Text that the kernel would not write is a ValueError, never a guess.
- A program chooses its own name, which stands in both files: nothing in it is taken for a field.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_FIELDS_BEFORE_STATE: Final = 3  # proc(5) counts from 1: pid, (comm), and then the state
_START_CODE: Final = 26 - _FIELDS_BEFORE_STATE
_START_STACK: Final = 28 - _FIELDS_BEFORE_STATE
_START_TIME: Final = 22 - _FIELDS_BEFORE_STATE
_U64: Final = 1 << 64
# Real, effective, saved, file system.
_IDS: Final = re.compile(
    rb"\nUid:\t[0-9]+\t([0-9]+)\t[0-9]+\t[0-9]+\nGid:\t[0-9]+\t([0-9]+)\t[0-9]+\t[0-9]+\n"
)
_GROUPS: Final = re.compile(rb"\nGroups:\t([0-9 ]*)\n")


@dataclass(frozen=True, slots=True)
class ProcessStat:
    """Of /proc/PID/stat.

    Attributes:
        start_time: clock ticks after boot; with the pid, the process's name.
        image: where its code and its stack begin; another one after every exec, since addresses
            are random. (0, 0) to readers who may not know.
    """

    start_time: int
    image: tuple[int, int]


@dataclass(frozen=True, slots=True)
class ProcessOwner:
    """Of /proc/PID/status: the effective user and group, and the supplementary groups."""

    uid: int
    gid: int
    groups: frozenset[int]


def parse_stat(raw: bytes) -> ProcessStat:
    """Read /proc/PID/stat.

    Raises:
        ValueError: it is not one.
    """
    # The name may hold spaces and parentheses: what follows the last one is the kernel's.
    _, parenthesis, rest = raw.rpartition(b") ")
    fields = rest.split()
    if not parenthesis or len(fields) <= _START_STACK:
        raise ValueError("not a /proc/PID/stat")
    return ProcessStat(
        start_time=_number(fields[_START_TIME], _U64),
        image=(_number(fields[_START_CODE], _U64), _number(fields[_START_STACK], _U64)),
    )


def parse_status(raw: bytes) -> ProcessOwner:
    """Read /proc/PID/status.

    Raises:
        ValueError: it is not one.
    """
    # The kernel escapes line feeds in the name: no part of it is taken for a line.
    ids, groups = _IDS.search(raw), _GROUPS.search(raw)
    if ids is None or groups is None:
        raise ValueError("not a /proc/PID/status")
    return ProcessOwner(
        uid=_number(ids[1], 1 << 32),
        gid=_number(ids[2], 1 << 32),
        groups=frozenset(_number(group, 1 << 32) for group in groups[1].split()),
    )


def _number(text: bytes, limit: int) -> int:
    # int() would take signs, underscores and spaces.
    if not text.isdigit() or len(text) > 20 or (value := int(text)) >= limit:
        raise ValueError("not a number that the kernel writes")
    return value
