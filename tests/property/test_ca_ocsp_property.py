"""OCSP answers mean what another library reads in them, byte for byte where it writes them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp
from hypothesis import given
from hypothesis import strategies as st

from identity_ca.der import element, encode_integer, encode_oid
from identity_ca.keys import verify_signature
from identity_ca.ocsp import (
    MAX_REQUESTS,
    CertStatus,
    OcspRequest,
    OcspSigner,
    SingleAnswer,
    issuer_hashes,
    parse_request,
)
from identity_ca.ocsp_responder import prepare_responder, sign_responder
from support.ca import hierarchy
from support.ca_material import NOW, TRUST_DOMAIN, signing_key

BELOW = hierarchy()
ISSUER = BELOW.intermediate
KEY = signing_key(nth=45)
CERTIFICATE = sign_responder(
    prepare_responder(
        issuer=BELOW.issuer, trust_domain=TRUST_DOMAIN, public_key=KEY.public_key, now=NOW
    ),
    BELOW.issuer.key,
)
SIGNER = OcspSigner(certificate=CERTIFICATE, key=KEY)
ALGORITHMS = (hashes.SHA1(), hashes.SHA256())
NAMES = {
    CertStatus.GOOD: ocsp.OCSPCertStatus.GOOD,
    CertStatus.REVOKED: ocsp.OCSPCertStatus.REVOKED,
    CertStatus.UNKNOWN: ocsp.OCSPCertStatus.UNKNOWN,
}
REASONS = {
    1: x509.ReasonFlags.key_compromise,
    2: x509.ReasonFlags.ca_compromise,
    3: x509.ReasonFlags.affiliation_changed,
    4: x509.ReasonFlags.superseded,
    5: x509.ReasonFlags.cessation_of_operation,
    6: x509.ReasonFlags.certificate_hold,
    9: x509.ReasonFlags.privilege_withdrawn,
}

moments = st.datetimes(datetime(1970, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))
serials = st.integers(1, (1 << 159) - 1)
nonces = st.none() | st.binary(min_size=1, max_size=128)


@st.composite
def told(draw: st.DrawFn) -> SingleAnswer:
    """What is said of one certificate, whose CertID is put in later."""
    status = draw(st.sampled_from(CertStatus))
    revoked = status is CertStatus.REVOKED
    this_update = draw(moments)
    return SingleAnswer(
        b"",
        status,
        this_update,
        this_update + timedelta(seconds=draw(st.integers(1, 10**8))),
        revoked_at=draw(moments) if revoked else None,
        reason=draw(st.sampled_from([None, *REASONS])) if revoked else None,
    )


def asked(serial: int, algorithm: hashes.HashAlgorithm) -> bytes:
    """A CertID as cryptography writes it."""
    builder = ocsp.OCSPRequestBuilder().add_certificate_by_hash(
        *next(each[1:] for each in issuer_hashes(ISSUER) if each[0] == algorithm.name),
        serial,
        algorithm,
    )
    read = parse_request(builder.build().public_bytes(Encoding.DER))
    assert isinstance(read, OcspRequest)
    return read.cert_ids[0].der


def completed(answer: SingleAnswer, cert_id: bytes) -> SingleAnswer:
    values = {name: getattr(answer, name) for name in SingleAnswer.__slots__}
    return SingleAnswer(**{**values, "cert_id": cert_id})


@given(serials, st.sampled_from(ALGORITHMS), told(), nonces)
def test_one_answer_is_byte_for_byte_what_cryptography_would_sign(
    serial: int, algorithm: hashes.HashAlgorithm, answer: SingleAnswer, nonce: bytes | None
) -> None:
    name_hash, key_hash = next(
        each[1:] for each in issuer_hashes(ISSUER) if each[0] == algorithm.name
    )
    builder = (
        ocsp.OCSPResponseBuilder()
        .add_response_by_hash(
            name_hash,
            key_hash,
            serial,
            algorithm,
            NAMES[answer.status],
            answer.this_update,
            answer.next_update,
            answer.revoked_at,
            None if answer.reason is None else REASONS[answer.reason],
        )
        .responder_id(ocsp.OCSPResponderEncoding.HASH, CERTIFICATE)
        .certificates([CERTIFICATE])
    )
    if nonce is not None:
        builder = builder.add_extension(x509.OCSPNonce(nonce), critical=False)
    theirs = builder.sign(KEY.as_private_key(), hashes.SHA256())
    der = SIGNER.sign(
        [completed(answer, asked(serial, algorithm))],
        produced_at=theirs.produced_at_utc,
        nonce=nonce,
    )
    ours = ocsp.load_der_ocsp_response(der)
    assert ours.tbs_response_bytes == theirs.tbs_response_bytes
    assert ours.signature_algorithm_oid == theirs.signature_algorithm_oid
    assert ours.certificates == theirs.certificates
    verify_signature(KEY.public_key, ours.signature, ours.tbs_response_bytes)


@given(st.lists(st.tuples(serials, told()), min_size=1, max_size=MAX_REQUESTS), nonces)
def test_several_answers_are_read_as_they_were_meant(
    answers: list[tuple[int, SingleAnswer]], nonce: bytes | None
) -> None:
    single = [
        completed(answer, asked(serial, ALGORITHMS[serial % 2])) for serial, answer in answers
    ]
    read = ocsp.load_der_ocsp_response(SIGNER.sign(single, produced_at=NOW, nonce=nonce))
    assert read.response_status is ocsp.OCSPResponseStatus.SUCCESSFUL
    assert read.produced_at_utc == NOW.replace(microsecond=0)
    found = [each.value.nonce for each in read.extensions if isinstance(each.value, x509.OCSPNonce)]
    assert found == ([] if nonce is None else [nonce])
    listed = list(read.responses)
    assert len(listed) == len(answers)
    for one, (serial, answer) in zip(listed, answers, strict=True):
        assert one.serial_number == serial
        assert one.certificate_status is NAMES[answer.status]
        assert one.this_update_utc == answer.this_update.replace(microsecond=0)
        assert one.next_update_utc == answer.next_update.replace(microsecond=0)
        revoked_at = answer.revoked_at
        assert one.revocation_time_utc == (revoked_at and revoked_at.replace(microsecond=0))
        assert one.revocation_reason == (None if answer.reason is None else REASONS[answer.reason])


@given(
    st.lists(
        st.tuples(st.booleans(), st.binary(max_size=40), st.binary(max_size=40), serials),
        min_size=1,
        max_size=MAX_REQUESTS,
    ),
    nonces,
)
def test_requests_are_read_as_they_were_written(
    ids: list[tuple[bool, bytes, bytes, int]], nonce: bytes | None
) -> None:
    def sequence(*parts: bytes) -> bytes:
        return element(0x30, b"".join(parts))

    written = [
        sequence(
            sequence(encode_oid("1.3.14.3.2.26" if sha1 else "2.16.840.1.101.3.4.2.1")),
            element(4, name),
            element(4, key),
            encode_integer(serial),
        )
        for sha1, name, key, serial in ids
    ]
    extensions = b""
    if nonce is not None:
        value = element(4, element(4, nonce))
        extensions = element(0xA2, sequence(sequence(encode_oid("1.3.6.1.5.5.7.48.1.2"), value)))
    requests = sequence(*(sequence(each) for each in written))
    read = parse_request(sequence(sequence(requests, extensions)))
    assert isinstance(read, OcspRequest)
    assert read.nonce == nonce
    assert [each.der for each in read.cert_ids] == written
    assert [(each.issuer, each.serial) for each in read.cert_ids] == [
        (("sha1" if sha1 else "sha256", name, key), serial) for sha1, name, key, serial in ids
    ]
