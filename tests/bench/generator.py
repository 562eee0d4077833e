"""The load generator: pre-serialized requests over raw HTTP/1.1 and HTTP/2, one thread, no library.

- One code path for every server measured: what differs is a few lines of framing. A request is
  bytes made before the clock starts; of a response only its status and its length are looked at
  (a few are kept, and verified in full after the clock has stopped).
- Closed loop: so many requests under way at any time. Open loop: arrivals at fixed moments, drawn
  before the run and independent of the answers; latency counts from the moment a request was due,
  so that a stall is paid for by every request that fell into it.
- HTTP/2 as a gRPC client speaks it: headers indexed after the first call, flow control obeyed,
  PING and SETTINGS acknowledged.
"""

from __future__ import annotations

import gc
import heapq
import random
import select
import socket
import ssl
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

KEEP_EVERY = 97
"""One response in so many is kept for validation."""
_DRAIN_SECONDS = 10.0
_PATIENCE_SECONDS = 10.0


class GeneratorError(Exception):
    """A server did not speak as it should."""


class Done(NamedTuple):
    """One answered request."""

    request: int
    due: float
    ok: bool
    body: bytes


def _connected(address: str) -> socket.socket:
    """A connection to "host:port", or to "unix:///path"."""
    if address.startswith("unix://"):
        local = socket.socket(socket.AF_UNIX)
        local.settimeout(_PATIENCE_SECONDS)
        local.connect(address.removeprefix("unix://"))
        return local
    host, _, port = address.rpartition(":")
    plain = socket.create_connection((host, int(port)), _PATIENCE_SECONDS)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return plain


class Wire:
    """One connection; the protocol is the subclass's."""

    #: Requests that may be under way at once.
    depth = 1

    def __init__(self, address: str, tls: ssl.SSLContext | None, name: str) -> None:
        plain = _connected(address)
        self.socket = plain if tls is None else tls.wrap_socket(plain, server_hostname=name)
        self._encrypted = tls is not None
        self.socket.setblocking(False)
        self._out = bytearray()
        self.under_way = 0

    def submit(self, request: int, due: float) -> None:
        """Queue a request; `flush` sends it."""
        raise NotImplementedError

    def _parse(self, data: bytes) -> list[Done]:
        raise NotImplementedError

    def receive(self) -> list[Done]:
        """Read what has come; return what it completes.

        Raises:
            GeneratorError: the server closed the connection.
        """
        done: list[Done] = []
        while True:
            try:
                data = self.socket.recv(262_144)
            except (BlockingIOError, ssl.SSLWantReadError):
                return done
            if not data:
                raise GeneratorError("the server closed the connection")
            done += self._parse(data)
            # Of TLS one record comes at a time; a plain socket gave all it had.
            if not self._encrypted:
                return done

    def flush(self) -> bool:
        """Send what is queued; whether all of it went."""
        while self._out:
            try:
                sent = self.socket.send(self._out)
            except (BlockingIOError, ssl.SSLWantWriteError):
                return False
            del self._out[:sent]
        return True

    def close(self) -> None:
        """Close it, without ceremony."""
        self.socket.close()


class Http1Wire(Wire):
    """Keep-alive HTTP/1.1: one request at a time. A request is all of its bytes."""

    def __init__(self, address: str, requests: Sequence[bytes]) -> None:
        super().__init__(address, None, "")
        self._requests = requests
        self._current = (0, 0.0)
        self._in = b""

    def submit(self, request: int, due: float) -> None:
        self._current = (request, due)
        self.under_way = 1
        self._out += self._requests[request]

    def _parse(self, data: bytes) -> list[Done]:
        self._in = held = self._in + data if self._in else data
        head = held.find(b"\r\n\r\n") + 4
        if head == 3:
            return []
        headers = held[:head].lower()
        at = headers.find(b"\r\ncontent-length: ")
        if at >= 0:
            length = int(headers[at + 18 : headers.index(b"\r\n", at + 18)])
            if len(held) - head < length:
                return []
            body = held[head:]
        elif b"\r\ntransfer-encoding: chunked" in headers:
            if not held.endswith(b"\r\n0\r\n\r\n"):
                return []
            body = held[head:]
        else:
            raise GeneratorError("an HTTP answer without a length")
        self._in = b""
        self.under_way = 0
        return [Done(*self._current, held.startswith(b"HTTP/1.1 200 "), body)]


