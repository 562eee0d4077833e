"""The store goes away: no credential is issued, none is lost, and it recovers by itself."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc
import pytest

from identity_broker.config.settings import Settings
from support.line import reason_of, running, settings_in
from support.postgres import PostgresServer

IDENTITY = "spiffe://example.org/payments/api"


@pytest.mark.postgresql
async def test_postgresql_away_issues_nothing_and_loses_nothing(tmp_path: Path) -> None:
    server = PostgresServer()
    await asyncio.to_thread(server.start)
    try:
        settings: Settings = settings_in(
            tmp_path / "idb", ca={"key_manager": "memory"}, store={"url": server.url()}
        )
        async with running(settings) as broker:
            node = await broker.join("web-1")
            entry = await broker.entry("/payments/api", "web-1")
            issued = [(await node.issue(entry.id)).svid.serial for _ in range(3)]
            await broker.ledger()

            await asyncio.to_thread(server.kill)
            started = time.monotonic()
            refused = await node.issue(entry.id)
            assert time.monotonic() - started < 10
            assert refused.status.reason == "STORE_UNAVAILABLE"
            assert not refused.svid.serial
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await broker.revoke(spiffe_id=IDENTITY)
            assert reason_of(failed.value) == "STORE_UNAVAILABLE"

            await asyncio.to_thread(server.start)
            async with asyncio.timeout(30):
                while (again := await node.issue(entry.id)).status.code != 0:
                    await asyncio.sleep(0.2)
            known = {item.id for item in await broker.ledger(spiffe_id=IDENTITY)}
            assert known >= {*issued, again.svid.serial}
            revoked = await broker.revoke(spiffe_id=IDENTITY)
            assert set(issued) <= set(revoked.revoked_ids)
    finally:
        await asyncio.to_thread(server.stop)


@pytest.mark.skipif(os.geteuid() != 0, reason="a test of root's rights needs root")
async def test_the_admin_socket_refuses_another_user(tmp_path: Path) -> None:
    # The file's mode keeps others out; should it ever be widened, the peer's uid still does.
    with TemporaryDirectory(prefix="idb-", dir="/tmp") as outside:  # of root's private folders
        await _refuses_nobody(settings_in(Path(outside), ca={"key_manager": "memory"}))


async def _refuses_nobody(settings: Settings) -> None:
    async with running(settings) as broker:
        socket = broker.addresses.admin_socket
        script = (
            "import grpc, os, sys\n"
            "from identity_api.broker.v1 import entry_pb2, entry_pb2_grpc\n"
            "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
            "stub = entry_pb2_grpc.EntryStub(grpc.insecure_channel(sys.argv[1]))\n"
            "try:\n"
            "    stub.List(entry_pb2.ListEntriesRequest(), timeout=5)\n"
            "except grpc.RpcError as error:\n"
            "    print(error.code().name)\n"
        )

        async def as_nobody() -> str:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                script,
                f"unix:{socket}",
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
            )
            out, _ = await process.communicate()
            return out.decode().strip()

        assert await as_nobody() == "UNAVAILABLE"
        socket.parent.chmod(0o755)
        socket.chmod(0o666)
        assert await as_nobody() == "UNAUTHENTICATED"
