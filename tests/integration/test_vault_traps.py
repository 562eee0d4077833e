"""The traps of OpenBao's and hvac's interfaces, each with the server (or a proxy) springing it."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed

from identity_ca.backends.vault.pki import VaultPkiUpstream
from identity_ca.backends.vault.provision import provision
from identity_ca.backends.vault.session import VaultRefused, VaultSession, VaultUnavailable
from identity_ca.backends.vault.transit import TransitKey, TransitKeyManager
from identity_ca.errors import (
    BackendMisconfigured,
    BackendUnavailable,
    KeyNotFound,
    UpstreamRejected,
)
from identity_ca.keys import (
    KeyAlgorithm,
    LocalSigningKey,
    generate_private_key,
    verify_signature,
)
from support.openbao import TRUST_DOMAIN, Fault, FaultProxy, OpenSession, VaultSite

pytestmark = pytest.mark.openbao

MESSAGE = b"to be signed"


@pytest.fixture
def mount(openbao_admin) -> Iterator[str]:
    name = f"trap-{time.monotonic_ns()}"
    openbao_admin.sys.enable_secrets_engine("transit", path=name)
    yield name
    openbao_admin.sys.disable_secrets_engine(name)


@pytest.fixture
def proxied(open_session: OpenSession, fault_proxy: FaultProxy) -> VaultSession:
    """A session of the root token, through the proxy."""
    return open_session(address=fault_proxy.address)


def keys_in(session: VaultSession, mount: str, kind: str = "ecdsa-p256", **options: Any):
    """A key manager on a key of that kind, made now."""
    session.post(f"{mount}/keys/k", {"type": kind, **options})
    return TransitKeyManager(session, mount=mount, names={"x509": "k"})


def local_key() -> LocalSigningKey:
    return LocalSigningKey("memory:k@1", generate_private_key(KeyAlgorithm.EC_P256))


def in_data(**changes: Any):
    """Rewrites members of an answer's data."""

    def rewrite(answer: dict[str, Any]) -> dict[str, Any]:
        return answer | {"data": answer["data"] | changes}

    return rewrite


# --- Transit --------------------------------------------------------------------------------------


def test_trap_making_a_key_is_an_upsert(openbao_admin, vault_site):
    """3b: a key of another type is answered with 200, as if it had been made."""
    layout = vault_site.layout
    answer = openbao_admin.write_data(
        f"{layout.transit_mount}/keys/{layout.x509_key}", data={"type": "rsa-2048"}
    )
    assert answer["data"]["type"] == "ecdsa-p256"
    with pytest.raises(BackendMisconfigured, match=r'type "ecdsa-p256" instead of "rsa-2048"'):
        provision(
            openbao_admin,
            trust_domain=TRUST_DOMAIN,
            layout=layout,
            x509_algorithm=KeyAlgorithm.RSA_2048,
        )


def test_trap_a_key_of_another_type_is_not_rotated(open_session, mount):
    keys = keys_in(open_session(), mount)
    with pytest.raises(BackendMisconfigured, match=r'"ecdsa-p256" and not "ecdsa-p384"'):
        keys.create("x509", KeyAlgorithm.EC_P384)
    assert keys.create("x509", KeyAlgorithm.EC_P256).key_id == "transit:k@2"


@pytest.mark.parametrize("option", ["exportable", "allow_plaintext_backup"])
def test_trap_a_key_that_can_leave_stays_that_way(open_session, mount, option):
    """3b: neither can be unset, so the key is refused wherever it is met."""
    session = open_session()
    keys = keys_in(session, mount, "ecdsa-p256", **{option: True})
    session.post(f"{mount}/keys/k/config", {option: False})
    for use in (
        keys.check,
        lambda: keys.load("transit:k@1"),
        lambda: keys.create("x509", KeyAlgorithm.EC_P256),
    ):
        with pytest.raises(BackendMisconfigured, match=option) as refused:
            use()
        assert "another name" in refused.value.hint