def unchunked(body: bytes) -> bytes:
    """An HTTP/1.1 body without the framing of chunks, if it had any."""
    if not body.endswith(b"\r\n0\r\n\r\n"):
        return body
    whole, at = b"", 0
    while True:
        end = body.index(b"\r\n", at)
        size = int(body[at:end].split(b";")[0], 16)
        if size == 0:
            return whole
        whole += body[end + 2 : end + 2 + size]
        at = end + 2 + size + 2


_DATA, _HEADERS, _RST, _SETTINGS, _PING, _GOAWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_MOST = 16_384  # the frame size every peer accepts (RFC 9113 section 4.2)
_LARGEST_WINDOW = 2**31 - 1
_STATUS_OK = b"\x0bgrpc-status\x010"  # a literal: our header table has no room to index it


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">BHBBI", len(payload) >> 16, len(payload) & 0xFFFF, kind, flags, stream) + (
        payload
    )


def _text(value: str) -> bytes:
    raw = value.encode()
    if len(raw) > 126:
        raise GeneratorError("a header too long for this encoder")
    return bytes([len(raw)]) + raw


class Http2Wire(Wire):
    """gRPC over one HTTP/2 connection. A request is its serialized message."""

    depth = 1024

    def __init__(
        self,
        address: str,
        tls: ssl.SSLContext | None,
        name: str,
        method: str,
        requests: Sequence[bytes],
        metadata: Sequence[tuple[str, str]] = (),
    ) -> None:
        super().__init__(address, tls, name)
        self._messages = [struct.pack(">BI", 0, len(raw)) + raw for raw in requests]
        # RFC 7541: POST and the scheme from the static table; the rest enters the dynamic one,
        # whose newest entry has number 62.
        begin = b"\x83\x86" if tls is None else b"\x83\x87"
        self._first_headers = (
            begin + b"\x44" + _text(method) + b"\x41" + _text(name)
            + b"\x5f" + _text("application/grpc") + b"\x40" + _text("te") + _text("trailers")
            + b"".join(b"\x40" + _text(key) + _text(value) for key, value in metadata)
        )  # fmt: skip
        entries = 4 + len(metadata)
        self._headers = begin + bytes(0x80 | 61 + number for number in range(entries, 0, -1))
        self._next = 1
        self._open: dict[int, tuple[int, float]] = {}
        self._bodies: dict[int, bytes] = {}
        self._in = b""
        self._window = 65_535
        self._stream_window = 65_535
        self._sending: deque[_Sending] = deque()
        # No server push, no header indexing towards us, and windows that never close.
        settings = struct.pack(">HIHIHI", 1, 0, 2, 0, 4, _LARGEST_WINDOW)
        self._out += b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        self._out += _frame(_SETTINGS, 0, 0, settings)
        self._out += _frame(_WINDOW, 0, 0, struct.pack(">I", _LARGEST_WINDOW - 65_535))

    def submit(self, request: int, due: float) -> None:
        stream, self._next = self._next, self._next + 2
        self.under_way += 1
        self._open[stream] = (request, due)
        headers = self._first_headers if stream == 1 else self._headers
        self._out += _frame(_HEADERS, _END_HEADERS, stream, headers)
        self._sending.append(_Sending(stream, self._messages[request], self._stream_window))
        self._pump()

    def _pump(self) -> None:
        """Frame as much as the server's windows allow."""
        while self._sending:
            first = self._sending[0]
            left = len(first.message) - first.sent
            size = min(left, _MOST, self._window, first.window)
            if size <= 0:
                return
            part = first.message[first.sent : first.sent + size]
            self._out += _frame(_DATA, _END_STREAM if size == left else 0, first.stream, part)
            first.sent += size
            first.window -= size
            self._window -= size
            if size == left:
                self._sending.popleft()

    def _parse(self, data: bytes) -> list[Done]:
        held = self._in + data if self._in else data
        done: list[Done] = []
        at, end = 0, len(held)
        while end - at >= 9:
            high, low, kind, flags, stream = struct.unpack_from(">BHBBI", held, at)
            after = at + 9 + (high << 16 | low)
            if after > end:
                break
            payload = held[at + 9 : after]
            at = after
            if kind == _DATA:
                before = self._bodies.get(stream)
                self._bodies[stream] = payload if before is None else before + payload
            elif kind == _HEADERS:
                if flags & _END_STREAM:
                    request, due = self._open.pop(stream)
                    self.under_way -= 1
                    body = self._bodies.pop(stream, b"")
                    done.append(Done(request, due, _STATUS_OK in payload, body[5:]))
            else:
                self._control(kind, flags, stream, payload)
        self._in = held[at:]
        return done

    def _control(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _WINDOW:
            size = struct.unpack(">I", payload)[0]
            if stream == 0:
                self._window += size
            else:
                for sending in self._sending:
                    if sending.stream == stream:
                        sending.window += size
            self._pump()
        elif kind == _SETTINGS and not flags & _ACK:
            for key, value in struct.iter_unpack(">HI", payload):
                if key == 4:
                    for sending in self._sending:
                        sending.window += value - self._stream_window
                    self._stream_window = value
            self._out += _frame(_SETTINGS, _ACK, 0, b"")
            self._pump()
        elif kind == _PING and not flags & _ACK:
            self._out += _frame(_PING, _ACK, 0, payload)
        elif kind == _RST:
            raise GeneratorError(f"the server reset a stream ({payload.hex()})")
        elif kind == _GOAWAY:
            raise GeneratorError(f"the server said goodbye: {payload[8:].decode(errors='replace')}")


@dataclass(slots=True)
class _Sending:
    """A message on its way out, as far as flow control has let it."""

    stream: int
    message: bytes
    window: int
    sent: int = 0


# --- the two loops --------------------------------------------------------------------------------


@dataclass(slots=True)
class Outcome:
    """What one run saw.

    Attributes:
        calls: answered within the time measured, all of them well.
        seconds: the time measured.
        cpu_seconds: of this process, in that time.
        latencies: seconds, one for each call.
        kept: (request, body) of some calls, for validation.
        unanswered: due in the time measured and not answered at all.
        received: all answers, those before and after the time measured too.
    """

    calls: int = 0
    received: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    kept: list[tuple[int, bytes]] = field(default_factory=list)
    unanswered: int = 0


class _Run:
    """The connections of one run, and what came back over them."""

    def __init__(self, wires: Sequence[Wire], smallest: int) -> None:
        self.wires = wires
        self.smallest = smallest
        self.outcome = Outcome()
        self._by_file = {wire.socket.fileno(): wire for wire in wires}
        self._poll = select.epoll()
        for number in self._by_file:
            self._poll.register(number, select.EPOLLIN)
        self._clogged: set[Wire] = set()

    def close(self) -> None:
        self._poll.close()

    def wait(self, seconds: float) -> list[tuple[Wire, list[Done]]]:
        """What was answered; returns after so many seconds at the latest."""
        # epoll counts in milliseconds; select in microseconds, and one epoll is one file.
        if seconds > 0 and not select.select([self._poll], [], [], seconds)[0]:
            return []
        answered = []
        for number, events in self._poll.poll(0):
            wire = self._by_file[number]
            if events & select.EPOLLOUT:
                self.flush(wire)
            if events & ~select.EPOLLOUT:
                done = wire.receive()
                if done:
                    answered.append((wire, done))
                else:
                    self.flush(wire)  # acknowledgements
        return answered

    def flush(self, wire: Wire) -> None:
        """Send; where the server does not take it all, the rest when it does."""
        if wire.flush():
            if wire in self._clogged:
                self._clogged.discard(wire)
                self._poll.modify(wire.socket.fileno(), select.EPOLLIN)
        elif wire not in self._clogged:
            self._clogged.add(wire)
            self._poll.modify(wire.socket.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def check(self, done: Done) -> None:
        """A refusal is no answer: a server that refuses quickly must not win.

        Raises:
            GeneratorError: the status or the length is wrong.
        """
        if not done.ok or len(done.body) < self.smallest:
            raise GeneratorError(f"refused: {done.body[:400]!r}")
        self.outcome.received += 1


OpenWires = Callable[[], Sequence[Wire]]


def closed_loop(
    open_wires: OpenWires,
    *,
    requests: int,
    concurrency: int,
    seconds: float,
    warm_up: float,
    smallest: int,
    on_edge: Callable[[], None] = lambda: None,
) -> Outcome:
    """Keep `concurrency` requests under way for so long.

    Args:
        requests: how many different ones the wires know; they are sent in turn.
        smallest: bytes below which an answer is a refusal.
        on_edge: called where the measured time begins, and where it ends.

    Raises:
        GeneratorError: any request was refused.
    """
    wires = open_wires()
    run = _Run(wires, smallest)
    outcome = run.outcome
    number = 0
    clock = time.perf_counter
    gc.collect()
    gc.disable()
    try:
        for at in range(concurrency):
            wires[at % len(wires)].submit(number % requests, clock())
            number += 1
        for wire in wires:
            run.flush(wire)
        begin = clock() + warm_up
        end = begin + seconds
        measuring = False
        began = cpu = 0.0
        while True:
            answered = run.wait(_PATIENCE_SECONDS)
            now = clock()
            if not answered and now > end + _PATIENCE_SECONDS:
                raise GeneratorError("the server stopped answering")
            if not measuring and now >= begin:
                measuring, began, cpu = True, now, time.process_time()
                on_edge()
            elif now >= end:
                outcome.seconds = now - began
                outcome.cpu_seconds = time.process_time() - cpu
                on_edge()
                break
            for wire, several in answered:
                for done in several:
                    run.check(done)
                    if measuring:
                        outcome.calls += 1
                        outcome.latencies.append(now - done.due)
                        if outcome.calls % KEEP_EVERY == 1:
                            outcome.kept.append((done.request, done.body))
                    wire.submit(number % requests, now)
                    number += 1
                run.flush(wire)
        _drain(run)
    finally:
        gc.enable()
        run.close()
        for wire in wires:
            wire.close()
    return outcome


def open_loop(
    open_wires: OpenWires,
    *,
    requests: int,
    rate: float,
    seconds: float,
    warm_up: float,
    smallest: int,
    seed: int = 1,
) -> Outcome:
    """Send at moments drawn beforehand (Poisson arrivals, `rate` a second), answered or not.

    Raises:
        GeneratorError: any request was refused.
    """
    draw = random.Random(seed)
    moments, at = [], 0.0
    while at < warm_up + seconds:
        moments.append(at)
        at += draw.expovariate(rate)
    wires = open_wires()
    run = _Run(wires, smallest)
    outcome = run.outcome
    # The least busy connection first; of equals, always the same one.
    free = [(0, number) for number in range(len(wires))]
    numbers = {wire: number for number, wire in enumerate(wires)}
    late: deque[tuple[int, float]] = deque()
    clock = time.perf_counter
    left = len(moments)
    gc.collect()
    gc.disable()

    def send(request: int, due: float) -> bool:
        while free:
            load, number = heapq.heappop(free)
            wire = wires[number]
            if load != wire.under_way:
                continue  # an old entry; a newer one says how busy it is
            if load >= wire.depth:
                return False
            wire.submit(request, due)
            run.flush(wire)
            if wire.under_way < wire.depth:
                heapq.heappush(free, (wire.under_way, number))
            return True
        return False

    try:
        start = clock() + 0.01
        cpu = time.process_time()
        next_one = 0
        while left:
            now = clock()
            while next_one < len(moments) and start + moments[next_one] <= now:
                due = start + moments[next_one]
                if late or not send(next_one % requests, due):
                    late.append((next_one % requests, due))
                next_one += 1
            if next_one < len(moments):
                wait = start + moments[next_one] - clock()
            else:
                wait = 0.1
                if now > start + moments[-1] + _DRAIN_SECONDS:
                    outcome.unanswered = left
                    break
            for wire, several in run.wait(max(wait, 1e-6)):
                now = clock()
                for done in several:
                    run.check(done)
                    left -= 1
                    if done.due - start >= warm_up:
                        outcome.calls += 1
                        outcome.latencies.append(now - done.due)
                        if outcome.calls % KEEP_EVERY == 1:
                            outcome.kept.append((done.request, done.body))
                heapq.heappush(free, (wire.under_way, numbers[wire]))
                run.flush(wire)
                while late and send(*late[0]):
                    late.popleft()
        outcome.seconds = clock() - start
        outcome.cpu_seconds = time.process_time() - cpu
    finally:
        gc.enable()
        run.close()
        for wire in wires:
            wire.close()
    return outcome


def _drain(run: _Run) -> None:
    """Let what is under way end, so that the next contender finds a quiet machine."""
    until = time.perf_counter() + _DRAIN_SECONDS
    while any(wire.under_way for wire in run.wires) and time.perf_counter() < until:
        for _, several in run.wait(0.1):
            for done in several:
                run.check(done)


def ask(wire: Wire, request: int = 0) -> bytes:
    """One request, answered: its body.

    Raises:
        GeneratorError: refused, or not answered in time.
    """
    run = _Run([wire], 0)
    try:
        wire.submit(request, 0.0)
        run.flush(wire)
        until = time.perf_counter() + _PATIENCE_SECONDS
        while time.perf_counter() < until:
            for _, several in run.wait(0.2):
                for done in several:
                    run.check(done)
                    return done.body
        raise GeneratorError("not answered in time")
    finally:
        run.close()
        wire.close()
