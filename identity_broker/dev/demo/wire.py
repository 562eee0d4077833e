"""What the processes of the demonstration say to each other.

- gRPC methods without a .proto: generic handlers whose messages are JSON objects.
- Events: one JSON object a line on stdout, with the machine's monotonic clock, which all
  processes share; that is what the times of the incident are measured with.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import grpc
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_status import rpc_status

RESERVE = "/demo.Inventory/Reserve"
PLACE = "/demo.Orders/Place"
API_KEY_HEADER = "x-api-key"

Message = dict[str, Any]
Handler = Callable[[Message, grpc.ServicerContext], Message]

_writing = threading.Lock()


def emit(event: str, **facts: Any) -> None:
    """Tell the stage that something happened."""
    line = json.dumps({"event": event, "at": time.monotonic(), **facts})
    with _writing:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def commands() -> Iterator[Message]:
    """What the stage asks for, until it closes our stdin."""
    for line in sys.stdin:
        yield json.loads(line)


def to_bytes(message: Message) -> bytes:
    """A message on the wire."""
    return json.dumps(message).encode()


def from_bytes(content: bytes) -> Message:
    """A message from the wire."""
    found = json.loads(content)
    if not isinstance(found, dict):
        raise ValueError("a message is a JSON object")  # noqa: TRY004 - grpc answers INTERNAL
    return found


def unary(channel: grpc.Channel, method: str) -> Callable[..., Message]:
    """A method of another service."""
    return channel.unary_unary(
        method, request_serializer=to_bytes, response_deserializer=from_bytes
    )


def service(method: str, handler: Handler) -> grpc.GenericRpcHandler:
    """One method served."""
    _, name, verb = method.split("/")
    unary_handler = grpc.unary_unary_rpc_method_handler(
        handler, request_deserializer=from_bytes, response_serializer=to_bytes
    )
    return grpc.method_handlers_generic_handler(name, {verb: unary_handler})


def reason_of(error: grpc.RpcError) -> str:
    """The stable reason of a refusal, or the status code's name."""
    call = cast("grpc.Call", error)  # what a stub raises is both
    status = rpc_status.from_call(call)
    for detail in status.details if status is not None else ():
        info = ErrorInfo()
        if detail.Unpack(info):
            return str(info.reason)
    return str(call.code().name)


def metadata_of(context: grpc.ServicerContext) -> Mapping[str, str | bytes]:
    """The caller's metadata."""
    return dict(context.invocation_metadata())