def test_a_key_that_may_be_deleted_or_rotates_by_itself_is_refused(open_session, mount):
    session = open_session()
    keys = keys_in(session, mount)
    keys.check()
    session.post(f"{mount}/keys/k/config", {"deletion_allowed": True, "auto_rotate_period": "1h"})
    with pytest.raises(BackendMisconfigured, match=r"deletion_allowed is on, auto_rotate_period"):
        keys.check()


def test_a_key_that_cannot_sign_is_refused(open_session, mount):
    keys = keys_in(open_session(), mount, "aes256-gcm96")
    with pytest.raises(BackendMisconfigured, match="it cannot sign"):
        keys.check()


def test_trap_the_default_hash_of_p384_is_sha256(proxied, fault_proxy, mount):
    """3b: sha2-256 for every curve unless told."""
    session = proxied
    keys = keys_in(session, mount, "ecdsa-p384")
    key = keys.load("transit:k@1")
    answer = session.post(f"{mount}/sign/k", {"input": base64.b64encode(MESSAGE).decode()})
    raw = base64.b64decode(answer["data"]["signature"].removeprefix("vault:v1:"))
    assert isinstance(key.public_key, ec.EllipticCurvePublicKey)
    key.public_key.verify(raw, MESSAGE, ec.ECDSA(hashes.SHA256()))
    with pytest.raises(InvalidSignature):
        verify_signature(key.public_key, raw, MESSAGE)
    key.public_key.verify(key.sign(MESSAGE), MESSAGE, ec.ECDSA(hashes.SHA384()))
    assert fault_proxy.seen[-1].json["hash_algorithm"] == "sha2-384"


def test_trap_the_default_rsa_padding_is_pss(open_session, mount):
    """3b: X.509 and RS256 need PKCS #1 v1.5."""
    session = open_session()
    key = keys_in(session, mount, "rsa-2048").load("transit:k@1")
    answer = session.post(f"{mount}/sign/k", {"input": base64.b64encode(MESSAGE).decode()})
    raw = base64.b64decode(answer["data"]["signature"].removeprefix("vault:v1:"))
    assert isinstance(key.public_key, rsa.RSAPublicKey)
    pss = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.AUTO)
    key.public_key.verify(raw, MESSAGE, pss, hashes.SHA256())
    key.public_key.verify(key.sign(MESSAGE), MESSAGE, padding.PKCS1v15(), hashes.SHA256())


def test_trap_an_ed25519_public_key_is_raw_base64(open_session, mount):
    """3b: not PEM as all others; and `prehashed` would be ignored, so the message is sent."""
    session = open_session()
    key = keys_in(session, mount, "ed25519").load("transit:k@1")
    shown = session.get(f"{mount}/keys/k")["data"]["keys"]["1"]["public_key"]
    assert base64.b64decode(shown) == key.public_key.public_bytes_raw()
    verify_signature(key.public_key, key.sign(MESSAGE), MESSAGE)


def test_trap_an_operators_rotate_does_not_change_what_signs(open_session, mount):
    """3b: without a pinned version, the newest signs."""
    session = open_session()
    key = keys_in(session, mount).create("x509", KeyAlgorithm.EC_P256)
    session.post(f"{mount}/keys/k/rotate", {})
    unpinned = session.post(f"{mount}/sign/k", {"input": "AAAA"})
    assert unpinned["data"]["signature"].startswith("vault:v3:")
    assert key.key_id == "transit:k@2"
    verify_signature(key.public_key, key.sign(MESSAGE), MESSAGE)


def test_a_signature_of_another_version_is_never_returned(proxied, fault_proxy, mount):
    key = keys_in(proxied, mount).create("x509", KeyAlgorithm.EC_P256)
    other = proxied.post(f"{mount}/sign/k", {"input": "AAAA", "key_version": 1})["data"]
    fault_proxy.inject(Fault(match="/sign/", rewrite=in_data(**other)))
    with pytest.raises(BackendMisconfigured, match="version 2 was asked for, 1 signed"):
        key.sign(MESSAGE)


