"""systemd: the unit and the slice that a process belongs to, read from its control group.

- `id` and `slice` are the system's: what root's systemd named. A user may name the units of his own
  systemd whatever he likes; those are `user_unit`, and worth something only beside `unix:uid`.
- A service that has made control groups of its own stays what it is: the outermost unit counts.
- A login session, or a container's scope, has a slice and no `id`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from identity_broker.attestors.workload import Process, WorkloadAttestor
from identity_broker.attestors.workload.cgroup import parse_cgroup, segments, systemd_path
from identity_broker.attestors.workload.facts import selectors_of
from identity_broker.attestors.workload.plugins import WorkloadAttestorPlugin, options_of
from identity_broker.domain.selector import Selector
from identity_broker.errors import AttestationFailed

_SLICE: Final = ".slice"
_SERVICE: Final = ".service"
_ROOT_SLICE: Final = "-.slice"
_USER_MANAGER: Final = re.compile(r"user@[0-9]{1,10}\.service", re.ASCII)


def facts_of(path: str) -> tuple[tuple[str, str], ...]:
    """What the path of a control group says: (key, value); nothing where systemd did not make it.

    Raises:
        ValueError: the path begins outside what the agent can see.
    """
    rest = segments(path)
    if rest[:1] == [".."]:
        raise ValueError("the control group lies outside the agent's")
    slices, rest = _slices(rest)
    unit = _unescaped(rest[0]) if rest else ""
    facts: list[tuple[str, str]] = []
    if slices or unit.endswith((_SERVICE, ".scope")):
        facts.append(("slice", slices[-1] if slices else _ROOT_SLICE))
    if unit.endswith(_SERVICE):
        facts.append(("id", unit))
    if _USER_MANAGER.fullmatch(unit) and slices:
        _, own = _slices(rest[1:])
        if own and (user_unit := _unescaped(own[0])).endswith(_SERVICE):
            facts.append(("user_unit", user_unit))
    return tuple(facts)


def _slices(parts: list[str]) -> tuple[list[str], list[str]]:
    """Split off the slices at the beginning, each of which must be in the one before it."""
    found: list[str] = []
    for part in parts:
        name = _unescaped(part)
        if not name.endswith(_SLICE) or name == _SLICE or not _is_within(name, found):
            break
        found.append(name)
    return found, parts[len(found) :]


def _is_within(name: str, outer: list[str]) -> bool:
    stem = name.removesuffix(_SLICE)
    if not outer:
        return "-" not in stem  # "a-b.slice" is in "a.slice"
    parent = outer[-1].removesuffix(_SLICE)
    return stem.startswith(f"{parent}-") and "-" not in stem[len(parent) + 1 :]


def _unescaped(segment: str) -> str:
    # systemd puts "_" before names that the kernel could take for its own files.
    return segment.removeprefix("_")


class SystemdAttestor:
    """id, slice, user_unit: nothing to wait for."""

    name = "systemd"
    keys = frozenset({"id", "slice", "user_unit"})

    async def attest(self, process: Process, *, wanted: frozenset[str]) -> frozenset[Selector]:
        try:
            path = systemd_path(parse_cgroup(process.read("cgroup")))
            return frozenset() if path is None else selectors_of(self.name, facts_of(path))
        except ValueError as exc:
            raise AttestationFailed(
                "the control group of the process does not tell its unit",
                detail=str(exc),
                hint="run the agent in the machine's own cgroup namespace",
            ) from exc


class SystemdOptions(BaseModel):
    """The configuration of the systemd attestor: there is nothing to set."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _build(table: Mapping[str, Any]) -> Sequence[WorkloadAttestor]:
    options_of(SystemdOptions, "systemd", table)
    return (SystemdAttestor(),)


PLUGIN: Final = WorkloadAttestorPlugin("systemd", _build)
