"""The source over a Workload API, in both forms, against a server that says what the test wants."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from spiffe import SpiffeId, TrustDomain

from identity_client import (
    IdentityNotReady,
    IdentityRevoked,
    IdentityWithdrawn,
    PeerRejected,
    PeerRevoked,
    SourceClosed,
    SourceState,
    client_ssl_context,
    server_ssl_context,
)
from identity_client import source as threaded
from identity_client._wire.workload import X509SVID, X509SVIDResponse
from identity_client.aio import IdentitySource
from identity_client.errors import (
    BrokerUnavailable,
    NotPermitted,
    ObjectNotFound,
    ProtocolViolation,
    RequestRejected,
)
from identity_client.peer import Peer, check_current, peer_from_der
from support.client import until
from support.workload_server import ScriptedDomain, ScriptedWorkloadApi, serving

WEB = "spiffe://example.org/web"
API = "spiffe://example.org/api"
OTHER = "spiffe://partner.org"
Code = grpc.StatusCode


@pytest.fixture
def domain() -> ScriptedDomain:
    return ScriptedDomain("example.org")


@pytest.fixture
async def api(domain: ScriptedDomain, tmp_path: Path) -> AsyncIterator[ScriptedWorkloadApi]:
    scripted = ScriptedWorkloadApi(domain)
    async with serving(scripted, tmp_path / "api.sock"):
        yield scripted


@asynccontextmanager
async def following(directory: Path, **choice: Any) -> AsyncIterator[IdentitySource]:
    source = IdentitySource.from_workload_api(f"unix://{directory / 'api.sock'}", **choice)
    async with source:
        yield source


def peer_of(source: IdentitySource) -> Peer:
    leaf = source.snapshot().svid.leaf
    return peer_from_der(leaf.public_bytes(serialization.Encoding.DER))


# --- what it hands out -------------------------------------------------------------------------


async def test_the_first_identity_offered_is_taken(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, tmp_path: Path
) -> None:
    web, other = domain.svid("/web"), domain.svid("/other")
    await api.say(domain.offer(web, hint="internal"), domain.offer(other))
    async with following(tmp_path) as source:
        snapshot = await source.wait_ready(timeout=5)
        assert (str(snapshot.spiffe_id), snapshot.serial) == (WEB, web.serial)
        assert snapshot.x509.hint == "internal"
        assert snapshot.bundle.same_keys(domain.bundle)
        assert source.x509_bundle().trust_domain == TrustDomain("example.org")
        status = source.status()
        assert (status.state, status.ready, status.last_error) == (SourceState.READY, True, None)
        assert status.revocations_synced is False  # No list was sent.
    assert source.status().state is SourceState.CLOSED
    with pytest.raises(SourceClosed):
        source.snapshot()


@pytest.mark.clause("API-20")
@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({}, "/first"),
        ({"spiffe_id": "spiffe://example.org/second"}, "/second"),
        ({"hint": "external"}, "/second"),
        ({"hint": "internal"}, "/third"),
        ({"spiffe_id": "spiffe://example.org/third", "hint": "internal"}, "/third"),
    ],
)
async def test_which_identity_is_taken(
    api: ScriptedWorkloadApi,
    domain: ScriptedDomain,
    tmp_path: Path,
    choice: dict[str, str],
    expected: str,
) -> None:
    await api.say(
        domain.offer(domain.svid("/first")),
        domain.offer(domain.svid("/second"), hint="external"),
        domain.offer(domain.svid("/third"), hint="internal"),
    )
    async with following(tmp_path, **choice) as source:
        assert (await source.wait_ready(5)).spiffe_id.path == expected


@pytest.mark.clause("API-9")
async def test_of_two_with_one_hint_the_first_wins(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, tmp_path: Path
) -> None:
    await api.say(
        domain.offer(domain.svid("/first"), hint="internal"),
        domain.offer(domain.svid("/second"), hint="internal"),
    )
    async with following(tmp_path, spiffe_id="spiffe://example.org/second") as source:
        with pytest.raises(IdentityNotReady) as refused:
            await source.wait_ready(0.5)
        assert refused.value.reason == "NO_IDENTITY"
    async with following(tmp_path, hint="internal") as source:
        assert (await source.wait_ready(5)).spiffe_id.path == "/first"


async def test_it_never_becomes_somebody_else(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, tmp_path: Path
) -> None:
    await api.say(domain.offer(domain.svid("/web"), hint="a"))
    async with following(tmp_path, hint="a") as source:
        await source.wait_ready(5)
        renewed = domain.svid("/web")
        await api.say(
            domain.offer(domain.svid("/other"), hint="a"), domain.offer(renewed, hint="b")
        )
        await until(lambda: source.snapshot().serial == renewed.serial)
        assert str(source.snapshot().spiffe_id) == WEB


@pytest.mark.parametrize("kind", ["p384", "rsa"])
async def test_other_kinds_of_key(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, tmp_path: Path, kind: str
) -> None:
    key = (
        rsa.generate_private_key(65537, 2048)
        if kind == "rsa"
        else ec.generate_private_key(ec.SECP384R1())
    )
    await api.say(offer_with(domain, key))
    async with following(tmp_path) as source:
        snapshot = await source.wait_ready(5)
        assert type(snapshot.svid.private_key) is type(key)


def offer_with(
    domain: ScriptedDomain, key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
) -> X509SVID:
    """An offer for `key`: the domain's certificate, made over for it."""
    from cryptography import x509

    leaf = domain.svid("/web").svid.leaf
    builder = x509.CertificateBuilder(
        issuer_name=leaf.issuer,
        subject_name=leaf.subject,
        public_key=key.public_key(),
        serial_number=leaf.serial_number,
        not_valid_before=leaf.not_valid_before_utc,
        not_valid_after=leaf.not_valid_after_utc,
    )
    for extension in leaf.extensions:
        builder = builder.add_extension(extension.value, critical=extension.critical)
    certificate = builder.sign(domain._key, hashes.SHA256())
    return X509SVID(
        spiffe_id=WEB,
        x509_svid=certificate.public_bytes(serialization.Encoding.DER),
        x509_svid_key=key.private_bytes(
            serialization.Encoding.DER,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
        bundle=domain.bundle_der(),
    )


async def test_a_rotation_reaches_subscribers_and_iterators(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, tmp_path: Path
) -> None:
    first, second = domain.svid("/web"), domain.svid("/web")
    await api.say(domain.offer(first))
    async with following(tmp_path) as source:
        await source.wait_ready(5)
        told: list[str] = []
        source.subscribe(lambda snapshot: told.append(snapshot.serial))
        updates = source.updates()
        assert (await anext(updates)).serial == first.serial
        await api.say(domain.offer(second))
        async with asyncio.timeout(5):
            assert (await anext(updates)).serial == second.serial
        assert told == [second.serial]
        # The same state again is no news.
        await api.say(domain.offer(second))
        await asyncio.sleep(0.1)
        assert told == [second.serial]


async def test_a_replaced_authority(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, tmp_path: Path
) -> None:
    await api.say(domain.offer(domain.svid("/web")))
    async with following(tmp_path) as source:
        await source.wait_ready(5)
        domain.replace_authority()
        fresh = domain.svid("/web")
        await api.say(domain.offer(fresh))
        await until(lambda: source.snapshot().serial == fresh.serial)
        assert source.snapshot().bundle.same_keys(domain.bundle)


def test_a_threaded_program_has_the_same(domain: ScriptedDomain, tmp_path: Path) -> None:
    import threading

    scripted = ScriptedWorkloadApi(domain)
    ready, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        async with serving(scripted, tmp_path / "api.sock"):
            await scripted.say(domain.offer(domain.svid("/web")))
            ready.set()
            await stop.wait()

    server = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    server.start()
    try:
        assert ready.wait(5)
        with threaded.IdentitySource.from_workload_api(f"unix://{tmp_path}/api.sock") as source:
            assert str(source.wait_ready(5).spiffe_id) == WEB
            token = source.fetch_jwt_svid("orders")
            assert source.validate_jwt_svid(token.token, "orders").spiffe_id == SpiffeId(WEB)
            assert source.crls == ()
            fresh = domain.svid("/web")
            updates = source.updates()
            next(updates)
            asyncio.run_coroutine_threadsafe(scripted.say(domain.offer(fresh)), loop).result(5)
            assert next(updates).serial == fresh.serial
    finally:
        loop.call_soon_threadsafe(stop.set)
        server.join(10)
        loop.close()


# --- redaction ---------------------------------------------------------------------------------


@pytest.mark.clause("API-11")
async def test_permission_denied_ends_the_use_of_the_identity_until_it_is_back(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, tmp_path: Path
) -> None:
    material = domain.svid("/web")
    await api.say(domain.offer(material))
    async with following(tmp_path) as source:
        await source.wait_ready(5)
        await source.fetch_jwt_svid("orders")
        await api.fail(Code.PERMISSION_DENIED, "no identity issued")
        await until(lambda: not source.status().ready)
        assert source.status().state is SourceState.WITHDRAWN
        for use in (source.snapshot, lambda: source.x509_svid, source.x509_bundle):
            with pytest.raises(IdentityWithdrawn) as refused:
                use()
            assert refused.value.reason == "IDENTITY_WITHDRAWN"
        with pytest.raises(IdentityWithdrawn):
            await source.fetch_jwt_svid("orders")
        with pytest.raises(ssl.SSLError):
            client_ssl_context(source, authorize=API).wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO())
        # The very same certificate may come back.
        await api.say(domain.offer(material))
        await until(lambda: source.status().ready)
        assert source.snapshot().serial == material.serial


