"""unix: the user and the groups of a process by name; and the plugin with all its parts.

- Names are those of the machine's user database when they are looked up.
- The user database may be remote and slow: it is asked in a thread, once at a time for each name,
  remembered for a minute, and only when somebody asks for names.
"""

from __future__ import annotations

import asyncio
import grp
import pwd
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field

from identity_broker.attestors.workload import Process, WorkloadAttestor
from identity_broker.attestors.workload.facts import is_wanted, selectors_of
from identity_broker.attestors.workload.owner import UnixOwner, owner_of
from identity_broker.attestors.workload.plugins import WorkloadAttestorPlugin, options_of
from identity_broker.attestors.workload.program import (
    DEFAULT_MAX_BYTES,
    ProgramDigests,
    UnixDigest,
    UnixPath,
)
from identity_broker.domain.selector import Selector

_REMEMBERED_FOR: Final = 60.0
_MOST_NAMES: Final = 4096
_LOOK_UPS_AT_A_TIME: Final = 2


class UnixNames:
    """user, group, supplementary_group."""

    name = "unix"
    keys = frozenset({"user", "group", "supplementary_group"})

    def __init__(self) -> None:
        self._users = _Names(lambda uid: pwd.getpwuid(uid).pw_name)
        self._groups = _Names(lambda gid: grp.getgrgid(gid).gr_name)

    async def attest(self, process: Process, *, wanted: frozenset[str]) -> frozenset[Selector]:
        owner = owner_of(process)
        facts: list[tuple[str, str | None]] = []
        if is_wanted(wanted, frozenset({"user"})):
            facts.append(("user", await self._users.of(owner.uid)))
        if is_wanted(wanted, frozenset({"group"})):
            facts.append(("group", await self._groups.of(owner.gid)))
        if is_wanted(wanted, frozenset({"supplementary_group"})):
            facts += [("supplementary_group", await self._groups.of(gid)) for gid in owner.groups]
        return selectors_of(self.name, [(key, name) for key, name in facts if name is not None])


class _Names:
    """Names by number, remembered; None where there is none."""

    def __init__(self, look_up: Callable[[int], str]) -> None:
        self._look_up = look_up
        self._known: OrderedDict[int, tuple[float, str | None]] = OrderedDict()
        self._asked: dict[int, asyncio.Task[str | None]] = {}
        self._turn = asyncio.Semaphore(_LOOK_UPS_AT_A_TIME)

    async def of(self, number: int) -> str | None:
        loop = asyncio.get_running_loop()
        known = self._known.get(number)
        if known is not None and loop.time() < known[0]:
            return known[1]
        asked = self._asked.get(number)
        if asked is None:
            asked = self._asked[number] = loop.create_task(self._ask(number))
            asked.add_done_callback(lambda task: self._forget(number, task))
        # Whoever cannot wait leaves; the thread cannot be stopped, and its answer is of use later.
        return await asyncio.shield(asked)

    async def _ask(self, number: int) -> str | None:
        async with self._turn:
            name = await asyncio.to_thread(self._name, number)
        self._known[number] = (asyncio.get_running_loop().time() + _REMEMBERED_FOR, name)
        self._known.move_to_end(number)
        while len(self._known) > _MOST_NAMES:
            self._known.popitem(last=False)
        return name

    def _name(self, number: int) -> str | None:
        try:
            return self._look_up(number)
        except KeyError:
            return None

    def _forget(self, number: int, task: asyncio.Task[str | None]) -> None:
        self._asked.pop(number, None)
        if not task.cancelled():
            task.exception()  # perhaps nobody waits for it any more


class UnixOptions(BaseModel):
    """The configuration of the unix attestor.

    `max_program_bytes`: programs longer than this have no sha256 selector.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_program_bytes: int = Field(default=DEFAULT_MAX_BYTES, gt=0)


def _build(table: Mapping[str, Any]) -> Sequence[WorkloadAttestor]:
    options = options_of(UnixOptions, "unix", table)
    # Apart, so that a slow user database or a long program costs its own selectors alone.
    return (
        UnixOwner(),
        UnixNames(),
        UnixPath(),
        UnixDigest(ProgramDigests(options.max_program_bytes)),
    )


PLUGIN: Final = WorkloadAttestorPlugin("unix", _build)
