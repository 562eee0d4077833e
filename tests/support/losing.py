"""A relay before a broker's admin socket that loses answers: what was asked for is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

LOST = "/identity_api.broker.v1.Revocation/Revoke"


class _Relay(grpc.GenericRpcHandler):
    """Passes unary calls on; of the first `times` revocations the answer goes astray."""

    def __init__(self, broker: grpc.Channel, times: int) -> None:
        self._broker = broker
        self._times = times
        self.lost = 0

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        """Return the handler of whatever method."""
        method = handler_call_details.method
        forward: Any = self._broker.unary_unary(method)

        def handle(request: bytes, context: grpc.ServicerContext) -> bytes:
            answer: bytes = forward(request, timeout=10)
            if method == LOST and self.lost < self._times:
                self.lost += 1
                context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
            return answer

        return grpc.unary_unary_rpc_method_handler(handle)


@contextmanager
def losing_answers(socket: Path, admin_socket: Path, *, times: int) -> Iterator[Callable[[], int]]:
    """Listen on `socket`; yields how many answers were lost."""
    options = [("grpc.default_authority", "localhost")]
    with grpc.insecure_channel(f"unix:{admin_socket}", options=options) as broker:
        relay = _Relay(broker, times)
        server = grpc.server(ThreadPoolExecutor(2), handlers=[relay])
        server.add_insecure_port(f"unix:{socket}")
        server.start()
        try:
            yield lambda: relay.lost
        finally:
            server.stop(None).wait(5)
