"""The asyncio source against a real broker: join, renew, follow, survive, end."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID
from spiffe import SpiffeId

from identity_api.broker.v1 import node_pb2, node_pb2_grpc, types_pb2
from identity_client import (
    IdentityNotReady,
    IdentityRevoked,
    PeerRevoked,
    SettingsInvalid,
    SourceClosed,
    SourceState,
)
from identity_client.aio import IdentitySource
from identity_client.clock import utc_now
from identity_client.engine import Engine
from identity_client.errors import NotAuthenticated
from identity_client.integrations.grpc import secure_channel_aio
from support.client import NAMES, due_now, echo_server_aio, source_arguments, until
from support.line import RunningBroker, node_id, running, settings_in

WEB = "spiffe://example.org/web"
API = "spiffe://example.org/api"


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[RunningBroker]:
    """SQLite and keys in memory: what the broker stands on makes no difference to its clients."""
    async with running(settings_in(tmp_path / "idb", ca={"key_manager": "memory"})) as running_one:
        yield running_one


@asynccontextmanager
async def joined(
    broker: RunningBroker, name: str, path: str, **arguments: Any
) -> AsyncIterator[IdentitySource]:
    """A source on a node of its own, authorised for `path`, ready."""
    entry = arguments.pop("entry", {})
    token = await broker.token(name)
    await broker.entry(path, name, selectors=[selector(name)], **entry)
    source = IdentitySource.from_join_token(
        **source_arguments(broker),
        token=token,
        spiffe_id=f"spiffe://example.org{path}",
        **arguments,
    )
    async with source:
        await source.wait_ready(timeout=10)
        yield source


def selector(name: str) -> Any:
    return types_pb2.Selector(type="join_token", value=f"name:{name}")


async def test_a_join_token_becomes_an_identity(broker: RunningBroker) -> None:
    async with joined(broker, "n1", "/web") as source:
        snapshot = source.snapshot()
        assert snapshot.spiffe_id == SpiffeId(WEB)
        assert snapshot.svid is source.x509_svid
        assert source.x509_bundle("example.org").x509_authorities
        status = source.status()
        assert (status.state, status.ready, status.spiffe_id) == (SourceState.READY, True, WEB)
        assert status.serial == snapshot.serial
        assert status.last_error is None
        listed = await broker.ledger(spiffe_id=WEB)
        assert [one.id for one in listed] == [snapshot.serial]
        await until(lambda: source.status().revocations_synced)
    assert source.status().state is SourceState.CLOSED
    with pytest.raises(SourceClosed):
        source.snapshot()


async def test_a_rejected_token_ends_the_wait_at_once_and_is_never_shown(
    broker: RunningBroker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    token = "idbt_this-token-is-made-up-and-must-not-show"
    source = IdentitySource.from_join_token(**source_arguments(broker), token=token)
    async with source:
        with pytest.raises(NotAuthenticated) as refused:
            await source.wait_ready(timeout=10)
    assert refused.value.reason == "JOIN_TOKEN_REJECTED"
    assert "idb token generate" in refused.value.hint
    shown = f"{source!r} {source.settings!r} {source.status()!r} {refused.value!r} {caplog.text}"
    assert "made-up" not in shown


async def test_a_machine_without_an_entry_waits_and_says_why(broker: RunningBroker) -> None:
    token = await broker.token("lonely")
    source = IdentitySource.from_join_token(**source_arguments(broker), token=token, spiffe_id=WEB)
    async with source:
        with pytest.raises(IdentityNotReady, match="not authorized") as waiting:
            await source.wait_ready(timeout=1)
        assert waiting.value.reason == "ENTRY_NOT_AUTHORIZED"
        assert f'idb explain "{WEB}" --node "{node_id("lonely")}"' in waiting.value.hint
        await broker.entry("/web", "lonely", selectors=[selector("lonely")])
        assert (await source.wait_ready(timeout=10)).spiffe_id == SpiffeId(WEB)


async def test_nobody_home_is_not_ready(tmp_path: Path, broker: RunningBroker) -> None:
    arguments = source_arguments(broker) | {"bootstrap_address": "127.0.0.1:1"}
    async with IdentitySource.from_join_token(**arguments, token="idbt_x") as source:
        with pytest.raises(IdentityNotReady) as waiting:
            await source.wait_ready(timeout=0.5)
    assert waiting.value.reason == "BROKER_UNREACHABLE"


async def test_a_false_broker_never_sees_the_token(tmp_path: Path, broker: RunningBroker) -> None:
    async with running(settings_in(tmp_path / "other", ca={"key_manager": "memory"})) as other:
        arguments = source_arguments(broker) | {
            "bootstrap_address": other.addresses.bootstrap_address
        }
        token = await other.token("victim")
        async with IdentitySource.from_join_token(**arguments, token=token) as source:
            with pytest.raises(IdentityNotReady) as waiting:
                await source.wait_ready(timeout=1)
        assert waiting.value.reason == "BROKER_TLS_FAILED"
        await other.attest(token)  # still unspent: it never arrived


async def test_the_certificate_is_renewed_at_half_life(broker: RunningBroker) -> None:
    async with joined(broker, "n1", "/web", entry={"x509_ttl_seconds": 60}) as source:
        first = source.snapshot()
        engine = source._engine
        assert isinstance(engine, Engine)
        due = engine._svid_due
        assert due is not None
        life = (first.not_after - first.x509.received).total_seconds()
        assert 0.44 < (due - first.x509.received).total_seconds() / life < 0.56
        engine._svid_due = first.x509.received
        engine._wake.set()
        await until(lambda: source.snapshot().revision > first.revision)
        second = source.snapshot()
        assert second.serial != first.serial
        assert second.x509.key_pem != first.x509.key_pem


async def test_updates_and_subscribers_see_every_newest_snapshot(broker: RunningBroker) -> None:
    async with joined(broker, "n1", "/web") as source:
        seen: list[str] = []
        unsubscribe = source.subscribe(lambda snapshot: seen.append(snapshot.serial))
        updates = source.updates()
        first = await anext(updates)
        renew_now(source)
        second = await asyncio.wait_for(anext(updates), 10)
        assert second.revision > first.revision
        assert seen == [second.serial]
        unsubscribe()
        renew_now(source)
        third = await asyncio.wait_for(anext(updates), 10)
        assert seen == [second.serial] != [third.serial]


def renew_now(source: IdentitySource) -> None:
    engine = source._engine
    assert isinstance(engine, Engine)
    engine._svid_due = None
    engine._wake.set()


async def test_the_node_is_renewed_and_the_streams_move_over(broker: RunningBroker) -> None:
    async with joined(broker, "n1", "/web") as source:
        await until(lambda: source.status().revocations_synced)
        engine = source._engine
        assert isinstance(engine, Engine)
        keeper = engine._keeper
        before = keeper.serial
        due_now(keeper)
        await until(lambda: keeper.serial != before)
        await asyncio.sleep(0.1)
        other = await broker.join("n2")
        await broker.entry("/other", "n2", selectors=[selector("n2")], id="other")
        issued = await other.issue("other")
        await broker.revoke(id=issued.svid.serial)
        await until(lambda: issued.svid.serial in source.denied)


async def test_jwt_svids_are_cached_by_audience_and_fetched_once(broker: RunningBroker) -> None:
    async with joined(broker, "n1", "/web") as source:
        tokens = await asyncio.gather(*(source.fetch_jwt_svid(["a", "b"]) for _ in range(20)))
        assert len({one.token for one in tokens}) == 1
        assert (await source.fetch_jwt_svid(["b", "a"])).token == tokens[0].token
        other = await source.fetch_jwt_svid("c")
        assert other.token != tokens[0].token
        assert other.spiffe_id == SpiffeId(WEB)
        listed = [one for one in await broker.ledger(spiffe_id=WEB) if one.kind == 2]
        assert len(listed) == 2
        checked = source.validate_jwt_svid(other.token, "c")
        assert checked.spiffe_id == SpiffeId(WEB)
        await until(lambda: source.status().revocations_synced)
        jti = next(one.id for one in listed if one.id in str(checked._claims))
        await broker.revoke(jti=jti)
        await until(lambda: jti in source.denied)
        with pytest.raises(PeerRevoked):
            source.validate_jwt_svid(other.token, "c")
        assert (await source.fetch_jwt_svid("c")).token != other.token


async def test_a_revoked_certificate_is_replaced_when_the_entry_stays(
    broker: RunningBroker,
) -> None:
    async with joined(broker, "n1", "/web") as source:
        await until(lambda: source.status().revocations_synced)
        before = source.snapshot()
        await broker.revoke(id=before.serial)
        await until(lambda: source.status().ready and source.status().serial != before.serial)
        assert before.serial in source.denied


async def test_a_revoked_identity_is_not_handed_out_any_more(broker: RunningBroker) -> None:
    async with joined(broker, "n1", "/web") as source:
        await until(lambda: source.status().revocations_synced)
        answer = await broker.revoke(spiffe_id=WEB)
        await until(lambda: source.status().state is SourceState.REVOKED)
        with pytest.raises(IdentityRevoked):
            source.snapshot()
        with pytest.raises(IdentityRevoked):
            await source.fetch_jwt_svid("a")
        await until(lambda: source.status().failures > 0)
        with pytest.raises(IdentityRevoked, match="not authorized"):
            source.snapshot()
        # An operator lifts the hold.
        await broker.lift(answer.revocation.hold)
        await until(lambda: source.status().ready, 15)
        # What is issued after the second in which it was revoked holds again.
        await asyncio.sleep(1)
        token = await source.fetch_jwt_svid("b")
        source.validate_jwt_svid(token.token, "b")


async def test_a_revoked_peer_is_refused_on_an_open_connection(broker: RunningBroker) -> None:
    async with (
        joined(broker, "n1", "/web") as web,
        joined(broker, "n2", "/api") as api,
        echo_server_aio(api, [WEB]) as address,
    ):
        await until(lambda: api.status().revocations_synced)
        stolen = Stolen(web)
        async with (
            secure_channel_aio(web, address, peer=API) as channel,
            secure_channel_aio(stolen, address, peer=API) as stolen_channel,
        ):
            echo = channel.unary_unary(NAMES["unary_unary"])
            stolen_echo = stolen_channel.unary_unary(NAMES["unary_unary"])
            assert await echo(b"x") == f"x|{WEB}".encode()
            assert await stolen_echo(b"x")
            started = asyncio.get_running_loop().time()
            await broker.revoke(spiffe_id=WEB)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                while True:
                    await stolen_echo(b"x")
            took = asyncio.get_running_loop().time() - started
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert took < 2
            await until(lambda: not web.status().ready)
            with pytest.raises(IdentityRevoked):
                await echo(b"x")


async def test_rotation_by_a_real_broker_under_load_fails_no_call(broker: RunningBroker) -> None:
    brief = {"x509_ttl_seconds": 10}  # the shortest there is
    async with (
        joined(broker, "n1", "/web", entry=brief) as web,
        joined(broker, "n2", "/api", entry=brief) as api,
        echo_server_aio(api, [WEB]) as address,
        secure_channel_aio(web, address, peer=API) as channel,
    ):
        serials = {web.snapshot().serial, api.snapshot().serial}
        web.subscribe(lambda snapshot: serials.add(snapshot.serial))
        api.subscribe(lambda snapshot: serials.add(snapshot.serial))
        echo = channel.unary_unary(NAMES["unary_unary"])
        done = 0
        ends = asyncio.get_running_loop().time() + 6.5
        while asyncio.get_running_loop().time() < ends:
            await asyncio.gather(*(echo(b"x", timeout=5) for _ in range(4)))
            done += 4
        assert len(serials) == 4  # each side was renewed once, at about half of its life
        assert done > 100


class Stolen:
    """What a thief has: one snapshot, for ever."""

    def __init__(self, source: IdentitySource) -> None:
        self._snapshot = source.snapshot()
        self._denied = type(source.denied)()

    def snapshot(self) -> Any:
        return self._snapshot

    @property
    def denied(self) -> Any:
        return self._denied


async def test_a_banned_node_keeps_what_is_valid_and_says_so(broker: RunningBroker) -> None:
    async with joined(broker, "n1", "/web") as source:
        nodes = await broker.stub(node_pb2_grpc.NodeStub)
        await nodes.Ban(node_pb2.BanNodeRequest(spiffe_id=node_id("n1"), reason="test"))
        renew_now(source)
        await until(lambda: source.status().last_error is not None)
        error = source.status().last_error
        assert error is not None
        assert error.reason in {"NODE_BANNED", "CREDENTIAL_REVOKED"}


async def test_the_source_survives_a_broker_restart(tmp_path: Path) -> None:
    tables: dict[str, Any] = {"ca": {"key_manager": "file"}}
    async with running(settings_in(tmp_path / "idb", **tables)) as broker:
        addresses = broker.addresses
        stack = joined(broker, "n1", "/web", state_dir=tmp_path / "state")
        source = await stack.__aenter__()
        before = source.snapshot()
        await until(lambda: source.status().revocations_synced)
    try:
        renew_now(source)
        await until(lambda: source.status().failures > 0)
        assert source.snapshot() is before  # what is valid is served on
        error = source.status().last_error
        assert error is not None
        assert error.reason == "BROKER_UNREACHABLE"
        fixed = {
            "address": addresses.address,
            "bootstrap_address": addresses.bootstrap_address,
        }
        async with running(settings_in(tmp_path / "idb", server=fixed, **tables)) as again:
            await until(lambda: source.snapshot().serial != before.serial, 20)
            await until(lambda: source.status().revocations_synced, 20)
            assert source.status().failures == 0
            await again.revoke(id=before.serial)
            await until(lambda: before.serial in source.denied)
    finally:
        await stack.__aexit__(None, None, None)


async def test_kept_state_needs_no_second_token(broker: RunningBroker, tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with joined(broker, "n1", "/web", state_dir=state) as source:
        first = source.snapshot()
    files = {path.name: path.stat().st_mode & 0o777 for path in state.iterdir()}
    assert files == {"node.json": 0o600, "revocations.json": 0o600, "lock": 0o600}
    assert state.stat().st_mode & 0o777 == 0o700
    assert first.x509.key_pem.decode() not in (state / "node.json").read_text()
    again = IdentitySource.from_join_token(
        **source_arguments(broker), token="idbt_spent", spiffe_id=WEB, state_dir=state
    )
    async with again:
        second = await again.wait_ready(timeout=10)
        assert second.serial != first.serial
        twin = IdentitySource.from_join_token(
            **source_arguments(broker), token="idbt_spent", state_dir=state
        )
        with pytest.raises(SettingsInvalid) as refused:
            await twin.start()
        assert refused.value.reason == "STATE_DIR_IN_USE"
    # An evicted node has to prove itself again, and a spent token cannot.
    nodes = await broker.stub(node_pb2_grpc.NodeStub)
    await nodes.Evict(node_pb2.EvictNodeRequest(spiffe_id=node_id("n1")))
    last = IdentitySource.from_join_token(
        **source_arguments(broker), token="idbt_spent", spiffe_id=WEB, state_dir=state
    )
    async with last:
        with pytest.raises((IdentityNotReady, NotAuthenticated)) as lost:
            await last.wait_ready(timeout=1.5)
    assert lost.value.reason in {
        "NODE_UNKNOWN",
        "CREDENTIAL_REVOKED",
        "UNAUTHENTICATED",
        "JOIN_TOKEN_REJECTED",
    }


async def test_an_evicted_node_joins_again_with_a_new_token_file(
    broker: RunningBroker, tmp_path: Path
) -> None:
    token_file = tmp_path / "token"
    token_file.write_text(await broker.token("n1") + "\n")
    await broker.entry("/web", "n1", selectors=[selector("n1")])
    source = IdentitySource.from_join_token(
        **source_arguments(broker), token_file=token_file, spiffe_id=WEB
    )
    async with source:
        first = await source.wait_ready(timeout=10)
        token_file.write_text(await broker.token("n1") + "\n")
        nodes = await broker.stub(node_pb2_grpc.NodeStub)
        await nodes.Evict(node_pb2.EvictNodeRequest(spiffe_id=node_id("n1")))
        renew_now(source)
        await until(lambda: source.status().ready and source.snapshot().serial != first.serial, 15)


def machine_certificate(directory: Path, machine_key: Any) -> tuple[Path, Path, Path]:
    """A CA file, and a machine's certificate and key below it."""
    ca_key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "machines")])
    now = utc_now()

    def built(subject: x509.Name, key: Any, *, ca: bool) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(
                x509.BasicConstraints(ca=ca, path_length=0 if ca else None), critical=True
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()),
                critical=False,
            )
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
        )
        if ca:
            builder = builder.add_extension(
                x509.KeyUsage(
                    digital_signature=False,
                    content_commitment=False,
                    key_encipherment=False,
                    data_encipherment=False,
                    key_agreement=False,
                    key_cert_sign=True,
                    crl_sign=True,
                    encipher_only=False,
                    decipher_only=False,
                ),
                critical=True,
            )
        else:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([x509.DNSName("machine-1.example.org")]),
                critical=False,
            )
        return builder.sign(ca_key, hashes.SHA256())

    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "machine-1")])
    ca_file, cert_file, key_file = (directory / n for n in ("ca.pem", "cert.pem", "key.pem"))
    pem = serialization.Encoding.PEM
    ca_file.write_bytes(built(name, ca_key, ca=True).public_bytes(pem))
    cert_file.write_bytes(built(subject, machine_key, ca=False).public_bytes(pem))
    key_file.write_bytes(
        machine_key.private_bytes(
            pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return ca_file, cert_file, key_file


@pytest.mark.parametrize(
    "make",
    [
        lambda: ec.generate_private_key(ec.SECP256R1()),
        lambda: ec.generate_private_key(ec.SECP384R1()),
        lambda: rsa.generate_private_key(65537, 2048),
        ed25519.Ed25519PrivateKey.generate,
    ],
    ids=["p256", "p384", "rsa", "ed25519"],
)
async def test_a_machine_certificate_becomes_an_identity(tmp_path: Path, make: Any) -> None:
    ca_file, cert_file, key_file = machine_certificate(tmp_path, make())
    settings = settings_in(
        tmp_path / "idb",
        ca={"key_manager": "memory"},
        attestors={"x509_pop": {"ca_bundle_file": str(ca_file)}},
    )
    async with running(settings) as broker:
        fingerprint = x509.load_pem_x509_certificate(cert_file.read_bytes())
        node = fingerprint.fingerprint(hashes.SHA256()).hex()
        await broker.entry(
            "/web",
            "",
            parent_id=f"spiffe://example.org/idb/node/x509_pop/{node}",
            selectors=[types_pb2.Selector(type="x509_pop", value="subject:cn:machine-1")],
        )
        source = IdentitySource.from_certificate(
            **source_arguments(broker), cert_file=cert_file, key_file=key_file
        )
        async with source:
            first = await source.wait_ready(timeout=10)
            assert first.spiffe_id == SpiffeId(WEB)
            # Evicted, it proves itself again without anybody's help.
            nodes = await broker.stub(node_pb2_grpc.NodeStub)
            await nodes.Evict(
                node_pb2.EvictNodeRequest(
                    spiffe_id=f"spiffe://example.org/idb/node/x509_pop/{node}"
                )
            )
            renew_now(source)
            await until(
                lambda: source.status().ready and source.snapshot().serial != first.serial, 15
            )


async def test_a_damaged_or_open_state_directory_is_refused(
    broker: RunningBroker, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o755)
    state.chmod(0o755)
    source = IdentitySource.from_join_token(
        **source_arguments(broker), token="idbt_x", state_dir=state
    )
    with pytest.raises(SettingsInvalid, match="open to other users") as refused:
        await source.start()
    assert "chmod 700" in refused.value.hint
    state.chmod(0o700)
    secret = "-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----"
    kept = {
        "version": 1,
        "trust_domain": "example.org",
        "key": secret,
        "chain": [],
        "bundle": "",
        "reattestable": False,
    }
    file = state / "node.json"
    for content in ("{", "[]", json.dumps({"version": 2}), json.dumps(kept)):
        file.write_text(content)
        file.chmod(0o600)
        with pytest.raises(SettingsInvalid) as damaged:
            await source.start()
        assert damaged.value.reason == "STATE_DAMAGED"
        assert "c2VjcmV0" not in repr(damaged.value.__dict__)
    file.chmod(0o644)
    with pytest.raises(SettingsInvalid) as unsafe:
        await source.start()
    assert unsafe.value.reason == "STATE_DIR_UNSAFE"