def test_a_signature_that_does_not_verify_is_never_returned(proxied, fault_proxy, mount):
    key = keys_in(proxied, mount).load("transit:k@1")
    other = proxied.post(f"{mount}/sign/k", {"input": "AAAA", "prehashed": False})["data"]
    fault_proxy.inject(Fault(match="/sign/", rewrite=in_data(**other)))
    with pytest.raises(BackendMisconfigured, match="does not verify"):
        key.sign(MESSAGE)
    with pytest.raises(BackendMisconfigured, match="does not verify"):
        key.as_private_key().sign(MESSAGE, ec.ECDSA(hashes.SHA256()))


@pytest.mark.parametrize(
    "signature", ["", "vault:v1:", "vault:v1:?", "bao:v1:AAAA", "vault:v1:AAAA\n", "vault:v1:A"]
)
def test_an_answer_without_a_signature_is_not_taken_for_one(proxied, fault_proxy, mount, signature):
    key = keys_in(proxied, mount).load("transit:k@1")
    fault_proxy.inject(Fault(match="/sign/", rewrite=in_data(signature=signature)))
    with pytest.raises(BackendMisconfigured):
        key.sign(MESSAGE)


def test_a_batch_with_one_refused_item_fails_as_a_whole(proxied, fault_proxy, mount):
    key = keys_in(proxied, mount).load("transit:k@1")

    def second_refused(answer: dict[str, Any]) -> dict[str, Any]:
        answer["data"]["batch_results"][1] = {"error": "out of entropy"}
        return answer

    fault_proxy.inject(Fault(match="/sign/", rewrite=second_refused, times=1))
    with pytest.raises(BackendUnavailable, match="out of entropy"):
        key.sign_many([b"1", b"2", b"3"])
    assert len(key.sign_many([b"1", b"2", b"3"])) == 3


def test_a_short_batch_is_not_taken_for_a_whole_one(proxied, fault_proxy, mount):
    key = keys_in(proxied, mount).load("transit:k@1")

    def last_lost(answer: dict[str, Any]) -> dict[str, Any]:
        answer["data"]["batch_results"].pop()
        return answer

    fault_proxy.inject(Fault(match="/sign/", rewrite=last_lost))
    with pytest.raises(BackendMisconfigured, match="number of signatures"):
        key.sign_many([b"1", b"2"])


def test_a_batch_is_one_round_trip_and_sends_digests_only(proxied, fault_proxy, mount):
    key = keys_in(proxied, mount).load("transit:k@1")
    before = len(fault_proxy.seen)
    key.sign_many([b"secret message %d" % number for number in range(100)])
    (sent,) = fault_proxy.seen[before:]
    assert len(sent.json["batch_input"]) == 100
    assert all(len(base64.b64decode(each["input"])) == 32 for each in sent.json["batch_input"])
    assert sent.json["key_version"] == 1
    assert sent.json["prehashed"] is True
    assert sent.json["hash_algorithm"] == "sha2-256"


def test_trap_a_large_batch_is_refused_as_too_complex_and_so_is_split(proxied, fault_proxy, mount):
    """Not in the reference: OpenBao limits the strings of a JSON body."""
    key = keys_in(proxied, mount).load("transit:k@1")
    body = {"batch_input": [{"input": "AAAA"}] * 1000}
    with pytest.raises(VaultRefused, match="complexity"):
        proxied.post(f"{mount}/sign/k", body)
    before = len(fault_proxy.seen)
    messages = [b"%d" % number for number in range(1001)]
    signatures = key.sign_many(messages)
    assert len(fault_proxy.seen) - before == 5
    assert len(signatures) == 1001
    verify_signature(key.public_key, signatures[-1], messages[-1])


def test_trap_a_version_that_is_gone_is_answered_with_500(open_session, mount):
    """That 500 is about the call: no outage, no retry, and other keys go on signing."""
    session = open_session()
    keys = keys_in(session, mount)
    first = keys.load("transit:k@1")
    second = keys.create("x509", KeyAlgorithm.EC_P256)
    session.post(f"{mount}/keys/k/config", {"min_decryption_version": 2})
    with pytest.raises(KeyNotFound):
        first.sign(MESSAGE)
    second.sign(MESSAGE)
    with pytest.raises(KeyNotFound, match="has no version 1"):
        keys.load("transit:k@1")


