"""Bytes that the inner server sends before the outer side is there are not lost.

Python 3.11.2 goes on reading a transport that was paused in connection_made; a gRPC server sends
its settings at once, and without them the connection never starts.
"""

from __future__ import annotations

import asyncio

from identity_broker.localpeer.splice import _Half


class RecordingTransport(asyncio.Transport):
    """Remembers what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += bytes(data)

    def pause_reading(self) -> None:
        """Is too late, as in Python 3.11.2."""

    def resume_reading(self) -> None:
        pass


def test_bytes_before_the_other_side_is_there_arrive_first_and_once() -> None:
    outer, inner = _Half(), _Half()
    outer.other, inner.other = inner, outer
    inner.connection_made(RecordingTransport())
    inner.data_received(b"settings ")
    inner.data_received(b"frame ")

    there = RecordingTransport()
    outer.connection_made(there)
    inner.data_received(b"answer")

    assert there.written == b"settings frame answer"
