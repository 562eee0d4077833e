"""kill -9 at every step of a revocation: it is whole or it never was, and nobody has to help."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from identity_api.broker.v1 import (
    authority_pb2,
    credential_pb2,
    entry_pb2,
    entry_pb2_grpc,
    revocation_pb2,
    svid_pb2,
)
from support.dying_broker import child
from support.line import (
    AttestedClient,
    RunningBroker,
    csr_for,
    new_key,
    reason_of,
    running,
    settings_in,
)

IDENTITY = "spiffe://example.org/payments/api"
REVOKED = credential_pb2.CREDENTIAL_STATE_REVOKED
HOLD = credential_pb2.REVOCATION_REASON_CERTIFICATE_HOLD
MANY = 7
"""More than two steps of `crashing_broker`."""


@asynccontextmanager
async def whole(directory: Path) -> AsyncIterator[RunningBroker]:
    """A broker that does not die, on the same directory."""
    async with running(settings_in(directory)) as broker:
        yield broker


async def issue_many(node: AttestedClient, entry_id: str) -> set[str]:
    """Issue some X.509-SVIDs; return their serials."""
    items = [
        svid_pb2.BatchIssueX509Request.Item(entry_id=entry_id, csr=csr_for(new_key()))
        for _ in range(MANY)
    ]
    answer = await node.svids.BatchIssueX509(svid_pb2.BatchIssueX509Request(items=items))
    return {result.svid.serial for result in answer.results}


async def finished(broker: RunningBroker, order_id: str) -> revocation_pb2.RevocationRecord | None:
    """The order once nothing is left to do; None where there is none."""
    revocations = await broker.revocations()
    async with asyncio.timeout(20):
        while True:
            try:
                answer = await revocations.Get(revocation_pb2.GetRevocationRequest(id=order_id))
            except grpc.aio.AioRpcError as error:
                if reason_of(error) != "REVOCATION_NOT_FOUND":
                    raise
                return None
            if answer.revocation.state != revocation_pb2.REVOCATION_STATE_RUNNING:
                record: revocation_pb2.RevocationRecord = answer.revocation
                return record
            await asyncio.sleep(0.1)


async def revoked(broker: RunningBroker) -> set[str]:
    """What the ledger says is revoked of the identity."""
    rows = await broker.ledger(spiffe_id=IDENTITY, page_size=1000)
    return {row.id for row in rows if row.state == REVOKED}


async def held_by(broker: RunningBroker, entry_id: str) -> str:
    """What holds the entry."""
    entries = await broker.stub(entry_pb2_grpc.EntryStub)
    return str((await entries.Get(entry_pb2.GetEntryRequest(id=entry_id))).entry.held_by)


async def ordered(broker: RunningBroker, **subject: Any) -> Any:
    """Revoke; None where the broker died instead of answering."""
    with suppress(grpc.aio.AioRpcError):
        return await broker.revoke(order_id="night", **subject)
    return None


@pytest.mark.parametrize(
    ("point", "count"),
    [
        ("open:before", 1),
        ("write:after", 1),
        ("advance:before", 1),
        ("advance:after", 2),
        ("settled:before", 1),
        ("sweep:before", 1),
    ],
)
async def test_an_identity_is_revoked_whole_or_not_at_all(
    tmp_path: Path, point: str, count: int
) -> None:
    directory = tmp_path / "idb"
    async with whole(directory) as broker:
        node = await broker.join("web-1")
        entry = await broker.entry("/payments/api", "web-1")
        serials = await issue_many(node, entry.id)
    async with child(directory, point, count) as broker:
        answer = await ordered(broker, spiffe_id=IDENTITY)
        if point.startswith("sweep"):
            assert answer is not None, "the second look comes after the answer"
            await asyncio.sleep(2.5)
    async with whole(directory) as broker:
        record = await finished(broker, "night")
        if answer is not None:
            assert record is not None
        if record is None:
            assert point == "open:before"
            assert await revoked(broker) == set()
            assert await held_by(broker, entry.id) == ""
            # The command is repeated, as a person would, with the same id or another.
            record = (await broker.revoke(order_id="night", spiffe_id=IDENTITY)).revocation
        assert await revoked(broker) == serials
        assert record.revoked == MANY
        assert await held_by(broker, entry.id) == "night"
        channel = await broker.mtls(node.key, node.svid)
        late = await AttestedClient(broker, node.key, node.svid, channel).issue(entry.id)
        assert late.status.reason == "ENTRY_NOT_AUTHORIZED"
        again = await broker.revoke(order_id="night", spiffe_id=IDENTITY)
        assert again.revocation.revoked == MANY


@pytest.mark.parametrize("point", ["lift:before", "write:after"])
async def test_a_hold_is_lifted_whole_or_not_at_all(tmp_path: Path, point: str) -> None:
    directory = tmp_path / "idb"
    async with whole(directory) as broker:
        node = await broker.join("web-1")
        entry = await broker.entry("/payments/api", "web-1")
        serials = await issue_many(node, entry.id)
        await broker.revoke(order_id="night", spiffe_id=IDENTITY, reason=HOLD)
        await asyncio.sleep(2.5)  # the second look is a write, too
    async with child(directory, point) as broker:
        with pytest.raises(grpc.aio.AioRpcError):
            await (await broker.revocations()).LiftHold(
                revocation_pb2.LiftHoldRequest(name="night")
            )
    async with whole(directory) as broker:
        if await held_by(broker, entry.id):
            assert await revoked(broker) == serials
            await (await broker.revocations()).LiftHold(
                revocation_pb2.LiftHoldRequest(name="night")
            )
        else:
            assert point == "write:after"
        assert await revoked(broker) == set()
        assert await held_by(broker, entry.id) == ""


@pytest.mark.parametrize("point", ["replace:before", "replace:after"])
async def test_an_authority_is_revoked_with_all_it_signed(tmp_path: Path, point: str) -> None:
    directory = tmp_path / "idb"
    async with whole(directory) as broker:
        node = await broker.join("web-1")
        entry = await broker.entry("/payments/api", "web-1")
        serials = await issue_many(node, entry.id)
        first = await active(broker)
    async with child(directory, point) as broker:
        assert await ordered(broker, authority=first) is None
    async with whole(directory) as broker:
        assert await finished(broker, "night") is not None
        assert await revoked(broker) == serials
        assert await active(broker) != first
        # Whoever has nothing but the old one proves himself anew.
        again = await (await broker.join("web-2")).issue(entry.id)
        assert again.status.reason == "ENTRY_NOT_AUTHORIZED"


async def active(broker: RunningBroker) -> str:
    """The id of the X.509 authority that signs."""
    answer = await (await broker.authorities()).List(authority_pb2.ListAuthoritiesRequest())
    [found] = [
        authority.id
        for authority in answer.authorities
        if authority.state == authority_pb2.AUTHORITY_STATE_ACTIVE
        and authority.kind == authority_pb2.AUTHORITY_KIND_X509
    ]
    return str(found)
