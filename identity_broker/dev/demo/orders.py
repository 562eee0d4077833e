"""The demonstration's `orders`: takes orders from customers and reserves stock at `inventory`.

- The first line on stdin says how: {"inventory": "host:port", "api_key": "…"}, or
  {"inventory": "host:port", "peer": "spiffe://…/inventory"}.
- The command {"copy_out": FILE} plays the bad day: key and certificate get out of the process.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from identity_broker.dev.demo.identity import copy_out, start_source
from identity_broker.dev.demo.wire import (
    API_KEY_HEADER,
    PLACE,
    RESERVE,
    Message,
    commands,
    emit,
    reason_of,
    service,
    unary,
)
from identity_client import IdentitySource, SourceError
from identity_client.integrations.grpc import secure_channel

_CALL_SECONDS = 5.0


def main() -> None:
    """Serve until stdin closes."""
    told = commands()
    asked = next(told)
    source: IdentitySource | None = None
    metadata: tuple[tuple[str, str], ...] = ()
    if "api_key" in asked:
        reserve = unary(grpc.insecure_channel(asked["inventory"]), RESERVE)
        metadata = ((API_KEY_HEADER, asked["api_key"]),)
    else:
        source = start_source()
        reserve = unary(secure_channel(source, asked["inventory"], peer=asked["peer"]), RESERVE)

    def call(item: str) -> Message:
        return reserve({"item": item}, timeout=_CALL_SECONDS, metadata=metadata)

    server = grpc.server(ThreadPoolExecutor(max_workers=4), handlers=[service(PLACE, place(call))])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    emit("ready", address=f"127.0.0.1:{port}")
    for command in told:
        if "copy_out" in command and source is not None:
            copy_out(source.snapshot(), Path(command["copy_out"]))
            emit("copied_out", serial=source.snapshot().serial)
    server.stop(grace=0.5).wait()
    if source is not None:
        source.close()


def place(reserve: Callable[[str], Message]) -> Callable[[Message, grpc.ServicerContext], Message]:
    """The handler of one order: it stands or falls with the reservation."""

    def handler(request: Message, context: grpc.ServicerContext) -> Message:
        try:
            return {"order": request["order"], **reserve(request["item"])}
        except grpc.RpcError as error:
            reason = reason_of(error)
        except SourceError as error:
            reason = error.reason
        emit("refused", reason=reason)
        context.abort(grpc.StatusCode.UNAVAILABLE, reason)
        raise AssertionError("abort raises")

    return handler


if __name__ == "__main__":
    main()
