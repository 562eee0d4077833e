"""An agent between a broker that says anything and those who follow: what is denied stays denied,
nobody is told that it has all when it may not, and the agent asks for the full state.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from identity_api.broker.v1 import credential_pb2, node_sync_pb2, revocation_feed_pb2, types_pb2
from identity_broker.agent import mirror as mirror_module
from support.agent import RunningAgent, agent_settings, running_agent
from support.feed import Verifier, until, verifier
from support.sync_server import (
    Script,
    Session,
    SyncServer,
    delta,
    digest_of,
    entry,
    says,
    sync_server,
)

ME = entry("web", selectors=[types_pb2.Selector(type="unix", value=f"uid:{os.getuid()}")])
DIGEST = digest_of([ME])
NAMES = [f"{number:040x}" for number in range(4)]


def revoked(name: str) -> revocation_feed_pb2.RevokedCredential:
    return revocation_feed_pb2.RevokedCredential(
        id=name,
        kind=credential_pb2.CREDENTIAL_KIND_X509,
        spiffe_id="spiffe://example.org/web",
        revoked_at=1_700_000_000,
        expires_at=4_000_000_000,
        entry_id="another node's business",
        instance="of its own",
    )


def change(previous: int, revision: int, *names: str, **fields: Any) -> node_sync_pb2.SyncResponse:
    return delta(
        previous,
        revision,
        revocations=[revoked(name) for name in names],
        entries_digest=DIGEST,
        **fields,
    )


def state(
    site: SyncServer, revision: int, *names: str, **fields: Any
) -> node_sync_pb2.SyncResponse:
    return site.full(revision, [ME], revocations=[revoked(name) for name in names], **fields)


@asynccontextmanager
async def agent_of(site: SyncServer, directory: Path) -> AsyncIterator[RunningAgent]:
    """An agent that believes the server to be its broker."""
    directory.mkdir(parents=True)
    bundle_file = directory / "bundle.pem"
    bundle_file.write_bytes(site.domain.bundle.roots_pem)
    broker = SimpleNamespace(
        addresses=site, settings=SimpleNamespace(server=SimpleNamespace(bundle_file=bundle_file))
    )
    settings = agent_settings(cast("Any", broker), directory, token="idbt_any")
    async with running_agent(cast("Any", broker), directory, settings=settings) as agent:
        yield agent


@asynccontextmanager
async def followed(
    directory: Path, *scripts: Script
) -> AsyncIterator[tuple[SyncServer, RunningAgent, Verifier]]:
    """One who follows an agent of a server with these scripts."""
    async with (
        sync_server(*scripts) as site,
        agent_of(site, directory / "agent") as agent,
        verifier(agent.channel()) as one,
    ):
        yield site, agent, one


async def test_what_is_told_to_the_node_is_told_on(open_directory: Path) -> None:
    one_by_one: list[Script] = []
    async with sync_server() as site:
        site.scripts = one_by_one

        async def script(session: Session) -> None:
            await session.send(state(site, 5, NAMES[0]))
            await until(lambda: bool(session.reports))
            await session.send(change(5, 6, NAMES[1]))
            await session.send(change(6, 7, released_ids=[NAMES[0]]))
            await session.hang()

        one_by_one.append(script)
        async with agent_of(site, open_directory / "agent") as agent:
            async with verifier(agent.channel()) as one:
                await until(lambda: one.complete_at == 7)
                assert one.denied == {NAMES[1]}
                assert not any(each.entry_id or each.instance for each in one.messages[0].revoked)
                name = f"spiffe://example.org/web/{os.getpid()}"
                await until(lambda: site.sessions[0].reports[-1:] == [{name: 7}])
            await until(lambda: site.sessions[0].reports[-1:] == [{}])


HOSTILE = {
    "a replay": [change(5, 6, NAMES[1]), change(5, 6, NAMES[1])],
    "a step left out": [change(6, 7, NAMES[1])],
    "two the wrong way round": [change(6, 7, NAMES[1]), change(5, 6, NAMES[2])],
    "backwards": [change(5, 4, released_ids=[NAMES[0]])],
    "another digest": [delta(5, 6, released_ids=[NAMES[0]], entries_digest=1)],
    "an epoch of nobody": [
        change(5, 6, released_ids=[NAMES[0]], epochs=[revocation_feed_pb2.IdentityEpoch()])
    ],
    "no message": [b"\xff\xff"],
}


@pytest.mark.parametrize("messages", HOSTILE.values(), ids=HOSTILE.keys())
async def test_what_does_not_fit_releases_nobody_and_is_asked_for_again(
    open_directory: Path, messages: list[Any]
) -> None:
    async with sync_server() as site:

        async def first(session: Session) -> None:
            await session.send(state(site, 5, NAMES[0]))
            await until(lambda: bool(session.reports))
            for message in messages:
                await session.send(message)
            await session.hang()

        site.scripts = [first, says(state(site, 9, NAMES[0], NAMES[3]))]
        async with (
            agent_of(site, open_directory / "agent") as agent,
            verifier(agent.channel()) as one,
        ):
            await until(lambda: one.complete_at == 9)
            assert site.sessions[1].hello.resume_from == 0
            assert one.denied == {NAMES[0], NAMES[3]}
            assert not any(NAMES[0] in message.released_ids for message in one.messages)
            # Over one and the same stream, without the full state.
            assert [message.full for message in one.messages].count(True) == 1


async def test_an_older_state_is_not_passed_on_before_the_broker_insists(
    open_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with sync_server() as site:
        site.scripts = [says(state(site, 50, *NAMES)), says(state(site, 3))]
        async with (
            agent_of(site, open_directory / "agent") as agent,
            verifier(agent.channel()) as one,
        ):
            await until(lambda: one.complete_at == 50)
            agent.agent._node.resync()
            await until(lambda: len(site.sessions) >= 3)
            assert one.denied == set(NAMES)
            assert not one.over
            assert not agent.agent._relay.is_fresh()
            monkeypatch.setattr(mirror_module, "INSIST_SECONDS", 0.0)
            await until(lambda: one.over, 30)  # its numbers mean something else now
            assert one.reason == "WATCH_LAGGED"
            async with verifier(agent.channel(), resume_from=50) as again:
                await until(lambda: again.complete_at > 0)
                assert again.messages[0].full
                assert not again.denied


async def test_a_large_state_and_a_large_change_come_in_pieces(open_directory: Path) -> None:
    many = [f"{number:040x}" for number in range(30_000)]
    async with sync_server() as site:

        async def script(session: Session) -> None:
            await session.send(state(site, 5, *many[:15_000]))
            await until(lambda: bool(session.reports))
            await session.send(change(5, 6, *many[15_000:]))
            await until(lambda: session.acks == [5, 6])
            await session.send(change(6, 7, released_ids=many[:29_000]))
            await session.hang()

        site.scripts = [script]
        async with (
            agent_of(site, open_directory / "agent") as agent,
            verifier(agent.channel()) as one,
        ):
            await until(lambda: one.complete_at == 7, 30)
            assert one.denied == set(many[29_000:])
            assert max(message.ByteSize() for message in one.messages) < 1024 * 1024
            assert len(one.messages) > 15
            async with verifier(agent.channel()) as late:
                await until(lambda: late.complete_at == 7, 30)
                assert late.denied == one.denied
