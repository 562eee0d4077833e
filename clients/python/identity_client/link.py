"""Calls to the broker: which channel, which message, which error. Decides nothing about when.

- The broker is authenticated on both listeners: by the trust bundle and by the one DNS SAN that
  stands for its SPIFFE ID. Nothing is sent before that held.
- Two channels at most: a short-lived one for attestation, and the mTLS one that is replaced
  whenever the node's certificate or the bundle changes; calls on the old one may finish.
- Every failure leaves as an IdentityError, and so does an answer that cannot be read.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, cast

import grpc
import grpc.aio

from identity_api.broker.v1 import (
    bundle_pb2,
    bundle_pb2_grpc,
    entry_pb2,
    entry_pb2_grpc,
    node_attestation_pb2,
    node_attestation_pb2_grpc,
    node_sync_pb2,
    node_sync_pb2_grpc,
    revocation_feed_pb2_grpc,
    svid_pb2,
    svid_pb2_grpc,
    types_pb2,
)
from identity_client._wire.calls import (
    REPLACED,
    STREAM_CUT,
    Duplex,
    calling,
    readable,
    streaming,
    write,
)
from identity_client._wire.convert import (
    AuthorizedEntry,
    bundle_from_wire,
    entries_from_wire,
)
from identity_client._wire.issued import jwts_from_wire, x509s_from_wire
from identity_client._wire.revocation_feed import FeedCall
from identity_client.clock import roll, utc_now
from identity_client.credential import BundleSnapshot, X509Material
from identity_client.errors import (
    IdentityError,
    IdentityNotReady,
    ProtocolViolation,
)
from identity_client.keys import KeyPair
from identity_client.node.settings import NodeSettings
from identity_client.node.values import (
    IssuedJwt,
    IssuedX509,
    JwtRequest,
    Verifier,
    X509Request,
)

__all__ = [
    "REPLACED",
    "STREAM_CUT",
    "Attested",
    "BrokerLink",
    "SyncCall",
    "issued_material",
]

_DRAIN_SECONDS = 5.0
_MAX_RECEIVE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Attested:
    """What a successful attestation gave."""

    material: X509Material
    bundle: BundleSnapshot
    bundle_message: bytes = field(repr=False)
    reattestable: bool


class BrokerLink:
    """The connection of one node to its broker. Belongs to one event loop."""

    def __init__(self, settings: NodeSettings) -> None:
        self._settings = settings
        self._channel: grpc.aio.Channel | None = None
        self._draining: set[asyncio.Task[None]] = set()

    async def attest(self, roots: bytes) -> Attested:
        """Proves this machine to the broker and receives a node SVID for a fresh key.

        Args:
            roots: the CA certificates the broker is recognised by, PEM.

        Raises:
            IdentityError: JOIN_TOKEN_REJECTED, CHALLENGE_FAILED, NODE_BANNED, BROKER_UNREACHABLE…
        """
        attestor = self._settings.attestor
        payload = await asyncio.to_thread(attestor.payload)
        pair = KeyPair()
        begin = node_attestation_pb2.AttestRequest.Begin(
            attestor=attestor.name, payload=payload, csr=pair.csr()
        )
        channel = self._secure(self._settings.bootstrap_address, roots)
        try:
            result = await calling(self._attest_on(channel, begin, pair))
        finally:
            await channel.close()
        bundle = bundle_from_wire(result.bundle, self._settings.domain)
        return Attested(
            material=issued_material(result.svid.cert_chain, pair, bundle, result.svid.hint),
            bundle=bundle,
            bundle_message=result.bundle.SerializeToString(),
            reattestable=result.reattestable,
        )

    async def _attest_on(
        self,
        channel: grpc.aio.Channel,
        begin: node_attestation_pb2.AttestRequest.Begin,
        pair: KeyPair,
    ) -> node_attestation_pb2.AttestResponse.Result:
        request = node_attestation_pb2.AttestRequest
        stub = node_attestation_pb2_grpc.NodeAttestationStub(channel)
        call: Any = stub.Attest(timeout=self._settings.rpc_timeout)
        await write(call, request(begin=begin))
        async for response in readable(call):
            if response.HasField("result"):
                await call.done_writing()
                return response.result  # type: ignore[no-any-return]
            answer = await asyncio.to_thread(
                self._settings.attestor.respond,
                response.challenge,
                public_key_der=pair.public_der(),
                trust_domain=self._settings.domain.name,
            )
            await write(call, request(challenge_response=answer))
        raise ProtocolViolation("the broker ended the attestation without a result")

    def connect(self, node: X509Material, roots: bytes) -> None:
        """Uses `node` for every call from now on; calls under way may finish."""
        old, self._channel = (
            self._channel,
            self._secure(self._settings.address, roots, node),
        )
        if old is not None:
            # Not all nodes at once: a new bundle makes every one of them reconnect.
            task = asyncio.get_running_loop().create_task(old.close(_DRAIN_SECONDS * (1 + roll())))
            self._draining.add(task)
            task.add_done_callback(self._draining.discard)

    async def renew_node(self, csr: bytes) -> types_pb2.X509Svid:
        """A fresh SVID for the node, unchecked."""
        stub = node_attestation_pb2_grpc.NodeAttestationStub(self._connected())
        request = node_attestation_pb2.RenewRequest(csr=csr)
        response = await self._unary(stub.Renew, request)
        return response.svid  # type: ignore[no-any-return]

    async def list_authorized(self, *, now: datetime) -> tuple[AuthorizedEntry, ...]:
        """The identities this machine may ask for."""
        stub = entry_pb2_grpc.EntryStub(self._connected())
        response = await self._unary(stub.ListAuthorized, entry_pb2.ListAuthorizedRequest())
        return entries_from_wire(response.entries, now=now)

    async def issue_x509(self, orders: Sequence[X509Request]) -> list[IssuedX509 | IdentityError]:
        """X.509-SVIDs for at most 500 orders, in order, unchecked."""
        stub = svid_pb2_grpc.SvidStub(self._connected())
        item = svid_pb2.BatchIssueX509Request.Item
        request = svid_pb2.BatchIssueX509Request(
            items=[item(entry_id=o.entry_id, csr=o.csr, instance=o.instance) for o in orders]
        )
        response = await self._unary(stub.BatchIssueX509, request)
        return x509s_from_wire(response.results, len(orders))

    async def issue_jwt(self, orders: Sequence[JwtRequest]) -> list[IssuedJwt | IdentityError]:
        """JWT-SVIDs for at most 500 orders, in order, unchecked."""
        stub = svid_pb2_grpc.SvidStub(self._connected())
        item = svid_pb2.BatchIssueJwtRequest.Item
        request = svid_pb2.BatchIssueJwtRequest(
            items=[item(entry_id=o.entry_id, audiences=o.audiences) for o in orders]
        )
        response = await self._unary(stub.BatchIssueJwt, request)
        return jwts_from_wire(response.results, len(orders))

    async def get_bundle(self) -> types_pb2.TrustBundle:
        """The trust bundle as it is now."""
        stub = bundle_pb2_grpc.BundleStub(self._connected())
        response = await self._unary(stub.Get, bundle_pb2.GetBundleRequest())
        return response.bundle  # type: ignore[no-any-return]

    async def watch_bundle(self) -> AsyncIterator[types_pb2.TrustBundle]:
        """The trust bundle now and whenever it changes."""
        stub = bundle_pb2_grpc.BundleStub(self._connected())
        call: Any = stub.Watch(bundle_pb2.WatchBundleRequest())
        async with streaming(call):
            async for response in readable(call):
                yield response.bundle

    def revocation_feed(self) -> FeedCall:
        """Opens the stream of revocations; nothing is sent yet."""
        stub = revocation_feed_pb2_grpc.RevocationFeedStub(self._connected())
        return FeedCall(stub.Follow(), self._settings.rpc_timeout)

    def sync(self) -> SyncCall:
        """Opens the stream of changes; nothing is sent yet."""
        stub = node_sync_pb2_grpc.NodeSyncStub(self._connected())
        return SyncCall(stub.Sync(), self._settings.rpc_timeout)

    async def close(self) -> None:
        """Ends every connection."""
        channel, self._channel = self._channel, None
        for task in list(self._draining):
            task.cancel()
        if channel is not None:
            await channel.close()

    def _connected(self) -> grpc.aio.Channel:
        if self._channel is None:
            raise IdentityNotReady("this machine has not been attested yet")
        return self._channel

    async def _unary(self, method: Callable[..., Any], request: object) -> Any:
        return await calling(method(request, timeout=self._settings.rpc_timeout))

    def _secure(
        self, address: str, roots: bytes, node: X509Material | None = None
    ) -> grpc.aio.Channel:
        credentials = grpc.ssl_channel_credentials(
            root_certificates=roots,
            private_key=node.key_pem if node else None,
            certificate_chain=node.chain_pem if node else None,
        )
        options = (
            ("grpc.ssl_target_name_override", self._settings.server_name),
            # Subchannels are shared by target; a new certificate needs a connection of its own.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2000),
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.max_receive_message_length", _MAX_RECEIVE_BYTES),
        )
        return grpc.aio.secure_channel(address, credentials, options)


class SyncCall(Duplex):
    """One call of NodeSync.Sync."""

    async def hello(self, *, resume_from: int, entries_digest: int, version: str) -> None:
        """Sends the first message; why it could not be sent, `read` says."""
        hello = node_sync_pb2.SyncRequest.Hello(
            resume_from=resume_from, entries_digest=entries_digest, version=version
        )
        await self.begin(node_sync_pb2.SyncRequest(hello=hello))

    async def read(self, within: float) -> node_sync_pb2.SyncResponse:
        """The broker's next message.

        Args:
            within: seconds after which the stream counts as broken.

        Raises:
            IdentityError: the stream has ended.
        """
        return cast("node_sync_pb2.SyncResponse", await self.next_message(within))

    async def acknowledge(self, revision: int) -> None:
        """Sends an acknowledgement; on a stream that has ended, does nothing."""
        ack = node_sync_pb2.SyncRequest.Ack(revision=revision)
        await self.send(node_sync_pb2.SyncRequest(ack=ack))

    async def report(self, verifiers: Iterable[Verifier]) -> None:
        """Sends who follows revocations through this node; as `acknowledge`."""
        request = node_sync_pb2.SyncRequest()
        request.verifiers.SetInParent()  # None is something to tell, too.
        for each in verifiers:
            request.verifiers.verifiers.add(name=each.name, revision=each.revision)
        await self.send(request)


def issued_material(
    chain: Sequence[bytes], pair: KeyPair, bundle: BundleSnapshot, hint: str
) -> X509Material:
    """A chain that was issued just now for the key of `pair`, checked.

    Raises:
        ProtocolViolation: reason CHAIN_UNTRUSTED when it does not lead to `bundle` (a newer one may
            help), CLOCK_SKEW when it has expired already, PROTOCOL_VIOLATION for anything else.
    """
    material = X509Material.from_chain(
        chain, private_key=pair.private_key, bundle=bundle, received=utc_now(), hint=hint
    )
    if material.not_after <= material.received:
        raise ProtocolViolation(
            "the certificate had expired when it arrived",
            reason="CLOCK_SKEW",
            hint="compare this machine's clock with the broker's",
        )
    return material
