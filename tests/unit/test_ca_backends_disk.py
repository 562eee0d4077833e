"""The upstream CA in files: what is believed, what is refused, and how changes are noticed."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from identity_ca.backends.disk import DiskUpstream
from identity_ca.errors import (
    BackendMisconfigured,
    KeyTooWeak,
    ProfileViolation,
    UpstreamRejected,
)
from identity_ca.keys import KeyAlgorithm
from identity_ca.upstream import SignedAuthority, verify_upstream_list
from support.ca import ca_extensions, forge, key_usage, replaced
from support.ca_material import (
    DAY,
    NOW,
    TRUST_DOMAIN,
    foreign_ca,
    key_pem,
    pem,
    root_certificate,
    signing_key,
    write_private,
)

OURS = signing_key(nth=9)
ROOT_KEY, SUB_KEY = signing_key(nth=5), signing_key(nth=6)


class Files:
    """The three files, written as a test likes."""

    def __init__(self, directory: Path) -> None:
        self.cert = directory / "ca.pem"
        self.key = directory / "ca.key"
        self.bundle = directory / "roots.pem"

    def write(self, *certificates: x509.Certificate, key=ROOT_KEY) -> Files:
        self.cert.write_bytes(pem(*certificates))
        write_private(self.key, key_pem(key))
        return self

    def upstream(self, *, bundle: bool = False) -> DiskUpstream:
        return DiskUpstream(self.cert, self.key, self.bundle if bundle else None)


@pytest.fixture
def files(tmp_path) -> Files:
    return Files(tmp_path)


def certify(upstream: DiskUpstream, **changes: Any) -> SignedAuthority:
    arguments: dict[str, Any] = {"trust_domain": TRUST_DOMAIN, "ttl": timedelta(days=7), "now": NOW}
    return upstream.certify(changes.pop("key", OURS), **(arguments | changes))


def refused(upstream: DiskUpstream, match: str, **changes: Any) -> BackendMisconfigured:
    with pytest.raises(BackendMisconfigured, match=match) as refusal:
        certify(upstream, **changes)
    assert refusal.value.detail
    return refusal.value


def a_root(**changes: Any) -> x509.Certificate:
    return foreign_ca("Acme Root", ROOT_KEY, **changes)


def a_sub_ca(root: x509.Certificate, **changes: Any) -> x509.Certificate:
    return foreign_ca("Acme Sub", SUB_KEY, below=(root, ROOT_KEY), **changes)


def test_a_root_in_a_file_signs_below_itself(files):
    root = a_root()
    signed = certify(files.write(root).upstream())
    assert signed.roots == (root,)
    assert len(signed.chain) == 1
    signed.chain[0].verify_directly_issued_by(root)


def test_the_root_may_stand_at_the_end_of_the_certificate_file(files):
    root = a_root()
    sub = a_sub_ca(root)
    signed = certify(files.write(sub, root, key=SUB_KEY).upstream())
    assert signed.roots == (root,)
    assert signed.chain[1:] == (sub,)


def test_the_bundle_file_says_what_the_roots_are(files):
    root, another = a_root(), root_certificate()
    files.bundle.write_bytes(pem(another, root))
    signed = certify(files.write(a_sub_ca(root), key=SUB_KEY).upstream(bundle=True))
    assert signed.roots == (another, root)


def test_an_expired_root_beside_the_used_one_is_no_reason_to_refuse(files):
    root = a_root()
    expired = foreign_ca("Old Root", signing_key(nth=7), not_after=NOW - timedelta(hours=1))
    files.bundle.write_bytes(pem(expired, root))
    assert certify(files.write(a_sub_ca(root), key=SUB_KEY).upstream(bundle=True)).chain


def test_an_rsa_ca_signs_an_ec_authority(files):
    key = signing_key(KeyAlgorithm.RSA_2048)
    root = foreign_ca("RSA Root", key)
    assert certify(files.write(root, key=key).upstream()).roots == (root,)


# --- refused ----------------------------------------------------------------------------------


def test_a_key_of_another_ca_is_refused(files):
    upstream = files.write(a_root(), key=SUB_KEY).upstream()
    refused(upstream, "does not belong to its certificate")
    with pytest.raises(BackendMisconfigured, match="does not belong"):
        upstream.check()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"ca": False}, "cA is false"),
        ({"key_cert_sign": False}, "keyCertSign"),
        ({"path_length": 0}, "path length"),
    ],
    ids=["no-ca", "no-key-cert-sign", "path-length-0"],
)
def test_a_certificate_that_may_not_certify_a_ca_is_refused(files, changes, why):
    refusal = refused(files.write(a_root(**changes)).upstream(), "not one of a CA")
    assert why in refusal.detail


@pytest.mark.parametrize(
    "moment", [NOW + 365 * DAY, NOW + 400 * DAY, NOW - DAY - timedelta(seconds=1)]
)
def test_a_ca_outside_its_validity_is_refused(files, moment):
    upstream = files.write(a_root()).upstream()
    refused(upstream, "expired or is not valid yet", now=moment)
    upstream.check()


def test_an_expired_root_above_a_valid_ca_is_refused(files):
    root = a_root(not_after=NOW - timedelta(hours=1))
    files.bundle.write_bytes(pem(root))
    upstream = files.write(a_sub_ca(root), key=SUB_KEY).upstream(bundle=True)
    assert "Acme Root" in refused(upstream, "expired").detail


def test_a_lifetime_beyond_the_cas_end_is_refused_and_not_cut(files):
    upstream = files.write(a_root(not_after=NOW + 10 * DAY)).upstream()
    assert certify(upstream, ttl=9 * DAY).chain[0].not_valid_after_utc == (
        NOW.replace(microsecond=0) + 9 * DAY
    )
    assert refused(upstream, "ends before", ttl=11 * DAY).hint


def test_limits_of_the_profile_are_kept(files):
    upstream = files.write(a_root()).upstream()
    with pytest.raises(ProfileViolation):
        certify(upstream, ttl=timedelta(0))
    with pytest.raises(KeyTooWeak):
        certify(upstream, key=signing_key(KeyAlgorithm.ED25519))


def test_a_sub_ca_without_its_root_is_refused(files):
    refusal = refused(files.write(a_sub_ca(a_root()), key=SUB_KEY).upstream(), "root is missing")
    assert "bundle file" in refusal.hint


def test_a_bundle_of_other_roots_is_refused(files):
    files.bundle.write_bytes(pem(root_certificate()))
    upstream = files.write(a_sub_ca(a_root()), key=SUB_KEY).upstream(bundle=True)
    refused(upstream, "does not end at one of its roots")


def test_a_namesake_of_the_root_is_refused(files):
    root = a_root()
    files.bundle.write_bytes(pem(foreign_ca("Acme Root", signing_key(nth=8))))
    refused(files.write(a_sub_ca(root), key=SUB_KEY).upstream(bundle=True), "does not end")


def test_a_bundle_that_holds_an_intermediate_is_refused(files):
    root = a_root()
    files.bundle.write_bytes(pem(root, a_sub_ca(root)))
    upstream = files.write(a_sub_ca(root), key=SUB_KEY).upstream(bundle=True)
    refused(upstream, "root is missing")


def test_a_file_out_of_order_is_refused(files):
    root = a_root()
    sub = a_sub_ca(root)
    leaf_ca = foreign_ca("Acme SPIFFE", signing_key(nth=7), below=(sub, SUB_KEY))
    files.bundle.write_bytes(pem(root))
    in_order = files.write(leaf_ca, sub, key=signing_key(nth=7))
    assert len(certify(in_order.upstream(bundle=True)).chain) == 3
    stranger = foreign_ca("Stranger", signing_key(nth=8), below=(root, ROOT_KEY))
    mixed = files.write(leaf_ca, stranger, key=signing_key(nth=7))
    refused(mixed.upstream(bundle=True), "not a chain")


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("which", ["cert", "key", "bundle"])
@pytest.mark.parametrize("damage", [remove, empty, garbage, directory])
def test_a_missing_or_damaged_file_is_refused(files, which, damage):
    root = a_root()
    files.write(root).bundle.write_bytes(pem(root))
    damage(getattr(files, which))
    upstream = files.upstream(bundle=True)
    with pytest.raises(BackendMisconfigured) as refusal:
        upstream.check()
    assert str(getattr(files, which)) in refusal.value.detail


def encrypted() -> bytes:
    return ROOT_KEY.as_private_key().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"hunter2"),
    )


def test_an_encrypted_key_is_refused(files):
    files.write(a_root()).key.write_bytes(encrypted())
    assert "not encrypted" in refused(files.upstream(), "no usable private key").hint


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o660, 0o644])
def test_a_key_others_can_reach_is_refused(files, bits):
    files.write(a_root()).key.chmod(bits)
    assert "chmod" in refused(files.upstream(), "other users").hint


def test_a_certificate_file_may_be_readable_by_all(files):
    files.write(a_root()).cert.chmod(0o644)
    assert certify(files.upstream()).chain


# --- mounted secrets and renewal --------------------------------------------------------------


def test_a_key_behind_a_symbolic_link_is_read_as_secrets_are_mounted(files, tmp_path):
    files.write(a_root())
    files.key.rename(tmp_path / "version-1.key")
    files.key.symlink_to(tmp_path / "version-1.key")
    assert certify(files.upstream()).chain


def replace_with(write: Callable[[Path], object], path: Path) -> None:
    """As a renewal does it: a new file takes the name."""
    beside = path.with_suffix(".new")
    write(beside)
    beside.replace(path)


def test_renewed_files_are_read_again(files):
    upstream = files.write(a_root()).upstream()
    first = certify(upstream).roots
    renewed = foreign_ca("Acme Root 2", SUB_KEY)
    replace_with(lambda p: p.write_bytes(pem(renewed)), files.cert)
    refused(upstream, "does not belong to its certificate")
    replace_with(lambda p: write_private(p, key_pem(SUB_KEY)), files.key)
    assert certify(upstream).roots == (renewed,) != first


def test_files_that_did_not_change_are_not_read_again(files, monkeypatch):
    upstream = files.write(a_root()).upstream()
    certify(upstream)
    monkeypatch.setattr(DiskUpstream, "_read", lambda self: pytest.fail("read again"))
    assert certify(upstream).chain


def test_a_key_that_became_readable_by_others_is_noticed(files):
    upstream = files.write(a_root()).upstream()
    certify(upstream)
    files.key.chmod(0o644)
    refused(upstream, "other users")


def test_a_closed_upstream_reads_again(files):
    upstream = files.write(a_root()).upstream()
    upstream.close()
    assert certify(upstream).chain


@pytest.mark.skipif(os.geteuid() != 0, reason="the file has to be root's")
@pytest.mark.parametrize(
    ("bits", "accepted"),
    [(0o400, True), (0o440, True), (0o640, True), (0o644, False), (0o660, False)],
)
def test_roots_own_file_may_be_readable_by_the_brokers_group(files, monkeypatch, bits, accepted):
    """How Kubernetes mounts a secret with an fsGroup: root's, 0440, and the broker is not root."""
    files.write(a_root()).key.chmod(bits)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    if accepted:
        assert certify(files.upstream()).chain
    else:
        refused(files.upstream(), "other users")


