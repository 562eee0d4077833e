"""Calls to the broker: which channel, which message, which error. Decides nothing about when.

- The broker is authenticated on both listeners: by the trust bundle and by the one DNS SAN that
  stands for its SPIFFE ID. Nothing is sent before that held.
- Two channels at most: a short-lived one for attestation, and the mTLS one that is replaced
  whenever the node's certificate or the bundle changes; calls on the old one may finish.
- Every failure leaves as an IdentityError.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

import grpc
import grpc.aio

from identity_api.broker.v1 import (
    bundle_pb2,
    bundle_pb2_grpc,
    credential_pb2,
    credential_pb2_grpc,
    entry_pb2,
    entry_pb2_grpc,
    node_attestation_pb2,
    node_attestation_pb2_grpc,
    svid_pb2,
    svid_pb2_grpc,
    types_pb2,
)
from identity_client._wire.convert import (
    AuthorizedEntry,
    bundle_from_wire,
    entries_from_wire,
    revocations_from_wire,
)
from identity_client._wire.status import error_from_item, error_from_rpc
from identity_client.clock import utc_now
from identity_client.credential import BundleSnapshot, X509Material
from identity_client.errors import BrokerUnavailable, IdentityNotReady, ProtocolViolation
from identity_client.keys import KeyPair
from identity_client.revocation import RevokedCredential
from identity_client.settings import SourceSettings

__all__ = ["REPLACED", "Attested", "BrokerLink", "RevocationUpdate"]

REPLACED = "CONNECTION_REPLACED"
_DRAIN_SECONDS = 5.0
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Attested:
    """What a successful attestation gave."""

    material: X509Material
    bundle: BundleSnapshot
    bundle_message: bytes = field(repr=False)
    reattestable: bool


@dataclass(frozen=True, slots=True)
class RevocationUpdate:
    """One message of the revocation stream."""

    revoked: tuple[RevokedCredential, ...]
    synced: bool


class BrokerLink:
    """The connection of one source to its broker. Belongs to one event loop."""

    def __init__(self, settings: SourceSettings) -> None:
        self._settings = settings
        self._channel: grpc.aio.Channel | None = None
        self._draining: set[asyncio.Task[None]] = set()

    async def attest(self, anchors: BundleSnapshot) -> Attested:
        """Proves this machine to the broker and receives a node SVID for a fresh key.

        Raises:
            IdentityError: JOIN_TOKEN_REJECTED, CHALLENGE_FAILED, NODE_BANNED, BROKER_UNREACHABLE…
        """
        attestor = self._settings.attestor
        payload = await asyncio.to_thread(attestor.payload)
        pair = KeyPair()
        begin = node_attestation_pb2.AttestRequest.Begin(
            attestor=attestor.name, payload=payload, csr=pair.csr()
        )
        channel = self._secure(self._settings.bootstrap_address, anchors)
        try:
            result = await _calling(self._attest_on(channel, begin, pair))
        finally:
            await channel.close()
        bundle = bundle_from_wire(result.bundle, self._settings.trust_domain)
        return Attested(
            material=_material(result.svid, pair, bundle),
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
        await _write(call, request(begin=begin))
        async for response in call:
            if response.HasField("result"):
                await call.done_writing()
                return response.result  # type: ignore[no-any-return]
            answer = await asyncio.to_thread(
                self._settings.attestor.respond,
                response.challenge,
                public_key_der=pair.public_der(),
                trust_domain=self._settings.trust_domain.name,
            )
            await _write(call, request(challenge_response=answer))
        raise ProtocolViolation("the broker ended the attestation without a result")

    def connect(self, node: X509Material, bundle: BundleSnapshot) -> None:
        """Uses `node` for every call from now on; calls under way may finish."""
        old, self._channel = (
            self._channel,
            self._secure(self._settings.address, bundle, node),
        )
        if old is not None:
            task = asyncio.get_running_loop().create_task(old.close(_DRAIN_SECONDS))
            self._draining.add(task)
            task.add_done_callback(self._draining.discard)

    async def renew_node(self, bundle: BundleSnapshot) -> tuple[X509Material, BundleSnapshot]:
        """A fresh SVID for the node, for a fresh key, and the bundle it leads to."""
        pair = KeyPair()
        stub = node_attestation_pb2_grpc.NodeAttestationStub(self._connected())
        request = node_attestation_pb2.RenewRequest(csr=pair.csr())
        response = await self._unary(stub.Renew, request)
        return await self._checked(response.svid, pair, bundle)

    async def list_authorized(self, *, now: datetime) -> tuple[AuthorizedEntry, ...]:
        """The identities this machine may ask for."""
        stub = entry_pb2_grpc.EntryStub(self._connected())
        response = await self._unary(stub.ListAuthorized, entry_pb2.ListAuthorizedRequest())
        return entries_from_wire(response.entries, now=now)

    async def issue_x509(
        self, entry: AuthorizedEntry, bundle: BundleSnapshot
    ) -> tuple[X509Material, BundleSnapshot]:
        """An X.509-SVID for `entry`, for a fresh key, and the bundle it leads to."""
        pair = KeyPair()
        stub = svid_pb2_grpc.SvidStub(self._connected())
        request = svid_pb2.BatchIssueX509Request(
            items=[svid_pb2.BatchIssueX509Request.Item(entry_id=entry.id, csr=pair.csr())]
        )
        response = await self._unary(stub.BatchIssueX509, request)
        result = _only_result(response.results)
        material, bundle = await self._checked(result.svid, pair, bundle)
        if material.spiffe_id != entry.spiffe_id:
            raise ProtocolViolation("the broker issued another identity than was asked for")
        return material, bundle

    async def issue_jwt(
        self, entry: AuthorizedEntry, audiences: Sequence[str]
    ) -> types_pb2.JwtSvid:
        """A JWT-SVID for `entry`."""
        stub = svid_pb2_grpc.SvidStub(self._connected())
        request = svid_pb2.BatchIssueJwtRequest(
            items=[svid_pb2.BatchIssueJwtRequest.Item(entry_id=entry.id, audiences=audiences)]
        )
        response = await self._unary(stub.BatchIssueJwt, request)
        result = _only_result(response.results)
        if result.svid.spiffe_id != str(entry.spiffe_id):
            raise ProtocolViolation("the broker issued another identity than was asked for")
        return result.svid  # type: ignore[no-any-return]

    async def get_bundle(self) -> BundleSnapshot:
        """The trust bundle as it is now."""
        stub = bundle_pb2_grpc.BundleStub(self._connected())
        response = await self._unary(stub.Get, bundle_pb2.GetBundleRequest())
        return bundle_from_wire(response.bundle, self._settings.trust_domain)

    async def watch_bundle(self) -> AsyncIterator[tuple[BundleSnapshot, bytes]]:
        """The trust bundle now and whenever it changes, with its message for keeping."""
        stub = bundle_pb2_grpc.BundleStub(self._connected())
        call: Any = stub.Watch(bundle_pb2.WatchBundleRequest())
        async with _streaming(call):
            async for response in call:
                bundle = bundle_from_wire(response.bundle, self._settings.trust_domain)
                yield bundle, response.bundle.SerializeToString()

    async def watch_revocations(self) -> AsyncIterator[RevocationUpdate]:
        """Every revocation that still matters, then each new one."""
        stub = credential_pb2_grpc.CredentialStub(self._connected())
        call: Any = stub.WatchRevocations(credential_pb2.WatchRevocationsRequest())
        async with _streaming(call):
            async for response in call:
                revoked = revocations_from_wire(response.revocations)
                yield RevocationUpdate(revoked=revoked, synced=response.synced)

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

    async def _checked(
        self, svid: types_pb2.X509Svid, pair: KeyPair, bundle: BundleSnapshot
    ) -> tuple[X509Material, BundleSnapshot]:
        try:
            return _material(svid, pair, bundle), bundle
        except ProtocolViolation as error:
            if error.reason != "CHAIN_UNTRUSTED":
                raise
            # The authority was rotated and its bundle has not reached us yet: ask for it.
            newer = await self.get_bundle()
            return _material(svid, pair, newer), newer

    async def _unary(self, method: Callable[..., Any], request: object) -> Any:
        return await _calling(method(request, timeout=self._settings.rpc_timeout))

    def _secure(
        self, address: str, bundle: BundleSnapshot, node: X509Material | None = None
    ) -> grpc.aio.Channel:
        credentials = grpc.ssl_channel_credentials(
            root_certificates=bundle.roots_pem,
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
        )
        return grpc.aio.secure_channel(address, credentials, options)


async def _write(call: Any, request: object) -> None:
    # A call the broker has ended refuses to be written to; the next read says why it ended.
    with suppress(asyncio.InvalidStateError):
        await call.write(request)


async def _calling(call: Awaitable[_T]) -> _T:
    try:
        return await call
    except grpc.RpcError as exc:
        raise error_from_rpc(exc) from exc
    except asyncio.CancelledError as exc:
        _reraise_if_ours(exc)
        raise _replaced() from exc


@asynccontextmanager
async def _streaming(call: Any) -> AsyncIterator[None]:
    try:
        yield
    except grpc.RpcError as exc:
        raise error_from_rpc(exc) from exc
    except asyncio.CancelledError as exc:
        _reraise_if_ours(exc)
        raise _replaced() from exc
    finally:
        call.cancel()


def _reraise_if_ours(exc: asyncio.CancelledError) -> None:
    # grpc.aio ends the calls of a closed channel with CancelledError; only when our own task is
    # being cancelled does it mean that we must stop.
    task = asyncio.current_task()
    if task is None or task.cancelling():
        raise exc


def _replaced() -> BrokerUnavailable:
    return BrokerUnavailable("the connection to the broker was replaced", reason=REPLACED)


def _only_result(results: Sequence[Any]) -> Any:
    if len(results) != 1:
        raise ProtocolViolation("the broker answered another number of items than was asked for")
    error = error_from_item(results[0].status)
    if error is not None:
        raise error
    return results[0]


def _material(svid: types_pb2.X509Svid, pair: KeyPair, bundle: BundleSnapshot) -> X509Material:
    material = X509Material.from_chain(
        svid.cert_chain,
        private_key=pair.private_key,
        bundle=bundle,
        received=utc_now(),
        hint=svid.hint,
    )
    if material.not_after <= material.received:
        raise ProtocolViolation(
            "the certificate had expired when it arrived",
            reason="CLOCK_SKEW",
            hint="compare this machine's clock with the broker's",
        )
    return material
