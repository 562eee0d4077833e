"""The node agent's own socket: how the agent is doing, and why a process gets what it gets.

    with AgentClient("/run/identity-broker/agent/admin.sock") as agent:
        print(agent.status().health)

- Sync: it serves a command line and scripts.
- The kernel tells the agent who asks; there is nothing to prove.
- Every failure is an IdentityError, with the agent's own reason and hint.
"""

from __future__ import annotations

import os
import socket
import stat
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import grpc

from identity_api.agent.v1 import agent_pb2, agent_pb2_grpc
from identity_client._wire.status import error_from_rpc
from identity_client.admin._convert import time_from_wire
from identity_client.errors import (
    BrokerUnavailable,
    NotPermitted,
    RequestRejected,
    SettingsInvalid,
)

__all__ = [
    "AgentClient",
    "AgentHealth",
    "AgentStatus",
    "EntryMatch",
    "ProcessExplanation",
]

_MAX_PATH_BYTES = 107  # sun_path, without its final zero
_PROBE_SECONDS = 2.0
_MAX_PID: Final = 2**31 - 1
_OPTIONS = (
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.default_authority", "localhost"),
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
)


class AgentHealth(StrEnum):
    """How an agent is doing."""

    OK = "ok"  # attested, in sync, nothing overdue
    DEGRADED = "degraded"  # serves what is still valid; the problems say what is wrong
    DOWN = "down"  # serves nothing
    UNKNOWN = "unknown"  # an agent newer than this client says something else


