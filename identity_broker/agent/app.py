"""The composition root of the agent: every part, built by hand, top to bottom.

- Trust → node → mirror → SVIDs and tokens → identities → follower → sockets; closed in reverse.
- It is ready when its sockets are bound, whether or not the broker answers: workloads wait there.
- A loop that ended is a bug, and ends the agent: whoever supervises it starts it anew.
"""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import monotonic
from typing import Any, Final

from identity_broker.agent import sds, trust
from identity_broker.agent.admin import AgentAdmin, AgentReport
from identity_broker.agent.follow import Follower, Listeners
from identity_broker.agent.health import Facts, Health, HealthReport, judge
from identity_broker.agent.identities import Identities
from identity_broker.agent.listener import ADMIN_SOCKET, WorkloadListener
from identity_broker.agent.mirror import Mirror
from identity_broker.agent.pages import PageListener, pages
from identity_broker.agent.relay import Relay
from identity_broker.agent.renewals import Renewals
from identity_broker.agent.revocation_feed import SERVICE_NAME as REVOCATION_FEED
from identity_broker.agent.revocation_feed import RevocationFeed
from identity_broker.agent.sds.absent import AbsentSecretDiscovery
from identity_broker.agent.svids import Svids
from identity_broker.agent.tokens import Tokens
from identity_broker.agent.workload_api.limits import CallerLimits, Limits
from identity_broker.agent.workload_api.service import WorkloadApi
from identity_broker.attestors.workload.attestation import Attestation
from identity_broker.attestors.workload.plugins import build_attestors
from identity_broker.config.agent_settings import AgentSettings, NodeSection
from identity_broker.domain.clock import Clock, SystemClock
from identity_broker.errors import InvariantViolated
from identity_broker.telemetry.logs import get_logger
from identity_broker.telemetry.metrics import AgentMetrics, Metrics
from identity_client.attestation import CertificateAttestor, JoinTokenAttestor, NodeAttestor
from identity_client.clock import roll
from identity_client.node import NodeKeeper, NodePhase, NodeSettings

_log = get_logger("agent")
_NODE_DIR: Final = "node"


@dataclass(frozen=True, slots=True)
class AgentAddresses:
    """Where the agent listens.

    Attributes:
        workload_api: as in SPIFFE_ENDPOINT_SOCKET: "unix:///run/…".
        http_address: host:port; empty where none is configured.
    """

    workload_api: str
    admin_socket: Path
    http_address: str = ""


async def run_agent(
    settings: AgentSettings,
    *,
    ready: Callable[[AgentAddresses], None] | None = None,
    stop: asyncio.Event | None = None,
    clock: Clock | None = None,
    made: Callable[[Agent], None] | None = None,
) -> None:
    """Run an agent until `stop` is set (or the task is cancelled).

    Args:
        ready: called once, when both sockets are bound.
        made: given the agent before it starts; for whoever runs it in a process of their own.

    Raises:
        ConfigError: a socket cannot be opened.
        SettingsInvalid: the trust anchors or the kept state cannot be used.
    """
    stop = stop or asyncio.Event()
    async with AsyncExitStack() as resources:
        agent = Agent(settings, clock or SystemClock())
        if made is not None:
            made(agent)
        addresses = await agent.serve(resources)
        if ready is not None:
            ready(addresses)
        tell_supervisor("READY=1")
        _log.info("ready", address=addresses.workload_api)
        await agent.wait(stop)
        tell_supervisor("STOPPING=1")
        _log.info("draining", timeout_s=settings.agent.drain_timeout.total_seconds())


