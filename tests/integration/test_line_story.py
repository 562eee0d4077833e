"""The line over real sockets: attest, authorize, issue, record, rotate, revoke."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import grpc
import pytest
from cryptography import x509

from identity_api.broker.v1 import (
    bundle_pb2,
    credential_pb2,
    entry_pb2,
    entry_pb2_grpc,
    node_attestation_pb2,
    node_pb2,
    node_pb2_grpc,
    svid_pb2,
    types_pb2,
)
from identity_broker.domain.clock import SystemClock
from identity_ca.bundle import TrustBundle
from identity_ca.chain import verify_x509_svid
from identity_ca.jwt import verify_jwt_svid
from identity_ca.keys import key_fingerprint
from identity_ca.spiffe_id import TrustDomain
from support.line import (
    RunningBroker,
    csr_for,
    new_key,
    node_id,
    reason_of,
    running,
    settings_in,
)

DOMAIN = TrustDomain.parse("example.org")


async def _spiffe_bundle(broker: RunningBroker) -> TrustBundle:
    import urllib.request

    url = f"http://{broker.addresses.http_address}/bundle"
    raw = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=5).read())
    return TrustBundle.from_spiffe_json(DOMAIN, raw)


async def test_a_credential_walks_the_whole_line(broker: RunningBroker) -> None:
    now = SystemClock().now()
    node = await broker.join("web-1")
    assert node.svid.spiffe_id == node_id("web-1")
    entry = await broker.entry("/payments/api", "web-1", hint="main", dns_names=["pay.internal"])

    key = new_key()
    result = await node.issue(entry.id, csr_for(key))
    assert result.status.code == 0, result.status
    verified = verify_x509_svid(
        list(result.svid.cert_chain), bundle=await _spiffe_bundle(broker), now=now
    )
    assert str(verified.spiffe_id) == "spiffe://example.org/payments/api"
    assert result.svid.hint == "main"
    leaf = x509.load_der_x509_certificate(result.svid.cert_chain[0])
    assert f"{leaf.serial_number:040x}" == result.svid.serial
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "pay.internal" in names.get_values_for_type(x509.DNSName)

    [recorded] = await broker.ledger(spiffe_id="spiffe://example.org/payments/api")
    assert recorded.id == result.svid.serial
    assert recorded.state == credential_pb2.CREDENTIAL_STATE_ISSUED
    assert recorded.digest == hashlib.sha256(result.svid.cert_chain[0]).hexdigest()
    assert recorded.node_id == node_id("web-1")
    assert recorded.entry_id == entry.id

    revoked = await broker.revoke(spiffe_id="spiffe://example.org/payments/api", reason=1)
    assert list(revoked.revoked_ids) == [result.svid.serial]
    assert list(revoked.revocation.held_entry_ids) == [entry.id]
    again = await node.issue(entry.id)
    assert again.status.reason == "ENTRY_NOT_AUTHORIZED"
    [recorded] = await broker.ledger(spiffe_id="spiffe://example.org/payments/api")
    assert recorded.state == credential_pb2.CREDENTIAL_STATE_REVOKED


async def test_a_revoked_svid_is_refused_on_an_open_connection(broker: RunningBroker) -> None:
    node = await broker.join("web-1")
    assert (await node.entries.ListAuthorized(entry_pb2.ListAuthorizedRequest())).entries == []
    await broker.revoke(id=node.svid.serial)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await node.entries.ListAuthorized(entry_pb2.ListAuthorizedRequest())
    assert reason_of(refused.value) == "CREDENTIAL_REVOKED"


async def test_a_banned_node_is_refused_on_an_open_connection(broker: RunningBroker) -> None:
    node = await broker.join("web-1")
    entry = await broker.entry("/payments/api", "web-1")
    issued = await node.issue(entry.id)
    nodes = await broker.stub(node_pb2_grpc.NodeStub)
    answer = await nodes.Ban(node_pb2.BanNodeRequest(spiffe_id=node_id("web-1"), reason="stolen"))
    assert answer.node.banned
    assert answer.revoked == 2
    revoked = await broker.ledger(states=[credential_pb2.CREDENTIAL_STATE_REVOKED])
    assert {item.id for item in revoked} == {node.svid.serial, issued.svid.serial}
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await node.issue(entry.id)
    assert reason_of(refused.value) == "NODE_BANNED"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await broker.join("web-1")
    assert reason_of(refused.value) == "NODE_BANNED"
    # The attempt was refused after its token was taken: the token is given back, the ban stays.
    await nodes.Evict(node_pb2.EvictNodeRequest(spiffe_id=node_id("web-1")))
    back = await broker.join("web-1")
    assert (await back.issue(entry.id)).status.code == 0


async def test_a_compromised_key_is_nobodys_key(broker: RunningBroker) -> None:
    key = new_key()
    node = await broker.join("web-1")
    entry = await broker.entry("/payments/api", "web-1")
    first = await node.issue(entry.id, csr_for(key))
    answer = await broker.revoke(key=key_fingerprint(key.public_key()), reason=1)
    assert list(answer.revoked_ids) == [first.svid.serial]
    assert (await node.issue(entry.id, csr_for(key))).status.reason == "KEY_BLOCKED"
    assert (await node.issue(entry.id)).status.code == 0
    token = await broker.token("web-2")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await broker.attest(token, key)
    assert reason_of(refused.value) == "KEY_BLOCKED"
    # Its token is not spent by that.
    assert (await broker.attest(token)).svid.spiffe_id == node_id("web-2")


async def test_a_banned_node_loses_its_open_stream(broker: RunningBroker) -> None:
    node = await broker.join("web-1")
    stream = await node.follow()
    nodes = await broker.stub(node_pb2_grpc.NodeStub)
    await nodes.Ban(node_pb2.BanNodeRequest(spiffe_id=node_id("web-1")))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        async with asyncio.timeout(5):
            while await stream.read() is not grpc.aio.EOF:
                pass
    assert reason_of(refused.value) == "NODE_BANNED"


async def test_a_join_token_works_once(broker: RunningBroker) -> None:
    token = await broker.token("web-1")
    await broker.attest(token)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await broker.attest(token)
    assert reason_of(refused.value) == "JOIN_TOKEN_REJECTED"


@pytest.mark.parametrize("token", ["", "idbt_", "idbt_" + "A" * 43, "idbt_" + "A" * 5000])
async def test_an_unknown_join_token_is_refused(broker: RunningBroker, token: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await broker.attest(token)
    assert reason_of(refused.value) == "JOIN_TOKEN_REJECTED"


async def test_an_expired_join_token_is_refused(broker: RunningBroker) -> None:
    token = await broker.token("web-1", ttl=1)
    await asyncio.sleep(1.1)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await broker.attest(token)
    assert reason_of(refused.value) == "JOIN_TOKEN_REJECTED"


async def test_one_of_many_wins_a_join_token(broker: RunningBroker) -> None:
    token = await broker.token("web-1")
    outcomes = await asyncio.gather(
        *(broker.attest(token) for _ in range(8)), return_exceptions=True
    )
    refused = [item for item in outcomes if isinstance(item, grpc.aio.AioRpcError)]
    assert len(refused) == 7
    assert {reason_of(item) for item in refused} == {"JOIN_TOKEN_REJECTED"}


async def test_a_broken_csr_costs_no_join_token(broker: RunningBroker) -> None:
    from identity_api.broker.v1 import node_attestation_pb2_grpc

    token = await broker.token("web-1")
    stub = node_attestation_pb2_grpc.NodeAttestationStub(await broker.bootstrap())

    async def begin():
        yield node_attestation_pb2.AttestRequest(
            begin=node_attestation_pb2.AttestRequest.Begin(
                attestor="join_token", payload=token.encode(), csr=b"\x30\x00"
            )
        )

    with pytest.raises(grpc.aio.AioRpcError) as refused:
        async for _ in stub.Attest(begin()):
            pass
    assert reason_of(refused.value) == "CSR_REJECTED"
    assert (await broker.attest(token)).svid.spiffe_id == node_id("web-1")


async def test_a_node_renews_and_the_former_svid_is_superseded(broker: RunningBroker) -> None:
    node = await broker.join("web-1")
    key = new_key()
    renewed = await node.attestation.Renew(node_attestation_pb2.RenewRequest(csr=csr_for(key)))
    assert renewed.svid.serial != node.svid.serial
    states = {item.id: item.state for item in await broker.ledger(spiffe_id=node_id("web-1"))}
    assert states == {
        node.svid.serial: credential_pb2.CREDENTIAL_STATE_SUPERSEDED,
        renewed.svid.serial: credential_pb2.CREDENTIAL_STATE_ISSUED,
    }


async def test_an_entry_of_another_node_is_refused_like_one_that_is_not_there(
    broker: RunningBroker,
) -> None:
    node = await broker.join("web-1")
    foreign = await broker.entry("/payments/api", "web-2")
    answers = [await node.issue(entry_id) for entry_id in (foreign.id, "nothing", "")]
    assert len({answer.status.SerializeToString() for answer in answers}) == 1
    assert answers[0].status.reason == "ENTRY_NOT_AUTHORIZED"


async def test_a_batch_answers_item_by_item(broker: RunningBroker) -> None:
    node = await broker.join("web-1")
    entry = await broker.entry("/payments/api", "web-1")
    good, item = csr_for(new_key()), svid_pb2.BatchIssueX509Request.Item
    request = svid_pb2.BatchIssueX509Request(
        items=[
            item(entry_id=entry.id, csr=good),
            item(entry_id="nothing", csr=good),
            item(entry_id=entry.id, csr=good[:-1]),
            *(item(entry_id=entry.id, csr=csr_for(new_key())) for _ in range(20)),
        ]
    )
    response = await node.svids.BatchIssueX509(request)
    reasons = [result.status.reason for result in response.results]
    assert reasons == ["", "ENTRY_NOT_AUTHORIZED", "CSR_REJECTED", *[""] * 20]
    issued = [result.svid.serial for result in response.results if result.status.code == 0]
    recorded = await broker.ledger(spiffe_id="spiffe://example.org/payments/api")
    assert {item.id for item in recorded} == set(issued)


async def test_the_names_in_a_csr_are_ignored(broker: RunningBroker) -> None:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.serialization import Encoding

    node = await broker.join("web-1")
    entry = await broker.entry("/payments/api", "web-1")
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "impostor")]))
        .add_extension(
            x509.SubjectAlternativeName(
                [
                    x509.UniformResourceIdentifier("spiffe://example.org/admin"),
                    x509.DNSName("bank.example"),
                ]
            ),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(new_key(), hashes.SHA256())
        .public_bytes(Encoding.DER)
    )
    result = await node.issue(entry.id, csr)
    assert result.status.code == 0
    leaf = x509.load_der_x509_certificate(result.svid.cert_chain[0])
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    assert uris == ["spiffe://example.org/payments/api"]
    assert "bank.example" not in names.get_values_for_type(x509.DNSName)
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert b"impostor" not in result.svid.cert_chain[0]


async def test_a_jwt_svid_verifies_and_is_recorded(broker: RunningBroker) -> None:
    node = await broker.join("web-1")
    entry = await broker.entry("/payments/api", "web-1")
    request = svid_pb2.BatchIssueJwtRequest(
        items=[
            svid_pb2.BatchIssueJwtRequest.Item(entry_id=entry.id, audiences=["ledger"]),
            svid_pb2.BatchIssueJwtRequest.Item(entry_id=entry.id, audiences=[]),
        ]
    )
    good, bad = (await node.svids.BatchIssueJwt(request)).results
    assert bad.status.reason == "AUDIENCE_INVALID"
    verified = verify_jwt_svid(
        good.svid.token,
        bundle=await _spiffe_bundle(broker),
        audience="ledger",
        now=SystemClock().now(),
    )
    assert str(verified.spiffe_id) == "spiffe://example.org/payments/api"
    [recorded] = await broker.ledger(kind=credential_pb2.CREDENTIAL_KIND_JWT)
    assert recorded.id == good.svid.jti == verified.jti
    assert recorded.digest == hashlib.sha256(good.svid.token.encode()).hexdigest()


async def test_a_stranger_gets_nowhere_on_the_mtls_port(broker: RunningBroker) -> None:
    channel = grpc.aio.secure_channel(
        broker.addresses.address,
        grpc.ssl_channel_credentials(broker.bundle_pem),
        options=[("grpc.ssl_target_name_override", "x")],
    )
    async with channel:
        stub = entry_pb2_grpc.EntryStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ListAuthorized(entry_pb2.ListAuthorizedRequest(), timeout=5)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert (await broker.join("still-served")).svid.spiffe_id == node_id("still-served")


async def test_a_node_may_not_administer(broker: RunningBroker) -> None:
    node = await broker.join("web-1")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await node.entries.List(entry_pb2.ListEntriesRequest())
    assert reason_of(refused.value) == "METHOD_DENIED"


async def test_an_admin_entry_lets_a_workload_administer(broker: RunningBroker) -> None:
    node = await broker.join("ops-1")
    entry = await broker.entry("/ops/console", "ops-1", admin=True)
    key = new_key()
    svid = (await node.issue(entry.id, csr_for(key))).svid
    stub = entry_pb2_grpc.EntryStub(await broker.mtls(key, svid))
    listed = await stub.List(entry_pb2.ListEntriesRequest())
    assert [item.id for item in listed.entries] == [entry.id]
    entries = await broker.stub(entry_pb2_grpc.EntryStub)
    await entries.BatchUpdate(
        entry_pb2.BatchUpdateEntryRequest(
            items=[
                entry_pb2.BatchUpdateEntryRequest.Item(
                    entry=types_pb2.RegistrationEntry(id=entry.id, admin=False), fields=["admin"]
                )
            ]
        )
    )
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.List(entry_pb2.ListEntriesRequest())
    assert reason_of(refused.value) == "METHOD_DENIED"


async def test_a_node_group_gives_its_members_the_groups_entries(broker: RunningBroker) -> None:
    node = await broker.join("web-1")
    await broker.entry(
        "/group/web",
        "",
        parent_id="spiffe://example.org/idb/broker",
        selectors=[types_pb2.Selector(type="join_token", value="name:web-1")],
    )
    entry = await broker.entry("/shop", "", parent_id="spiffe://example.org/group/web")
    assert (await node.issue(entry.id)).status.code == 0
    other = await broker.join("db-1")
    assert (await other.issue(entry.id)).status.reason == "ENTRY_NOT_AUTHORIZED"


async def test_watchers_see_revocations_and_entries_as_they_commit(broker: RunningBroker) -> None:
    node = await broker.join("web-1")
    entries = await broker.stub(entry_pb2_grpc.EntryStub)
    watch = entries.Watch(entry_pb2.WatchEntriesRequest())
    assert (await watch.read()).synced
    entry = await broker.entry("/payments/api", "web-1")
    seen = await asyncio.wait_for(watch.read(), 5)
    assert [item.id for item in seen.changed] == [entry.id]

    revocations = await node.follow()
    issued = (await node.issue(entry.id)).svid
    await broker.revoke(id=issued.serial, reason=1)
    told = await asyncio.wait_for(revocations.read(), 5)
    assert [item.id for item in told.revoked] == [issued.serial]
    watch.cancel()
    revocations.cancel()


async def test_the_bundle_is_anyones(broker: RunningBroker) -> None:
    bundles = await broker.bundles()
    bundle = (await bundles.Get(bundle_pb2.GetBundleRequest())).bundle
    served = await _spiffe_bundle(broker)
    assert tuple(bundle.x509_authorities) == served.x509_authorities
    assert bundle.sequence == served.sequence > 0


async def test_a_restart_resumes_with_the_same_authorities_and_nodes(tmp_path: Path) -> None:
    settings = settings_in(tmp_path / "idb")
    async with running(settings) as broker:
        node = await broker.join("web-1")
        entry = await broker.entry("/payments/api", "web-1")
        await broker.revoke(id=(await node.issue(entry.id)).svid.serial)
        before = broker.bundle_pem
        key, svid = node.key, node.svid
    async with running(settings) as broker:
        assert broker.bundle_pem == before
        stub_channel = await broker.mtls(key, svid)
        stub = entry_pb2_grpc.EntryStub(stub_channel)
        listed = await stub.ListAuthorized(entry_pb2.ListAuthorizedRequest())
        assert [item.id for item in listed.entries] == [entry.id]
        assert len(await broker.ledger(states=[credential_pb2.CREDENTIAL_STATE_REVOKED])) == 1


async def test_a_lost_memory_key_is_replaced_and_the_former_bundle_stays_trusted(
    tmp_path: Path,
) -> None:
    settings = settings_in(tmp_path / "idb", ca={"key_manager": "memory"})
    async with running(settings) as broker:
        first = await _spiffe_bundle(broker)
    async with running(settings) as broker:
        second = await _spiffe_bundle(broker)
        assert set(first.x509_authorities) < set(second.x509_authorities)
        assert second.sequence > first.sequence
        assert (await broker.join("web-1")).svid.spiffe_id == node_id("web-1")
