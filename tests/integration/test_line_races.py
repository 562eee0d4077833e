"""Two things at once, and things that fail in between: nothing slips through."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from identity_api.broker.v1 import (
    credential_pb2,
    credential_pb2_grpc,
    entry_pb2,
    entry_pb2_grpc,
    node_attestation_pb2_grpc,
)
from identity_api.broker.v1 import node_attestation_pb2 as pb
from identity_broker.domain.credential import CredentialState
from identity_broker.domain.revocation import SubjectKind
from identity_broker.errors import (
    ConfigError,
    EntryNotAuthorized,
    SigningBackendUnavailable,
    StoreUnavailable,
)
from identity_broker.lifecycle.denials import Denials
from identity_broker.lifecycle.issue import X509Order, one
from identity_broker.lifecycle.rotate import RotateServer
from identity_broker.server.app import run_broker
from identity_broker.server.trust import Trust
from identity_ca.authority_certificate import build_root
from identity_ca.issuer import X509Issuer
from identity_ca.keys import KeyAlgorithm, LocalSigningKey, generate_private_key
from identity_ca.profile import WORKLOAD
from identity_ca.spiffe_id import SpiffeId, TrustDomain
from support.line import csr_for, new_key, node_id, reason_of, running, settings_in
from support.verbs import HINT, LIFE, NODE, START, Parts


async def test_revocations_at_once_each_wait_for_all_that_is_under_way(parts: Parts) -> None:
    entry = await parts.admit()
    other = await parts.register("other", "/other")
    reached, go_on = asyncio.Event(), asyncio.Event()
    intend = parts.record.intend

    async def slow_intend(*args: Any, **kwargs: Any) -> None:
        reached.set()
        await go_on.wait()
        await intend(*args, **kwargs)

    parts.record.intend = slow_intend  # type: ignore[method-assign]
    issuing = asyncio.create_task(parts.svid())
    await reached.wait()
    revoking = [
        asyncio.create_task(parts.end(SubjectKind.SPIFFE_ID, spiffe_id))
        for spiffe_id in (other.spiffe_id, entry.spiffe_id)
    ]
    while not all(item.held_by for item in parts.directory.entries()):
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    assert not any(task.done() for task in revoking)
    go_on.set()
    issued = await issuing
    _, revoked = await asyncio.gather(*revoking)
    assert [item.id for item in revoked.revocations] == [issued.serial]


async def test_what_outlives_its_caller_is_waited_for(parts: Parts) -> None:
    entry = await parts.admit()
    reached, go_on = asyncio.Event(), asyncio.Event()
    intend = parts.record.intend

    async def slow_intend(*args: Any, **kwargs: Any) -> None:
        reached.set()
        await go_on.wait()
        await intend(*args, **kwargs)

    parts.record.intend = slow_intend  # type: ignore[method-assign]
    issuing = asyncio.create_task(parts.svid())
    await reached.wait()
    issuing.cancel()
    await asyncio.gather(issuing, return_exceptions=True)
    revoking = asyncio.create_task(parts.end(SubjectKind.SPIFFE_ID, entry.spiffe_id))
    await asyncio.sleep(0.1)
    assert not revoking.done()
    go_on.set()
    assert len((await revoking).revocations) == 1


async def test_what_another_broker_had_under_way_is_revoked_a_moment_later(parts: Parts) -> None:
    entry = await parts.admit()
    stale = parts.authorize.entry(NODE, entry.id)  # granted before the other broker heard of it
    await parts.end(SubjectKind.SPIFFE_ID, entry.spiffe_id)
    late = one(await parts.issue.x509([X509Order(stale, csr_for(new_key()))]))
    async with asyncio.timeout(10):
        while not parts.directory.is_revoked(late.serial):
            await asyncio.sleep(0.05)


async def test_revoking_an_identity_reads_its_entries_where_they_are_stored(parts: Parts) -> None:
    gone = await parts.admit()
    new = await parts.register("new", "/payments/api")
    issued = await parts.svid("new")
    # This broker has not heard yet that one entry went and another came.
    parts.directory.sync = lambda: asyncio.sleep(0)  # type: ignore[method-assign]
    await parts.store.write(lambda repos: repos.entries.delete(gone.id))
    parts.directory.fill(parts.directory.seq, [gone], [], Denials())
    revoked = await parts.end(SubjectKind.SPIFFE_ID, new.spiffe_id)
    assert issued.serial in {item.id for item in revoked.revocations}
    assert revoked.held_entry_ids == ("new",)


async def test_nothing_outlives_the_entry_it_is_issued_from(parts: Parts) -> None:
    await parts.admit()
    ends = START + timedelta(minutes=10)
    await parts.register("short", "/short", expires_at=ends)
    assert (await parts.svid("short")).not_after == ends
    parts.clock.time = ends
    with pytest.raises(EntryNotAuthorized):
        await parts.svid("short")


async def test_authorities_that_could_not_be_put_into_force_are_the_next_time(
    parts: Parts,
) -> None:
    first = parts.signing.authorities.x509_set.active
    install = parts.signing.install

    async def away(*_: Any) -> None:
        raise SigningBackendUnavailable

    parts.clock.time = START + LIFE * 2 / 3
    parts.signing.install = away  # type: ignore[assignment]
    with pytest.raises(SigningBackendUnavailable):
        await parts.rotate.run()
    parts.signing.install = install  # type: ignore[method-assign]
    assert await parts.rotate.run()
    assert parts.signing.authorities.x509_set.prepared is not None
    assert parts.signing.authorities.x509_set.active == first
    assert not await parts.rotate.run()


async def test_installing_at_once_never_goes_back_a_generation(parts: Parts) -> None:
    sequences = [parts.signing.bundle.sequence]
    install = parts.signing.install

    async def slow_install(*args: Any) -> None:
        await asyncio.sleep(0.02 if len(sequences) % 2 else 0)
        await install(*args)
        sequences.append(parts.signing.bundle.sequence)

    parts.signing.install = slow_install  # type: ignore[assignment]
    for hours in (7, 10, 11, 17):
        parts.clock.time = START + timedelta(hours=hours)
        await asyncio.gather(
            parts.rotate.install(),
            parts.rotate.run(),
            parts.rotate.install(),
            return_exceptions=True,
        )
    assert sequences == sorted(sequences)
    stored = await parts.store.read(lambda repos: repos.authorities.sequence())
    assert parts.signing.bundle.sequence == stored


async def test_two_first_starts_on_one_store_agree(parts: Parts, tmp_path: Path) -> None:
    # Both lost their keys, and find the same authorities to replace.
    others = [Parts(parts.store, parts.clock, parts.keys) for _ in range(3)]
    parts.clock.time = START + LIFE * 2
    await asyncio.gather(*(other.rotate.start() for other in others))
    for other in others:
        await other.rotate.install()
    assert len({other.signing.bundle.sequence for other in others}) == 1
    for other in others:
        await other.close()


async def test_a_bundle_file_that_cannot_be_written_hides_the_bundle_from_nobody(
    parts: Parts, tmp_path: Path
) -> None:
    server = RotateServer(authorize=parts.authorize, issue=parts.issue, clock=parts.clock)
    await server.run()
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder must be")
    trust = Trust(parts.signing, server, blocked / "bundle.pem")
    seen: list[int] = []
    trust.listen(lambda bundle: seen.append(len(bundle.x509_authorities)))
    trust.publish()
    with pytest.raises(ConfigError):
        await trust.write_file()
    assert seen == [1]
    assert trust.tls().roots_pem == parts.signing.bundle.to_pem()
    blocked.unlink()
    await trust.write_file()
    assert (blocked / "bundle.pem").read_bytes() == parts.signing.bundle.to_pem()
    assert (blocked / "bundle.pem").stat().st_mode & 0o777 == 0o644


async def test_the_brokers_own_svid_is_replaced_when_it_is_revoked(parts: Parts) -> None:
    server = RotateServer(
        authorize=parts.authorize,
        issue=parts.issue,
        clock=parts.clock,
        is_revoked=parts.directory.is_revoked,
    )
    await server.run()
    assert server.current is not None
    serial = server.current.credential.serial
    assert not await server.run()
    await parts.end_one(serial)
    assert await server.run()
    assert server.current.credential.serial != serial


async def test_a_follower_that_meets_a_bug_goes_on_and_silence_is_noticed(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = await parts.admit()
    failed = asyncio.Event()

    def broken(_: object) -> None:
        if not failed.is_set():
            failed.set()
            raise ValueError("a bug")

    parts.directory.listen(broken)
    following = asyncio.create_task(parts.directory.follow())
    await parts.store.write(lambda repos: repos.entries.delete(entry.id))
    await asyncio.wait_for(failed.wait(), 5)
    await parts.store.write(lambda repos: repos.nodes.delete(NODE))
    async with asyncio.timeout(5):
        while parts.directory.node(NODE) is not None:
            await asyncio.sleep(0.02)
    await parts.directory.check()
    following.cancel()
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 60)
    with pytest.raises(StoreUnavailable):
        await parts.directory.check()


async def test_a_database_of_another_trust_domain_is_refused(tmp_path: Path) -> None:
    async with running(settings_in(tmp_path / "idb", ca={"key_manager": "memory"})):
        pass
    other = settings_in(
        tmp_path / "idb", server={"trust_domain": "other.org"}, ca={"key_manager": "memory"}
    )
    with pytest.raises(ConfigError, match=r"example\.org"):
        await run_broker(other)


async def test_a_node_that_hangs_up_while_it_proves_itself_keeps_its_token(
    tmp_path: Path,
) -> None:
    async with running(settings_in(tmp_path / "idb", ca={"key_manager": "memory"})) as broker:
        stub = node_attestation_pb2_grpc.NodeAttestationStub(await broker.bootstrap())
        credentials = await broker.stub(credential_pb2_grpc.CredentialStub)
        for delay in (0, 0.001, 0.002, 0.004, 0.008):
            token = await broker.token(f"n{delay}".replace(".", "-"))
            call = stub.Attest()
            await call.write(
                pb.AttestRequest(
                    begin=pb.AttestRequest.Begin(
                        attestor="join_token", payload=token.encode(), csr=csr_for(new_key())
                    )
                )
            )
            await asyncio.sleep(delay)
            call.cancel()
            await asyncio.sleep(0.3)
            name = node_id(f"n{delay}".replace(".", "-"))
            listed = await credentials.List(credential_pb2.ListCredentialsRequest(spiffe_id=name))
            if listed.credentials:  # it came as far as its SVID: the token is spent
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await broker.attest(token)
                assert reason_of(refused.value) == "JOIN_TOKEN_REJECTED"
            else:
                assert (await broker.attest(token)).svid.spiffe_id == name


async def test_draining_takes_one_grace_for_all_doors(tmp_path: Path) -> None:
    settings = settings_in(
        tmp_path / "idb", server={"drain_timeout": "2s"}, ca={"key_manager": "memory"}
    )
    async with running(settings) as broker:
        node = await broker.join("web-1")
        watches: list[Any] = [
            await node.follow(),
            (await broker.stub(entry_pb2_grpc.EntryStub)).Watch(entry_pb2.WatchEntriesRequest()),
            node_attestation_pb2_grpc.NodeAttestationStub(await broker.bootstrap()).Attest(),
        ]
        await watches[1].read()
        started = time.monotonic()
    assert time.monotonic() - started < 4


async def test_what_is_expired_by_a_wrong_clock_can_still_be_revoked(parts: Parts) -> None:
    await parts.admit()
    issued = await parts.svid()
    await parts.store.ledger.flush()
    parts.clock.time += timedelta(hours=2)
    await parts.record.expire()
    parts.clock.time = START + HINT
    await parts.end_one(issued.serial)
    stored = await parts.store.read(lambda repos: repos.credentials.get(issued.serial))
    assert stored.state is CredentialState.REVOKED
    assert parts.directory.is_revoked(issued.serial)


async def test_a_clock_that_went_forward_and_back_forgets_no_revocation(parts: Parts) -> None:
    await parts.admit()
    issued = await parts.svid()
    await parts.end_one(issued.serial)
    parts.clock.time += timedelta(hours=2)
    await parts.directory.forget_expired()
    assert not parts.directory.is_revoked(issued.serial)
    parts.clock.time = START + HINT
    await parts.directory.forget_expired()
    assert parts.directory.is_revoked(issued.serial)


async def test_what_another_ca_below_the_same_root_signed_is_no_identity(tmp_path: Path) -> None:
    domain = TrustDomain.parse("example.org")
    root_key = LocalSigningKey("root@1", generate_private_key(KeyAlgorithm.EC_P256))
    now = datetime.now(UTC)
    root = build_root(root_key, trust_domain=domain, ttl=timedelta(days=30), now=now, path_length=1)
    cert_file, key_file = tmp_path / "root.pem", tmp_path / "root.key"
    cert_file.write_bytes(root.public_bytes(Encoding.PEM))
    key_file.write_bytes(
        root_key.as_private_key().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    key_file.chmod(0o600)
    settings = settings_in(
        tmp_path / "idb",
        ca={
            "key_manager": "memory",
            "upstream": "disk",
            "disk": {"cert_file": str(cert_file), "key_file": str(key_file)},
        },
    )
    async with running(settings) as broker:
        node = await broker.join("web-1")
        await broker.entry("/ops", "web-1", admin=True)
        # The root signs a leaf with that administrator's name, past the broker.
        key = new_key()
        stranger = X509Issuer(authority_id="root", trust_domain=domain, key=root_key, chain=[root])
        leaf = stranger.sign(
            stranger.prepare(
                csr=csr_for(key),
                spiffe_id=SpiffeId.parse("spiffe://example.org/ops"),
                profile=WORKLOAD,
                ttl=timedelta(hours=1),
                now=now,
            )
        )
        forged = type(node.svid)(cert_chain=list(leaf.chain))
        stub = credential_pb2_grpc.CredentialStub(await broker.mtls(key, forged))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.List(credential_pb2.ListCredentialsRequest())
        assert reason_of(refused.value) == "UNAUTHENTICATED"