def test_a_version_below_the_minimum_is_refused_and_not_replaced(open_session, mount):
    session = open_session()
    keys = keys_in(session, mount)
    first = keys.load("transit:k@1")
    keys.create("x509", KeyAlgorithm.EC_P256)
    session.post(f"{mount}/keys/k/config", {"min_encryption_version": 2})
    with pytest.raises(BackendMisconfigured, match="may not sign with version 1"):
        keys.load("transit:k@1")
    with pytest.raises(BackendMisconfigured):
        first.sign(MESSAGE)


def test_a_key_that_is_gone_is_not_found(open_session, mount):
    session = open_session()
    keys = keys_in(session, mount)
    key = keys.load("transit:k@1")
    session.post(f"{mount}/keys/k/config", {"deletion_allowed": True})
    session.request("DELETE", f"{mount}/keys/k")
    with pytest.raises(KeyNotFound):
        key.sign(MESSAGE)
    with pytest.raises(KeyNotFound):
        keys.load("transit:k@1")
    with pytest.raises(BackendMisconfigured, match="there is no Transit key"):
        keys.check()
    with pytest.raises(BackendMisconfigured, match="there is no Transit key"):
        keys.create("x509", KeyAlgorithm.EC_P256)


def without_version(version: str):
    def rewrite(answer: dict[str, Any]) -> dict[str, Any]:
        data = answer["data"]
        data["keys"].pop(version, None)
        data["latest_version"] = max(int(each) for each in data["keys"])
        return answer

    return rewrite


def test_trap_a_standby_may_not_have_heard_of_the_version_yet(proxied, fault_proxy, mount):
    """3e: reads of a standby are eventually consistent."""
    keys = keys_in(proxied, mount)
    made = keys.create("x509", KeyAlgorithm.EC_P256)
    fault_proxy.inject(Fault(match="/keys/k", rewrite=without_version("2"), times=2))
    assert keys.load(made.key_id).key_id == made.key_id


def test_trap_the_new_version_comes_from_the_rotation_not_from_a_read(proxied, fault_proxy, mount):
    keys = keys_in(proxied, mount)
    reads = [path for path in fault_proxy.paths() if path.endswith("/keys/k")]
    made = [keys.create("x509", KeyAlgorithm.EC_P256).key_id for _ in range(3)]
    assert made == ["transit:k@2", "transit:k@3", "transit:k@4"]
    after = [path for path in fault_proxy.paths() if path.endswith("/keys/k")]
    assert len(after) - len(reads) == 3  # one before each rotation, none after


def test_a_version_that_never_was_is_not_found_soon(open_session, mount):
    keys = keys_in(open_session(), mount)
    began = time.monotonic()
    with pytest.raises(KeyNotFound):
        keys.load("transit:k@99")
    assert time.monotonic() - began < 2


def test_the_remote_key_shows_no_private_half(open_session, mount):
    key = keys_in(open_session(), mount).load("transit:k@1").as_private_key()
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    with pytest.raises(TypeError):
        key.private_numbers()
    digest = hashes.Hash(hashes.SHA256())
    digest.update(MESSAGE)
    signature = key.sign(digest.finalize(), ec.ECDSA(Prehashed(hashes.SHA256())))
    key.public_key().verify(signature, MESSAGE, ec.ECDSA(hashes.SHA256()))


def test_a_transit_key_signs_a_crl_and_a_certificate(open_session, mount):
    key = keys_in(open_session(), mount).load("transit:k@1")
    assert isinstance(key, TransitKey)
    now = datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")])
    crl = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(name)
        .last_update(now)
        .next_update(now + timedelta(hours=1))
        .sign(key.as_private_key(), hashes.SHA256())
    )
    assert crl.is_signature_valid(key.public_key)


# --- PKI ------------------------------------------------------------------------------------------


@pytest.fixture
def upstream_at(open_session):
    def at(site: VaultSite, address: str | None = None) -> VaultPkiUpstream:
        return VaultPkiUpstream(
            open_session(auth=site.auth(), address=address),
            mount=site.layout.pki_mount,
            issuer_ref=site.layout.issuer,
        )

    return at


