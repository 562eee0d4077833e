"""The same server without us: bare grpc.aio on a Unix socket, answering as long as it is asked.

    python tests/bench/agent_bare.py PATH       # ends when stdin does

- No splice before it, no attestation, no pipeline: what is left is gRPC and Python.
- The server's options are those of the agent's listener.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

import grpc

from identity_broker.agent.listener import _OPTIONS

UNARY = "/bench.Bare/Unary"
STREAM = "/bench.Bare/Stream"


def request(answer_bytes: int) -> bytes:
    """What asks for an answer of that length."""
    return str(answer_bytes).encode()


async def _unary(asked: bytes, _context: Any) -> bytes:
    return bytes(int(asked))


async def _stream(asked: bytes, context: Any) -> None:
    await context.write(bytes(int(asked)))
    await asyncio.Event().wait()


async def _serve(path: str) -> None:
    server = grpc.aio.server(options=_OPTIONS)
    handlers: Any = {
        "Unary": grpc.unary_unary_rpc_method_handler(_unary),
        "Stream": grpc.unary_stream_rpc_method_handler(_stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Bare", handlers),))
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


@dataclass(frozen=True)
class Bare:
    """A bare server."""

    pid: int
    address: str


@contextmanager
def bare() -> Iterator[Bare]:
    """A bare server, in a process of its own."""
    directory = Path(tempfile.mkdtemp(prefix="idb-bench-"))
    process = subprocess.Popen(
        [sys.executable, __file__, str(directory / "s")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if not process.stdout.readline():
            raise RuntimeError("the bare server did not start")
        yield Bare(process.pid, f"unix://{directory}/s")
    finally:
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
