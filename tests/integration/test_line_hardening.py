"""What strangers, latecomers and bad luck in timing cannot do."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from identity_api.broker.v1 import (
    bundle_pb2,
    credential_pb2,
    credential_pb2_grpc,
    entry_pb2,
    entry_pb2_grpc,
    node_attestation_pb2,
    node_attestation_pb2_grpc,
    node_pb2,
    node_pb2_grpc,
    revocation_pb2,
    types_pb2,
)
from identity_broker.attestors.node.join_token import JoinTokenAttestor, new_token, token_hash
from identity_broker.domain.caller import Caller, CallerClass, LocalPeer
from identity_broker.domain.events import AuditEvent, AuditKind
from identity_broker.domain.node import JoinToken
from identity_broker.errors import NodeBanned, Unauthenticated
from identity_broker.lifecycle.attest import Attest
from identity_broker.lifecycle.authorize import Gate
from identity_broker.lifecycle.rotate import RotateNode
from identity_broker.server.app import BoundAddresses, run_broker
from identity_broker.server.refusals import PROVEN, STRANGERS, Refusals
from identity_broker.server.rpc.pipeline import RefusedCall
from identity_broker.store import Repositories, Store
from identity_client.attestation import CertificateAttestor
from support.line import (
    RunningBroker,
    csr_for,
    new_key,
    node_id,
    reason_of,
    running,
    settings_in,
)
from support.machines import MachineCa, client_half
from support.verbs import DOMAIN, NODE, Parts

T = TypeVar("T")

STRANGER = Caller(frozenset({CallerClass.ANYONE}), "ipv4:10.0.0.1:5")
ISSUE = "/identity_api.broker.v1.Svid/BatchIssueX509"


@pytest.fixture(scope="module")
def machines() -> MachineCa:
    return MachineCa()


@pytest.fixture
def machines_pem(tmp_path: Path, machines: MachineCa) -> Path:
    path = tmp_path / "machines.pem"
    path.write_bytes(machines.certificate.public_bytes(Encoding.PEM))
    return path


@pytest.fixture
def machine(tmp_path: Path, machines: MachineCa) -> CertificateAttestor:
    return client_half(tmp_path / "machine", *machines.machine())


def begin(payload: bytes) -> node_attestation_pb2.AttestRequest:
    return node_attestation_pb2.AttestRequest(
        begin=node_attestation_pb2.AttestRequest.Begin(
            attestor="x509_pop", payload=payload, csr=csr_for(new_key())
        )
    )


async def refused(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await call
    return refusal.value


class ShiftedClock:
    """The real time, and what a test adds to it."""

    def __init__(self) -> None:
        self.ahead = timedelta()

    def now(self) -> datetime:
        return datetime.now(UTC) + self.ahead


# --- a connection outlives its certificate --------------------------------------------------------


async def test_an_svid_that_expires_on_an_open_connection_is_refused(tmp_path: Path) -> None:
    clock = ShiftedClock()
    async with running(
        settings_in(tmp_path / "idb", ca={"key_manager": "memory"}), clock=clock
    ) as broker:
        node = await broker.join("web-1")
        await node.entries.ListAuthorized(entry_pb2.ListAuthorizedRequest())
        watch = await node.follow()
        clock.ahead = timedelta(hours=1, seconds=1)
        error = await refused(node.entries.ListAuthorized(entry_pb2.ListAuthorizedRequest()))
        assert reason_of(error) == "UNAUTHENTICATED"
        assert "expired" in (error.details() or "")
        assert reason_of(await refused(watch.read())) == "UNAUTHENTICATED"


# --- a ban that comes in the middle ---------------------------------------------------------------


class Meanwhile:
    """A store in which something happens just before a write."""

    def __init__(self, store: Store, event: Callable[[Repositories], None]) -> None:
        self._store = store
        self._event = event

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def write(self, work: Callable[[Repositories], T]) -> T:
        await self._store.write(self._event)
        return await self._store.write(work)


def ban(repos: Repositories) -> None:
    repos.nodes.upsert(replace(repos.nodes.get(NODE), banned=True, ban_reason="stolen"))


async def test_a_ban_that_comes_while_a_node_attests_is_not_undone(parts: Parts) -> None:
    await parts.admit()
    secret = new_token()
    now = parts.clock.now()
    token = JoinToken(token_hash(secret), NODE, now + timedelta(minutes=5), now)
    await parts.store.write(lambda repos: repos.join_tokens.create(token))

    async def consume(hashed: str) -> JoinToken:
        return await parts.store.write(lambda repos: repos.join_tokens.consume(hashed, now))

    async def release(hashed: str) -> None:
        await parts.store.write(lambda repos: repos.join_tokens.release(hashed))

    async def challenge(_question: bytes) -> bytes:
        raise AssertionError("a join token asks nothing")

    def attest(store: Any) -> Attest:
        return Attest(
            attestors={"join_token": JoinTokenAttestor(consume, release)},
            authorize=parts.authorize,
            issue=parts.issue,
            store=store,
            directory=parts.directory,
            clock=parts.clock,
        )

    join = ("join_token", secret.encode(), csr_for(new_key()), challenge, STRANGER)
    with pytest.raises(NodeBanned):
        await attest(Meanwhile(parts.store, ban)).node(*join)
    stored = await parts.store.read(lambda repos: repos.nodes.get(NODE))
    assert stored.banned
    assert stored.ban_reason == "stolen"
    # The same, undisturbed: the token was given back, and it is the ban that refuses.
    await parts.store.write(
        lambda repos: repos.nodes.upsert(replace(stored, banned=False, ban_reason=""))
    )
    await parts.directory.sync()
    assert (await attest(parts.store).node(*join)).node.spiffe_id == NODE


async def test_a_ban_that_comes_while_a_node_renews_is_not_undone(parts: Parts) -> None:
    await parts.admit()
    before = await parts.store.read(lambda repos: repos.nodes.get(NODE))

    def renewal(store: Any) -> RotateNode:
        return RotateNode(
            authorize=parts.authorize,
            issue=parts.issue,
            store=store,
            directory=parts.directory,
            clock=parts.clock,
        )

    caller = Caller(frozenset({CallerClass.NODE}), str(NODE), NODE, before.serial)
    with pytest.raises(NodeBanned):
        await renewal(Meanwhile(parts.store, ban)).renew(caller, csr_for(new_key()))
    stored = await parts.store.read(lambda repos: repos.nodes.get(NODE))
    assert stored.banned
    assert stored.serial == before.serial
    await parts.store.write(lambda repos: repos.nodes.upsert(before))
    await parts.directory.sync()
    renewed = await renewal(parts.store).renew(caller, csr_for(new_key()))
    stored = await parts.store.read(lambda repos: repos.nodes.get(NODE))
    assert stored.serial == renewed.serial


# --- the admin socket -----------------------------------------------------------------------------


def test_an_administrator_by_supplementary_group_is_let_in(parts: Parts) -> None:
    gate = Gate(
        parts.directory, DOMAIN, parts.clock, is_authority=lambda _key_id: False, admin_gid=4242
    )
    for peer in (LocalPeer(1, 31337, 4242), LocalPeer(1, 31337, 100, frozenset({7, 4242}))):
        assert CallerClass.LOCAL in gate.local(peer).classes
    with pytest.raises(Unauthenticated):
        gate.local(LocalPeer(1, 31337, 100, frozenset({7, 8})))
    with pytest.raises(Unauthenticated):
        Gate(parts.directory, DOMAIN, parts.clock, is_authority=lambda _key_id: False).local(
            LocalPeer(1, 31337, 0, frozenset({0}))
        )


# --- draining -------------------------------------------------------------------------------------


async def test_a_drain_does_not_wait_for_streams_or_silent_nodes(
    tmp_path: Path, machine: CertificateAttestor, machines_pem: Path
) -> None:
    wanted = settings_in(
        tmp_path / "idb",
        ca={"key_manager": "memory"},
        attestors={"x509_pop": {"ca_bundle_file": str(machines_pem)}},
        server={"drain_timeout": "20s"},
    )
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    bound: asyncio.Future[BoundAddresses] = loop.create_future()
    serving = asyncio.create_task(run_broker(wanted, ready=bound.set_result, stop=stop))
    async with AsyncExitStack() as resources:
        broker = RunningBroker(await asyncio.wait_for(bound, 30), wanted, resources)
        stranger = await broker.bootstrap()
        attests = node_attestation_pb2_grpc.NodeAttestationStub(stranger)
        silent = attests.Attest()
        await silent.write(begin(machine.payload()))
        asked: Any = await silent.read()
        assert asked.challenge
        mute = attests.Attest()
        await mute.wait_for_connection()
        # The published types know the stub of gRPC's synchronous half alone.
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub
        reflecting = reflection(stranger).ServerReflectionInfo()
        await reflecting.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        await reflecting.read()
        watching = (await broker.bundles()).Watch(bundle_pb2.WatchBundleRequest())
        await watching.read()
        started = loop.time()
        stop.set()
        errors = [await refused(silent.read()), await refused(mute.read())]
        assert await reflecting.read() is grpc.aio.EOF
        assert await watching.read() is grpc.aio.EOF
        await serving
        assert loop.time() - started < 5
    for error in errors:
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert reason_of(error) == "BROKER_STOPPING"


async def test_a_node_that_hangs_up_leaves_nothing_behind(
    tmp_path: Path, machine: CertificateAttestor, machines_pem: Path
) -> None:
    wanted = settings_in(
        tmp_path / "idb",
        ca={"key_manager": "memory"},
        attestors={"x509_pop": {"ca_bundle_file": str(machines_pem)}},
    )
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda _loop, context: complaints.append(context)
    )
    async with running(wanted) as broker:
        attests = node_attestation_pb2_grpc.NodeAttestationStub(await broker.bootstrap())
        for answered in (False, True):
            call = attests.Attest()
            await call.write(begin(machine.payload()))
            await call.read()
            if answered:
                await call.write(node_attestation_pb2.AttestRequest(challenge_response=b"{}"))
            call.cancel()
            await asyncio.sleep(0.2)
            gc.collect()
    gc.collect()
    assert not complaints


# --- what is written down about strangers ---------------------------------------------------------


def a_refusal(caller: str, *, proven: bool, method: str = ISSUE) -> RefusedCall:
    return RefusedCall(method, caller, proven, "UNAUTHENTICATED", "", "c-1")


async def audited(store: Store) -> list[AuditEvent]:
    page = await store.read(lambda repos: repos.audit.page("", 1000))
    return [event for event in page.items if event.kind is AuditKind.CALL_REFUSED]


async def test_strangers_cannot_fill_the_audit_nor_crowd_out_a_node(parts: Parts) -> None:
    seconds = [0.0]
    refusals = Refusals(parts.store, parts.clock, monotonic=lambda: seconds[0])
    for second in range(60):
        seconds[0] = float(second)
        for number in range(300):
            for method in "abcdefgh":
                refusals.put(a_refusal(f"10.0.{second}.{number}", proven=False, method=method))
        refusals.put(a_refusal(str(NODE), proven=True))
        await refusals.flush()
    events = await audited(parts.store)
    strangers = [event for event in events if event.actor != str(NODE)]
    assert STRANGERS.together.burst <= len(strangers) <= STRANGERS.together.burst + 5
    assert len(events) - len(strangers) == PROVEN.each.burst


async def test_one_network_has_a_small_budget_and_like_refusals_are_one_row(parts: Parts) -> None:
    refusals = Refusals(parts.store, parts.clock, monotonic=lambda: 0.0)
    for _ in range(5):
        refusals.put(a_refusal("10.0.0.1", proven=False))
    for number in range(50):
        refusals.put(a_refusal("10.0.0.1", proven=False, method=f"/m/{number}"))
    refusals.put(a_refusal("10.0.0.2", proven=False))
    await refusals.flush()
    await refusals.flush()
    events = await audited(parts.store)
    assert len([event for event in events if event.actor == "10.0.0.1"]) == STRANGERS.each.burst
    assert len([event for event in events if event.actor == "10.0.0.2"]) == 1
    assert events[0].facts["count"] == "5"


# --- what is asked --------------------------------------------------------------------------------


async def test_bad_texts_are_refused_and_named(tmp_path: Path) -> None:
    async with running(settings_in(tmp_path / "idb", ca={"key_manager": "memory"})) as broker:
        entries = await broker.stub(entry_pb2_grpc.EntryStub)
        nodes = await broker.stub(node_pb2_grpc.NodeStub)
        credentials = await broker.stub(credential_pb2_grpc.CredentialStub)
        revocations = await broker.revocations()
        for bad in ("\x00", "a\nb", "\x1b[2J", "\u202e"):
            for call, field in (
                (entries.Get(entry_pb2.GetEntryRequest(id=bad)), "id"),
                (entries.List(entry_pb2.ListEntriesRequest(owner=bad)), "owner"),
                (entries.List(entry_pb2.ListEntriesRequest(hint=bad)), "hint"),
                (nodes.List(node_pb2.ListNodesRequest(attestor=bad)), "attestor"),
                (
                    nodes.CreateJoinToken(node_pb2.CreateJoinTokenRequest(node_name=bad)),
                    "node_name",
                ),
                (credentials.Get(credential_pb2.GetCredentialRequest(id=bad)), "id"),
                (revocations.Get(revocation_pb2.GetRevocationRequest(id=bad)), "id"),
                (revocations.LiftHold(revocation_pb2.LiftHoldRequest(name=bad)), "name"),
                (
                    credentials.List(credential_pb2.ListCredentialsRequest(entry_id=bad)),
                    "entry_id",
                ),
            ):
                error = await refused(call)
                assert reason_of(error) == "MALFORMED_REQUEST"
                assert (error.details() or "").startswith(f"{field} ")


async def test_one_bad_id_in_a_batch_fails_alone(tmp_path: Path) -> None:
    async with running(settings_in(tmp_path / "idb", ca={"key_manager": "memory"})) as broker:
        kept = await broker.entry("/kept", "web-1")
        gone = await broker.entry("/gone", "web-1")
        entries = await broker.stub(entry_pb2_grpc.EntryStub)
        item = entry_pb2.BatchUpdateEntryRequest.Item
        answer = await entries.BatchUpdate(
            entry_pb2.BatchUpdateEntryRequest(
                items=[
                    item(entry=types_pb2.RegistrationEntry(id="\x00"), fields=["hint"]),
                    item(
                        entry=types_pb2.RegistrationEntry(id=kept.id, hint="new"), fields=["hint"]
                    ),
                ]
            )
        )
        assert [result.status.reason for result in answer.results] == ["MALFORMED_REQUEST", ""]
        assert answer.results[1].entry.hint == "new"
        answer = await entries.BatchDelete(
            entry_pb2.BatchDeleteEntryRequest(ids=["\x00", gone.id, "", "nothing"])
        )
        assert [(result.id, result.status.reason) for result in answer.results] == [
            ("\x00", "MALFORMED_REQUEST"),
            (gone.id, ""),
            ("", "MALFORMED_REQUEST"),
            ("nothing", "ENTRY_NOT_FOUND"),
        ]


async def test_a_page_token_is_refused_elsewhere(tmp_path: Path) -> None:
    async with running(settings_in(tmp_path / "idb", ca={"key_manager": "memory"})) as broker:
        for number in range(2):
            await broker.entry(f"/app-{number}", "web-1")
            await broker.join(f"web-{number}")
        entries = await broker.stub(entry_pb2_grpc.EntryStub)
        nodes = await broker.stub(node_pb2_grpc.NodeStub)
        credentials = await broker.stub(credential_pb2_grpc.CredentialStub)
        pages: list[tuple[Callable[..., Any], Callable[..., Any], str]] = [
            (entries.List, entry_pb2.ListEntriesRequest, "spiffe_id"),
            (nodes.List, node_pb2.ListNodesRequest, "attestor"),
            (credentials.List, credential_pb2.ListCredentialsRequest, "spiffe_id"),
        ]
        for at, (call, request, filtered) in enumerate(pages):
            token = (await call(request(page_size=1))).next_page_token
            assert token
            await call(request(page_size=1, page_token=token))
            other_call, other_request, _ = pages[at - 1]
            value = "join_token" if filtered == "attestor" else node_id("web-0")
            for elsewhere in (
                other_call(other_request(page_token=token)),
                call(request(page_token=token, **{filtered: value})),
                call(request(page_token=token + "A" * 5000)),
            ):
                assert reason_of(await refused(elsewhere)) == "PAGE_TOKEN_INVALID"


async def test_a_stranger_holds_a_bounded_number_of_streams(tmp_path: Path) -> None:
    async with running(settings_in(tmp_path / "idb", ca={"key_manager": "memory"})) as broker:
        bundles = await broker.bundles()
        held = [bundles.Watch(bundle_pb2.WatchBundleRequest()) for _ in range(16)]
        for watch in held:
            await watch.read()
        one_more = bundles.Watch(bundle_pb2.WatchBundleRequest())
        assert reason_of(await refused(one_more.read())) == "RATE_LIMITED"
