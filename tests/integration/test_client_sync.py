"""The threaded source against a real broker: the same core, used from ordinary threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from spiffe import SpiffeId

from identity_api.broker.v1 import types_pb2
from identity_client import IdentitySource, SourceClosed, SourceState, client_ssl_context
from identity_client.integrations.grpc import secure_channel
from identity_client.tls import RotatingContext
from support.client import NAMES, echo_server, source_arguments
from support.line import RunningBroker, running, settings_in

WEB = "spiffe://example.org/web"


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[RunningBroker]:
    """SQLite and keys in memory."""
    async with running(settings_in(tmp_path / "idb", ca={"key_manager": "memory"})) as running_one:
        yield running_one


async def prepared(broker: RunningBroker, name: str, path: str) -> dict[str, Any]:
    token = await broker.token(name)
    chosen = types_pb2.Selector(type="join_token", value=f"name:{name}")
    await broker.entry(path, name, selectors=[chosen])
    return {**source_arguments(broker), "token": token}


async def test_a_thread_gets_an_identity_and_gives_it_back(broker: RunningBroker) -> None:
    arguments = await prepared(broker, "n1", "/web")

    def program() -> None:
        updates: list[str] = []
        with IdentitySource.from_join_token(**arguments) as source:
            snapshot = source.wait_ready(timeout=20)
            assert snapshot.spiffe_id == SpiffeId(WEB)
            assert source.x509_svid is snapshot.svid
            assert source.x509_bundle().x509_authorities
            tokens = {source.fetch_jwt_svid("api").token for _ in range(3)}
            assert len(tokens) == 1
            assert source.validate_jwt_svid(tokens.pop(), "api").spiffe_id == SpiffeId(WEB)
            assert source.status().ready
            assert isinstance(client_ssl_context(source, authorize=WEB), RotatingContext)
            following = source.updates()
            updates.append(next(following).serial)
            with (
                echo_server(source, WEB) as address,
                secure_channel(source, address, peer=WEB) as channel,
            ):
                assert channel.unary_unary(NAMES["unary_unary"])(b"x") == f"x|{WEB}".encode()
        assert updates == [snapshot.serial]
        assert list(following) == []
        assert source.status().state is SourceState.CLOSED
        with pytest.raises(SourceClosed):
            source.fetch_jwt_svid("api")
        source.close()

    await asyncio.to_thread(program)
    assert "identity-source" not in {thread.name for thread in threading.enumerate()}


async def test_sources_share_one_thread(broker: RunningBroker) -> None:
    first = await prepared(broker, "n1", "/web")
    second = await prepared(broker, "n2", "/api")

    def program() -> None:
        with (
            IdentitySource.from_join_token(**first) as web,
            IdentitySource.from_join_token(**second) as api,
        ):
            assert web.wait_ready(20).spiffe_id != api.wait_ready(20).spiffe_id
            names = [thread.name for thread in threading.enumerate()]
            assert names.count("identity-source") == 1

    await asyncio.to_thread(program)


async def test_a_subscriber_that_blocks_or_fails_harms_nobody(
    broker: RunningBroker, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = await prepared(broker, "n1", "/web")

    def program() -> None:
        source = IdentitySource.from_join_token(**arguments)
        caught: list[BaseException] = []

        def wrong(snapshot: object) -> None:
            try:
                source.fetch_jwt_svid("api")
            except RuntimeError as error:
                caught.append(error)
                raise

        source.subscribe(wrong)
        with source:
            source.wait_ready(20)
        assert len(caught) == 1

    await asyncio.to_thread(program)
    assert "a subscriber of the identity source failed" in caplog.text
