"""A thousand verifiers in other processes: each over mTLS of its own, following and acknowledging.

    python tests/bench/revocation_fleet.py ORDERS.json        # ends when stdin does

- On the wire they are SDKs with a link to the broker; inside, one thread with one epoll, as in
  `agent_fleet`.
- For each revoked credential one line of JSON on stdout: when the first and when the last of them
  had been told, on the machine's monotonic clock.
"""

from __future__ import annotations

import asyncio
import json
import resource
import select
import ssl
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

from bench.agent_fleet import Orders, join_all, written_orders
from bench.generator import (
    _DATA,
    _END_HEADERS,
    _HEADERS,
    Done,
    GeneratorError,
    Http2Wire,
    _frame,
)
from bench.servers import SERVER_NAME
from identity_api.broker.v1 import revocation_feed_pb2 as pb

if TYPE_CHECKING:
    from bench.agent_site import Site

_FOLLOW = "/identity_api.broker.v1.RevocationFeed/Follow"
_START_SECONDS = 180.0
_MAX_PATIENCE = 60.0


class FollowWire(Http2Wire):
    """One verifier's connection: says hello, and acknowledges whatever it is told."""

    def __init__(self, address: str, tls: ssl.SSLContext) -> None:
        super().__init__(address, tls, SERVER_NAME, _FOLLOW, [])
        self.complete = False
        self.told: list[str] = []
        self._open[1] = (0, 0.0)
        self._out += _frame(_HEADERS, _END_HEADERS, 1, self._first_headers)
        self._say(pb.FollowRequest(hello=pb.FollowRequest.Hello(version="bench")))

    def _say(self, request: pb.FollowRequest) -> None:
        raw = request.SerializeToString()
        message = struct.pack(">BI", 0, len(raw)) + raw
        self._window -= len(message)
        if self._window < 0:
            raise GeneratorError("the broker takes no more acknowledgements")
        self._out += _frame(_DATA, 0, 1, message)

    def _parse(self, data: bytes) -> list[Done]:
        if super()._parse(data):
            raise GeneratorError("the broker ended a verifier's stream")
        held = self._bodies.pop(1, b"")
        while len(held) >= 5:
            end = 5 + int.from_bytes(held[1:5], "big")
            if len(held) < end:
                break
            message = pb.FollowResponse.FromString(held[5:end])
            held = held[end:]
            if self.complete:
                self.told += [each.id for each in message.revoked]
            if message.complete:
                self.complete = True
                ack = pb.FollowRequest.Ack(sequence=message.sequence)
                self._say(pb.FollowRequest(ack=ack))
        self._bodies[1] = held
        return []


def _follow(orders: Orders, contexts: Sequence[ssl.SSLContext], began: float) -> None:
    """Follow until stdin ends."""
    poll = select.epoll()
    poll.register(sys.stdin.fileno(), select.EPOLLIN | select.EPOLLHUP)
    wires: dict[int, FollowWire] = {}
    waiting: set[int] = set()
    for context in contexts:
        wire = FollowWire(orders.address, context)
        wires[wire.socket.fileno()] = wire
        waiting.add(wire.socket.fileno())
        poll.register(wire.socket.fileno(), select.EPOLLIN)
        assert wire.flush()
    until = time.monotonic() + _MAX_PATIENCE
    counted: dict[str, tuple[int, float]] = {}
    while True:
        for number, _ in poll.poll(1.0):
            if number == sys.stdin.fileno():
                return
            wire = wires[number]
            wire.receive()
            now = time.monotonic()
            for credential_id in wire.told:
                count, first = counted.get(credential_id, (0, now))
                counted[credential_id] = count + 1, first
                if count + 1 == len(wires):
                    del counted[credential_id]
                    line = {"id": credential_id, "first": first, "last": now}
                    print(json.dumps(line), flush=True)
            wire.told.clear()
            if not wire.flush():
                raise GeneratorError("the broker does not read")
            if wire.complete and number in waiting:
                waiting.discard(number)
                if not waiting:
                    seconds = time.perf_counter() - began
                    print(json.dumps({"connected": len(wires), "seconds": seconds}), flush=True)
        if waiting and time.monotonic() > until:
            raise GeneratorError(f"{len(waiting)} verifiers were told nothing")


def main() -> int:
    """Be the fleet."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    orders = Orders(**json.loads(Path(sys.argv[1]).read_text()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4 * orders.nodes + 256)), hard))
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="idb-bench-") as directory:
        contexts = asyncio.run(join_all(orders, Path(directory)))
    _follow(orders, contexts, began)
    return 0


# --- from outside ---------------------------------------------------------------------------------


@dataclass
class Verifiers:
    """Verifiers that are up to date."""

    connected: int
    start_seconds: float
    _process: subprocess.Popen[bytes]

    async def told(self, credential_id: str) -> tuple[float, float]:
        """When the first and when the last of them was told of it."""
        line = await asyncio.to_thread(_line, self._process)
        found = json.loads(line)
        assert found["id"] == credential_id, found
        return found["first"], found["last"]


@contextmanager
def verifiers(place: Site, count: int) -> Iterator[Verifiers]:
    """So many verifiers, in one process."""
    file = written_orders(place, count, "verifiers")
    process = subprocess.Popen(
        [sys.executable, __file__, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if not select.select([process.stdout], [], [], _START_SECONDS)[0]:
            raise GeneratorError(f"{count} verifiers did not connect in time")
        said: dict[str, Any] = json.loads(_line(process))
        yield Verifiers(said["connected"], said["seconds"], process)
        if process.poll() is not None:
            raise GeneratorError("the verifiers ended meanwhile")
    finally:
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _line(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise GeneratorError("the verifiers ended")
    return line


if __name__ == "__main__":
    sys.exit(main())