def certify(upstream: VaultPkiUpstream, ttl: timedelta = timedelta(hours=6)):
    now = datetime.now(UTC)
    return upstream.certify(local_key(), trust_domain=TRUST_DOMAIN, ttl=ttl, now=now)


def test_trap_a_longer_lifetime_is_cut_with_status_200(vault_site, openbao_admin, upstream_at):
    """3a: silently, to max_lease_ttl."""
    openbao_admin.sys.tune_mount_configuration(vault_site.layout.pki_mount, max_lease_ttl="2h")
    with pytest.raises(UpstreamRejected, match="cut the lifetime") as refused:
        certify(upstream_at(vault_site))
    assert "-max-lease-ttl=21600s" in refused.value.hint
    assert certify(upstream_at(vault_site), timedelta(hours=1))


def test_trap_an_intermediate_may_outlive_its_issuer(vault_site, openbao_admin, open_session):
    """3a: the server permits it for intermediates, whatever the issuer's setting."""
    mount = vault_site.layout.pki_mount
    openbao_admin.secrets.pki.generate_root(
        "internal",
        "short",
        extra_params={"issuer_name": "short", "ttl": "1h", "key_type": "ec"},
        mount_point=mount,
    )
    upstream = VaultPkiUpstream(open_session(), mount=mount, issuer_ref="short")
    with pytest.raises(UpstreamRejected, match="outlive"):
        certify(upstream)


def test_trap_without_use_csr_values_the_name_constraints_are_lost(
    vault_site, open_session, fault_proxy, upstream_at
):
    """3a: whoever drops the parameter on the way gets a CA for every trust domain; we refuse it."""
    layout = vault_site.layout
    root = open_session()
    upstream = upstream_at(vault_site, fault_proxy.address)

    def signed_without(answer: dict[str, Any]) -> dict[str, Any]:
        (sent,) = [each for each in fault_proxy.seen if "sign-intermediate" in each.path]
        assert sent.json["use_csr_values"] is True
        return dict(
            root.post(
                f"{layout.pki_mount}/issuer/{layout.issuer}/sign-intermediate",
                {"csr": sent.json["csr"], "ttl": "21600s", "max_path_length": "0"}
                | {"common_name": "ca"},
            )
        )

    fault_proxy.inject(Fault(match="sign-intermediate", rewrite=signed_without))
    with pytest.raises(UpstreamRejected, match=r"name constraints|key usage|SPIFFE"):
        certify(upstream)


def test_a_certificate_for_another_key_is_refused(vault_site, fault_proxy, upstream_at):
    upstream = upstream_at(vault_site, fault_proxy.address)
    other: list[dict[str, Any]] = []

    def the_first_one(answer: dict[str, Any]) -> dict[str, Any]:
        other.append(answer)
        return other[0]

    fault_proxy.inject(Fault(match="sign-intermediate", rewrite=the_first_one))
    certify(upstream)
    with pytest.raises(UpstreamRejected, match="another key"):
        certify(upstream)


def test_the_chain_is_sorted_by_what_it_holds(vault_site, fault_proxy, upstream_at):
    upstream = upstream_at(vault_site, fault_proxy.address)

    def reversed_chain(answer: dict[str, Any]) -> dict[str, Any]:
        answer["data"]["ca_chain"].reverse()
        return answer

    fault_proxy.inject(Fault(match="sign-intermediate", rewrite=reversed_chain))
    signed = certify(upstream)
    assert len(signed.chain) == len(signed.roots) == 1


def test_a_chain_without_a_root_is_refused(vault_site, fault_proxy, upstream_at):
    upstream = upstream_at(vault_site, fault_proxy.address)
    fault_proxy.inject(Fault(match="sign-intermediate", rewrite=in_data(ca_chain=[])))
    with pytest.raises(UpstreamRejected, match="does not lead to a root"):
        certify(upstream)


def test_an_unreadable_certificate_is_refused(vault_site, fault_proxy, upstream_at):
    upstream = upstream_at(vault_site, fault_proxy.address)
    fault_proxy.inject(Fault(match="sign-intermediate", rewrite=in_data(certificate="garbage")))
    with pytest.raises(UpstreamRejected, match="cannot be parsed"):
        certify(upstream)


