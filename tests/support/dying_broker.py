"""A broker in a process of its own that kills itself (`crashing_broker`), or is killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from identity_broker.server.app import BoundAddresses
from support.line import RunningBroker, settings_in

SCRIPT = Path(__file__).parent / "crashing_broker.py"


@asynccontextmanager
async def child(directory: Path, point: str, count: int = 1) -> AsyncIterator[RunningBroker]:
    """A broker in a process of its own that dies at `point`."""
    settings = settings_in(directory)
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(SCRIPT),
        str(directory),
        point,
        str(count),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env=environment,
    )
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), 30)
        assert line, "the broker did not start"
        told = json.loads(line)
        addresses = BoundAddresses(**{**told, "admin_socket": Path(told["admin_socket"])})
        async with AsyncExitStack() as resources:
            yield RunningBroker(addresses, settings, resources)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(process.wait(), 20)
