"""The agent's own socket: how it is doing, and why a process gets what it gets.

- Anybody may connect; the kernel says who it is, and each method who may call it.
- `ExplainProcess` says nothing about a process to another user, not even whether it exists; and to
  the process's own user nothing of entries that are not nearly its own: a selector may be a secret.
- No secret leaves by it: serial numbers at most.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Protocol

import grpc

from identity_api.agent.v1 import agent_pb2
from identity_broker.agent.health import Health, HealthReport
from identity_broker.agent.identities import Attested
from identity_broker.agent.identity import Caller
from identity_broker.agent.instances import key_for
from identity_broker.agent.mirror import Mirror
from identity_broker.agent.svids import Svids
from identity_broker.agent.workload_api.front import Callers, Front
from identity_broker.agent.workload_api.limits import CallerLimits
from identity_broker.attestors.workload import Process
from identity_broker.domain.clock import Clock
from identity_broker.errors import (
    AgentNotReady,
    AttestationFailed,
    CallerUnknown,
    MalformedRequest,
    MethodDenied,
)
from identity_broker.localpeer.process import LiveProcess
from identity_broker.telemetry.metrics import Metrics
from identity_client.node.values import SyncedEntry

SERVICE_NAME: Final = agent_pb2.DESCRIPTOR.services_by_name["Agent"].full_name
_ROOT: Final = 0
# What a process's own user may be told that an entry asks for.
_OPEN_FACTS: Final = ("unix:path:", "unix:sha256:", "systemd:")
_HEALTH: Final = {
    Health.OK: agent_pb2.HEALTH_OK,
    Health.DEGRADED: agent_pb2.HEALTH_DEGRADED,
    Health.DOWN: agent_pb2.HEALTH_DOWN,
}


@dataclass(frozen=True, slots=True)
class AgentReport:
    """What `Status` says; see agent.proto."""

    judged: HealthReport
    version: str
    started_at: datetime
    trust_domain: str
    node_id: str
    node_serial: str
    node_expires_at: datetime | None
    broker_address: str
    connected: bool
    revision: int
    heard_at: datetime | None
    entries: int
    x509_svids: int
    jwt_svids: int
    connections: int
    overdue: int
    workload_api: str
    followers: int
    revocations: int
    revocations_fresh: bool


class Explains(Protocol):
    """Attests a process with every attestor there is: `identities.Identities`."""

    async def explain(self, process: Process) -> Attested:
        """Return all that can be said of a process."""
        ...


class AgentAdmin:
    """The service `identity_api.agent.v1.Agent`, as handlers of a gRPC server.

    Args:
        report: how the agent is doing now.
        explains: who attests a process that is asked about.
        callers: the process behind gRPC's peer name.
    """

    def __init__(
        self,
        *,
        report: Callable[[], AgentReport],
        explains: Explains,
        mirror: Mirror,
        svids: Svids,
        clock: Clock,
        callers: Callers,
        metrics: Metrics,
    ) -> None:
        self._report = report
        self._explains = explains
        self._mirror = mirror
        self._svids = svids
        self._clock = clock
        self._front = Front(callers, CallerLimits(), metrics, header=False)

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        """What the listener serves."""
        methods = {
            "Status": self._front.unary(
                f"/{SERVICE_NAME}/Status", agent_pb2.StatusRequest, self._status
            ),
            "ExplainProcess": self._front.unary(
                f"/{SERVICE_NAME}/ExplainProcess",
                agent_pb2.ExplainProcessRequest,
                self._explain_process,
            ),
        }
        return [grpc.method_handlers_generic_handler(SERVICE_NAME, methods)]

    async def _status(
        self, _request: agent_pb2.StatusRequest, caller: Caller
    ) -> agent_pb2.StatusResponse:
        _require(caller, _owners())
        found = self._report()
        return agent_pb2.StatusResponse(
            health=_HEALTH[found.judged.health],
            problems=found.judged.problems,
            version=found.version,
            started_at=_seconds(found.started_at),
            trust_domain=found.trust_domain,
            node_id=found.node_id,
            node_serial=found.node_serial,
            node_expires_at=_seconds(found.node_expires_at),
            broker_address=found.broker_address,
            connected=found.connected,
            revision=found.revision,
            heard_at=_seconds(found.heard_at),
            entries=found.entries,
            x509_svids=found.x509_svids,
            jwt_svids=found.jwt_svids,
            connections=found.connections,
            overdue=found.overdue,
            workload_api=found.workload_api,
            followers=found.followers,
            revocations=found.revocations,
            revocations_fresh=found.revocations_fresh,
        )

    async def _explain_process(
        self, request: agent_pb2.ExplainProcessRequest, caller: Caller
    ) -> agent_pb2.ExplainProcessResponse:
        if request.pid <= 0:
            raise MalformedRequest("a pid is greater than zero")
        with _process(request.pid) as process:
            _require(caller, {*_owners(), process.uid})
            if not self._mirror.synced:
                raise AgentNotReady("the agent has not heard from its broker yet")
            attested = await self._explains.explain(process)
            selectors = frozenset(map(str, attested.selectors))
            entries = list(self._matches(process, selectors))
            shown = [
                entry
                for entry in entries
                if caller.uid in _owners() or entry.matches or self._is_near(entry)
            ]
            answer = agent_pb2.ExplainProcessResponse(
                selectors=sorted(selectors),
                problems=attested.problems,
                entries=shown,
                executable=_executable(process),
                hidden=len(entries) - len(shown),
            )
            process.check()
            return answer

    def _matches(
        self, process: LiveProcess, selectors: frozenset[str]
    ) -> Iterator[agent_pb2.ExplainProcessResponse.EntryMatch]:
        """Every entry: what matches, then what nearly does."""
        now = self._clock.now()
        matching = self._mirror.match(selectors, now)
        for entry in matching:
            yield self._match(process, entry, now)
        matched = {entry.id for entry in matching}
        others = [
            (sorted(set(entry.selectors) - selectors), entry)
            for entry in self._mirror.entries(now)
            if entry.id not in matched
        ]
        for missing, other in sorted(others, key=lambda each: (len(each[0]), each[1].id)):
            yield agent_pb2.ExplainProcessResponse.EntryMatch(
                entry_id=other.id, spiffe_id=other.spiffe_id, matches=False, missing=missing
            )

    def _is_near(self, match: agent_pb2.ExplainProcessResponse.EntryMatch) -> bool:
        """Whether nothing but the program or the unit differs: its user may know why."""
        entry = self._mirror.entry(match.entry_id, self._clock.now())
        return (
            entry is not None
            and len(match.missing) < len(entry.selectors)
            and all(each.startswith(_OPEN_FACTS) for each in match.missing)
        )

    def _match(
        self, process: LiveProcess, entry: SyncedEntry, now: datetime
    ) -> agent_pb2.ExplainProcessResponse.EntryMatch:
        key = key_for(entry, process)
        identity = self._svids.usable(key, entry, now)
        failure = self._svids.failure(key)
        problem = ""
        if self._svids.is_denied(key):
            problem = "the SVID of this very process was revoked; it gets no other one"
        elif failure is not None:
            problem = f"{failure.message} ({failure.reason}, tried {failure.attempts} times)"
        elif identity is None:
            problem = "its SVID is made when the process asks for it"
        return agent_pb2.ExplainProcessResponse.EntryMatch(
            entry_id=entry.id,
            spiffe_id=entry.spiffe_id,
            matches=True,
            problem=problem,
            serial=identity.serial if identity is not None else "",
        )


def _owners() -> frozenset[int]:
    return frozenset({_ROOT, os.geteuid()})


def _require(caller: Caller, uids: Iterable[int]) -> None:
    """Let only these users on.

    Raises:
        MethodDenied: it is another one.
    """
    if caller.uid not in uids:
        raise _denied()


def _denied() -> MethodDenied:
    return MethodDenied(
        "only root, the agent's own user and a process's own user may ask that",
        hint="or there is no such process",
    )


@contextmanager
def _process(pid: int) -> Iterator[LiveProcess]:
    """The process of that pid, for the length of a call.

    Raises:
        MethodDenied: there is none; strangers are not told more than of another user's.
    """
    try:
        process = LiveProcess.of_pid(pid)
    except (CallerUnknown, AttestationFailed) as exc:
        raise _denied() from exc
    try:
        yield process
    finally:
        process.close()


def _executable(process: LiveProcess) -> str:
    try:
        return process.link("exe")
    except AttestationFailed:
        return ""


def _seconds(moment: datetime | None) -> int:
    return 0 if moment is None else int(moment.timestamp())