@dataclass(frozen=True, slots=True)
class AgentStatus:
    """An agent's own account of itself; holds no secret.

    Attributes:
        problems: what is wrong, a sentence each.
        trust_domain: name, without scheme.
        node_id: the node's SPIFFE ID; empty before the first attestation.
        node_serial: the node SVID's serial number; empty when there is none.
        broker_address: host:port.
        connected: whether the stream to the broker stands.
        revision: the change feed's position the agent stands at; 0 before the first.
        heard_at: when it last heard from the broker.
        entries: entries this node may ask for.
        x509_svids, jwt_svids: SVIDs held.
        connections: connections of workloads.
        overdue: X.509-SVIDs past their renewal time.
        workload_api: the Workload API's address, as in SPIFFE_ENDPOINT_SOCKET.
        followers: streams of workloads that follow revocations here.
        revocations: revoked credentials that are refused on this machine.
        revocations_fresh: whether that is all there is, as far as the broker told lately.
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
    followers: int
    revocations: int
    revocations_fresh: bool


@dataclass(frozen=True, slots=True)
class EntryMatch:
    """One entry of the node, held against a process.

    Attributes:
        matches: whether the process is that identity.
        missing: the entry's selectors that the process does not have, "type:value".
        problem: why it is not issued although it matches, or not yet; else empty.
        serial: the X.509-SVID's serial number that the process is given; empty for none.
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
        selectors: the process's, "type:value", sorted.
        problems: attestors that failed or did not answer in time, a sentence each.
        entries: of this node, matching ones first; every one for root and the agent's own user.
        executable: path of the program it runs.
        hidden: how many entries are left out, because somebody else asks.
    """

    selectors: tuple[str, ...]
    problems: tuple[str, ...]
    entries: tuple[EntryMatch, ...]
    executable: str
    hidden: int = 0


class AgentClient:
    """Asks one agent on this machine. A context manager; thread-safe.

    Args:
        path: the agent's admin socket.
        timeout: seconds each call may take.

    Raises:
        BrokerUnavailable: reason AGENT_UNREACHABLE; no agent listens there.
        NotPermitted: this user may not connect there.
        SettingsInvalid: that cannot be a socket.
    """

    def __init__(self, path: str | Path, *, timeout: float = 15.0) -> None:
        path = Path(path).absolute()
        _probe(path)
        self._timeout = timeout
        self._channel = grpc.insecure_channel(f"unix:{path}", options=_OPTIONS)
        self._stub = agent_pb2_grpc.AgentStub(self._channel)

    def status(self) -> AgentStatus:
        """How the agent is doing. For root and the agent's own user.

        Raises:
            NotPermitted: reason METHOD_DENIED.
            IdentityError: it does not answer.
        """
        answer = self._call(self._stub.Status, agent_pb2.StatusRequest())
        return AgentStatus(
            health=_HEALTH.get(answer.health, AgentHealth.UNKNOWN),
            problems=tuple(answer.problems),
            version=answer.version,
            started_at=time_from_wire(answer.started_at),
            trust_domain=answer.trust_domain,
            node_id=answer.node_id,
            node_serial=answer.node_serial,
            node_expires_at=time_from_wire(answer.node_expires_at),
            broker_address=answer.broker_address,
            connected=answer.connected,
            revision=answer.revision,
            heard_at=time_from_wire(answer.heard_at),
            entries=answer.entries,
            x509_svids=answer.x509_svids,
            jwt_svids=answer.jwt_svids,
            connections=answer.connections,
            overdue=answer.overdue,
            workload_api=answer.workload_api,
            followers=answer.followers,
            revocations=answer.revocations,
            revocations_fresh=answer.revocations_fresh,
        )

    def explain_process(self, pid: int) -> ProcessExplanation:
        """Why the process `pid` gets what it gets. For root, the agent's user and its own.

        Raises:
            NotPermitted: reason METHOD_DENIED: another user's process, or none.
            RequestRejected: not a process id.
            IdentityError: it does not answer, or the process changed meanwhile.
        """
        if not 0 < pid <= _MAX_PID:
            raise RequestRejected(f"{pid} is not a process id")
        answer = self._call(self._stub.ExplainProcess, agent_pb2.ExplainProcessRequest(pid=pid))
        return ProcessExplanation(
            selectors=tuple(answer.selectors),
            problems=tuple(answer.problems),
            entries=tuple(
                EntryMatch(
                    entry_id=one.entry_id,
                    spiffe_id=one.spiffe_id,
                    matches=one.matches,
                    missing=tuple(one.missing),
                    problem=one.problem,
                    serial=one.serial,
                )
                for one in answer.entries
            ),
            executable=answer.executable,
            hidden=answer.hidden,
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

    def _call(self, method: Any, request: object) -> Any:
        try:
            return method(request, timeout=self._timeout)
        except grpc.RpcError as exc:
            error = error_from_rpc(exc)
            if error.reason == _LATE:
                error = _no_answer(f"the agent did not answer within {self._timeout:g} s", _LATE)
            elif error.reason == _NOBODY:  # else the agent said so itself
                error = _no_answer("the agent does not answer", _UNREACHABLE)
            raise error from exc


_LATE: Final = "DEADLINE_EXCEEDED"
_NOBODY: Final = BrokerUnavailable.default_reason
_UNREACHABLE: Final = "AGENT_UNREACHABLE"
_HEALTH = {
    agent_pb2.HEALTH_OK: AgentHealth.OK,
    agent_pb2.HEALTH_DEGRADED: AgentHealth.DEGRADED,
    agent_pb2.HEALTH_DOWN: AgentHealth.DOWN,
}


def _no_answer(message: str, reason: str) -> BrokerUnavailable:
    return BrokerUnavailable(message, reason=reason, hint="is it running? idb agent run")


def _probe(path: Path) -> None:
    """Connects once by hand: the kernel says why not in better words than gRPC passes on."""
    if len(os.fsencode(path)) > _MAX_PATH_BYTES:
        raise SettingsInvalid(
            f'the socket path "{path}" is too long',
            hint=f"a Unix socket's path has at most {_MAX_PATH_BYTES} bytes",
        )
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    probe.settimeout(_PROBE_SECONDS)
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise SettingsInvalid(f'"{path}" is not a socket')
        probe.connect(os.fspath(path))
    except PermissionError as exc:
        raise NotPermitted(
            f'this user may not use the agent\'s socket "{path}"',
            reason="ADMIN_SOCKET_DENIED",
            hint="run it as root or as the agent's own user",
        ) from exc
    except OSError as exc:
        raise _no_answer(f'no agent listens on "{path}"', _UNREACHABLE) from exc
    finally:
        probe.close()