def test_an_intermediate_as_issuer_gives_a_chain(vault_site, openbao_admin, open_session):
    """The root stays out of the chain, the middle is in it."""
    layout = vault_site.layout
    middle = openbao_admin.write_data(
        f"{layout.pki_mount}/issuers/generate/intermediate/internal",
        data={"common_name": "middle", "key_type": "ec"},
    )["data"]["csr"]
    signed = openbao_admin.write_data(
        f"{layout.pki_mount}/issuer/{layout.issuer}/sign-intermediate",
        data={"csr": middle, "common_name": "middle", "ttl": "100h"},
    )["data"]["certificate"]
    made = openbao_admin.write_data(
        f"{layout.pki_mount}/issuers/import/cert", data={"pem_bundle": signed}
    )["data"]["imported_issuers"]
    openbao_admin.write_data(f"{layout.pki_mount}/issuer/{made[0]}", data={"issuer_name": "middle"})
    upstream = VaultPkiUpstream(open_session(), mount=layout.pki_mount, issuer_ref="middle")
    found = certify(upstream)
    assert [each.subject.rfc4514_string() for each in found.chain][1:] == ["CN=middle"]
    (root,) = found.roots
    assert root == x509.load_pem_x509_certificate(vault_site.provisioned.root_certificate.encode())
    denied = VaultPkiUpstream(
        open_session(auth=vault_site.auth()), mount=layout.pki_mount, issuer_ref="middle"
    )
    with pytest.raises(VaultRefused):  # the broker's policy names idb-root only
        certify(denied)


def test_the_default_issuer_is_not_accepted(open_session):
    with pytest.raises(BackendMisconfigured, match="default"):
        VaultPkiUpstream(open_session(), issuer_ref="default")


@pytest.mark.parametrize("where", ["mount", "issuer"])
def test_check_names_a_missing_mount_or_issuer(open_session, vault_site, where):
    names = {"mount": vault_site.layout.pki_mount, "issuer_ref": "idb-root"}
    names |= {"mount": "nowhere"} if where == "mount" else {"issuer_ref": "nobody"}
    with pytest.raises(BackendMisconfigured, match="has no issuer"):
        VaultPkiUpstream(open_session(), **names).check()


# --- the protocol ---------------------------------------------------------------------------------


def test_trap_a_call_without_content_is_an_empty_dict(open_session, mount):
    """3g: hvac answers 204 with a Response and 200 with a dict."""
    assert open_session().post(f"sys/mounts/{mount}/tune", {"max_lease_ttl": "1h"}) == {}


def test_trap_bodies_are_copied(open_session, openbao_admin, vault_site):
    """3a: hvac writes into the caller's dict; the session and provisioning pass copies."""
    theirs: dict[str, Any] = {}
    openbao_admin.secrets.pki.generate_root(
        "internal", "x", extra_params=theirs, mount_point=vault_site.layout.pki_mount
    )
    assert theirs == {"common_name": "x"}
    ours = {"input": "AAAA"}
    open_session().post(f"{vault_site.layout.transit_mount}/hash", ours)
    assert ours == {"input": "AAAA"}


@pytest.mark.parametrize(
    ("status", "error"), [(400, "bad"), (403, "permission denied"), (404, ""), (405, "unsupported")]
)
def test_trap_refusals_are_not_repeated(proxied, fault_proxy, status, error):
    """3e, and 3g: hvac's exceptions have no 405."""
    proxied.get("sys/mounts")
    fault_proxy.inject(Fault(match="some/path", status=status, errors=(error,)))
    with pytest.raises(VaultRefused) as refused:
        proxied.get("some/path")
    assert refused.value.status == status
    assert refused.value.retry_after is None
    assert fault_proxy.paths().count("some/path") == 1


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (412, ""),
        (502, ""),
        (503, "no active Vault instance found"),
        (503, "node is not active"),
        (504, ""),
        (500, "local node not active but active cluster node not found"),
    ],
)
def test_trap_what_is_gone_a_moment_later_is_repeated(proxied, fault_proxy, status, error):
    """3e: hvac repeats nothing."""
    fault_proxy.inject(Fault(match="sys/mounts", status=status, errors=(error,), times=2))
    assert proxied.get("sys/mounts")["data"]
    assert fault_proxy.paths().count("sys/mounts") == 3


