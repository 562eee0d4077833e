"""A relay before a broker's admin socket that loses or changes answers; what was asked is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

REVOKE = "/identity_api.broker.v1.Revocation/Revoke"
GET = "/identity_api.broker.v1.Revocation/Get"


class Lost(Exception):
    """The answer does not arrive."""


Change = Callable[[str, bytes], bytes]
"""Method and answer to the answer that arrives; may raise `Lost`."""


class _Relay(grpc.GenericRpcHandler):
    """Passes unary calls on."""

    def __init__(self, broker: grpc.Channel, change: Change) -> None:
        self._broker = broker
        self._change = change

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Return the handler of whatever method."""
        method = handler_call_details.method
        forward: Any = self._broker.unary_unary(method)

        def handle(request: bytes, context: grpc.ServicerContext) -> bytes:
            answer: bytes = forward(request, timeout=10)
            try:
                return self._change(method, answer)
            except Lost:
                context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")

        return grpc.unary_unary_rpc_method_handler(handle)


@contextmanager
def relaying(socket: Path, admin_socket: Path, change: Change) -> Iterator[None]:
    """Listen on `socket`; answers go through `change`."""
    options = [("grpc.default_authority", "localhost")]
    with grpc.insecure_channel(f"unix:{admin_socket}", options=options) as broker:
        server = grpc.server(ThreadPoolExecutor(2), handlers=[_Relay(broker, change)])
        server.add_insecure_port(f"unix:{socket}")
        server.start()
        try:
            yield
        finally:
            server.stop(None).wait(5)


@contextmanager
def losing_answers(socket: Path, admin_socket: Path, *, times: int) -> Iterator[Callable[[], int]]:
    """Lose the answer to the first `times` revocations; yields how many were lost."""
    lost = 0

    def lose(method: str, answer: bytes) -> bytes:
        nonlocal lost
        if method == REVOKE and lost < times:
            lost += 1
            raise Lost
        return answer

    with relaying(socket, admin_socket, lose):
        yield lambda: lost
