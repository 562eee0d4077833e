"""OCSP: which requests are read, what stands in an answer, and which answers are believed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp
from cryptography.x509.oid import ExtendedKeyUsageOID

from identity_ca.der import element, encode_integer, encode_oid
from identity_ca.errors import AnswerRejected, LintFailed, ProfileViolation, UpstreamRejected
from identity_ca.keys import KeyAlgorithm, LocalSigningKey, generate_private_key
from identity_ca.ocsp import (
    MAX_REQUEST_OCTETS,
    MAX_REQUESTS,
    CertStatus,
    OcspRequest,
    OcspSigner,
    ResponseStatus,
    SingleAnswer,
    issuer_hashes,
    parse_request,
    refusal,
)
from identity_ca.ocsp_check import build_request, check_answer
from identity_ca.ocsp_responder import prepare_responder, sign_responder
from support.ca import HOUR, ca_extensions, forge, hierarchy, replaced
from support.ca_material import NOW, TRUST_DOMAIN, signing_key

BELOW = hierarchy()
LEAF = x509.load_der_x509_certificate(BELOW.issue().chain[0])
ISSUER = BELOW.intermediate
MALFORMED = ResponseStatus.MALFORMED_REQUEST
BASIC = "1.3.6.1.5.5.7.48.1.4"
NONCE = "1.3.6.1.5.5.7.48.1.2"
NULL = b"\x05\x00"
SHA1 = encode_oid("1.3.14.3.2.26")
SHA256 = encode_oid("2.16.840.1.101.3.4.2.1")


def sequence(*parts: bytes) -> bytes:
    return element(0x30, b"".join(parts))


def octets(content: bytes) -> bytes:
    return element(0x04, content)


def extension(oid: str, value: bytes, critical: bytes = b"") -> bytes:
    return sequence(encode_oid(oid), critical, octets(value))


def cert_id(
    serial: bytes = b"\x07", *, algorithm: bytes = SHA1 + NULL, name: bytes = b"n" * 20
) -> bytes:
    return sequence(element(0x30, algorithm), octets(name), octets(b"k" * 20), element(2, serial))


def one(*parts: bytes) -> bytes:
    return sequence(*(parts or (cert_id(),)))


def request(
    *requests: bytes, before: bytes = b"", after: bytes = b"", signature: bytes = b""
) -> bytes:
    return sequence(sequence(before, sequence(*(requests or (one(),))), after), signature)


def nonce_extension(value: bytes) -> bytes:
    return element(0xA2, sequence(extension(NONCE, value)))


# --- requests -------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [hashes.SHA1(), hashes.SHA256()])
@pytest.mark.parametrize("nonce", [None, b"n", b"n" * 32, b"n" * 128])
def test_a_request_of_cryptography_is_read(
    algorithm: hashes.HashAlgorithm, nonce: bytes | None
) -> None:
    builder = ocsp.OCSPRequestBuilder().add_certificate(
        LEAF,
        ISSUER,
        algorithm,
    )
    if nonce is not None:
        builder = builder.add_extension(x509.OCSPNonce(nonce), critical=False)
    read = parse_request(builder.build().public_bytes(Encoding.DER))
    assert isinstance(read, OcspRequest)
    [asked] = read.cert_ids
    assert asked.issuer in issuer_hashes(ISSUER)
    assert asked.issuer is not None
    assert asked.issuer[0] == algorithm.name
    assert asked.serial == LEAF.serial_number
    assert read.nonce == nonce


def test_what_else_a_request_may_hold() -> None:
    several = [one(cert_id(bytes((serial,)))) for serial in (1, 2, 0x7F)]
    negative, unknown = one(cert_id(b"\xff")), one(cert_id(algorithm=encode_oid("1.2.3")))
    located = one(
        cert_id(), element(0xA0, sequence(extension("1.3.6.1.5.5.7.48.1.7", b"\x30\x00")))
    )
    read = parse_request(
        request(
            *several,
            negative,
            unknown,
            located,
            before=bytes.fromhex("a003020100") + element(0xA1, element(0x82, b"me")),
            after=element(0xA2, sequence(extension(BASIC, b"\x30\x00"), extension("1.2.3", b""))),
            signature=element(0xA0, sequence(b"whatever")),
        )
    )
    assert isinstance(read, OcspRequest)
    assert [each.serial for each in read.cert_ids] == [1, 2, 0x7F, -1, 7, 7]
    assert [each.issuer is None for each in read.cert_ids] == [False] * 4 + [True, False]
    assert read.cert_ids[0].der == cert_id(b"\x01")
    assert read.cert_ids[0].issuer == ("sha1", b"n" * 20, b"k" * 20)
    assert read.nonce is None
    # RFC 5754 leaves the parameters of SHA-2 out; some write them all the same.
    for algorithm in (SHA256, SHA256 + NULL, SHA1):
        found = parse_request(request(one(cert_id(algorithm=algorithm))))
        assert isinstance(found, OcspRequest)
        assert found.cert_ids[0].issuer is not None


GOOD = request()
BAD = {
    "nothing": b"",
    "text": b"GET / HTTP/1.1",
    "cut": GOOD[:-1],
    "followed": GOOD + b"\x00",
    "long": request(*[one()] * (MAX_REQUESTS + 1)),
    "huge": sequence(sequence(sequence(one()), b"\x00" * MAX_REQUEST_OCTETS)),
    "no requests": sequence(sequence(sequence())),
    "empty request": request(one(b"")),
    "version 2": request(before=bytes.fromhex("a003020101")),
    "indefinite length": b"\x30\x80" + GOOD[2:] + b"\x00\x00",
    "long form of a short length": b"\x30\x81" + GOOD[1:],
    "serial without octets": request(one(cert_id(b""))),
    "serial with a zero too many": request(one(cert_id(b"\x00\x01"))),
    "serial with a one too many": request(one(cert_id(b"\xff\x80"))),
    "serial of 21 octets": request(one(cert_id(b"\x01" * 21))),
    "something behind the id": request(one(cert_id(), NULL)),
    "something in the id": request(one(sequence(cert_id()[2:], NULL))),
    "algorithm without an oid": request(one(cert_id(algorithm=b""))),
    "empty extensions": request(after=element(0xA2, sequence())),
    "two lists of extensions": request(after=element(0xA2, sequence(extension(BASIC, b"")) * 2)),
    "extension twice": request(after=element(0xA2, sequence(extension(BASIC, b"") * 2))),
    "critical and unknown": request(
        after=element(0xA2, sequence(extension(BASIC, b"", b"\x01\x01\xff")))
    ),
    "critical and unknown, of one": request(
        one(cert_id(), element(0xA0, sequence(extension("1.2.3", b"", b"\x01\x01\xff"))))
    ),
    "false written out": request(
        after=element(0xA2, sequence(extension(BASIC, b"", b"\x01\x01\x00")))
    ),
    "empty nonce": request(after=nonce_extension(octets(b""))),
    "long nonce": request(after=nonce_extension(octets(b"n" * 129))),
    "bare nonce": request(after=nonce_extension(b"n" * 16)),
    "nonce and more": request(after=nonce_extension(octets(b"n") + NULL)),
    "signature and more": request(signature=element(0xA0, sequence() + NULL)),
    "signature of another kind": request(signature=element(0xA0, NULL)),
    "extensions before requests": request(before=nonce_extension(octets(b"n"))),
}


@pytest.mark.parametrize("name", BAD)
def test_requests_that_are_refused(name: str) -> None:
    assert parse_request(BAD[name]) is MALFORMED


def test_the_good_ones_are_good() -> None:
    """What the bad ones are bad variants of."""
    assert isinstance(parse_request(GOOD), OcspRequest)
    assert isinstance(parse_request(request(*[one()] * MAX_REQUESTS)), OcspRequest)
    with_nonce = parse_request(request(after=nonce_extension(octets(b"n" * 128))))
    assert isinstance(with_nonce, OcspRequest)
    assert with_nonce.nonce == b"n" * 128
    critical = element(0xA2, sequence(extension(NONCE, octets(b"n"), b"\x01\x01\xff")))
    assert isinstance(parse_request(request(after=critical)), OcspRequest)


def test_the_sha256_of_an_issuer_is_what_cryptography_makes_of_it() -> None:
    for algorithm, mine in zip(
        (hashes.SHA1(), hashes.SHA256()), issuer_hashes(ISSUER), strict=True
    ):
        theirs = ocsp.OCSPRequestBuilder().add_certificate(
            LEAF,
            ISSUER,
            algorithm,
        )
        asked = theirs.build()
        assert mine == (algorithm.name, asked.issuer_name_hash, asked.issuer_key_hash)


# --- the responder's certificate ------------------------------------------------------------------


@dataclass(frozen=True)
class Signer:
    certificate: x509.Certificate
    key: LocalSigningKey


RESPONDER_KEY = signing_key(nth=40)


def certified(
    *, below: Signer | None = None, key: LocalSigningKey = RESPONDER_KEY, now: datetime = NOW
) -> x509.Certificate:
    issuer = below or Signer(ISSUER, BELOW.issuer.key)  # type: ignore[arg-type]
    prepared = prepare_responder(
        issuer=issuer, trust_domain=TRUST_DOMAIN, public_key=key.public_key, now=now
    )
    return sign_responder(prepared, issuer.key)


@pytest.mark.parametrize(
    "algorithm", [KeyAlgorithm.EC_P256, KeyAlgorithm.EC_P384, KeyAlgorithm.RSA_2048]
)
def test_a_responder_s_certificate(algorithm: KeyAlgorithm) -> None:
    above = hierarchy(algorithm=algorithm)
    signer = Signer(above.intermediate, above.issuer.key)  # type: ignore[arg-type]
    certificate = certified(below=signer)
    certificate.verify_directly_issued_by(above.intermediate)
    found = {type(each.value): each for each in certificate.extensions}
    assert found.keys() == {
        x509.BasicConstraints,
        x509.KeyUsage,
        x509.ExtendedKeyUsage,
        x509.OCSPNoCheck,
        x509.SubjectKeyIdentifier,
        x509.AuthorityKeyIdentifier,
    }
    assert list(found[x509.ExtendedKeyUsage].value) == [ExtendedKeyUsageOID.OCSP_SIGNING]
    assert found[x509.BasicConstraints].critical
    assert found[x509.KeyUsage].critical
    assert certificate.not_valid_before_utc == NOW.replace(microsecond=0) - timedelta(seconds=10)
    assert certificate.not_valid_after_utc == NOW.replace(microsecond=0) + timedelta(days=1)
    assert certificate.subject.rfc4514_string().startswith("CN=broker-ocsp-")


def test_a_responder_never_outlives_its_authority() -> None:
    end = ISSUER.not_valid_after_utc
    assert certified(now=end - HOUR).not_valid_after_utc == end
    for moment in (end, end + HOUR, ISSUER.not_valid_before_utc - HOUR):
        with pytest.raises(ProfileViolation, match="not valid now"):
            certified(now=moment)


def test_what_was_linted_is_what_is_signed() -> None:
    signer = Signer(ISSUER, BELOW.issuer.key)  # type: ignore[arg-type]
    prepared = prepare_responder(
        issuer=signer, trust_domain=TRUST_DOMAIN, public_key=RESPONDER_KEY.public_key, now=NOW
    )
    changed = replace(prepared, tbs=prepared.tbs.replace(b"broker-ocsp", b"broker-spco"))
    with pytest.raises(LintFailed):
        sign_responder(changed, signer.key)
    with pytest.raises(UpstreamRejected):
        certified(below=Signer(ISSUER, signing_key(nth=41)))


# --- answers --------------------------------------------------------------------------------------

SIGNER = OcspSigner(certificate=certified(), key=RESPONDER_KEY)
HALF_HOUR = timedelta(minutes=30)


def answer(
    status: CertStatus = CertStatus.GOOD,
    *,
    signer: OcspSigner = SIGNER,
    leaf: x509.Certificate = LEAF,
    now: datetime = NOW,
    **fields: object,
) -> bytes:
    read = parse_request(build_request(leaf, ISSUER))
    assert isinstance(read, OcspRequest)
    single = SingleAnswer(read.cert_ids[0].der, status, now, now + HALF_HOUR)
    return signer.sign([replace(single, **fields)], produced_at=now)  # type: ignore[arg-type]


def test_refusals_are_not_signed() -> None:
    for status in ResponseStatus:
        if status is not ResponseStatus.SUCCESSFUL:
            read = ocsp.load_der_ocsp_response(refusal(status))
            assert read.response_status.value == status


def test_an_answer_that_is_believed() -> None:
    for status in CertStatus:
        revoked_at = NOW - HOUR if status is CertStatus.REVOKED else None
        checked = check_answer(
            answer(status, revoked_at=revoked_at), leaf=LEAF, issuer=ISSUER, now=NOW
        )
        assert checked.status is status
        assert checked.this_update == NOW.replace(microsecond=0)
        assert checked.next_update == NOW.replace(microsecond=0) + HALF_HOUR
        assert checked.revoked_at == (revoked_at and revoked_at.replace(microsecond=0))
    # The issuer may answer itself.
    own = OcspSigner(certificate=ISSUER, key=BELOW.issuer.key)
    check_answer(answer(signer=own), leaf=LEAF, issuer=ISSUER, now=NOW)


def test_revoked_says_since_when() -> None:
    with pytest.raises(ProfileViolation):
        answer(CertStatus.REVOKED)


def forged(*usages: x509.ObjectIdentifier, by: LocalSigningKey | None = None) -> OcspSigner:
    """A responder whose certificate the issuer, or somebody of that name, signed."""
    key = signing_key(nth=42)
    extensions = replaced((), x509.ExtendedKeyUsage(list(usages)), critical=False) if usages else ()
    certificate = forge(
        subject="responder",
        key=key,
        issuer=ISSUER,
        issuer_key=by or BELOW.issuer.key,  # type: ignore[arg-type]
        extensions=extensions,
    )
    return OcspSigner(certificate=certificate, key=key)


SERVER = ExtendedKeyUsageOID.SERVER_AUTH
OCSP_SIGNING = ExtendedKeyUsageOID.OCSP_SIGNING
OTHER = x509.load_der_x509_certificate(BELOW.issue().chain[0])


def flipped(der: bytes, at: int) -> bytes:
    return der[:at] + bytes((der[at] ^ 1,)) + (der[at + 1 :] if at != -1 else b"")


@pytest.mark.parametrize(
    "der",
    [
        b"",
        b"garbage",
        refusal(ResponseStatus.TRY_LATER),
        flipped(answer(), -1),
        answer().replace(b"\x80\x00", b"\x82\x00", 1),
        answer(leaf=OTHER),
        answer(now=NOW - HOUR),
        answer(now=NOW + HOUR),
        answer(signer=forged(SERVER)),
        answer(signer=forged()),
        answer(signer=forged(OCSP_SIGNING, by=signing_key(nth=43))),
        answer(signer=OcspSigner(certificate=certified(), key=signing_key(nth=44))),
    ],
)
def test_answers_that_are_not_believed(der: bytes) -> None:
    with pytest.raises(AnswerRejected):
        check_answer(der, leaf=LEAF, issuer=ISSUER, now=NOW)
    check_answer(answer(signer=forged(OCSP_SIGNING)), leaf=LEAF, issuer=ISSUER, now=NOW)


def test_an_expired_or_foreign_responder_is_not_believed() -> None:
    der = answer(now=NOW + timedelta(hours=24))
    with pytest.raises(AnswerRejected):
        check_answer(der, leaf=LEAF, issuer=ISSUER, now=NOW + timedelta(hours=24))
    key = LocalSigningKey("memory:x@1", generate_private_key(KeyAlgorithm.EC_P256))
    stranger = forge(
        subject="other", key=key, issuer=None, issuer_key=key, extensions=ca_extensions()
    )
    with pytest.raises(AnswerRejected):
        check_answer(
            answer(signer=OcspSigner(certificate=stranger, key=key)),
            leaf=LEAF,
            issuer=ISSUER,
            now=NOW,
        )


def test_an_integer_helper_agrees() -> None:
    """The serial numbers of the ledger come back as they were."""
    read = parse_request(request(one(cert_id(encode_integer(LEAF.serial_number)[2:]))))
    assert isinstance(read, OcspRequest)
    assert read.cert_ids[0].serial == LEAF.serial_number
