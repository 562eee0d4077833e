"""Calls to a Workload API: which message, which error. Decides nothing about when.

- Every request carries the security header (SPIFFE Workload Endpoint, section 3).
- No TLS and no client authentication: the endpoint knows us by what the kernel tells it.
- Every failure leaves as an IdentityError.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any, TypeVar

import grpc
import grpc.aio

from identity_api.broker.v1 import revocation_feed_pb2_grpc
from identity_client._wire.revocation_feed import FeedCall
from identity_client._wire.status import error_from_workload_api
from identity_client._wire.workload import (
    SECURITY_METADATA,
    JWTBundlesRequest,
    JWTBundlesResponse,
    JWTSVIDRequest,
    ValidateJWTSVIDRequest,
    WorkloadApiStub,
    X509SVIDRequest,
    X509SVIDResponse,
)
from identity_client._wire.workload_values import token_from_wire
from identity_client.clock import utc_now
from identity_client.errors import BrokerUnavailable
from identity_client.jwt_cache import CachedToken
from identity_client.workload_api.settings import WorkloadApiSettings

__all__ = ["WorkloadApiLink"]

# Revocation lists may be long: 64 MiB is about a million entries.
_LARGEST_MESSAGE = 64 * 1024 * 1024
_OPTIONS: tuple[tuple[str, str | int], ...] = (
    # gRPC would name the socket's path here, which some servers refuse.
    ("grpc.default_authority", "localhost"),
    # Connections are known by their process: one is not shared among sources.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", _LARGEST_MESSAGE),
    # An agent that was restarted is found again as soon as the source asks.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
_ENDED = "STREAM_ENDED"
_HINT = "idb agent status"
_T = TypeVar("_T")


class WorkloadApiLink:
    """The connection of one source to its Workload API. Belongs to one event loop."""

    def __init__(self, settings: WorkloadApiSettings) -> None:
        self._settings = settings
        self._channel = grpc.aio.insecure_channel(settings.endpoint.target, options=_OPTIONS)
        self._stub = WorkloadApiStub(self._channel)
        self._feed: Any = revocation_feed_pb2_grpc.RevocationFeedStub(self._channel).Follow

    async def x509_svids(self) -> AsyncIterator[X509SVIDResponse]:
        """X.509-SVIDs now and whenever they change; ends by raising.

        Raises:
            IdentityError: the stream broke, or ended.
        """
        call = self._stub.FetchX509SVID(X509SVIDRequest(), metadata=SECURITY_METADATA)
        async for message in _messages(call):
            yield message

    async def jwt_bundles(self) -> AsyncIterator[JWTBundlesResponse]:
        """JWT bundles now and whenever they change; ends by raising.

        Raises:
            IdentityError: the stream broke, or ended.
        """
        call = self._stub.FetchJWTBundles(JWTBundlesRequest(), metadata=SECURITY_METADATA)
        async for message in _messages(call):
            yield message

    def revocation_feed(self) -> FeedCall:
        """Opens our agent's feed of revocations; nothing is sent yet.

        It is not part of the Workload API: other endpoints answer Unimplemented.
        """
        call = self._feed(metadata=SECURITY_METADATA)
        return FeedCall(call, self._settings.rpc_timeout, error_from_workload_api)

    async def jwt_svid(self, spiffe_id: str, audiences: Sequence[str]) -> CachedToken:
        """A JWT-SVID of `spiffe_id` for `audiences`.

        Raises:
            IdentityError: it was refused, or the answer cannot be used.
        """
        request = JWTSVIDRequest(audience=audiences, spiffe_id=spiffe_id)
        answer = await _answer(
            self._stub.FetchJWTSVID(
                request, metadata=SECURITY_METADATA, timeout=self._settings.rpc_timeout
            )
        )
        return token_from_wire(answer, spiffe_id=spiffe_id, audiences=audiences, received=utc_now())

    async def validate_jwt_svid(self, token: str, audience: str) -> str:
        """The SPIFFE ID of a token that holds, for `audience`.

        Raises:
            RequestRejected: it does not hold.
            IdentityError: nobody could say.
        """
        request = ValidateJWTSVIDRequest(svid=token, audience=audience)
        answer = await _answer(
            self._stub.ValidateJWTSVID(
                request, metadata=SECURITY_METADATA, timeout=self._settings.rpc_timeout
            )
        )
        return answer.spiffe_id

    async def close(self) -> None:
        """Ends the connection."""
        await self._channel.close()


async def _messages(call: Any) -> AsyncIterator[Any]:
    try:
        while (message := await _answer(call.read())) is not grpc.aio.EOF:
            yield message
    finally:
        call.cancel()
    raise BrokerUnavailable("the Workload API ended the stream", reason=_ENDED, hint=_HINT)


async def _answer(call: Awaitable[_T]) -> _T:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise error_from_workload_api(error) from error
    except asyncio.CancelledError as cancelled:
        # grpc.aio says this for a server's status CANCELLED as well.
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise BrokerUnavailable(
            "the Workload API cancelled the call", reason=_ENDED, hint=_HINT
        ) from cancelled