@pytest.mark.clause("API-5")
@pytest.mark.clause("API-11")
async def test_an_identity_left_out_of_a_message_is_not_used_any_more(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, tmp_path: Path
) -> None:
    await api.say(domain.offer(domain.svid("/web")), domain.offer(domain.svid("/other")))
    async with following(tmp_path) as source:
        await source.wait_ready(5)
        await api.say(domain.offer(domain.svid("/other")))
        await until(lambda: source.status().state is SourceState.WITHDRAWN)
        error = source.status().last_error
        assert error is not None
        assert "spiffe://example.org/other" in error.hint
        back = domain.svid("/web")
        await api.say(domain.offer(domain.svid("/other")), domain.offer(back))
        await until(lambda: source.status().ready)
        assert source.snapshot().serial == back.serial


@pytest.mark.clause("API-5")
async def test_nothing_old_is_retained(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, tmp_path: Path
) -> None:
    partner, third = ScriptedDomain("partner.org"), ScriptedDomain("third.org")
    peer = domain.svid("/api")
    offered = domain.offer(domain.svid("/web"))
    federated = {OTHER: partner.bundle_der(), "spiffe://third.org": third.bundle_der()}
    await api.say(offered, crls=[domain.crl([peer.serial])], federated=federated)
    async with following(tmp_path) as source:
        snapshot = await source.wait_ready(5)
        assert set(map(str, snapshot.bundles)) == {"example.org", "partner.org", "third.org"}
        assert source.x509_bundle("partner.org").x509_authorities == {
            *partner.bundle.x509_authorities
        }
        assert len(source.denied) == 1
        await api.say(offered, federated={OTHER: partner.bundle_der()})
        await until(lambda: len(source.snapshot().bundles) == 2)
        assert (len(source.denied), source.crls) == (0, ())
        await api.say(offered)
        await until(lambda: len(source.snapshot().bundles) == 1)
        with pytest.raises(ObjectNotFound):
            source.x509_bundle("partner.org")
        # Keys that went away were those of others: our certificate is the same as before.
        assert source.snapshot().serial == snapshot.serial