class Agent:
    """All parts, built; `serve` starts them."""

    def __init__(self, settings: AgentSettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._started_at = clock.now()
        self._calls = Metrics()
        self._metrics = AgentMetrics(self._calls.registry)
        self._phase: NodePhase | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        trust_domain = settings.agent.trust_domain
        data_dir = settings.agent.data_dir
        self._node = NodeKeeper(
            NodeSettings(
                address=settings.broker.address,
                bootstrap_address=settings.broker.bootstrap_address,
                trust_domain=trust_domain.name,
                attestor=_attestor(settings.node),
                anchors=trust.anchors(settings.trust, trust_domain),
                state_dir=None if data_dir is None else data_dir / _NODE_DIR,
                rpc_timeout=settings.broker.timeout.total_seconds(),
                version=own_version(),
            ),
            on_change=self._on_node,
        )
        self._mirror = Mirror(trust_domain)
        self._svids = Svids(settings.workloads.x509_svids, roll)
        self._tokens = Tokens(
            node=self._node,
            mirror=self._mirror,
            clock=clock,
            metrics=self._metrics,
            limit=settings.workloads.jwt_svids,
            is_connected=lambda: self._follower.hearing.connected,
        )
        planned = asyncio.Event()
        self._identities = Identities(
            mirror=self._mirror,
            svids=self._svids,
            tokens=self._tokens,
            attestation=Attestation(
                [
                    attestor
                    for name in settings.attestors.enabled
                    for attestor in build_attestors(name, settings.attestors.plugins.get(name, {}))
                ],
                settings.attestors.deadline.total_seconds(),
            ),
            clock=clock,
            metrics=self._metrics,
            wake=planned.set,
            bundles_for_all=settings.workloads.bundles_for_all,
        )
        self._renewals = Renewals(
            node=self._node,
            mirror=self._mirror,
            svids=self._svids,
            clock=clock,
            metrics=self._metrics,
            woken=planned,
            on_change=self._identities.svids_changed,
        )
        self._relay = Relay(
            self._mirror,
            clock,
            is_fresh=lambda: self._mirror.synced and self._follower.hearing.is_fresh(monotonic()),
            on_change=lambda: self._node.report_verifiers(self._relay.verifiers),
        )
        self._follower = Follower(
            source=self._node,
            mirror=self._mirror,
            listeners=Listeners(
                self._relay, self._svids, self._tokens, self._identities, self._renewals
            ),
            clock=clock,
            metrics=self._metrics,
        )
        self._door = WorkloadListener(
            settings.agent.workload_api,
            limit=settings.workloads.connections,
            per_uid_limit=settings.workloads.connections_per_user,
            on_count=self._metrics.agent_connections.set,
        )
        self._admin_door = WorkloadListener(
            settings.agent.admin_socket, naming=ADMIN_SOCKET, header=False
        )

    async def serve(self, resources: AsyncExitStack) -> AgentAddresses:
        """Open the sockets and start to follow the broker.

        Raises:
            ConfigError: a socket cannot be opened.
            SettingsInvalid: the trust anchors or the kept state cannot be used.
        """
        resources.push_async_callback(self._node.close)
        await self._node.start()
        resources.push_async_callback(self._tokens.close)
        resources.push_async_callback(self._end_tasks)
        await self._open_doors(resources)
        for work in (
            self._follower.run(),
            self._follower.keep_time(),
            self._relay.run(),
            self._renewals.run(),
        ):
            self._spawn(work)
        _settle_memory()
        return AgentAddresses(
            self._door.address, self._settings.agent.admin_socket, await self._open_pages(resources)
        )

    async def wait(self, stop: asyncio.Event) -> None:
        """Return when `stop` is set; raise what ended a loop."""
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({stopped, *self._tasks}, return_when=asyncio.FIRST_COMPLETED)
            for task in self._tasks:
                if task.done():
                    task.result()
                    raise InvariantViolated(detail="a loop of the agent has ended")
        finally:
            stopped.cancel()

    def report(self) -> AgentReport:
        """How the agent is doing."""
        node = self._node.status
        hearing = self._follower.hearing
        return AgentReport(
            judged=self._judge(),
            version=own_version(),
            started_at=self._started_at,
            trust_domain=self._settings.agent.trust_domain.name,
            node_id=node.node_id,
            node_serial=node.serial,
            node_expires_at=node.expires_at,
            broker_address=self._settings.broker.address,
            connected=hearing.connected,
            revision=self._mirror.revision,
            heard_at=hearing.heard_at,
            entries=len(self._mirror.entries(self._clock.now())),
            x509_svids=len(self._svids),
            jwt_svids=len(self._tokens),
            connections=self._door.count,
            overdue=self._svids.overdue(self._clock.now()),
            workload_api=self._door.address,
            followers=len(self._relay),
            revocations=len(self._mirror.denied),
            revocations_fresh=self._relay.is_fresh(),
        )

    def _judge(self) -> HealthReport:
        hearing, now = self._follower.hearing, self._clock.now()
        order_error = self._renewals.last_error
        facts = Facts(
            node=self._node.status,
            synced=self._mirror.synced,
            connected=hearing.connected,
            silent_for=monotonic() - hearing.lost_tick,
            heard_at=hearing.heard_at,
            skew=hearing.skew,
            out_of_step="" if hearing.mismatch is None else hearing.mismatch.value,
            held=len(self._svids),
            overdue=self._svids.overdue(now),
            expired=self._svids.expired(now),
            order_problem="" if order_error is None else str(order_error),
        )
        return judge(facts, now)

    # --- inside -------------------------------------------------------------------------------

    async def _open_doors(self, resources: AsyncExitStack) -> None:
        workloads = self._settings.workloads
        limits = CallerLimits(
            Limits(calls_per_second=workloads.calls_per_second, burst=workloads.calls_at_once)
        )
        callers = self._door.callers.of
        other: tuple[str, ...] = (REVOCATION_FEED,)
        faces: list[Any] = [
            RevocationFeed(
                self._relay, self._identities, callers, limits=limits, metrics=self._calls
            )
        ]
        if sds.available():
            from identity_broker.agent.sds.service import (  # noqa: PLC0415  # an optional extra
                SERVICE_NAME,
                SecretDiscovery,
            )

            other = (*other, SERVICE_NAME)
            faces.append(
                SecretDiscovery(self._identities, callers, limits=limits, metrics=self._calls)
            )
        else:
            faces.append(AbsentSecretDiscovery())
        faces.insert(
            0,
            WorkloadApi(
                self._identities,
                callers,
                limits=limits,
                metrics=self._calls,
                is_serving=lambda: self._judge().health is not Health.DOWN,
                other_services=other,
            ),
        )
        admin = AgentAdmin(
            report=self.report,
            explains=self._identities,
            mirror=self._mirror,
            svids=self._svids,
            clock=self._clock,
            callers=self._admin_door.callers.of,
            metrics=self._calls,
        )
        grace = self._settings.agent.drain_timeout

        async def close() -> None:
            for face in faces:
                face.end_streams()
            await asyncio.gather(self._door.stop(grace), self._admin_door.stop(grace))

        resources.push_async_callback(close)
        await self._door.start([handler for face in faces for handler in face.handlers()])
        await self._admin_door.start(admin.handlers())

    async def _open_pages(self, resources: AsyncExitStack) -> str:
        """The pages for supervisors, where they are configured; returns their address."""
        address = self._settings.agent.http_address
        if address is None:
            return ""
        listener = PageListener(address, pages(self._judge, self._calls.render))
        resources.push_async_callback(listener.stop)
        await listener.start()
        return listener.address

    def _on_node(self) -> None:
        status = self._node.status
        if status.phase == self._phase:
            return
        before, self._phase = self._phase, status.phase
        error = status.last_error
        _log.info(
            "node phase",
            state=str(status.phase),
            node_id=status.node_id,
            reason="" if error is None else error.reason,
        )
        if status.phase is NodePhase.BANNED and before is not NodePhase.BANNED:
            self._follower.withdraw()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.add(asyncio.create_task(work))

    async def _end_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _settle_memory() -> None:
    """Spare the garbage collector what lives as long as the process: code."""
    gc.collect()
    gc.freeze()


def own_version() -> str:
    """The agent's version."""
    try:
        return version("identity-broker")
    except PackageNotFoundError:
        return "unknown"


def tell_supervisor(message: str) -> None:
    """Tell systemd how it goes, where it listens (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = f"\0{address[1:]}"
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.sendto(message.encode(), address)


def _attestor(settings: NodeSection) -> NodeAttestor:
    if settings.cert_file is not None and settings.key_file is not None:
        return CertificateAttestor(settings.cert_file, settings.key_file)
    return JoinTokenAttestor(token_file=settings.join_token_file)
