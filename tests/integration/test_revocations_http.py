"""GET /revocations, and what every channel says when the broker cannot know what was revoked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from cryptography import x509

from identity_broker.lifecycle import directory
from identity_broker.lifecycle.crl import lists as lists_module
from support.line import RunningBroker, running
from support.lists import list_url, number_of, public_settings
from support.postgres import PostgresServer

pytestmark = pytest.mark.postgresql


@pytest.fixture
async def database(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[PostgresServer]:
    """Its loss is noticed soon."""
    monkeypatch.setattr(directory, "_SILENCE_SECONDS", 1.0)
    monkeypatch.setattr(directory, "_POLL_SECONDS", 0.3)
    monkeypatch.setattr(lists_module, "_LOOK_SECONDS", 0.2)
    monkeypatch.setattr(lists_module, "_RETRY_SECONDS", 0.2)
    server = PostgresServer()
    await asyncio.to_thread(server.start)
    try:
        yield server
    finally:
        await asyncio.to_thread(server.stop)


async def test_nobody_is_told_that_what_is_known_is_all_there_is(
    tmp_path: Path, database: PostgresServer
) -> None:
    """A database that is away: lists are not made anew, and the rest is not answered."""
    settings = public_settings(
        tmp_path / "idb",
        ca={"key_manager": "memory"},
        store={"url": database.url()},
        revocation={"crl_validity": "10s"},
    )
    async with (
        running(settings) as broker,
        httpx.AsyncClient(base_url=settings.revocation.public_url or "") as client,
    ):
        leaf = await _leaf(broker)
        [own] = (await client.get("/crl")).json()["lists"]
        urls = [own["url"], own["delta_url"], list_url(leaf)]
        known = (await client.get("/revocations")).headers["etag"]
        for url in urls:
            assert (await client.get(url)).status_code == 200
        await asyncio.to_thread(database.kill)
        await _until(client, 503)

        for headers in ({}, {"if-none-match": known}):
            answer = await client.get("/revocations", headers=headers)
            assert answer.status_code == 503
            assert answer.json()["reason"] == "STORE_UNAVAILABLE"
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.headers["cache-control"] == "no-store"
            assert "etag" not in answer.headers

        # Half of a list's life goes by, and it would be made again; then all of it.
        numbers: dict[str, set[int]] = {url: set() for url in urls}
        noticed = time.monotonic()
        while time.monotonic() < noticed + 8:
            for url in urls:
                answer = await client.get(url)
                if answer.status_code == 200:
                    numbers[url].add(number_of(x509.load_der_x509_crl(answer.content)))
                else:
                    assert answer.status_code == 503
                    assert int(answer.headers["retry-after"]) >= 1
            await asyncio.sleep(0.2)
        assert [len(found) for found in numbers.values()] == [1, 1, 1]
        ready = await client.get("/readyz")
        down = {name for name, state in ready.json()["dependencies"].items() if not state["ready"]}
        assert (ready.status_code, down) == (503, {"store", "change_feed", "revocation_lists"})

        await asyncio.to_thread(database.start)
        async with asyncio.timeout(30):
            await _until(client, 200)
            while True:
                crl = x509.load_der_x509_crl((await client.get(own["url"])).content)
                if number_of(crl) not in numbers[own["url"]]:
                    break
                await asyncio.sleep(0.1)
            assert (await client.get(list_url(leaf))).status_code == 200
            await _until(client, 200, "/readyz")


async def _leaf(broker: RunningBroker) -> x509.Certificate:
    node = await broker.join("web-1")
    entry = await broker.entry("/payments/api", "web-1")
    svid = (await node.issue(entry.id)).svid
    return x509.load_der_x509_certificate(svid.cert_chain[0])


async def _until(client: httpx.AsyncClient, status: int, path: str = "/revocations") -> None:
    async with asyncio.timeout(30):
        while (await client.get(path)).status_code != status:
            await asyncio.sleep(0.1)