# --- revocation lists -----------------------------------------------------------------------------


def lists_of(upstream: DiskUpstream) -> tuple[bytes, ...]:
    return upstream.revocation_lists(
        number=41, this_update=NOW, next_update=NOW + timedelta(hours=1)
    )


def test_an_empty_list_of_the_ca_whose_key_is_here(files):
    root = a_root()
    sub = a_sub_ca(root)
    [der] = lists_of(files.write(sub, root, key=SUB_KEY).upstream())
    found = verify_upstream_list(der, [root, sub])
    assert (found.number, found.entries) == (41, 0)
    assert found.next_update == (NOW + timedelta(hours=1)).replace(microsecond=0)
    own = sub.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    assert found.authority_id == own.hex()
    with pytest.raises(UpstreamRejected, match="no authority above ours"):
        verify_upstream_list(der, [root])


def test_a_list_of_another_s_signature_is_nobody_s(files):
    """The same name, and another key: an organization that made its CA anew."""
    [der] = lists_of(files.write(a_root()).upstream())
    namesake = foreign_ca("Acme Root", SUB_KEY)
    with pytest.raises(UpstreamRejected, match="no authority above ours"):
        verify_upstream_list(der, [namesake])


def test_a_ca_that_may_not_sign_lists_has_none(files):
    usage = key_usage(sign=True)
    certificates_only = x509.KeyUsage(
        **{
            name: getattr(usage, name)
            for name in (
                *("digital_signature", "content_commitment", "key_encipherment"),
                *("data_encipherment", "key_agreement", "key_cert_sign"),
            )
        },
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    root = forge(
        subject="Acme Root",
        key=ROOT_KEY,
        issuer=None,
        issuer_key=ROOT_KEY,
        extensions=replaced(
            ca_extensions(path_length=1, trust_domain=None), certificates_only, critical=True
        ),
        not_after=NOW + timedelta(days=90),
    )
    assert lists_of(files.write(root).upstream()) == ()


def test_lists_of_files_that_cannot_be_used(files):
    with pytest.raises(BackendMisconfigured):
        lists_of(files.upstream())