@pytest.mark.clause("API-6")
@pytest.mark.parametrize("field", ["spiffe_id", "x509_svid", "x509_svid_key", "bundle", "svids"])
async def test_a_message_without_a_mandatory_field_is_discarded_whole(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, tmp_path: Path, field: str
) -> None:
    good = domain.svid("/web")
    await api.say(domain.offer(good))
    async with following(tmp_path) as source:
        await source.wait_ready(5)
        broken = domain.offer(domain.svid("/other"))
        if field == "svids":
            await api.say(crls=[domain.crl([good.serial])])
        else:
            broken.ClearField(field)  # type: ignore[arg-type]
            await api.say(
                domain.offer(domain.svid("/web")), broken, crls=[domain.crl([good.serial])]
            )
        await until(lambda: source.status().last_error is not None)
        assert isinstance(source.status().last_error, ProtocolViolation)
        assert source.snapshot().serial == good.serial
        assert len(source.denied) == 0
        # The stream goes on: nobody connects again for it.
        better = domain.svid("/web")
        await api.say(domain.offer(better))
        await until(lambda: source.snapshot().serial == better.serial)
        assert source.status().last_error is None
        assert api.asked["FetchX509SVID"] == 1


def _swap(offer: X509SVID, **fields: object) -> X509SVID:
    changed = X509SVID.FromString(offer.SerializeToString())
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


