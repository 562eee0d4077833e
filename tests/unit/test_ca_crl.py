"""Revocation lists: what may stand in one, and who may sign it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import pytest
from cryptography import x509

from identity_ca.crl import RevokedEntry, build_crl, encode_entry, encode_removal, sign_crl
from identity_ca.distribution import DistributionPoints, Shard, shard_of
from identity_ca.errors import ProfileViolation, UpstreamRejected
from identity_ca.keys import KeyAlgorithm, LocalSigningKey
from support.ca import HOUR, ca_extensions, forge, hierarchy, key_usage, replaced
from support.ca_material import NOW, signing_key

ISSUER = hierarchy().issuer


def crl(*entries: RevokedEntry, number: int = 1, life: timedelta = HOUR) -> bytes:
    return build_crl(
        issuer=ISSUER, entries=entries, number=number, this_update=NOW, next_update=NOW + life
    )


def test_what_is_in_a_list() -> None:
    serial = int(hierarchy().issue().serial, 16)
    parsed = x509.load_der_x509_crl(
        crl(RevokedEntry(serial, NOW, 1), RevokedEntry(7, NOW - HOUR), number=41)
    )
    assert parsed.issuer == ISSUER.certificate.subject
    assert parsed.last_update_utc == NOW.replace(microsecond=0)
    assert parsed.next_update_utc == NOW.replace(microsecond=0) + HOUR
    assert parsed.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number == 41
    own = ISSUER.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    authority = parsed.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    assert authority.key_identifier == own.digest
    assert [each.serial_number for each in parsed] == [serial, 7]
    first = parsed.get_revoked_certificate_by_serial_number(serial)
    assert first is not None
    reason = first.extensions.get_extension_for_class(x509.CRLReason).value.reason
    assert reason is x509.ReasonFlags.key_compromise
    second = parsed.get_revoked_certificate_by_serial_number(7)
    assert second is not None
    assert second.revocation_date_utc == NOW.replace(microsecond=0) - HOUR
    assert len(second.extensions) == 0


@pytest.mark.parametrize(
    "algorithm", [KeyAlgorithm.EC_P256, KeyAlgorithm.EC_P384, KeyAlgorithm.RSA_2048]
)
def test_the_signature_verifies(algorithm: KeyAlgorithm) -> None:
    issuer = hierarchy(algorithm=algorithm).issuer
    der = build_crl(issuer=issuer, entries=[], number=0, this_update=NOW, next_update=NOW + HOUR)
    parsed = x509.load_der_x509_crl(der)
    public_key = issuer.certificate.public_key()
    assert parsed.is_signature_valid(public_key)  # type: ignore[arg-type]
    assert len(parsed) == 0


def test_entries_are_appended_not_rebuilt() -> None:
    kept = [encode_entry(RevokedEntry(serial, NOW)) for serial in range(1, 1001)]
    der = sign_crl(
        issuer=ISSUER,
        encoded_entries=kept,
        number=2,
        this_update=NOW,
        next_update=NOW + HOUR,
    )
    assert [each.serial_number for each in x509.load_der_x509_crl(der)] == list(range(1, 1001))


def test_a_typical_entry_is_short() -> None:
    assert len(encode_entry(RevokedEntry(int("32" + "ab" * 19, 16), NOW))) == 39


@pytest.mark.parametrize("serial", [0, -1, 1 << 159])
def test_impossible_serials(serial: int) -> None:
    with pytest.raises(ProfileViolation, match="serial"):
        encode_entry(RevokedEntry(serial, NOW))


@pytest.mark.parametrize("reason", [-1, 7, 8, 11])
def test_impossible_reasons(reason: int) -> None:
    with pytest.raises(ProfileViolation, match="reason"):
        encode_entry(RevokedEntry(1, NOW, reason))


def test_unspecified_is_left_out() -> None:
    assert encode_entry(RevokedEntry(1, NOW, 0)) == encode_entry(RevokedEntry(1, NOW))


def test_impossible_lists() -> None:
    with pytest.raises(ProfileViolation, match="number"):
        crl(number=-1)
    with pytest.raises(ProfileViolation, match="number"):
        crl(number=1 << 159)
    with pytest.raises(ProfileViolation, match="next update"):
        crl(life=timedelta(0))


@dataclass(frozen=True)
class Signer:
    certificate: x509.Certificate
    key: LocalSigningKey


def test_only_a_ca_that_may_signs_lists() -> None:
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    key = signing_key(nth=5)
    for extensions, its_key, error in (
        (replaced(ca_extensions(), usage, critical=True), key, ProfileViolation),
        (replaced(ca_extensions(), key_usage(), critical=True), key, UpstreamRejected),
        (ca_extensions(), signing_key(nth=6), UpstreamRejected),
    ):
        own = forge(subject="ca", key=key, issuer=None, issuer_key=key, extensions=extensions)
        with pytest.raises(error):
            build_crl(
                issuer=Signer(own, its_key),
                entries=[],
                number=1,
                this_update=NOW,
                next_update=NOW + HOUR,
            )


def extension(der: bytes, kind: type[x509.ExtensionType]) -> x509.Extension[x509.ExtensionType]:
    return x509.load_der_x509_crl(der).extensions.get_extension_for_class(kind)


def test_a_part_of_the_certificates() -> None:
    url = "http://crl.example.org/crl/a1/7-of-64.crl"
    found = extension(signed(scope_url=url), x509.IssuingDistributionPoint)
    assert found.critical
    assert isinstance(found.value, x509.IssuingDistributionPoint)
    assert found.value.full_name == [x509.UniformResourceIdentifier(url)]
    assert found.value.only_contains_user_certs


def test_a_full_list_says_where_its_delta_is_and_the_delta_what_it_builds_on() -> None:
    url = "http://crl.example.org/crl/a1/delta.crl"
    freshest = extension(signed(delta_url=url), x509.FreshestCRL)
    assert not freshest.critical
    assert isinstance(freshest.value, x509.FreshestCRL)
    [point] = freshest.value
    assert point.full_name == [x509.UniformResourceIdentifier(url)]
    delta = signed(
        base_number=40,
        entries=[encode_entry(RevokedEntry(7, NOW, 6)), encode_removal(8, NOW)],
    )
    indicator = extension(delta, x509.DeltaCRLIndicator)
    assert indicator.critical
    assert indicator.value == x509.DeltaCRLIndicator(40)
    reasons = [
        entry.extensions.get_extension_for_class(x509.CRLReason).value.reason
        for entry in x509.load_der_x509_crl(delta)
    ]
    assert reasons == [x509.ReasonFlags.certificate_hold, x509.ReasonFlags.remove_from_crl]


def signed(
    *,
    entries: Sequence[bytes] = (),
    scope_url: str = "",
    base_number: int | None = None,
    delta_url: str = "",
) -> bytes:
    return sign_crl(
        issuer=ISSUER,
        encoded_entries=entries,
        number=41,
        this_update=NOW,
        next_update=NOW + HOUR,
        scope_url=scope_url,
        base_number=base_number,
        delta_url=delta_url,
    )


def test_impossible_deltas() -> None:
    for base in (-1, 42):
        with pytest.raises(ProfileViolation, match="base"):
            signed(base_number=base)
    with pytest.raises(ProfileViolation, match="delta"):
        signed(base_number=1, delta_url="http://crl.example.org/d")
    with pytest.raises(ProfileViolation, match="serial"):
        encode_removal(0, NOW)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 6, 1_640, 430_000])
def test_lists_of_every_length_of_length(size: int) -> None:
    """The entries' length takes one to four octets."""
    kept = [encode_entry(RevokedEntry(serial, NOW)) for serial in range(1, size + 1)]
    assert len(x509.load_der_x509_crl(signed(entries=kept))) == size


def test_the_part_is_a_public_rule_and_its_name_says_of_how_many() -> None:
    points = DistributionPoints("http://idb.example.org:8082", 64)
    serial = int(hierarchy().issue().serial, 16)
    shard = Shard(shard_of(serial, points.shards), points.shards)
    assert shard.number == serial % 64
    url = points.shard_url("a1", shard)
    assert url == f"http://idb.example.org:8082/crl/a1/{serial % 64}-of-64.crl"
    assert points.shard_urls("a1")[shard.number] == url
    assert Shard.parse(str(shard)) == shard


@pytest.mark.parametrize(
    "name",
    ["", "5", "64-of-64", "-1-of-64", "05-of-64", "5-of-064", "5-of-1025", "0-of-0", "5-OF-64"],
)
def test_what_names_no_part(name: str) -> None:
    with pytest.raises(ProfileViolation, match="no such part"):
        Shard.parse(name)


@pytest.mark.parametrize(
    ("base", "shards"),
    [("", 64), ("http://bücher.example", 64), (f"http://{'a' * 600}", 64), ("http://a", 0)],
)
def test_what_cannot_stand_in_a_certificate(base: str, shards: int) -> None:
    with pytest.raises(ProfileViolation):
        DistributionPoints(base, shards)
