"""Envoy's secret discovery on a real agent socket, and a bare client of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from envoy.config.core.v3 import base_pb2
from envoy.extensions.transport_sockets.tls.v3 import secret_pb2
from envoy.service.discovery.v3 import discovery_pb2
from envoy.service.secret.v3 import sds_pb2_grpc

from identity_broker.agent.identity import Caller
from identity_broker.agent.sds.messages import TYPE_URL
from identity_broker.agent.sds.service import SERVICE_NAME, SecretDiscovery
from identity_broker.agent.workload_api.limits import CallerLimits, Limits
from identity_broker.telemetry.metrics import Metrics
from support.workload_api import ServedWorkloadApi, served
from support.workload_identities import FakeIdentities


@dataclass
class ServedSecrets:
    """A socket with secret discovery that is up."""

    identities: FakeIdentities
    api: ServedWorkloadApi
    service: SecretDiscovery
    metrics: Metrics

    @property
    def socket(self) -> str:
        return self.api.socket

    def stub(self) -> Any:
        """The service's calls, on a connection of their own."""
        return sds_pb2_grpc.SecretDiscoveryServiceStub(self.api.channel())

    def counted(self, method: str, reason: str) -> int:
        """Calls that ended so."""
        return self.metrics.rpc_total.labels(f"/{SERVICE_NAME}/{method}", reason).value

    async def quiet(self, *, streams: int = 0) -> None:
        """Wait until that many streams are served.

        Raises:
            AssertionError: there are others after ten seconds.
        """
        async with asyncio.timeout(10):
            while self.service.streams != streams:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def secrets_served(
    directory: Path, identities: FakeIdentities | None = None, *, limits: Limits | None = None
) -> AsyncIterator[ServedSecrets]:
    """Serve for as long as the block lasts."""
    identities = identities or FakeIdentities()
    started: list[ServedWorkloadApi] = []

    def caller_of(peer: str) -> Caller:
        return started[0].listener.callers.of(peer)

    metrics = Metrics()
    service = SecretDiscovery(identities, caller_of, limits=CallerLimits(limits), metrics=metrics)
    async with served(directory, identities, handlers=service.handlers()) as api:
        started.append(api)
        try:
            yield ServedSecrets(identities, api, service, metrics)
        finally:
            service.end_streams()


@pytest.fixture
async def secrets(open_directory: Path) -> AsyncIterator[ServedSecrets]:
    """Secret discovery on a socket; nobody has an identity yet."""
    async with secrets_served(open_directory) as served_secrets:
        yield served_secrets


class SecretStream:
    """One stream of either variant, that says and reads what the test wants."""

    def __init__(self, call: Any, *, delta: bool = False) -> None:
        self.call = call
        self._delta = delta
        self._named = False
        self.last: Any = None
        self._reading: asyncio.Task[Any] | None = None

    async def ask(self, *names: str, metadata: dict[str, bool] | None = None, **more: Any) -> None:
        """Subscribe; with `metadata` in the node of the first request."""
        request: Any
        if self._delta:
            request = discovery_pb2.DeltaDiscoveryRequest(
                type_url=TYPE_URL, resource_names_subscribe=names, **more
            )
        else:
            request = discovery_pb2.DiscoveryRequest(
                type_url=TYPE_URL, resource_names=names, **more
            )
        if not self._named:
            request.node.CopyFrom(base_pb2.Node(id="test"))
            request.node.metadata.update(metadata or {})
            self._named = True
        await self.call.write(request)

    async def answer(self, *names: str, refusal: str = "") -> None:
        """Acknowledge the last response, or refuse it."""
        more: dict[str, Any] = {"response_nonce": self.last.nonce}
        if not self._delta:
            more["version_info"] = self.last.version_info
        if refusal:
            more["error_detail"] = {"code": 13, "message": refusal}
        await self.ask(*names, **more)

    async def read(self, timeout: float = 10) -> dict[str, Any]:
        """The secrets of the next response, by name.

        Raises:
            AssertionError: the stream ended.
        """
        async with asyncio.timeout(timeout):
            self.last = await asyncio.shield(self._next())
        self._reading = None
        assert self.last is not grpc.aio.EOF, await self.call.details()
        assert self.last.type_url == TYPE_URL
        packed = [each.resource if self._delta else each for each in self.last.resources]
        found: dict[str, Any] = {}
        for any_message in packed:
            secret = secret_pb2.Secret()
            assert any_message.Unpack(secret)
            found[secret.name] = secret
        assert len(found) == len(packed)
        return found

    async def is_silent(self, seconds: float = 0.3) -> bool:
        """Whether nothing is said for a while."""
        done, _ = await asyncio.wait({self._next()}, timeout=seconds)
        return not done

    def _next(self) -> asyncio.Task[Any]:
        # Kept: whoever stops waiting for a read of gRPC's ends the call.
        if self._reading is None:
            self._reading = asyncio.ensure_future(self.call.read())
        return self._reading


def leaf_pem(secret: Any) -> bytes:
    """The first certificate of a TLS certificate secret."""
    chain: bytes = secret.tls_certificate.certificate_chain.inline_bytes
    return chain[: chain.index(b"-----END CERTIFICATE-----")]
