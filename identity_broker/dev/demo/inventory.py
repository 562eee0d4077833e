"""The demonstration's `inventory`: reserves stock for whoever it accepts.

- The first line on stdin says how: {"api_key": "…"}, or {"allow": "spiffe://…/orders"}.
"""

from __future__ import annotations

import hmac
from concurrent.futures import ThreadPoolExecutor

import grpc

from identity_broker.dev.demo.identity import start_source
from identity_broker.dev.demo.wire import (
    API_KEY_HEADER,
    RESERVE,
    Handler,
    Message,
    commands,
    emit,
    metadata_of,
    service,
)
from identity_client.integrations.grpc import authorize_peers, peer_spiffe_id, server_credentials

_ANY_PORT = "127.0.0.1:0"


def with_api_key(api_key: str) -> tuple[grpc.Server, int]:
    """Before: whoever knows the key may call, and the log cannot say who that was."""

    def reserve(request: Message, context: grpc.ServicerContext) -> Message:
        shown = str(metadata_of(context).get(API_KEY_HEADER, ""))
        if not hmac.compare_digest(shown.encode(), api_key.encode()):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong API key")
        emit("call", caller="whoever has the API key", item=request["item"])
        return {"reserved": request["item"]}

    server = _server(reserve, [])
    return server, server.add_insecure_port(_ANY_PORT)


def with_identity(allow: str) -> tuple[grpc.Server, int]:
    """With identities: exactly one SPIFFE ID may call, and the log names it."""
    source = start_source()

    def reserve(request: Message, context: grpc.ServicerContext) -> Message:
        emit("call", caller=str(peer_spiffe_id(context)), item=request["item"])
        return {"reserved": request["item"]}

    server = _server(reserve, [authorize_peers(source, allow)])
    return server, server.add_secure_port(_ANY_PORT, server_credentials(source))


def main() -> None:
    """Serve until stdin closes."""
    told = commands()
    asked = next(told)
    if "api_key" in asked:
        server, port = with_api_key(asked["api_key"])
    else:
        server, port = with_identity(asked["allow"])
    server.start()
    emit("ready", address=f"127.0.0.1:{port}")
    for _ in told:
        pass
    server.stop(grace=0.5).wait()


def _server(reserve: Handler, interceptors: list[grpc.ServerInterceptor]) -> grpc.Server:
    pool = ThreadPoolExecutor(max_workers=4)
    return grpc.server(pool, handlers=[service(RESERVE, reserve)], interceptors=interceptors)


if __name__ == "__main__":
    main()
