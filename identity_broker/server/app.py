"""The broker at work: its parts, built by `server.parts`, and what they do.

- Parts → jobs → listeners; closed in reverse.
- The broker is ready when all listeners are bound, and says so by calling `ready`.
- It stops by draining: no new calls, a grace for running ones, the ledger flushed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from starlette.routing import Route

from identity_broker.config.settings import LimitSettings, Settings
from identity_broker.domain.clock import Clock, SystemClock
from identity_broker.errors import AuthorityUnavailable, BrokerError
from identity_broker.lifecycle.directory import Update
from identity_broker.lifecycle.leaks import Leaks
from identity_broker.server.http.app import build_app
from identity_broker.server.http.crl import crl_routes
from identity_broker.server.http.leaks import leak_routes
from identity_broker.server.http.listener import HttpListener
from identity_broker.server.http.ocsp import ocsp_routes
from identity_broker.server.http.readiness import Readiness
from identity_broker.server.http.revocations import revocation_routes
from identity_broker.server.jobs import Job, Jobs
from identity_broker.server.jobs.retention import Retention
from identity_broker.server.jobs.status_watch import StatusWatch
from identity_broker.server.parts import Parts, build_parts
from identity_broker.server.refusals import Refusals
from identity_broker.server.rpc.health import Health
from identity_broker.server.rpc.limits import RateLimiter
from identity_broker.server.rpc.listener import BootstrapListener, LocalListener, MtlsListener
from identity_broker.server.rpc.methods import Rate, RateName
from identity_broker.server.rpc.pipeline import build_handlers
from identity_broker.server.rpc.reflection import reflection_services, service_names
from identity_broker.telemetry.logs import get_logger
from identity_ca.authority import Authority, AuthorityKind

_log = get_logger("broker")

_10S: Final = timedelta(seconds=10)
_30S: Final = timedelta(seconds=30)


@dataclass(frozen=True, slots=True)
class BoundAddresses:
    """Where the broker listens, free ports resolved."""

    address: str
    bootstrap_address: str
    http_address: str
    admin_socket: Path


async def run_broker(
    settings: Settings,
    *,
    ready: Callable[[BoundAddresses], None] | None = None,
    stop: asyncio.Event | None = None,
    clock: Clock | None = None,
) -> None:
    """Run a broker until `stop` is set (or the task is cancelled).

    Args:
        ready: called once, when every listener is bound.

    Raises:
        ConfigError: the settings name something that cannot be used.
        StoreUnavailable, SigningBackendUnavailable: a dependency is away at the start.
    """
    stop = stop or asyncio.Event()
    async with AsyncExitStack() as resources:
        broker = Broker(await build_parts(settings, clock or SystemClock(), resources))
        addresses = await broker.serve(resources)
        if ready is not None:
            ready(addresses)
        _log.info("ready", trust_domain=str(settings.server.trust_domain))
        await stop.wait()
        _log.info("draining", timeout_s=settings.server.drain_timeout.total_seconds())


class Broker:
    """The parts at work: follows the change feed, runs the jobs, opens the doors."""

    def __init__(self, parts: Parts) -> None:
        self._settings = parts.settings
        self._clock = parts.clock
        self._metrics = parts.metrics
        self._store = parts.store
        self._signing = parts.signing
        self._directory = parts.directory
        self._record = parts.record
        self._rotate_authorities = parts.rotate_authorities
        self._rotate_server = parts.rotate_server
        self._trust = parts.trust
        self._gate = parts.gate
        self._revocation_lists = parts.revocation_lists
        self._node_sync = parts.node_sync
        self._feed = parts.feed
        self._statements = parts.statements
        self._revoke = parts.revoke
        self._ocsp_responders = parts.ocsp_responders
        self._ocsp = parts.ocsp
        self._services = parts.services
        self._leaks = Leaks(
            store=parts.store,
            revoke=parts.revoke,
            trust_domain=parts.settings.server.trust_domain,
            bundle=lambda: parts.signing.bundle,
            clock=parts.clock,
        )
        self._http_address: str | None = None
        self._status_watch = StatusWatch(
            address=lambda: self._http_address,
            # Those that are revoked have lists and answers too, until they expire.
            authorities=lambda: tuple(parts.signing.authorities.x509_set),
            store=parts.store,
            clock=parts.clock,
            metrics=parts.metrics,
        )
        self._refusals = Refusals(parts.store, parts.clock)
        self._retention = Retention(parts.store, parts.clock, parts.settings.ledger.retain_expired)
        self._stopping = asyncio.Event()
        self._health = Health(service_names(parts.services))
        self._readiness = Readiness(self._checks(), parts.metrics)
        self._following: set[asyncio.Task[None]] = set()

    async def serve(self, resources: AsyncExitStack) -> BoundAddresses:
        """Follow the change feed, start the jobs and open the doors.

        Raises:
            ConfigError: an address cannot be bound.
        """
        self._directory.listen(self._on_update)
        self._spawn(self._directory.follow())
        self._spawn(self._revocation_lists.run())
        self._spawn(self._resume())
        resources.push_async_callback(self._end_following)
        jobs = Jobs(self._job_table(), self._metrics)
        jobs.start()
        resources.callback(jobs.stop)
        http = HttpListener(
            self._settings.server.http_address,
            build_app(
                readiness=self._readiness,
                metrics=self._metrics,
                bundle=lambda: self._signing.bundle,
                stopping=self._stopping.is_set,
                routes=self._routes(),
            ),
        )
        doors: list[Callable[[timedelta], Awaitable[None]]] = []
        resources.push_async_callback(self._drain, doors)
        await http.start()
        self._http_address = http.address
        doors.append(http.stop)
        addresses = await self._open_listeners(doors, http.address)
        self._health.set_all(True)
        return addresses

    def _routes(self) -> list[Route]:
        routes = [
            *crl_routes(self._revocation_lists, clock=self._clock),
            *ocsp_routes(self._ocsp, clock=self._clock, metrics=self._metrics),
            *revocation_routes(
                self._directory,
                trust_domain=self._settings.server.trust_domain,
                clock=self._clock,
            ),
        ]
        revocation = self._settings.revocation
        if revocation.leak_reports:
            per_minute = revocation.leak_reports_per_minute
            routes += leak_routes(self._leaks, per_minute=per_minute, clock=self._clock)
        return routes

    async def _open_listeners(
        self, doors: list[Callable[[timedelta], Awaitable[None]]], http_address: str
    ) -> BoundAddresses:
        server = self._settings.server
        local = LocalListener(
            server.admin_socket,
            gid=server.admin_gid,
            on_count=self._metrics.local_connections.set,
        )
        mtls = MtlsListener(server.address, current_tls=self._trust.tls)
        bootstrap = BootstrapListener(server.bootstrap_address, current_tls=self._trust.tls)
        limiter = RateLimiter(_rates(self._settings.limits))
        services = {**self._services, **self._health.services()}
        services.update(reflection_services(services))
        for listener in (local, mtls, bootstrap):
            await listener.start(
                build_handlers(
                    services,
                    listener=listener.kind,
                    authenticate=self._gate.authenticate,
                    limiter=limiter,
                    metrics=self._metrics,
                    log=get_logger("rpc"),
                    stopping=self._stopping,
                    local_peers=local,
                    on_refused=self._refusals.put,
                )
            )
            doors.append(listener.stop)
        return BoundAddresses(
            address=mtls.address,
            bootstrap_address=bootstrap.address,
            http_address=http_address,
            admin_socket=server.admin_socket,
        )

    # --- what happens by itself -----------------------------------------------------------------

    def _job_table(self) -> list[Job]:
        settings = self._settings
        return [
            Job("refusals", timedelta(seconds=1), self._refusals.flush),
            Job("groups", timedelta(seconds=1), self._node_sync.look_at_groups),
            Job("holds", timedelta(seconds=1), self._revoke.lift_due),
            Job("revocations", timedelta(seconds=5), self._revoke.resume),
            Job("statements", timedelta(seconds=1), self._statements.run),
            Job("dependencies", timedelta(seconds=5), self._probe),
            Job("server_certificate", min(_10S, settings.svid.node_ttl / 8), self._renew_server),
            Job("bundle_file", _10S, self._trust.write_file),
            Job("status_watch", timedelta(minutes=1), self._status_watch.run),
            Job("ocsp_responders", _30S, self._ocsp_responders.renew),
            Job("authorities", min(_30S, settings.ca.x509_ca_ttl / 24), self._rotate),
            Job("sweep", min(_30S, settings.ledger.unconfirmed_after / 2), self._sweep),
            Job("expire", timedelta(minutes=1), self._expire),
            Job("retain", timedelta(hours=1), self._retention.run),
        ]

    async def _renew_server(self) -> None:
        if await self._rotate_server.run():
            self._trust.publish()

    async def _rotate(self) -> None:
        if await self._rotate_authorities.run():
            self._trust.publish()

    async def _sweep(self) -> None:
        self._metrics.unconfirmed_total.inc(await self._record.sweep())

    async def _expire(self) -> None:
        await self._record.expire()
        await self._directory.forget_expired()

    async def _probe(self) -> None:
        report = await self._readiness.report()
        self._health.set_all(report.ready and not self._stopping.is_set())
        self._metrics.ledger_pending.set(self._store.ledger.pending)
        self._metrics.directory_entries.set(self._directory.entry_count())
        self._metrics.directory_nodes.set(self._directory.node_count())
        self._metrics.directory_sequence.set(self._directory.seq)
        for kind, active in self._active_authorities():
            if active is not None:
                expires = active.not_after.timestamp()
                self._metrics.authority_expires.labels(kind.value).set(expires)

    def _checks(self) -> dict[str, Callable[[], Awaitable[None]]]:
        return {
            "store": self._store.check,
            "signing_backend": self._signing.check_keys,
            "authority": self._check_authority,
            "change_feed": self._directory.check,
            "revocation_lists": self._revocation_lists.check,
        }

    async def _check_authority(self) -> None:
        """An active X.509 and JWT authority, with some life left.

        Raises:
            AuthorityUnavailable: there is none.
        """
        now = self._clock.now()
        for kind, active in self._active_authorities():
            if active is None or active.not_after <= now:
                raise AuthorityUnavailable(f"no {kind.value} authority is active")

    def _active_authorities(self) -> list[tuple[AuthorityKind, Authority | None]]:
        authorities = self._signing.authorities
        return [
            (AuthorityKind.X509, authorities.x509_set.active),
            (AuthorityKind.JWT, authorities.jwt_set.active),
        ]

    def _on_update(self, update: Update) -> None:
        server = self._rotate_server.current
        own = server.credential.serial if server is not None else ""
        for revocation in update.revocations:
            self._metrics.revoked_total.labels(revocation.kind.value).inc()
        if update.authorities_changed:
            # Another broker on the same store rotated: put its authorities into force here.
            self._spawn(self._reinstall())
        elif any(revocation.id == own for revocation in update.revocations):
            self._spawn(self._replace_own())

    async def _reinstall(self) -> None:
        try:
            if await self._rotate_authorities.install():
                # One that was revoked signed our own certificate, maybe.
                await self._rotate_server.run()
                self._trust.publish()
                await self._trust.write_file()
        except BrokerError as error:
            _log.error("authorities not taken over", reason=error.reason, detail=error.detail)

    async def _resume(self) -> None:
        """Go on at once with what a crash cut off; the job does it from then on."""
        with suppress(BrokerError):  # it was logged
            await self._revoke.resume()

    async def _replace_own(self) -> None:
        try:
            await self._renew_server()
        except BrokerError as error:
            _log.error("server certificate not replaced", reason=error.reason, detail=error.detail)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._following.add(task)
        task.add_done_callback(self._following.discard)

    async def _end_following(self) -> None:
        tasks = tuple(self._following)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _drain(self, doors: Sequence[Callable[[timedelta], Awaitable[None]]]) -> None:
        """Close all doors at once; running calls share one deadline."""
        self._health.set_all(False)
        self._stopping.set()
        self._node_sync.stop()
        self._feed.stop()
        grace = self._settings.server.drain_timeout
        await asyncio.gather(*(stop(grace) for stop in doors))
        with suppress(BrokerError):
            await self._refusals.flush()


def _rates(limits: LimitSettings) -> dict[RateName, Rate]:
    return {
        RateName.ATTEST: Rate(limits.attest_per_second, limits.attest_burst),
        RateName.ISSUE: Rate(limits.issue_per_second, limits.issue_burst),
        RateName.READ: Rate(limits.read_per_second, limits.read_burst),
        RateName.WRITE: Rate(limits.write_per_second, limits.write_burst),
        RateName.WATCH: Rate(limits.watch_per_second, limits.watch_burst),
        RateName.FOLLOW: Rate(limits.follow_per_second, limits.follow_burst),
    }