def test_trap_a_broken_connection_is_repeated(proxied, fault_proxy):
    fault_proxy.inject(Fault(match="sys/mounts", reset=True, times=1))
    fault_proxy.inject(Fault(match="sys/mounts", truncate=True, times=1))
    assert proxied.get("sys/mounts")["data"]
    assert fault_proxy.paths().count("sys/mounts") == 3


def test_what_must_not_happen_twice_is_not_repeated(proxied, fault_proxy, mount):
    proxied.get("sys/mounts")
    fault_proxy.inject(Fault(match="/keys/", reset_after=True))
    with pytest.raises(VaultUnavailable):
        proxied.post(f"{mount}/keys/once", {"type": "ed25519"}, repeat=False)
    assert fault_proxy.paths().count(f"{mount}/keys/once") == 1


def test_trap_429_on_health_is_a_standby(proxied, fault_proxy):
    """3e: the same code as a rate limit."""
    fault_proxy.inject(
        Fault(
            match="sys/health",
            status=429,
            body=b'{"initialized":true,"sealed":false,"standby":true,"version":"2.7.2",'
            b'"server_time_utc":1}',
        )
    )
    health = proxied.health(datetime.now(UTC))
    assert health.standby
    assert not health.sealed
    proxied.get("sys/mounts")  # no rate limit was remembered


def test_trap_429_on_a_call_is_a_rate_limit(proxied, fault_proxy):
    proxied.get("sys/mounts")
    fault_proxy.inject(Fault(match="sys/mounts", status=429, headers={"Retry-After": "7"}))
    before = len(fault_proxy.seen)
    for _ in range(5):
        with pytest.raises(VaultUnavailable, match="limits the rate") as limited:
            proxied.get("sys/mounts")
        assert limited.value.retry_after == pytest.approx(7, abs=0.5)
    assert len(fault_proxy.seen) == before + 1  # backing off means not asking


def test_a_short_rate_limit_is_waited_for(proxied, fault_proxy):
    proxied.get("sys/mounts")
    fault_proxy.inject(Fault(match="sys/mounts", status=429, headers={"Retry-After": "1"}, times=1))
    began = time.monotonic()
    assert proxied.get("sys/mounts")["data"]
    assert 0.9 < time.monotonic() - began < 2


def test_trap_health_is_asked_with_get_and_without_the_token(proxied, fault_proxy, openbao):
    """3e: hvac's HEAD has no body; and health needs no token, so none is risked."""
    now = datetime.now(UTC)
    health = proxied.health(now)
    (asked,) = fault_proxy.seen
    assert asked.method == "GET"
    assert not [name for name in asked.headers if name.lower() == "x-vault-token"]
    assert health.initialized
    assert not health.sealed
    assert not health.standby
    assert re.fullmatch(r"[0-9.]+", health.version)
    assert health.clock_skew is not None
    assert abs(health.clock_skew) < timedelta(seconds=2)
    late = proxied.health(now + timedelta(hours=1))
    assert late.clock_skew is not None
    assert late.clock_skew < timedelta(minutes=-59)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_trap_a_redirect_does_not_carry_the_token_to_a_stranger(
    proxied, fault_proxy, openbao, status
):
    """3g: requests, and so hvac, would send X-Vault-Token along."""
    stranger = FaultProxy(openbao.address)
    try:
        proxied.get("sys/mounts")
        to = f"{stranger.address}/v1/sys/mounts"
        fault_proxy.inject(Fault(match="sys/mounts", status=status, headers={"Location": to}))
        with pytest.raises(VaultRefused, match="not configured") as refused:
            proxied.get("sys/mounts")
        assert stranger.address.removeprefix("http://") in refused.value.hint
        assert stranger.seen == []
    finally:
        stranger.stop()


