"""`idb svid fetch --watch` as a process of its own, and what it printed so far."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

# Ends with the tests, whatever ends them. Not preexec_fn: gRPC's own threads live in this
# process, and its fork handlers may end the child before it is idb.
_TIED = ("setpriv", "--pdeathsig", "KILL") if shutil.which("setpriv") else ()
_IDB = (*_TIED, sys.executable, "-m", "identity_broker.cli.main")


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Our environment without anything that names a broker or an agent."""
    named = ("IDB_", "IDENTITY_BROKER_", "SPIFFE_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(named)}
    return {**kept, **(extra or {})}


class Watch:
    """A running `idb svid fetch --watch -o json`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.documents: list[dict[str, Any]] = []
        self.talk = ""
        self._readers = [
            asyncio.create_task(self._read_documents()),
            asyncio.create_task(self._read_talk()),
        ]

    async def document(self, number: int, seconds: float = 20.0) -> dict[str, Any]:
        """The document with that number, from 1, once it is there."""
        await self.until(lambda: len(self.documents) >= number, seconds)
        return self.documents[number - 1]

    async def until(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        """Wait until `condition` holds; fails with what was said when it does not in time."""
        try:
            async with asyncio.timeout(seconds):
                while not condition():
                    assert self.process.returncode is None or condition(), self.talk
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"not in time:\n{self.talk}") from None

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End it; return its exit code."""
        if self.process.returncode is None:
            self.process.send_signal(number)
        async with asyncio.timeout(15):
            code = await self.process.wait()
            await asyncio.gather(*self._readers)
        return code

    async def _read_documents(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.documents.append(json.loads(line))

    async def _read_talk(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.talk += line.decode()


@asynccontextmanager
async def watching(
    *arguments: str, env: Mapping[str, str] | None = None, **options: Any
) -> AsyncIterator[Watch]:
    """Run `idb svid fetch --watch -o json …`; stopped on the way out."""
    process = await asyncio.create_subprocess_exec(
        *(*_IDB, "svid", "fetch", "--watch", "-o", "json", *arguments),
        env=clean_environment(env),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        **options,
    )
    watch = Watch(process)
    try:
        yield watch
    finally:
        await watch.stop()


async def fetch_once(
    *arguments: str, env: Mapping[str, str] | None = None, **options: Any
) -> tuple[int, str, str]:
    """Run `idb svid fetch …` to its end; return exit code, stdout and stderr."""
    process = await asyncio.create_subprocess_exec(
        *(*_IDB, "svid", "fetch", *arguments),
        env=clean_environment(env),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        **options,
    )
    async with asyncio.timeout(40):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()
