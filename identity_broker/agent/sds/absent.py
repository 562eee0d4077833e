"""What stands in for secret discovery where the extra `envoy` is not installed.

- Envoy, which sends no security header, is told what is missing instead of that header.
"""

from __future__ import annotations

from typing import Any, cast

import grpc

from identity_broker.agent.rpc_status import unimplemented

_PREFIX = "/envoy.service.secret.v3.SecretDiscoveryService/"


class AbsentSecretDiscovery:
    """Refuses every call of the service."""

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        """What the listener serves."""
        return [_Refusal()]

    def end_streams(self) -> None:
        """None are served."""


class _Refusal(grpc.GenericRpcHandler):
    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        if not handler_call_details.method.startswith(_PREFIX):
            return None
        return grpc.stream_stream_rpc_method_handler(cast("Any", _refuse))


async def _refuse(_messages: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    await context.abort(
        *unimplemented("this agent runs without secret discovery: install identity-broker[envoy]")
    )
