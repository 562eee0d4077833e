"""A listener with made-up services: what the pipeline and the listeners are tested with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc

from identity_api.broker.v1 import bundle_pb2
from identity_broker.domain.caller import (
    Caller,
    CallerClass,
    ListenerKind,
    LocalPeer,
    PeerCertificate,
)
from identity_broker.server.rpc.limits import RateLimiter
from identity_broker.server.rpc.listener import BootstrapListener, LocalListener, MtlsListener
from identity_broker.server.rpc.methods import METHODS, MethodRow, Rate, RateName
from identity_broker.server.rpc.pipeline import RefusedCall, ServiceFunction, build_handlers
from identity_broker.telemetry.logs import get_logger
from identity_broker.telemetry.metrics import Metrics
from support.tls_material import KeyPair, TestAuthority

GET = "/identity_api.broker.v1.Bundle/Get"
WATCH = "/identity_api.broker.v1.Bundle/Watch"
ATTEST = "/identity_api.broker.v1.NodeAttestation/Attest"
ISSUE = "/identity_api.broker.v1.Svid/BatchIssueX509"
RENEW = "/identity_api.broker.v1.NodeAttestation/Renew"
ENTRY_LIST = "/identity_api.broker.v1.Entry/List"
NONE = timedelta(0)


def everybody(
    listener: ListenerKind, peer: PeerCertificate | LocalPeer | None, address: str
) -> Caller:
    """An authenticator that believes everything."""
    if isinstance(peer, PeerCertificate):
        return Caller(
            frozenset({CallerClass.NODE}), str(peer.spiffe_id), peer.spiffe_id, peer.serial
        )
    if isinstance(peer, LocalPeer):
        return Caller(frozenset({CallerClass.LOCAL}), f"uid:{peer.uid}", local=peer)
    return Caller(frozenset({CallerClass.ANYONE}), address)


def unix_channel(address: str, options: Any = ()) -> Any:
    """A channel to a Unix socket, as untyped as the raw bytes that go through it."""
    return grpc.aio.insecure_channel(address, options)


async def empty_bundle(_request: Any, _call: Any) -> bundle_pb2.GetBundleResponse:
    return bundle_pb2.GetBundleResponse()


@dataclass
class Shell:
    """The parts around the services of one test."""

    services: Mapping[str, ServiceFunction]
    authenticate: Callable[..., Caller] = everybody
    rates: Mapping[RateName, Rate] = field(default_factory=dict)
    methods: Mapping[str, MethodRow] = field(default_factory=lambda: METHODS)
    metrics: Metrics = field(default_factory=Metrics)
    authority: TestAuthority = field(default_factory=TestAuthority)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    refused: list[RefusedCall] = field(default_factory=list)

    def handlers(
        self, kind: ListenerKind, local: LocalListener | None = None
    ) -> list[grpc.GenericRpcHandler]:
        return build_handlers(
            self.services,
            listener=kind,
            authenticate=self.authenticate,
            limiter=RateLimiter(self.rates),
            metrics=self.metrics,
            log=get_logger("rpc"),
            stopping=self.stopping,
            local_peers=local,
            on_refused=self.refused.append,
            methods=self.methods,
        )

    @asynccontextmanager
    async def bootstrap(self) -> AsyncIterator[Any]:
        """A channel to a bootstrap listener."""
        tls = self.authority.broker()
        listener = BootstrapListener("127.0.0.1:0", current_tls=lambda: tls)
        await listener.start(self.handlers(ListenerKind.BOOTSTRAP))
        credentials = grpc.ssl_channel_credentials(self.authority.pem)
        try:
            async with grpc.aio.secure_channel(listener.address, credentials) as channel:
                yield channel
        finally:
            await listener.stop(NONE)

    @asynccontextmanager
    async def mtls(self) -> AsyncIterator[MtlsListener]:
        """An mTLS listener."""
        tls = self.authority.broker()
        listener = MtlsListener("127.0.0.1:0", current_tls=lambda: tls)
        await listener.start(self.handlers(ListenerKind.MTLS))
        try:
            yield listener
        finally:
            await listener.stop(NONE)

    def channel(self, address: str, client: KeyPair | None) -> Any:
        """A channel that trusts this shell's authority."""
        credentials = grpc.ssl_channel_credentials(
            self.authority.pem,
            client.key_pem if client else None,
            client.chain_pem if client else None,
        )
        return grpc.aio.secure_channel(address, credentials)

    @asynccontextmanager
    async def local(self, path: Path, **options: Any) -> AsyncIterator[LocalListener]:
        """A listener on the admin socket."""
        listener = LocalListener(path, **options)
        await listener.start(self.handlers(ListenerKind.LOCAL, listener))
        try:
            yield listener
        finally:
            await listener.stop(NONE)

    def count(self, method: str, reason: str) -> float:
        """How many calls of the method ended with the reason."""
        value = self.metrics.registry.get_sample_value(
            "idb_rpc_total", {"method": method, "reason": reason}
        )
        return value or 0.0


def leaves(root: type[Any]) -> list[type[Any]]:
    """Every class below `root` that has no subclass."""
    found: list[type[Any]] = []
    for cls in root.__subclasses__():
        found += leaves(cls) or [cls]
    return found
