"""kill -9 at every step of the line: no credential exists that the ledger does not know."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from identity_api.broker.v1 import credential_pb2, svid_pb2
from support.crashing_broker import POINTS
from support.dying_broker import child
from support.line import (
    AttestedClient,
    RunningBroker,
    csr_for,
    new_key,
    running,
    settings_in,
)

IDENTITY = "spiffe://example.org/payments/api"
REVOCATION_POINTS = {"open", "settled", "advance", "sweep", "replace", "lift", "close"}
"""In `test_revocation_crash` and `test_revocation_feed_crash`."""
KNOWN_STATES = {
    credential_pb2.CREDENTIAL_STATE_INTENT,
    credential_pb2.CREDENTIAL_STATE_ISSUED,
    credential_pb2.CREDENTIAL_STATE_UNCONFIRMED,
    credential_pb2.CREDENTIAL_STATE_SUPERSEDED,
    credential_pb2.CREDENTIAL_STATE_REVOKED,
}


@asynccontextmanager
async def whole(directory: Path) -> AsyncIterator[RunningBroker]:
    """A broker that does not die, on the same directory."""
    async with running(settings_in(directory, ledger={"unconfirmed_after": "5s"})) as broker:
        yield broker


async def _ask_until_it_dies(node: AttestedClient, entry_id: str) -> list[str]:
    """Ask for X.509- and JWT-SVIDs, several at a time; return what arrived."""
    arrived: list[str] = []
    x509_request = svid_pb2.BatchIssueX509Request(
        items=[
            svid_pb2.BatchIssueX509Request.Item(entry_id=entry_id, csr=csr_for(new_key()))
            for _ in range(3)
        ]
    )
    jwt_request = svid_pb2.BatchIssueJwtRequest(
        items=[svid_pb2.BatchIssueJwtRequest.Item(entry_id=entry_id, audiences=["a"])]
    )

    async def one_round() -> None:
        x509_answer, jwt_answer = await asyncio.gather(
            node.svids.BatchIssueX509(x509_request, timeout=5),
            node.svids.BatchIssueJwt(jwt_request, timeout=5),
        )
        arrived.extend(item.svid.serial for item in x509_answer.results if item.svid.serial)
        arrived.extend(item.svid.jti for item in jwt_answer.results if item.svid.jti)

    with pytest.raises(grpc.aio.AioRpcError):
        for _ in range(200):
            await one_round()
    return arrived


def _sweep() -> list[tuple[str, int]]:
    lines = ["prepare", "intend", "commit", "answer", "sign", "sign_jwt", "conclude"]
    points = [(f"{name}:{when}", 1) for name in lines for when in ("before", "after")]
    # Later runs: outcomes of earlier rounds are then part of the commit that dies.
    points += [("commit:before", 3), ("commit:after", 3), ("sign:after", 4)]
    return points


@pytest.mark.parametrize(("point", "count"), _sweep())
async def test_no_credential_exists_that_the_ledger_does_not_know(
    tmp_path: Path, point: str, count: int
) -> None:
    directory = tmp_path / "idb"
    async with whole(directory) as broker:
        node = await broker.join("web-1")
        entry = await broker.entry("/payments/api", "web-1")
    async with child(directory, point, count) as broker:
        channel = await broker.mtls(node.key, node.svid)
        arrived = await _ask_until_it_dies(
            AttestedClient(broker, node.key, node.svid, channel), entry.id
        )
    signed = (directory / "signed.log").read_text().split()
    assert set(arrived) <= set(signed)
    async with whole(directory) as broker:
        recorded = {item.id: item.state for item in await broker.ledger(page_size=1000)}
        assert set(signed) <= set(recorded)
        assert {recorded[item] for item in signed} <= KNOWN_STATES
        # Whatever became of them, one command ends them all.
        await broker.revoke(spiffe_id=IDENTITY)
        after = await broker.ledger(spiffe_id=IDENTITY, page_size=1000)
        assert {item.state for item in after} <= {credential_pb2.CREDENTIAL_STATE_REVOKED}
        assert {item.id for item in after} >= set(arrived)


@pytest.mark.parametrize("point", ["write:before", "write:after", "sync:before", "sync:after"])
async def test_a_revocation_that_was_acknowledged_survives(tmp_path: Path, point: str) -> None:
    directory = tmp_path / "idb"
    async with whole(directory) as broker:
        node = await broker.join("web-1")
        entry = await broker.entry("/payments/api", "web-1")
        serials = [(await node.issue(entry.id)).svid.serial for _ in range(3)]
    acknowledged: list[str] = []
    async with child(directory, point, 2) as broker:
        with pytest.raises(grpc.aio.AioRpcError):
            for serial in serials:
                await broker.revoke(id=serial)
                acknowledged.append(serial)
    async with whole(directory) as broker:
        states = {item.id: item.state for item in await broker.ledger(spiffe_id=IDENTITY)}
        assert set(states) == set(serials)
        for serial in acknowledged:
            assert states[serial] == credential_pb2.CREDENTIAL_STATE_REVOKED
        # The command is repeated, as a person would, and now holds.
        for serial in serials:
            await broker.revoke(id=serial)
        revoked = await broker.ledger(states=[credential_pb2.CREDENTIAL_STATE_REVOKED])
        assert {item.id for item in revoked} == set(serials)


async def test_an_intent_without_an_outcome_is_swept_listed_and_revocable(tmp_path: Path) -> None:
    directory = tmp_path / "idb"
    async with whole(directory) as broker:
        node = await broker.join("web-1")
        entry = await broker.entry("/payments/api", "web-1")
    async with child(directory, "sign:before") as broker:
        channel = await broker.mtls(node.key, node.svid)
        with pytest.raises(grpc.aio.AioRpcError):
            await AttestedClient(broker, node.key, node.svid, channel).issue(entry.id)
    async with whole(directory) as broker:
        async with asyncio.timeout(30):
            while True:
                [item] = await broker.ledger(spiffe_id=IDENTITY)
                if item.state != credential_pb2.CREDENTIAL_STATE_INTENT:
                    break
                await asyncio.sleep(0.2)
        assert item.state == credential_pb2.CREDENTIAL_STATE_UNCONFIRMED
        assert not item.digest
        answer = await broker.revoke(id=item.id)
        assert list(answer.revoked_ids) == [item.id]


@pytest.mark.parametrize(
    ("point", "count"),
    [
        ("write:before", 1),
        ("write:after", 1),
        ("intend:after", 1),
        ("sign:after", 1),
        ("write:before", 2),
        ("write:after", 2),
    ],
)
async def test_an_attestation_that_was_cut_off_leaves_nothing_unrecorded(
    tmp_path: Path, point: str, count: int
) -> None:
    directory = tmp_path / "idb"
    async with whole(directory) as broker:
        token = await broker.token("web-1")
    async with child(directory, point, count) as broker:
        with pytest.raises((grpc.aio.AioRpcError, AssertionError)):
            await broker.attest(token)
    signed = (directory / "signed.log").read_text().split()
    async with whole(directory) as broker:
        recorded = {item.id for item in await broker.ledger(page_size=1000)}
        assert set(signed) <= recorded
        # A fresh token always helps, whatever became of the first.
        assert (await broker.join("web-1")).svid.serial


def test_every_point_is_swept() -> None:
    used = {point.partition(":")[0] for point, _ in _sweep()} | {"write", "sync"}
    assert used | REVOCATION_POINTS == set(POINTS)