def test_a_redirect_to_a_configured_node_is_followed(open_session, fault_proxy, openbao):
    """3e: 307 to the leader when a standby cannot forward."""
    leader = FaultProxy(openbao.address)
    try:
        session = open_session(
            address=fault_proxy.address,
            redirect_hosts=frozenset({leader.address.removeprefix("http://")}),
        )
        to = f"{leader.address}/v1/auth/token/lookup"
        session.get("sys/mounts")
        fault_proxy.inject(Fault(match="token/lookup", status=307, headers={"Location": to}))
        with pytest.raises(VaultRefused):
            session.post("auth/token/lookup", {"token": "unknown"})
        (asked,) = [each for each in leader.seen if each.path == "/v1/auth/token/lookup"]
        assert asked.method == "POST"
        assert asked.json == {"token": "unknown"}
        assert asked.headers["X-Vault-Token"] == openbao.root_token
    finally:
        leader.stop()


def test_a_redirect_to_another_path_or_in_a_circle_is_refused(proxied, fault_proxy):
    proxied.get("sys/mounts")
    fault_proxy.inject(
        Fault(match="one", status=307, headers={"Location": "/v1/sys/raw/core"}, times=1)
    )
    with pytest.raises(VaultRefused, match="another path"):
        proxied.get("one")
    fault_proxy.inject(
        Fault(match="two", status=307, headers={"Location": f"{fault_proxy.address}/v1/two"})
    )
    with pytest.raises(VaultRefused, match="circle"):
        proxied.get("two")


def test_trap_the_environment_is_not_read(
    open_session, fault_proxy, openbao, monkeypatch, tmp_path
):
    """3g: hvac reads VAULT_*, requests reads proxies and .netrc."""
    stranger = FaultProxy(openbao.address)
    try:
        for name in ("VAULT_ADDR", "BAO_ADDR", "HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, stranger.address)
        monkeypatch.setenv("VAULT_TOKEN", "s.somebody-elses")
        monkeypatch.setenv("VAULT_NAMESPACE", "somewhere")
        netrc = tmp_path / "netrc"
        netrc.write_text("machine 127.0.0.1 login somebody password else\n")
        monkeypatch.setenv("NETRC", str(netrc))
        open_session(address=fault_proxy.address).get("sys/mounts")
        assert stranger.seen == []
        for each in fault_proxy.seen:
            names = {name.lower() for name in each.headers}
            assert not names & {"authorization", "x-vault-namespace"}
            assert each.headers["X-Vault-Token"] != "s.somebody-elses"
    finally:
        stranger.stop()


def test_a_namespace_is_sent(open_session, fault_proxy, openbao_admin):
    openbao_admin.write_data("sys/namespaces/team-a", data={})
    session = open_session(address=fault_proxy.address, namespace="team-a")
    with pytest.raises(BackendMisconfigured):  # the root token is not of that namespace's
        session.get("transit/keys/none")
    assert {each.headers["X-Vault-Namespace"] for each in fault_proxy.seen} == {"team-a"}


@pytest.mark.parametrize(
    "path",
    ["", "/", "a//b", "/a", "a/", "a/./b", "a/../b", "..", "a/%2e%2e/b", "a b", "a?b", "a#b", "ä"],
)
def test_trap_a_path_that_would_be_rewritten_is_refused(proxied, fault_proxy, path):
    """3g: requests resolves dots, OpenBao redirects //, and a trailing slash is another path."""
    with pytest.raises(BackendMisconfigured, match="segment"):
        proxied.get(path)
    assert path not in fault_proxy.paths()


def test_an_answer_that_is_no_json_object_is_empty(proxied, fault_proxy):
    proxied.get("sys/mounts")
    for body in (b"", b"<html>", b"[1]", b"null", b"\xff"):
        fault_proxy.inject(Fault(match="odd", status=200, body=body, times=1))
        assert proxied.get("odd") == {}


def test_an_answer_that_is_too_large_is_not_read_to_its_end(proxied, fault_proxy):
    proxied.get("sys/mounts")
    fault_proxy.inject(Fault(match="odd", status=200, body=b"x" * (9 * 1024 * 1024)))
    with pytest.raises(VaultRefused, match="too large"):
        proxied.get("odd")
