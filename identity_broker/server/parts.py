"""Every part of the broker, built by hand, top to bottom; `server.app` puts them to work.

- Telemetry → store → signing → directory → verbs → services.
- A part is given what it needs and nothing else; there is no container and no global.
- Nothing is served and nothing runs by itself yet.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from contextlib import AsyncExitStack, ExitStack, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Final

from identity_broker.config.settings import RevocationSettings, Settings
from identity_broker.domain.clock import Clock
from identity_broker.domain.selector_syntax import SelectorSyntax
from identity_broker.errors import ConfigError
from identity_broker.lifecycle.attest import Attest
from identity_broker.lifecycle.authorize import Authorize, Gate, TtlPolicy
from identity_broker.lifecycle.concerned import ConcernedNodes
from identity_broker.lifecycle.crl.lists import GATHER, RevocationLists
from identity_broker.lifecycle.directory import Directory
from identity_broker.lifecycle.feed import RevocationFeed
from identity_broker.lifecycle.issue import Issue
from identity_broker.lifecycle.ocsp import Ocsp
from identity_broker.lifecycle.ocsp_responders import Responders
from identity_broker.lifecycle.propagation import Propagation
from identity_broker.lifecycle.record import Record
from identity_broker.lifecycle.revoke import Revoke
from identity_broker.lifecycle.roster import Roster
from identity_broker.lifecycle.rotate import (
    AuthorityPolicy,
    RotateAuthorities,
    RotateNode,
    RotateServer,
)
from identity_broker.lifecycle.statement import Statements
from identity_broker.lifecycle.sync import NodeSync
from identity_broker.lifecycle.verifiers import VerifierKind, Verifiers
from identity_broker.registry.entries import Entries
from identity_broker.registry.nodes import Nodes
from identity_broker.server.backends import build_attestors, build_backends
from identity_broker.server.rpc.pipeline import ServiceFunction
from identity_broker.server.rpc.services.authority import AuthorityService
from identity_broker.server.rpc.services.bundle import BundleService
from identity_broker.server.rpc.services.credential import CredentialService
from identity_broker.server.rpc.services.entry import EntryService
from identity_broker.server.rpc.services.node import NodeService
from identity_broker.server.rpc.services.node_attestation import NodeAttestationService
from identity_broker.server.rpc.services.node_sync import NodeSyncService
from identity_broker.server.rpc.services.revocation import RevocationService
from identity_broker.server.rpc.services.revocation_feed import RevocationFeedService
from identity_broker.server.rpc.services.svid import SvidService
from identity_broker.server.trust import Trust
from identity_broker.signing import Signing
from identity_broker.store import Store
from identity_broker.telemetry.metrics import Metrics
from identity_ca.distribution import DistributionPoints

# A list goes to every connected node: many of them are not told of one more often than they can be.
_LIST_PACE_OF_EACH: Final = timedelta(milliseconds=1)
_LIST_OCTETS_A_SECOND: Final = 50_000_000
# Calls make few cycles: collect ten times less often than Python would.
_GC_THRESHOLDS: Final = (7_000, 20, 50)


@dataclass(frozen=True, slots=True)
class Parts:
    """All parts, built; nothing is served yet."""

    settings: Settings
    clock: Clock
    metrics: Metrics
    store: Store
    signing: Signing
    directory: Directory
    record: Record
    rotate_authorities: RotateAuthorities
    rotate_server: RotateServer
    trust: Trust
    gate: Gate
    revocation_lists: RevocationLists
    node_sync: NodeSync
    feed: RevocationFeed
    statements: Statements
    revoke: Revoke
    ocsp_responders: Responders
    ocsp: Ocsp
    services: Mapping[str, ServiceFunction]


async def build_parts(settings: Settings, clock: Clock, resources: AsyncExitStack) -> Parts:
    """Build every part, in order; `resources` closes them in reverse.

    Raises:
        ConfigError: the settings name something that cannot be used.
        StoreUnavailable, SigningBackendUnavailable: a dependency is away.
    """
    trust_domain = settings.server.trust_domain
    metrics = Metrics()

    store = await _opened_store(settings, clock, metrics, resources)
    points = _distribution_points(settings.revocation)
    backends = build_backends(settings, resources.enter_context(ExitStack()))
    signing = Signing(
        trust_domain=trust_domain,
        keys=backends.keys,
        upstream=backends.upstream,
        refresh_hint=settings.bundle.refresh_hint,
        points=points,
        observe=lambda kind, seconds: metrics.signing_seconds.labels(kind).observe(seconds),
    )
    resources.push_async_callback(signing.close)

    directory = Directory(store, trust_domain, clock)
    await directory.load()
    _settle_memory()

    ttl = TtlPolicy(
        x509=settings.svid.x509_ttl,
        jwt=settings.svid.jwt_ttl,
        node=settings.svid.node_ttl,
        max_x509=settings.svid.max_x509_ttl,
        max_jwt=settings.svid.max_jwt_ttl,
    )
    authorize = Authorize(
        directory, trust_domain, ttl, clock, broker_dns_names=settings.server.dns_names
    )
    record = Record(store, clock, unconfirmed_after=settings.ledger.unconfirmed_after)
    issue = Issue(
        signing,
        record,
        clock,
        is_key_blocked=directory.is_key_blocked,
        epoch=directory.epoch,
    )
    attest = Attest(
        attestors=build_attestors(settings, store, clock),
        authorize=authorize,
        issue=issue,
        store=store,
        directory=directory,
        clock=clock,
    )
    resources.push_async_callback(attest.settled)
    resources.push_async_callback(issue.settled)
    rotate_node = RotateNode(
        authorize=authorize, issue=issue, store=store, directory=directory, clock=clock
    )
    rotate_authorities = RotateAuthorities(
        signing=signing,
        store=store,
        policy=AuthorityPolicy(
            x509_algorithm=settings.ca.key_algorithm,
            x509_ttl=settings.ca.x509_ca_ttl,
            jwt_algorithm=settings.ca.jwt_key_algorithm,
            jwt_ttl=settings.ca.jwt_key_ttl,
            refresh_hint=settings.bundle.refresh_hint,
        ),
        clock=clock,
    )
    rotate_server = RotateServer(
        authorize=authorize,
        issue=issue,
        clock=clock,
        is_revoked=directory.is_revoked,
        is_trusted=signing.is_trusted,
    )
    trust = Trust(signing, rotate_server, settings.server.bundle_file)

    await rotate_authorities.start()
    await rotate_server.run()
    trust.publish()
    await trust.write_file()

    async def revoke_authority(authority_id: str, actor: str) -> None:
        await rotate_authorities.revoke(authority_id, actor)
        # Those who call with the new bundle find a certificate that holds by it.
        await rotate_server.run()
        trust.publish()
        with suppress(ConfigError):  # the job that writes it says so
            await trust.write_file()

    revoke = Revoke(store, directory, clock, issue.settled, revoke_authority=revoke_authority)
    resources.push_async_callback(revoke.close)

    verifiers, feed, propagation = _verifiers(directory, store, clock, metrics)
    statements = Statements(
        store=store,
        signing=signing,
        propagation=propagation,
        clock=clock,
        acknowledge_timeout=settings.revocation.acknowledge_timeout,
    )
    revoke.on_committed += [propagation.begun, statements.committed]
    roster = Roster(on_count=metrics.agents_connected.set, verifiers=verifiers)
    revocation_lists = RevocationLists(
        signing=signing,
        directory=directory,
        store=store,
        clock=clock,
        validity=settings.revocation.crl_validity,
        points=points,
        metrics=metrics,
        pace=partial(_list_pace, roster),
    )
    node_sync = NodeSync(
        directory=directory,
        authorize=authorize,
        roster=roster,
        trust_domain=trust_domain,
        clock=clock,
        bundle=lambda: signing.bundle,
        lists=lambda: revocation_lists.current,
    )
    await revocation_lists.start()
    trust.listen(node_sync.bundle_changed)
    trust.listen(revocation_lists.wake)
    revocation_lists.listen(node_sync.lists_changed)

    ocsp_responders = Responders(
        signing=signing,
        store=store,
        clock=clock,
        is_revoked=directory.is_revoked,
        keep_ready=settings.revocation.public_url is not None,
    )
    ocsp = Ocsp(
        signing=signing,
        directory=directory,
        store=store,
        responders=ocsp_responders,
        clock=clock,
        validity=settings.revocation.ocsp_validity,
    )

    entries = Entries(store, directory, trust_domain, clock)
    nodes = Nodes(store, revoke, trust_domain, clock)
    services: dict[str, ServiceFunction] = {}
    for service in (
        NodeAttestationService(attest, rotate_node, signing, metrics),
        SvidService(authorize, issue, metrics),
        EntryService(
            entries,
            authorize,
            directory,
            SelectorSyntax({*settings.entries.selector_types, *settings.attestors.plugins}),
        ),
        NodeService(nodes, directory.is_revoked),
        BundleService(signing, trust.listen),
        CredentialService(store),
        RevocationService(revoke, propagation, roster, trust_domain, clock),
        AuthorityService(signing),
        NodeSyncService(node_sync, roster, directory, metrics, clock),
        RevocationFeedService(feed, metrics, clock),
    ):
        services.update(service.functions())
    return Parts(
        settings=settings,
        clock=clock,
        metrics=metrics,
        store=store,
        signing=signing,
        directory=directory,
        record=record,
        rotate_authorities=rotate_authorities,
        rotate_server=rotate_server,
        trust=trust,
        gate=Gate(
            directory,
            trust_domain,
            clock,
            is_authority=signing.is_trusted,
            admin_gid=settings.server.admin_gid,
        ),
        revocation_lists=revocation_lists,
        node_sync=node_sync,
        feed=feed,
        statements=statements,
        revoke=revoke,
        ocsp_responders=ocsp_responders,
        ocsp=ocsp,
        services=services,
    )


def _distribution_points(revocation: RevocationSettings) -> DistributionPoints | None:
    """The public addresses of lists and responder, if they have any."""
    if revocation.public_url is None:
        return None
    return DistributionPoints(revocation.public_url, revocation.crl_shards)


def _list_pace(roster: Roster, octets: int) -> timedelta:
    """The least time between two tellings of lists of so many bytes."""
    network = timedelta(seconds=len(roster) * octets / _LIST_OCTETS_A_SECOND)
    return max(GATHER, len(roster) * _LIST_PACE_OF_EACH, network)


async def _opened_store(
    settings: Settings, clock: Clock, metrics: Metrics, resources: AsyncExitStack
) -> Store:
    def committed(rows: int, seconds: float) -> None:
        metrics.ledger_commit_rows.observe(rows)
        metrics.ledger_commit_seconds.observe(seconds)

    store = Store(settings.database_url, clock=clock, on_commit=committed)
    resources.push_async_callback(store.close)
    await store.migrate()
    return store


def _verifiers(
    directory: Directory, store: Store, clock: Clock, metrics: Metrics
) -> tuple[Verifiers, RevocationFeed, Propagation]:
    """Who is told of revocations, by what, and who has heard."""

    def verifiers_connected(kind: VerifierKind, count: int) -> None:
        metrics.verifiers_connected.labels(kind.value).set(count)

    verifiers = Verifiers(verifiers_connected)
    feed = RevocationFeed(directory, verifiers)
    propagation = Propagation(
        verifiers,
        directory,
        clock,
        needed=feed.needed,
        nodes_of=ConcernedNodes(store, clock).of,
        on_acknowledged=metrics.revocation_propagation_seconds.observe,
        on_outcome=lambda outcome: metrics.revocation_acknowledgements_total.labels(
            outcome.value
        ).inc(),
    )
    return verifiers, feed, propagation


def _settle_memory() -> None:
    """Spare the garbage collector what lives as long as the process: code and the directory."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)
