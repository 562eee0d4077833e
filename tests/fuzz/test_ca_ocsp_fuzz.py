"""Bounded fuzzing of OCSP: requests are read or refused, answers believed or rejected."""

from __future__ import annotations

import time
from contextlib import suppress

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp
from hypothesis import given
from hypothesis import strategies as st

from identity_ca.der import element
from identity_ca.errors import AnswerRejected
from identity_ca.ocsp import (
    MAX_REQUEST_OCTETS,
    CertStatus,
    OcspRequest,
    OcspSigner,
    ResponseStatus,
    SingleAnswer,
    parse_request,
)
from identity_ca.ocsp_check import build_request, check_answer
from support.ca import HOUR, hierarchy
from support.ca_material import NOW

BELOW = hierarchy()
LEAF = x509.load_der_x509_certificate(BELOW.issue().chain[0])
REQUEST = build_request(LEAF, BELOW.intermediate)
FULL = (
    ocsp.OCSPRequestBuilder()
    .add_certificate(LEAF, BELOW.intermediate, hashes.SHA256())
    .add_extension(x509.OCSPNonce(b"n" * 32), critical=False)
    .add_extension(x509.OCSPAcceptableResponses([x509.ObjectIdentifier("1.2.3")]), critical=False)
    .build()
    .public_bytes(Encoding.DER)
)
ASKED = parse_request(REQUEST)
assert isinstance(ASKED, OcspRequest)
ANSWER = OcspSigner(certificate=BELOW.intermediate, key=BELOW.issuer.key).sign(
    [SingleAnswer(ASKED.cert_ids[0].der, CertStatus.GOOD, NOW, NOW + HOUR)], produced_at=NOW
)


@st.composite
def mutations(draw: st.DrawFn, original: bytes) -> bytes:
    """The original with a few octets changed, cut, doubled or inserted."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(["change", "flip", "cut", "double", "insert"]))
        if kind == "change" and data:
            data[at] = draw(st.integers(0, 255))
        elif kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at : at + draw(st.integers(1, 16))]
        elif kind == "double":
            data[at:at] = data[at : at + draw(st.integers(1, 16))]
        else:
            data[at:at] = draw(st.binary(min_size=1, max_size=8))
    return bytes(data)


@given(st.one_of(st.binary(max_size=300), mutations(REQUEST), mutations(FULL)))
def test_requests(der: bytes) -> None:
    read = parse_request(der)
    assert isinstance(read, OcspRequest) or read is ResponseStatus.MALFORMED_REQUEST
    if isinstance(read, OcspRequest) and len(read.cert_ids) == 1:
        # We are stricter than others, never more lenient.
        with suppress(ValueError):
            theirs = ocsp.load_der_ocsp_request(der)
            assert theirs.serial_number == read.cert_ids[0].serial


def _deep() -> bytes:
    data = b""
    while len(data) < MAX_REQUEST_OCTETS - 8:
        data = element(0x30, data)
    return data


@pytest.mark.parametrize(
    "der",
    [
        b"\x30" * MAX_REQUEST_OCTETS,
        b"\x00" * MAX_REQUEST_OCTETS,
        b"\x30\x84\xff\xff\xff\xff" * (MAX_REQUEST_OCTETS // 6),
        _deep(),
        element(0x30, element(0x30, element(0x30, b"\x30\x00" * 32_000))),
        b"\x30" * (MAX_REQUEST_OCTETS + 1),
    ],
    ids=["sequences", "zeros", "lengths", "deep", "many", "too long"],
)
def test_the_largest_requests_take_no_time(der: bytes) -> None:
    started = time.process_time()
    assert parse_request(der) is ResponseStatus.MALFORMED_REQUEST
    assert time.process_time() - started < 0.1


def test_the_answer_that_is_mutated_is_believed() -> None:
    assert check_answer(ANSWER, leaf=LEAF, issuer=BELOW.intermediate, now=NOW).der == ANSWER


@given(st.one_of(st.binary(max_size=300), mutations(ANSWER)))
def test_answers(der: bytes) -> None:
    with suppress(AnswerRejected):
        checked = check_answer(der, leaf=LEAF, issuer=BELOW.intermediate, now=NOW)
        assert checked.status is CertStatus.GOOD
