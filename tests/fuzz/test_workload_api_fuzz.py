"""Any bytes to the Workload API's socket, as calls or as raw bytes: it says no, and serves on."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import suppress
from pathlib import Path

import grpc
from hypothesis import given
from hypothesis import strategies as st

from identity_client._wire.workload import METHODS, SECURITY_METADATA, X509SVIDRequest
from support.workload_api import ServedWorkloadApi, details_of, served

# What a stranger who knows no identity may be told; INTERNAL is none of it.
FINE = {
    *("MALFORMED_REQUEST", "SECURITY_HEADER_MISSING", "NO_IDENTITY", "RATE_LIMITED"),
    *("AUDIENCE_INVALID", "SPIFFE_ID_INVALID", "TOKEN_INVALID"),
}
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

field = st.builds(
    lambda tag, body: bytes([tag, len(body)]) + body, st.integers(0, 127), st.binary(max_size=60)
)
text = st.builds(
    lambda tag, body: bytes([tag, len(body)]) + body,
    st.sampled_from([0x0A, 0x12, 0x1A]),  # string fields 1, 2, 3
    st.text(max_size=30).map(str.encode),
)
message = st.lists(field | text, max_size=4).map(b"".join) | st.binary(max_size=64)
metadata = st.sampled_from([SECURITY_METADATA, (), (("workload.spiffe.io", "maybe"),)])
call = st.tuples(st.sampled_from(sorted(METHODS.values())), message, metadata)
# HTTP/2 frames of any kind and length, well-formed lengths or not.
frame = st.builds(
    lambda size, kind, flags, stream, payload: (
        (len(payload) if size is None else size).to_bytes(3, "big")
        + bytes([kind, flags])
        + stream.to_bytes(4, "big")
        + payload
    ),
    st.none() | st.integers(0, 2**24 - 1),
    st.integers(0, 12),
    st.integers(0, 255),
    st.integers(0, 2**32 - 1),
    st.binary(max_size=60),
)


@given(st.lists(call, min_size=1, max_size=40))
def test_any_message_to_any_method(calls: list[tuple[str, bytes, tuple[tuple[str, str], ...]]]):
    async def scenario() -> None:
        with tempfile.TemporaryDirectory() as directory:
            async with served(Path(directory)) as api:
                channel = api.channel()
                for name, raw, header in calls:
                    try:
                        async with asyncio.timeout(10):
                            await channel.unary_stream(name)(raw, metadata=header).read()
                    except grpc.aio.AioRpcError as exc:
                        assert details_of(exc)[0] in FINE, exc  # noqa: PT017
                await serves_on(api)

    asyncio.run(scenario())


@given(st.lists(st.tuples(st.booleans(), st.lists(frame, max_size=6)), min_size=1, max_size=10))
def test_any_bytes_at_all(connections: list[tuple[bool, list[bytes]]]) -> None:
    async def scenario() -> None:
        with tempfile.TemporaryDirectory() as directory:
            async with served(Path(directory)) as api:
                for begins_well, frames in connections:
                    reader, writer = await asyncio.open_unix_connection(api.socket)
                    with suppress(ConnectionError, TimeoutError):
                        writer.write((PREFACE if begins_well else b"") + b"".join(frames))
                        writer.write_eof()
                        async with asyncio.timeout(0.2):
                            await reader.read(-1)
                    writer.close()
                await serves_on(api)

    asyncio.run(scenario())


async def serves_on(api: ServedWorkloadApi) -> None:
    api.identities.grant("/a")
    answer = api.stub().FetchX509SVID(X509SVIDRequest(), metadata=SECURITY_METADATA)
    async with asyncio.timeout(10):
        assert (await answer.read()).svids
