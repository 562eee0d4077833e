"""Ask all attestors about a process at once, and make sure afterwards that it was that process.

- An attestor that fails, or is slow, leaves its own selectors out: fewer selectors never match more
  entries. It is a problem to be told, not an end.
- After the last answer the process is checked: what was read is about it, or is thrown away.
- Only attestors that somebody asks for are asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from identity_broker.attestors.workload import Process, WorkloadAttestor
from identity_broker.domain.selector import Selector
from identity_broker.errors import BrokerError, CallerUnknown, ProcessChanged
from identity_broker.telemetry.logs import get_logger

DEFAULT_DEADLINE: Final = 1.0
_log = get_logger("attestation")


@dataclass(frozen=True, slots=True)
class Attested:
    """What is vouched for, and what could not be found out ("docker: …"), in order."""

    selectors: frozenset[Selector]
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Answer:
    selectors: frozenset[Selector] = frozenset()
    problem: str = ""


class Attestation:
    """All attestors of an agent.

    Args:
        attestors: several may vouch for selectors of one type.
        deadline: seconds that each may take.
    """

    def __init__(
        self, attestors: Sequence[WorkloadAttestor], deadline: float = DEFAULT_DEADLINE
    ) -> None:
        self._attestors = tuple(attestors)
        self._deadline = deadline

    async def attest(
        self, process: Process, wanted: Mapping[str, frozenset[str]] | None
    ) -> Attested:
        """Find out what can be vouched for.

        Args:
            wanted: by selector type, the first parts of the values that anybody asks for (see
                `WorkloadAttestor.attest`); types that are not in it are left out. None: everything.

        Raises:
            CallerUnknown, ProcessChanged: the process is not, or no longer, what it was.
        """
        asked = [
            (attestor, frozenset() if wanted is None else wanted[attestor.name])
            for attestor in self._attestors
            if wanted is None or _is_asked(attestor, wanted)
        ]
        answers = await self._ask_all(process, asked)
        process.check()
        return Attested(
            frozenset().union(*(answer.selectors for answer in answers)),
            tuple(sorted({answer.problem for answer in answers if answer.problem})),
        )

    async def _ask_all(
        self, process: Process, asked: Sequence[tuple[WorkloadAttestor, frozenset[str]]]
    ) -> list[_Answer]:
        if len(asked) == 1:  # mostly: no tasks for it
            return [await self._ask(asked[0][0], process, asked[0][1])]
        tasks: list[asyncio.Task[_Answer]] = []
        refused: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                for attestor, keys in asked:
                    tasks.append(group.create_task(self._ask(attestor, process, keys)))
        except* (CallerUnknown, ProcessChanged) as refusals:
            refused = refusals.exceptions[0]
        if refused is not None:  # out here, since except* would wrap it again
            raise refused
        return [task.result() for task in tasks]

    async def _ask(
        self, attestor: WorkloadAttestor, process: Process, wanted: frozenset[str]
    ) -> _Answer:
        name = attestor.name
        try:
            async with asyncio.timeout(self._deadline):
                selectors = await attestor.attest(process, wanted=wanted)
        except (CallerUnknown, ProcessChanged):
            raise
        except TimeoutError:
            return _Answer(problem=f"{name}: no answer within {self._deadline:g} s")
        except BrokerError as exc:
            _log.info("attestor failed", attestor=name, pid=process.pid, error=str(exc))
            return _Answer(problem=f"{name}: {exc.public}")
        except Exception:  # noqa: BLE001  # logged; its bug must not take the others' answers away
            _log.exception("attestor failed", attestor=name, pid=process.pid)
            return _Answer(problem=f"{name}: failed; the agent's log says how")
        strangers = {selector for selector in selectors if selector.type != name}
        if strangers:
            _log.error("attestor vouches for another's type", attestor=name, pid=process.pid)
            return _Answer(problem=f"{name}: vouches for selectors of another type")
        return _Answer(selectors)


def _is_asked(attestor: WorkloadAttestor, wanted: Mapping[str, frozenset[str]]) -> bool:
    keys = wanted.get(attestor.name)
    return keys is not None and not (keys and attestor.keys and keys.isdisjoint(attestor.keys))
