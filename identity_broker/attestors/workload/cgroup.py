"""What the kernel writes of a process's control groups and mounts, read strictly.

- Pure: bytes in, values out; text that the kernel would not write is a ValueError.
- The path of a control group is the kernel's word; but who may make control groups chooses their
  names. Without privilege that is possible below `user@UID.service` alone: see `user_of`.
- Mounts are the process's own to make (user namespaces): what they say is a hint, never a proof.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

UNIFIED: Final = ""  # the controllers of the one hierarchy of cgroup v2
_SYSTEMD: Final = "name=systemd"
_ESCAPED: Final = re.compile(rb"\\([0-7]{3})")
_USER: Final = re.compile(r"user(?:@([0-9]{1,10})\.service|-([0-9]{1,10})\.slice)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of /proc/PID/mountinfo, as far as it is of use here.

    Attributes:
        device: of the file system, "major:minor".
        root: the part of the file system that is mounted.
        point: where.
    """

    id: int
    device: str
    root: str
    point: str


def parse_cgroup(raw: bytes) -> Mapping[str, str]:
    """Read /proc/PID/cgroup: controllers ("" for cgroup v2) → path.

    Raises:
        ValueError: it is not one.
    """
    found: dict[str, str] = {}
    for line in _lines(raw):
        number, first, rest = line.partition(b":")
        controllers, second, path = rest.partition(b":")
        name = os.fsdecode(controllers)
        if not (first and second and number.isdigit() and path.startswith(b"/")) or name in found:
            raise ValueError("not a /proc/PID/cgroup")
        found[name] = os.fsdecode(path)
    return found


def parse_mountinfo(raw: bytes) -> tuple[Mount, ...]:
    """Read /proc/PID/mountinfo.

    Raises:
        ValueError: it is not one.
    """
    mounts = []
    for line in _lines(raw):
        fields = line.split(b" ")
        # ID parent major:minor root point options [optional…] - type source super-options
        if len(fields) < 10 or b"-" not in fields[6:] or not fields[0].isdigit():
            raise ValueError("not a /proc/PID/mountinfo")
        mounts.append(
            Mount(
                int(fields[0]),
                os.fsdecode(fields[2]),
                _unescaped(fields[3]),
                _unescaped(fields[4]),
            )
        )
    return tuple(mounts)


def segments(path: str) -> list[str]:
    """The parts of a control group's path, from the root."""
    return [segment for segment in path.split("/") if segment]


def systemd_path(groups: Mapping[str, str]) -> str | None:
    """The path that systemd keeps, under either version of control groups; None: neither is there.

    In the hybrid layout both are; a process that systemd has not placed in the unified one is at
    its root.
    """
    unified, legacy = groups.get(UNIFIED), groups.get(_SYSTEMD)
    if legacy is not None and unified in {None, "/"}:
        return legacy
    return unified


def user_of(path: str) -> int | None:
    """The user under whose systemd instance the path lies, who may choose names there."""
    for segment in segments(path):
        if found := _USER.fullmatch(segment):
            return int(found[1] or found[2])
    return None


def _lines(raw: bytes) -> list[bytes]:
    # Not splitlines(): names may hold a carriage return.
    return raw.removesuffix(b"\n").split(b"\n") if raw else []


def _unescaped(field: bytes) -> str:
    return os.fsdecode(_ESCAPED.sub(lambda found: bytes([int(found[1], 8) & 0xFF]), field))
