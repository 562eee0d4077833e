"""What a node does when its broker refuses it: banned, forgotten, or wrongly refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc

from identity_client.attestation import JoinTokenAttestor
from identity_client.errors import NotPermitted
from identity_client.node import NodeKeeper, NodePhase
from support.client import until
from support.node import Held, followed, kept_node
from support.sync_server import Session, SyncServer, delta, says, sync_server


async def test_a_banned_node_says_so_at_once_and_comes_back_when_it_may() -> None:
    banned = NotPermitted("the node is banned", reason="NODE_BANNED")
    async with sync_server() as site:

        async def first(session: Session) -> None:
            await session.send(site.full(5))
            await session.refuse(banned, grpc.StatusCode.PERMISSION_DENIED)

        async def later(session: Session) -> None:
            if site.refuse_renewal is not None:
                await session.refuse(banned, grpc.StatusCode.PERMISSION_DENIED)
            await says(delta(5, 6))(session)

        site.scripts = [first, later]
        site.refuse_renewal = (banned, grpc.StatusCode.PERMISSION_DENIED)
        seen: list[NodePhase] = []
        keepers: list[NodeKeeper] = []
        notice: Callable[[], None] = lambda: seen.append(keepers[0].status.phase)  # noqa: E731
        async with kept_node_noting(site, keepers, notice) as keeper:
            mirror = Held()
            phases: list[NodePhase] = []
            task = asyncio.create_task(
                mirror.run(keeper, lambda: phases.append(keeper.status.phase))
            )
            await until(lambda: bool(mirror.reasons))
            # The acknowledgement met the end of the call, so its reason may come with the next.
            await until(lambda: mirror.reasons[-1] == "NODE_BANNED")
            assert set(mirror.reasons) <= {"STREAM_CUT", "NODE_BANNED"}
            assert phases[-1] is NodePhase.BANNED
            await until(lambda: site.renewals >= 2)
            site.refuse_renewal = None
            await until(lambda: keeper.status.phase is NodePhase.ATTESTED)
            await until(lambda: mirror.revision == 6)
            assert NodePhase.BANNED in seen
            assert seen[-1] is NodePhase.ATTESTED
            await keeper.close()
            await task


@asynccontextmanager
async def kept_node_noting(
    site: SyncServer, keepers: list[NodeKeeper], notice: Callable[[], None]
) -> AsyncIterator[NodeKeeper]:
    keeper = NodeKeeper(site.settings(), on_change=notice, dice=lambda: 0.0)
    keepers.append(keeper)
    await keeper.start()
    try:
        yield keeper
    finally:
        await keeper.close()


async def test_a_node_the_broker_forgot_proves_itself_again_and_follows_on(
    tmp_path: Path,
) -> None:
    unknown = NotPermitted("no such node", reason="NODE_UNKNOWN")
    token = tmp_path / "token"
    token.write_text("idbt_any")
    async with sync_server() as site:

        async def first(session: Session) -> None:
            await session.send(site.full(5))
            await until(lambda: session.acks == [5])
            site.refuse_renewal = (unknown, grpc.StatusCode.PERMISSION_DENIED)
            await session.refuse(unknown, grpc.StatusCode.PERMISSION_DENIED)

        site.scripts = [first, says(delta(5, 6))]
        settings = site.settings(attestor=JoinTokenAttestor(token_file=token))
        async with kept_node(settings) as keeper:
            mirror = Held()
            task = asyncio.create_task(mirror.run(keeper))
            await until(lambda: mirror.revision == 6)
            assert site.attestations == 2
            assert site.renewals == 1
            assert mirror.reasons == ["NODE_UNKNOWN"]
            assert keeper.status.phase is NodePhase.ATTESTED
            await keeper.close()
            await task


async def test_a_doubt_that_proves_vain_every_time_is_not_asked_after_for_ever() -> None:
    unknown = NotPermitted("no such node", reason="NODE_UNKNOWN")

    async def always(session: Session) -> None:
        await session.refuse(unknown, grpc.StatusCode.PERMISSION_DENIED)

    async with (
        sync_server(always) as site,
        kept_node(site.settings(), dice=lambda: 0.0) as keeper,
        followed(keeper) as mirror,
    ):
        await asyncio.sleep(3)
        # The renewal succeeds each time, so nothing is lost, and the broker's ledger stays small.
        assert site.attestations == 1
        assert 1 <= site.renewals <= 8
        assert mirror.reasons


async def test_a_banned_machine_that_has_no_svid_says_so_to_whoever_follows() -> None:
    async with sync_server() as site:
        site.scripts = [says(site.full(5))]
        banned = NotPermitted("the node is banned", reason="NODE_BANNED")
        site.refuse_attestation = (banned, grpc.StatusCode.PERMISSION_DENIED)
        async with (
            kept_node(site.settings(), dice=lambda: 0.0) as keeper,
            followed(keeper) as held,
        ):
            await until(lambda: len(held.reasons) >= 2)
            assert set(held.reasons) == {"NODE_BANNED"}
            assert keeper.status.phase is NodePhase.BANNED
            assert not site.sessions
            site.refuse_attestation = None
            await until(lambda: held.revision == 5)
            assert keeper.status.last_error is None


async def test_a_broker_that_admits_a_node_and_forgets_it_each_time_is_not_flooded(
    tmp_path: Path,
) -> None:
    unknown = NotPermitted("no such node", reason="NODE_UNKNOWN")
    token = tmp_path / "token"
    token.write_text("idbt_any")

    async def always(session: Session) -> None:
        await session.refuse(unknown, grpc.StatusCode.PERMISSION_DENIED)

    async with sync_server(always) as site:
        site.refuse_renewal = (unknown, grpc.StatusCode.PERMISSION_DENIED)
        settings = site.settings(attestor=JoinTokenAttestor(token_file=token))
        async with kept_node(settings, dice=lambda: 0.0) as keeper, followed(keeper) as held:
            await asyncio.sleep(3)
            assert 2 <= site.attestations <= 8
            assert set(held.reasons) == {"NODE_UNKNOWN"}