@pytest.mark.parametrize(
    "kind",
    ["other-key", "other-name", "other-authority", "cut", "no-der", "ed25519", "text-key", "no-id"],
)
async def test_an_svid_that_cannot_be_is_not_taken(
    api: ScriptedWorkloadApi,
    domain: ScriptedDomain,
    tmp_path: Path,
    kind: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    offer, other = domain.offer(domain.svid("/web")), domain.offer(domain.svid("/web"))
    strange = ed25519.Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    broken = {
        "other-key": _swap(offer, x509_svid_key=other.x509_svid_key),
        "other-name": _swap(offer, spiffe_id=API),
        "other-authority": _swap(offer, bundle=ScriptedDomain("example.org").bundle_der()),
        "cut": _swap(offer, x509_svid=offer.x509_svid[:-1]),
        "no-der": _swap(offer, x509_svid=b"\x30\x03abc"),
        "ed25519": _swap(offer, x509_svid_key=strange),
        "text-key": _swap(offer, x509_svid_key=b"secret words"),
        "no-id": _swap(offer, spiffe_id="spiffe://Example.org/web"),
    }[kind]
    await api.say(broken)
    async with following(tmp_path) as source:
        with pytest.raises(IdentityNotReady) as refused:
            await source.wait_ready(0.5)
        assert refused.value.reason in {"PROTOCOL_VIOLATION", "CHAIN_UNTRUSTED"}
        assert "secret words" not in f"{refused.value}{caplog.text}"
        await api.say(offer)
        assert str((await source.wait_ready(5)).spiffe_id) == WEB


async def test_one_unreadable_foreign_bundle_keeps_nothing_from_us(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, tmp_path: Path
) -> None:
    partner = ScriptedDomain("partner.org")
    federated = {
        OTHER: partner.bundle_der(),
        "spiffe://bad.org": b"\x30\x03abc",
        "spiffe://cut.org": partner.bundle_der()[:-1],
        "spiffe://empty.org": b"",
        "Not a name": partner.bundle_der(),
    }
    await api.say(domain.offer(domain.svid("/web")), federated=federated)
    async with following(tmp_path) as source:
        snapshot = await source.wait_ready(5)
        assert set(map(str, snapshot.bundles)) == {"example.org", "partner.org"}


# --- trying again ------------------------------------------------------------------------------


@pytest.mark.clause("EP-4")
@pytest.mark.clause("EP-11")
@pytest.mark.parametrize("code", [Code.INVALID_ARGUMENT, Code.UNIMPLEMENTED])
async def test_what_must_not_be_tried_again_is_not(
    api: ScriptedWorkloadApi, tmp_path: Path, code: grpc.StatusCode
) -> None:
    await api.fail(code, "never")
    async with following(tmp_path) as source:
        with pytest.raises(RequestRejected):
            await source.wait_ready(5)
        await asyncio.sleep(0.6)
        assert api.asked["FetchX509SVID"] == 1
        assert api.asked["FetchJWTBundles"] == 1


@pytest.mark.clause("EP-11")
@pytest.mark.parametrize("code", [Code.UNAVAILABLE, Code.PERMISSION_DENIED, Code.CANCELLED])
async def test_what_may_pass_is_tried_again_with_a_backoff(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, tmp_path: Path, code: grpc.StatusCode
) -> None:
    await api.fail(code, "later")
    async with following(tmp_path) as source:
        waiting = asyncio.create_task(source.wait_ready(20))
        await asyncio.sleep(1.0)
        # 100 to 200 ms, then twice that, then twice that again: three or four times, not twenty.
        assert 2 <= api.asked["FetchX509SVID"] <= 5
        error = source.status().last_error
        assert isinstance(
            error, NotPermitted if code is Code.PERMISSION_DENIED else BrokerUnavailable
        )
        await api.say(domain.offer(domain.svid("/web")))
        assert str((await waiting).spiffe_id) == WEB


async def test_an_agent_that_is_away_takes_nothing_that_is_valid(
    domain: ScriptedDomain, tmp_path: Path
) -> None:
    scripted = ScriptedWorkloadApi(domain)
    first = domain.svid("/web")
    await scripted.say(domain.offer(first), crls=[domain.crl()])
    async with AsyncExitStack() as stack:
        async with serving(scripted, tmp_path / "api.sock"):
            source = await stack.enter_async_context(following(tmp_path))
            await source.wait_ready(5)
            token = await source.fetch_jwt_svid("orders")
            assert source.status().revocations_synced
        await until(lambda: source.status().last_error is not None)
        error = source.status().last_error
        assert error is not None
        assert error.reason == "WORKLOAD_API_UNREACHABLE"
        assert "idb agent status" in error.hint
        assert source.snapshot().serial == first.serial
        assert not source.status().revocations_synced
        assert (await source.fetch_jwt_svid("orders")).token == token.token
        with pytest.raises(BrokerUnavailable):
            await source.fetch_jwt_svid("somebody-else")
        # Restarted, with other state: found by itself, and soon.
        second = domain.svid("/web")
        await scripted.say(domain.offer(second))
        async with serving(scripted, tmp_path / "api.sock"):
            await until(lambda: source.snapshot().serial == second.serial, seconds=5)


async def test_an_agent_that_comes_later(domain: ScriptedDomain, tmp_path: Path) -> None:
    scripted = ScriptedWorkloadApi(domain)
    await scripted.say(domain.offer(domain.svid("/web")))
    async with following(tmp_path) as source:
        with pytest.raises(IdentityNotReady) as refused:
            await source.wait_ready(0.3)
        assert refused.value.reason == "WORKLOAD_API_UNREACHABLE"
        async with serving(scripted, tmp_path / "api.sock"):
            assert (await source.wait_ready(5)).spiffe_id == SpiffeId(WEB)


async def test_a_stream_that_merely_ends_is_opened_again(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, tmp_path: Path
) -> None:
    material = domain.svid("/web")

    async def once(request: object, context: object) -> AsyncIterator[X509SVIDResponse]:
        api.asked["once"] += 1
        yield X509SVIDResponse(svids=[domain.offer(material)])

    api.FetchX509SVID = once  # type: ignore[method-assign]
    scripted = api
    async with serving(scripted, tmp_path / "second.sock"):
        source = IdentitySource.from_workload_api(f"unix://{tmp_path}/second.sock")
        async with source:
            await source.wait_ready(5)
            await until(lambda: api.asked["once"] >= 3)
            assert source.snapshot().serial == material.serial


@pytest.mark.clause("EP-3")
async def test_every_request_carries_the_header(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, tmp_path: Path
) -> None:
    # The server refuses whatever comes without it.
    await api.say(domain.offer(domain.svid("/web")))
    async with following(tmp_path) as source:
        await source.wait_ready(5)
        await source.fetch_jwt_svid("orders")
        assert set(api.asked) == {"FetchX509SVID", "FetchJWTBundles", "FetchJWTSVID"}
        assert source.status().last_error is None


@pytest.mark.clause("EP-8")
async def test_over_tcp(domain: ScriptedDomain, unused_tcp_port: int) -> None:
    scripted = ScriptedWorkloadApi(domain)
    await scripted.say(domain.offer(domain.svid("/web")))
    address = f"127.0.0.1:{unused_tcp_port}"
    async with (
        serving(scripted, address),
        IdentitySource.from_workload_api(f"tcp://{address}") as source,
    ):
        assert str((await source.wait_ready(5)).spiffe_id) == WEB


@pytest.mark.clause("EP-7")
async def test_a_path_with_signs_that_mean_something_in_a_uri(
    domain: ScriptedDomain, tmp_path: Path
) -> None:
    # Where gRPC's own server cannot listen, the socket is moved there.
    scripted = ScriptedWorkloadApi(domain)
    await scripted.say(domain.offer(domain.svid("/web")))
    async with serving(scripted, tmp_path / "plain.sock"):
        odd = tmp_path / "a b?c#d%25é.sock"
        (tmp_path / "plain.sock").rename(odd)
        from urllib.parse import quote

        async with IdentitySource.from_workload_api(f"unix://{quote(str(odd))}") as source:
            assert str((await source.wait_ready(5)).spiffe_id) == WEB
        odd.rename(tmp_path / "plain.sock")


async def test_a_source_that_is_closed_leaves_no_stream_behind(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, tmp_path: Path
) -> None:
    await api.say(domain.offer(domain.svid("/web")))
    async with following(tmp_path) as source:
        await source.wait_ready(5)
        await until(lambda: api.streams == 2)
    await until(lambda: api.streams == 0)


# --- JWT-SVIDs ---------------------------------------------------------------------------------


async def test_jwt_svids_come_from_the_cache_until_half_of_their_life(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, tmp_path: Path
) -> None:
    await api.say(domain.offer(domain.svid("/web")))
    async with following(tmp_path) as source:
        await source.wait_ready(5)
        tokens = await asyncio.gather(*(source.fetch_jwt_svid(["a", "b"]) for _ in range(20)))
        assert len({one.token for one in tokens}) == 1
        assert (await source.fetch_jwt_svid(["b", "a"])).token == tokens[0].token
        assert api.asked["FetchJWTSVID"] == 1
        api.jwt_ttl = timedelta(seconds=6)
        short = await source.fetch_jwt_svid("c")
        assert (await source.fetch_jwt_svid("c")).token == short.token
        await asyncio.sleep(3.2)
        assert (await source.fetch_jwt_svid("c")).token != short.token
        with pytest.raises(RequestRejected):
            await source.fetch_jwt_svid([])


async def test_a_refusal_is_not_covered_by_the_cache(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, tmp_path: Path
) -> None:
    await api.say(domain.offer(domain.svid("/web")))
    api.jwt_ttl = timedelta(seconds=4)
    async with following(tmp_path) as source:
        await source.wait_ready(5)
        await source.fetch_jwt_svid("orders")
        await asyncio.sleep(2.1)
        api.jwt_failure = (Code.PERMISSION_DENIED, "no")
        with pytest.raises(NotPermitted):
            await source.fetch_jwt_svid("orders")


@pytest.mark.clause("API-16")
async def test_a_token_is_verified_with_the_keys_of_its_own_trust_domain(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, tmp_path: Path
) -> None:
    partner, stranger = ScriptedDomain("partner.org"), ScriptedDomain("stranger.org")
    own_keys = {"spiffe://example.org": domain.jwks()}
    await api.say(domain.offer(domain.svid("/web")))
    await api.say_jwt_bundles(own_keys | {OTHER: partner.jwks()})
    minute = timedelta(minutes=1)
    async with following(tmp_path) as source:
        await source.wait_ready(5)
        ours = domain.issue_jwt(SpiffeId(API), ["orders"], minute)
        theirs = partner.issue_jwt(SpiffeId(f"{OTHER}/x"), ["orders"], minute)
        assert source.validate_jwt_svid(ours.token, "orders").spiffe_id == SpiffeId(API)
        assert source.validate_jwt_svid(theirs.token, "orders").spiffe_id.path == "/x"
        forged = partner.issue_jwt(SpiffeId(API), ["orders"], minute)
        unknown = stranger.issue_jwt(SpiffeId("spiffe://stranger.org/x"), ["orders"], minute)
        for token, audience in (
            (forged.token, "orders"),
            (unknown.token, "orders"),
            (ours.token, "somebody-else"),
            ("a.b.c", "orders"),
            ("", "orders"),
        ):
            with pytest.raises(PeerRejected) as refused:
                source.validate_jwt_svid(token, audience)
            assert refused.value.reason == "TOKEN_REJECTED"
        await api.say_jwt_bundles(own_keys)
        await until(lambda: TrustDomain("partner.org") not in source.snapshot().federated)
        with pytest.raises(PeerRejected):
            source.validate_jwt_svid(theirs.token, "orders")


@pytest.mark.clause("API-10")
@pytest.mark.clause("J-12")
async def test_a_key_for_another_use_verifies_no_token(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, tmp_path: Path
) -> None:
    await api.say(domain.offer(domain.svid("/web")))
    wrong = domain.jwks().replace(b"jwt-svid", b"wit-svid")
    await api.say_jwt_bundles({"spiffe://example.org": wrong})
    token = domain.issue_jwt(SpiffeId(API), ["orders"], timedelta(minutes=1)).token
    async with following(tmp_path) as source:
        await source.wait_ready(5)
        with pytest.raises(PeerRejected):
            source.validate_jwt_svid(token, "orders")
        await api.say_jwt_bundles({"spiffe://example.org": domain.jwks()})
        await until(lambda: bool(source.snapshot().bundle.jwt_bundle.jwt_authorities))
        source.validate_jwt_svid(token, "orders")
        # What cannot be read is left out; what cannot be used at all is discarded.
        await api.say_jwt_bundles({"spiffe://example.org": b"{"})
        await until(lambda: not source.snapshot().bundle.jwt_bundle.jwt_authorities)


@pytest.mark.parametrize("use", ["sig", "jwt-svid", ""])
async def test_the_words_others_use_for_a_jwt_key(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, tmp_path: Path, use: str
) -> None:
    await api.say(domain.offer(domain.svid("/web")))
    jwks = domain.jwks().replace(b"jwt-svid", use.encode())
    await api.say_jwt_bundles({"spiffe://example.org": jwks})
    token = domain.issue_jwt(SpiffeId(API), ["orders"], timedelta(minutes=1)).token
    async with following(tmp_path) as source:
        await source.wait_ready(5)
        assert source.validate_jwt_svid(token, "orders").spiffe_id == SpiffeId(API)


async def test_an_api_without_the_jwt_profile(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, tmp_path: Path
) -> None:
    api.jwt_bundles = None
    await api.say(domain.offer(domain.svid("/web")))
    async with following(tmp_path) as source:
        await source.wait_ready(0.9)  # It does not wait for bundles that cannot come.
        await asyncio.sleep(0.5)
        assert api.asked["FetchJWTBundles"] == 1
        assert source.status().last_error is None


# --- revocation lists --------------------------------------------------------------------------


async def test_a_list_revokes_peers_and_ourselves(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, tmp_path: Path
) -> None:
    mine, peer = domain.svid("/web"), domain.svid("/api")
    await api.say(domain.offer(mine), crls=[domain.crl()])
    async with following(tmp_path) as source:
        await source.wait_ready(5)
        assert source.status().revocations_synced
        seen = peer_from_der(peer.svid.leaf.public_bytes(serialization.Encoding.DER))
        check_current(seen, source.denied)
        await api.say(domain.offer(mine), crls=[domain.crl([peer.serial])])
        await until(lambda: len(source.denied) == 1)
        with pytest.raises(PeerRevoked):
            check_current(seen, source.denied)
        check_current(peer_of(source), source.denied)
        await api.say(domain.offer(mine), crls=[domain.crl([peer.serial, mine.serial])])
        await until(lambda: not source.status().ready)
        assert source.status().state is SourceState.REVOKED
        with pytest.raises(IdentityRevoked):
            source.snapshot()
        await api.say(domain.offer(domain.svid("/web")), crls=[domain.crl([mine.serial])])
        await until(lambda: source.status().ready)


async def test_a_new_list_alone_is_news_to_whoever_asks_for_lists(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, tmp_path: Path
) -> None:
    offer = domain.offer(domain.svid("/web"))
    await api.say(offer, crls=[domain.crl()])
    async with following(tmp_path) as source:
        await source.wait_ready(5)
        with_lists, without = source.updates(crls=True), source.updates()
        first = await anext(with_lists)
        assert await anext(without) is first
        newer = domain.crl([domain.svid("/api").serial])
        await api.say(offer, crls=[newer])
        async with asyncio.timeout(5):
            assert await anext(with_lists) is first
        assert source.crls == (newer,)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await anext(without)


async def test_a_list_that_its_issuer_did_not_sign_denies_nobody(
    api: ScriptedWorkloadApi,
    domain: ScriptedDomain,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    mine = domain.svid("/web")
    forged = domain.crl([mine.serial], signed_by=ec.generate_private_key(ec.SECP256R1()))
    with caplog.at_level(logging.WARNING):
        await api.say(domain.offer(mine), crls=[forged, b"no list at all"])
        async with following(tmp_path) as source:
            await source.wait_ready(5)
            assert len(source.denied) == 0
    assert "was not signed by its issuer" in caplog.text
    assert "cannot be read" in caplog.text


async def test_a_list_denies_its_own_issuer_s_certificates_alone(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, tmp_path: Path
) -> None:
    mine, stranger = domain.svid("/web"), ScriptedDomain("example.org")
    # An authority we were never shown: taken on the agent's word, for that authority's own.
    theirs = stranger.svid("/api")
    await api.say(domain.offer(mine), crls=[stranger.crl([mine.serial, theirs.serial])])
    async with following(tmp_path) as source:
        await source.wait_ready(5)
        check_current(peer_of(source), source.denied)
        with pytest.raises(PeerRevoked):
            check_current(
                peer_from_der(theirs.svid.leaf.public_bytes(serialization.Encoding.DER)),
                source.denied,
            )


async def test_a_long_list_is_read_beside_the_loop_and_once(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, tmp_path: Path
) -> None:
    serials = [f"01{number:038x}" for number in range(1, 5001)]
    long = domain.crl(serials)
    offer = domain.offer(domain.svid("/web"))
    await api.say(offer, crls=[long])
    async with following(tmp_path) as source:
        await source.wait_ready(10)
        assert len(source.denied) == 5000
        engine = source._engine
        assert engine is not None
        before = engine._lists._read[long]  # type: ignore[attr-defined]
        await api.say(domain.offer(domain.svid("/web")), crls=[long])
        await asyncio.sleep(0.2)
        assert engine._lists._read[long] is before  # type: ignore[attr-defined]


async def test_a_revocation_cuts_off_a_peer_on_an_open_connection(
    api: ScriptedWorkloadApi, domain: ScriptedDomain, tmp_path: Path
) -> None:
    mine = domain.svid("/web")
    peer = domain.source(API)
    await api.say(domain.offer(mine), crls=[domain.crl()])
    async with following(tmp_path) as source:
        await source.wait_ready(5)

        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with pytest.raises((OSError, asyncio.IncompleteReadError)):
                while True:
                    writer.write(await reader.readexactly(1))
            writer.close()

        server = await asyncio.start_server(
            echo, "127.0.0.1", 0, ssl=server_ssl_context(source, authorize=API)
        )
        async with server:
            port = server.sockets[0].getsockname()[1]
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", port, ssl=client_ssl_context(peer, authorize=WEB)
            )
            writer.write(b"x")
            assert await reader.readexactly(1) == b"x"
            await api.say(domain.offer(mine), crls=[domain.crl([peer.serial])])
            await until(lambda: len(source.denied) == 1)
            writer.write(b"x")
            with pytest.raises((OSError, asyncio.IncompleteReadError)):
                await reader.readexactly(1)
            writer.close()
