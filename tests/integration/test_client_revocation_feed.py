"""The follower of the feed: over an agent's socket, over a broker's link, over restarts."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from identity_api.broker.v1 import types_pb2
from identity_client import (
    PeerRejected,
    PeerRevoked,
    StalenessPolicy,
    client_ssl_context,
    server_ssl_context,
)
from identity_client.aio import IdentitySource
from identity_client.clock import utc_now
from identity_client.holder import IdentityHolder
from identity_client.naming import parse_trust_domain
from identity_client.peer import check_current, peer_from_pem
from identity_client.revocation import DenySet, IdentityEpoch, RevokedCredential
from identity_client.revocation_feed import RevocationFollower, verifier_name
from identity_client.revocation_file import RevocationMemory
from identity_client.staleness import DEFAULT_STALENESS
from support.client import source_arguments, until
from support.feed_server import FeedSession, ScriptedFeed, feeding, says, told
from support.line import RunningBroker, running, settings_in
from support.workload_server import ScriptedDomain, ScriptedWorkloadApi

WEB = "spiffe://example.org/web"
API = "spiffe://example.org/api"


@pytest.fixture
def domain() -> ScriptedDomain:
    return ScriptedDomain("example.org")


@pytest.fixture
async def api(domain: ScriptedDomain) -> ScriptedWorkloadApi:
    scripted = ScriptedWorkloadApi(domain)
    await scripted.say(domain.offer(domain.svid("/web")))
    return scripted


@asynccontextmanager
async def following(
    directory: Path, staleness: StalenessPolicy | None = None
) -> AsyncIterator[IdentitySource]:
    source = IdentitySource.from_workload_api(
        f"unix://{directory / 'api.sock'}", staleness=staleness or DEFAULT_STALENESS
    )
    async with source:
        yield source


# --- an agent's socket ---------------------------------------------------------------------------


async def test_an_agent_s_feed_is_followed_and_acknowledged(
    api: ScriptedWorkloadApi, tmp_path: Path
) -> None:
    go_on = asyncio.Event()

    async def script(session: FeedSession) -> None:
        await session.send(told(7, full=True, revoked={"aa": API}, complete=False))
        await session.acked(7)
        await session.send(told(7, revoked={"bb": API}))
        await session.acked(7)
        await go_on.wait()
        await session.send(told(9, 7, revoked={"cc": API}, released=("aa",)))
        await session.acked(9)
        await session.hang()

    feed = ScriptedFeed(script)
    async with feeding(api, feed, tmp_path / "api.sock"), following(tmp_path) as source:
        await source.wait_ready(5)
        status = source.status()
        assert status.revocations_synced
        assert not status.revocations_stale
        assert status.revocations_heard_at is not None
        assert ("aa" in source.denied, "bb" in source.denied) == (True, True)
        (session,) = feed.sessions
        assert session.hello.resume_from == 0
        assert session.hello.name == verifier_name()
        assert len(session.hello.name) <= 64
        assert feed.headers == ["true"]
        go_on.set()
        await until(lambda: 9 in session.acks)
        assert [one in source.denied for one in ("aa", "bb", "cc")] == [False, True, True]


async def test_a_broken_stream_goes_on_where_it_stood(
    api: ScriptedWorkloadApi, tmp_path: Path
) -> None:
    async def breaks(session: FeedSession) -> None:
        await session.send(told(7, full=True, revoked={"aa": API}))
        await session.acked(7)

    feed = ScriptedFeed(breaks, says(told(8, 7, revoked={"bb": API})))
    async with feeding(api, feed, tmp_path / "api.sock"), following(tmp_path) as source:
        await until(lambda: "bb" in source.denied)
        assert [one.hello.resume_from for one in feed.sessions] == [0, 7]
        assert "aa" in source.denied


@pytest.mark.parametrize(
    "lie",
    [
        told(9, 8, released=("aa",)),  # a gap
        told(6, 7, released=("aa",)),  # a step back
        told(5, full=True),  # an old full state
        told(8, 7, revoked={"": API}, released=("aa",)),  # nonsense
        told(8, 7, revoked={"x" * 300: API}, released=("aa",)),
        b"\xff\xff\xff",
    ],
)
async def test_a_lie_takes_nothing_back_and_everything_is_asked_for_again(
    api: ScriptedWorkloadApi, tmp_path: Path, lie: Any
) -> None:
    honest = told(12, full=True, revoked={"bb": API})
    feed = ScriptedFeed(says(told(7, full=True, revoked={"aa": API}), lie), says(honest))
    async with feeding(api, feed, tmp_path / "api.sock"), following(tmp_path) as source:
        await until(lambda: "aa" in source.denied)
        await until(lambda: len(feed.sessions) == 2)
        wanted = 7 if isinstance(lie, bytes) else 0
        assert feed.sessions[1].hello.resume_from == wanted
        # What it said last counts, being whole.
        await until(lambda: "bb" in source.denied and "aa" not in source.denied)
        assert source.status().revocations_synced


async def test_who_lies_all_the_time_is_asked_seldom(
    api: ScriptedWorkloadApi, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lying = says(told(7, full=True, revoked={"aa": API}), told(3, 2, released=("aa",)))
    feed = ScriptedFeed(lying)
    async with feeding(api, feed, tmp_path / "api.sock"), following(tmp_path) as source:
        await source.wait_ready(5)
        await asyncio.sleep(2)
        assert len(feed.sessions) <= 5
        assert "aa" in source.denied
        assert "what is denied stays denied" in caplog.text


async def test_an_endpoint_without_a_feed_is_asked_once(
    domain: ScriptedDomain, api: ScriptedWorkloadApi, tmp_path: Path
) -> None:
    peer = domain.svid("/api")
    await api.say(domain.offer(domain.svid("/web")), crls=[domain.crl([peer.serial])])
    async with feeding(api, None, tmp_path / "api.sock"), following(tmp_path) as source:
        begun = time.monotonic()
        await source.wait_ready(5)
        assert time.monotonic() - begun < 0.9  # Nobody waits for what cannot come.
        assert source.status().revocations_synced  # by the list
        assert source.denied.denies(peer.serial, peer.issuer)
        engine: Any = source._engine
        asked = 0
        real = engine._link.revocation_feed

        def counted() -> Any:
            nonlocal asked
            asked += 1
            return real()

        engine._link.revocation_feed = counted
        await asyncio.sleep(1.0)
        assert asked == 0


async def test_an_endpoint_that_has_a_feed_after_a_reconnection(
    domain: ScriptedDomain, api: ScriptedWorkloadApi, tmp_path: Path
) -> None:
    async with following(tmp_path) as source:
        async with feeding(api, None, tmp_path / "api.sock"):
            await source.wait_ready(5)
            assert not source.status().revocations_synced
        await until(lambda: source.status().last_error is not None)
        feed = ScriptedFeed(says(told(7, full=True, revoked={"aa": API})))
        async with feeding(api, feed, tmp_path / "api.sock"):
            await until(lambda: "aa" in source.denied)
            assert source.status().revocations_synced
        await until(lambda: not source.status().revocations_synced)
        assert "aa" in source.denied


async def test_no_identity_is_published_before_the_feed_had_its_moment(
    api: ScriptedWorkloadApi, tmp_path: Path
) -> None:
    async def late(session: FeedSession) -> None:
        await asyncio.sleep(0.5)
        await session.send(told(7, full=True, revoked={"aa": API}))
        await session.hang()

    feed = ScriptedFeed(late)
    async with feeding(api, feed, tmp_path / "api.sock"), following(tmp_path) as source:
        await source.wait_ready(5)
        assert "aa" in source.denied
    silent = ScriptedFeed(says())
    async with feeding(api, silent, tmp_path / "api.sock"), following(tmp_path) as source:
        begun = time.monotonic()
        await source.wait_ready(5)
        assert 0.9 < time.monotonic() - begun < 2.5  # bounded


async def test_our_own_revocation_is_heard_by_the_feed(
    domain: ScriptedDomain, api: ScriptedWorkloadApi, tmp_path: Path
) -> None:
    mine = domain.svid("/web")
    await api.say(domain.offer(mine))
    go_on = asyncio.Event()

    async def script(session: FeedSession) -> None:
        await session.send(told(7, full=True))
        await go_on.wait()
        await session.send(told(8, 7, revoked={mine.serial: WEB}))
        await session.hang()

    feed = ScriptedFeed(script)
    async with feeding(api, feed, tmp_path / "api.sock"), following(tmp_path) as source:
        await source.wait_ready(5)
        go_on.set()
        await until(lambda: not source.status().ready)
        await api.say(domain.offer(domain.svid("/web")))
        await until(lambda: source.status().ready)


async def test_silence_ends_the_stream_and_then_counts(
    api: ScriptedWorkloadApi, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    # What is not complete is no news.
    silent = says(told(7, full=True, complete=False, heartbeat_ms=1000))
    feed = ScriptedFeed(says(told(7, full=True, heartbeat_ms=1000)), silent)
    policy = StalenessPolicy.refuse(2)
    async with feeding(api, feed, tmp_path / "api.sock"), following(tmp_path, policy) as source:
        snapshot = await source.wait_ready(5)
        peer = peer_from_pem(snapshot.x509.chain_pem)
        check_current(peer, source.denied)
        await until(lambda: source.status().revocations_stale, 4)
        with pytest.raises(PeerRejected) as refused:
            check_current(peer, source.denied)
        assert refused.value.reason == "REVOCATIONS_STALE"
        await until(lambda: len(feed.sessions) > 1, 6)  # after three heartbeats
        await asyncio.sleep(0.3)
        assert source.status().revocations_stale


# --- a broker's link -----------------------------------------------------------------------------


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[RunningBroker]:
    async with running(settings_in(tmp_path / "idb", ca={"key_manager": "memory"})) as one:
        yield one


async def joined(broker: RunningBroker, name: str, path: str, **arguments: Any) -> IdentitySource:
    selector = types_pb2.Selector(type="join_token", value=f"name:{name}")
    await broker.entry(path, name, selectors=[selector])
    return IdentitySource.from_join_token(
        **source_arguments(broker),
        token=await broker.token(name),
        spiffe_id=f"spiffe://example.org{path}",
        **arguments,
    )


async def test_a_verifier_that_was_away_denies_before_it_serves(
    broker: RunningBroker, tmp_path: Path
) -> None:
    web = await joined(broker, "n1", "/web")
    arguments = {"state_dir": tmp_path / "state"}
    api = await joined(broker, "n2", "/api", **arguments)
    async with web:
        stolen = peer_from_pem((await web.wait_ready(10)).x509.chain_pem)
        token = await web.fetch_jwt_svid("orders")
        async with api:
            await api.wait_ready(10)
            check_current(stolen, api.denied)
        await broker.revoke(spiffe_id=WEB)
        again = IdentitySource(api.settings)
        async with again:
            await again.wait_ready(10)
            # No waiting: it was told before it had an identity.
            with pytest.raises(PeerRevoked):
                check_current(stolen, again.denied)
            with pytest.raises(PeerRevoked):
                again.validate_jwt_svid(token.token, "orders")


async def test_what_was_known_is_denied_without_a_broker(
    broker: RunningBroker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = tmp_path / "state"
    web = await joined(broker, "n1", "/web")
    api = await joined(broker, "n2", "/api", state_dir=state)
    async with web, api:
        stolen = peer_from_pem((await web.wait_ready(10)).x509.chain_pem)
        await api.wait_ready(10)
        await broker.revoke(spiffe_id=WEB)
        await until(lambda: stolen.serial in api.denied)
        # Written behind: not at the end alone, which may never come.
        file = state / "revocations.json"
        await until(lambda: file.exists() and stolen.serial in _kept_ids(file), 5)
        assert file.stat().st_mode & 0o777 == 0o600
    settings = api.settings
    nobody = IdentitySource(_elsewhere(settings))
    async with nobody:
        assert stolen.serial in nobody.denied
        assert nobody.denied.names(WEB)
        assert not nobody.status().revocations_synced
    file.write_text("{ damaged")
    async with IdentitySource(_elsewhere(settings)) as forgetful:
        assert len(forgetful.denied) == 0
        assert "are ignored: it is damaged" in caplog.text
    async with IdentitySource(settings) as back:
        await back.wait_ready(10)
        assert stolen.serial in back.denied


async def test_an_idle_connection_ends_within_a_second_of_the_command(
    broker: RunningBroker,
) -> None:
    ended: list[Exception | bytes] = []
    done = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            ended.append(await reader.read(1))
        except OSError as error:
            ended.append(error)
        writer.close()
        done.set()

    web, api = await joined(broker, "n1", "/web"), await joined(broker, "n2", "/api")
    async with web, api:
        await web.wait_ready(10)
        await api.wait_ready(10)
        context = server_ssl_context(api, authorize=WEB)
        async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as server:
            _, writer = await asyncio.open_connection(
                *server.sockets[0].getsockname(), ssl=client_ssl_context(web, authorize=API)
            )
            await asyncio.sleep(0.1)
            assert not done.is_set()
            await broker.revoke(spiffe_id=WEB)
            async with asyncio.timeout(1):
                await done.wait()
            writer.close()
    (error,) = ended
    assert isinstance(error, PeerRejected)
    assert error.reason == "PEER_REVOKED"


def _kept_ids(file: Path) -> str:
    return file.read_text()


def _elsewhere(settings: Any) -> Any:
    from dataclasses import replace

    return replace(settings, address="127.0.0.1:1", bootstrap_address="127.0.0.1:1")


# --- the file ------------------------------------------------------------------------------------


def memory(directory: Path | None, name: str = "example.org") -> tuple[RevocationMemory, Any, Any]:
    holder = IdentityHolder()
    follower = RevocationFollower(holder, on_own=lambda: None)
    domain = parse_trust_domain(name)
    return RevocationMemory(directory, domain, holder.denied, follower), holder.denied, follower


async def _filled(directory: Path) -> DenySet:
    kept, denied, follower = memory(directory)
    now = utc_now()
    expires = now.replace(year=now.year + 1)
    denied.add([RevokedCredential("0a" * 20, WEB, expires)], now=now)
    denied.add([RevokedCredential("a jti", WEB, expires, shown_in_tls=False)], now=now)
    denied.raise_epoch(IdentityEpoch(WEB, 5, int(expires.timestamp())))
    denied.deny_authorities(["aabb", "kid"])
    follower.sequence = 2**63
    await kept.save()
    found: DenySet = denied
    return found


async def test_the_file_keeps_all_of_it(tmp_path: Path) -> None:
    written = await _filled(tmp_path)
    kept, denied, follower = memory(tmp_path)
    await kept.load()
    assert follower.sequence == 2**63
    assert denied.keep() == written.keep()
    assert [path.name for path in tmp_path.iterdir()] == ["revocations.json"]
    other, stranger, _ = memory(tmp_path, "example.com")
    await other.load()
    assert len(stranger) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"version": 3},
        {"sequence": -1},
        {"sequence": 2**64},
        {"sequence": "7"},
        {"denied": []},
        {"denied": {"x": ["aa"]}},
        {"denied": {"1": ["zz"]}},
        {"denied": {"1": [1]}},
        {"epochs": {"a": [1]}},
        {"epochs": {"a": [1, "2"]}},
        {"named": {"a": None}},
        {"authorities": [1]},
        {"heard_at": "yesterday"},
    ],
)
async def test_a_file_that_was_tampered_with_is_ignored_whole(
    tmp_path: Path, change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    await _filled(tmp_path)
    file = tmp_path / "revocations.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    kept, denied, follower = memory(tmp_path)
    await kept.load()
    assert (len(denied), follower.sequence) == (0, 0)
    assert "are ignored" in caplog.text


async def test_a_file_that_others_can_read_or_that_is_a_link_is_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await _filled(tmp_path)
    file = tmp_path / "revocations.json"
    file.chmod(0o644)
    kept, denied, _ = memory(tmp_path)
    await kept.load()
    assert len(denied) == 0
    assert caplog.text.count("are ignored") == 1
    file.chmod(0o600)
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    await kept.load()
    assert len(denied) == 0
    file.unlink()
    os.mkfifo(file, 0o600)
    async with asyncio.timeout(5):
        await kept.load()
    assert len(denied) == 0


async def test_a_directory_that_is_gone_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept, _, _ = memory(tmp_path / "gone")
    for _ in range(3):
        await kept.save()
    assert caplog.text.count("cannot be kept") == 1
    nothing, _, _ = memory(None)
    await nothing.load()
    await nothing.save()
    await nothing.run()
