"""The node agent's own socket: how the agent is doing, and why a process gets what it gets.

- Sync, for a command line and scripts; nothing secret comes by it.
- Who may ask is the agent's to say: root and its own user everything, others about their own
  processes.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

from identity_api.agent.v1 import agent_pb2, agent_pb2_grpc
from identity_client.admin._calls import call
from identity_client.errors import BrokerUnavailable, ProtocolViolation, SettingsInvalid

__all__ = [
    "AgentClient",
    "AgentHealth",
    "AgentStatus",
    "EntryMatch",
    "ProcessExplanation",
]

DEFAULT_TIMEOUT = 10.0
_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.default_authority", "localhost"),
)


class AgentHealth(StrEnum):
    """How an agent is doing."""

    UNKNOWN = "unknown"
    OK = "ok"
    DEGRADED = "degraded"
    DOWN = "down"


_HEALTH = {
    agent_pb2.HEALTH_OK: AgentHealth.OK,
    agent_pb2.HEALTH_DEGRADED: AgentHealth.DEGRADED,
    agent_pb2.HEALTH_DOWN: AgentHealth.DOWN,
}


@dataclass(frozen=True, slots=True)
class AgentStatus:
    """How an agent is doing; times are aware, in UTC.

    Attributes:
        problems: what is wrong, a sentence each.
        node_id: the node's SPIFFE ID; "" before the first attestation.
        revision: of the broker's state that the agent stands at.
        entries: that this node may ask for.
        overdue: X.509-SVIDs past their renewal time.
        workload_api: as in SPIFFE_ENDPOINT_SOCKET.
    """

    health: AgentHealth
    problems: tuple[str, ...]
    version: str
    started_at: datetime | None
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


@dataclass(frozen=True, slots=True)
class EntryMatch:
    """What an entry means to a process.

    Attributes:
        missing: the selectors the process does not have.
        problem: why there is no SVID although it matches, or none yet; "" where there is one.
        serial: of the X.509-SVID the process is given; "" where there is none.
    """

    entry_id: str
    spiffe_id: str
    matches: bool
    missing: tuple[str, ...]
    problem: str
    serial: str


@dataclass(frozen=True, slots=True)
class ProcessExplanation:
    """Why a process gets what it gets.

    Attributes:
        selectors: all that is known of it, "type:value", sorted.
        problems: attestors that failed or did not answer in time, a sentence each.
        entries: every entry of the node: those that match, then those that nearly do.
        executable: the file it runs; "" where the agent may not know.
    """

    pid: int
    executable: str
    selectors: tuple[str, ...]
    problems: tuple[str, ...]
    entries: tuple[EntryMatch, ...]


class AgentClient:
    """Asks one agent. A context manager; thread-safe.

    Args:
        path: of the agent's own socket.
        timeout: seconds each call may take.

    Raises:
        BrokerUnavailable: reason AGENT_UNAVAILABLE; no agent listens there.
        SettingsInvalid: the path is no socket's.
    """

    def __init__(self, path: Path, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        path = path.absolute()
        _probe(path)
        self._channel = grpc.insecure_channel(f"unix:{path}", options=_OPTIONS)
        self._stub = agent_pb2_grpc.AgentStub(self._channel)
        self._timeout = timeout

    def status(self) -> AgentStatus:
        """Say how the agent is doing.

        Raises:
            NotPermitted: only root and the agent's own user may ask.
            BrokerUnavailable: the agent went away.
        """
        found = call(self._stub.Status, agent_pb2.StatusRequest(), self._timeout)
        return AgentStatus(
            health=_HEALTH.get(found.health, AgentHealth.UNKNOWN),
            problems=tuple(found.problems),
            version=found.version,
            started_at=_time(found.started_at),
            trust_domain=found.trust_domain,
            node_id=found.node_id,
            node_serial=found.node_serial,
            node_expires_at=_time(found.node_expires_at),
            broker_address=found.broker_address,
            connected=found.connected,
            revision=found.revision,
            heard_at=_time(found.heard_at),
            entries=found.entries,
            x509_svids=found.x509_svids,
            jwt_svids=found.jwt_svids,
            connections=found.connections,
            overdue=found.overdue,
            workload_api=found.workload_api,
        )

    def explain_process(self, pid: int) -> ProcessExplanation:
        """Say why the process gets what it gets.

        Raises:
            NotPermitted: it is another user's, or there is none; the agent does not say which.
            RequestRejected: that is no pid.
            BrokerUnavailable: the agent went away, or has not heard from its broker yet.
        """
        if not 0 < pid < 2**31:
            raise SettingsInvalid(f"{pid} is no pid", reason="PID_INVALID")
        request = agent_pb2.ExplainProcessRequest(pid=pid)
        found = call(self._stub.ExplainProcess, request, self._timeout)
        return ProcessExplanation(
            pid=pid,
            executable=found.executable,
            selectors=tuple(found.selectors),
            problems=tuple(found.problems),
            entries=tuple(
                EntryMatch(
                    entry_id=each.entry_id,
                    spiffe_id=each.spiffe_id,
                    matches=each.matches,
                    missing=tuple(each.missing),
                    problem=each.problem,
                    serial=each.serial,
                )
                for each in found.entries
            ),
        )

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _probe(path: Path) -> None:
    """Connect once by hand: the kernel says why not in better words than gRPC passes on."""
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    probe.settimeout(2.0)
    try:
        probe.connect(os.fspath(path))
    except OSError as exc:
        if exc.errno is None or "too long" in str(exc):
            raise SettingsInvalid(f'"{path}" is no path of a socket: {exc}') from exc
        raise BrokerUnavailable(
            f'no agent answers at "{path}": {(exc.strerror or str(exc)).lower()}',
            reason="AGENT_UNAVAILABLE",
            hint="is it running, and is that its admin socket? start one: idb agent run",
        ) from exc
    finally:
        probe.close()


def _time(seconds: int) -> datetime | None:
    if not seconds:
        return None
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, OSError, ValueError) as exc:
        raise ProtocolViolation(
            f"the agent answered a time that does not exist: {seconds}"
        ) from exc
