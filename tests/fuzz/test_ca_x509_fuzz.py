"""Bounded fuzzing of everything X.509 that reads foreign bytes: only CAError may come out."""

from __future__ import annotations

from contextlib import suppress

from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from identity_ca.authority_certificate import issuer_facts
from identity_ca.bundle import TrustBundle
from identity_ca.chain import verify_x509_svid
from identity_ca.csr import parse_csr
from identity_ca.der import DerError, Reader, element
from identity_ca.errors import CAError, ChainRejected, LintFailed, SpiffeIdError
from identity_ca.keys import KeyAlgorithm, spki_der
from identity_ca.lint import Expectations, lint_tbs
from identity_ca.profile import INTERMEDIATE, WORKLOAD
from identity_ca.spiffe_id import SpiffeId, TrustDomain
from support.ca import HOUR, csr_der, hierarchy, workload_key
from support.ca_material import NOW, TRUST_DOMAIN, WORKLOAD_ID

BELOW = hierarchy()
PREPARED = BELOW.issuer.prepare(
    csr=csr_der(), spiffe_id=WORKLOAD_ID, profile=WORKLOAD, ttl=HOUR, now=NOW
)
CREDENTIAL = BELOW.issue()
EXPECTED = Expectations(
    issuer=issuer_facts(BELOW.intermediate, BELOW.issuer.key),
    spiffe_id=WORKLOAD_ID,
    spki=spki_der(workload_key().public_key),
    not_before=PREPARED.not_before,
    not_after=PREPARED.not_after,
    dns_names=(WORKLOAD_ID.dns_san() or "",),
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


@given(st.one_of(st.text(max_size=80), st.from_regex(r"spiffe://[ -~]{0,60}")))
def test_spiffe_id(text: str) -> None:
    for parse in (SpiffeId.parse, TrustDomain.parse):
        with suppress(SpiffeIdError):
            value = parse(text)
            assert str(value).removeprefix("spiffe://") == text.removeprefix("spiffe://")


@given(
    st.one_of(
        st.binary(max_size=400),
        *(
            mutations(csr_der(algorithm))
            for algorithm in (
                KeyAlgorithm.EC_P256,
                KeyAlgorithm.RSA_2048,
                KeyAlgorithm.ED25519,
            )
        ),
        mutations(csr_der(subject="name", sans=("https://example.org",))),
    )
)
def test_csr(data: bytes) -> None:
    with suppress(CAError):
        request = parse_csr(data, allowed=frozenset(KeyAlgorithm))
        # Whatever got through proved a key that can be used.
        assert request.spki_der == spki_der(request.public_key)


@given(mutations(csr_der()))
def test_issuing_from_any_request(data: bytes) -> None:
    with suppress(CAError):
        prepared = BELOW.issuer.prepare(
            csr=data, spiffe_id=WORKLOAD_ID, profile=WORKLOAD, ttl=HOUR, now=NOW
        )
        chain = BELOW.issuer.sign(prepared).chain
        assert verify_x509_svid(chain, bundle=BELOW.bundle, now=NOW).spiffe_id == WORKLOAD_ID


@given(st.one_of(st.binary(max_size=400), mutations(PREPARED.tbs)))
def test_lint_lets_nothing_but_the_original_through(data: bytes) -> None:
    for each in (WORKLOAD, INTERMEDIATE):
        try:
            lint_tbs(data, each, EXPECTED)
        except LintFailed:
            continue
        # Only the serial number, which lint does not know, may differ.
        at = PREPARED.tbs.index(bytes.fromhex(PREPARED.serial))
        assert each is WORKLOAD
        assert data[:at] == PREPARED.tbs[:at]
        assert data[at + 20 :] == PREPARED.tbs[at + 20 :]


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=200),
            st.sampled_from([*CREDENTIAL.chain, BELOW.root.public_bytes(Encoding.DER)]),
            mutations(CREDENTIAL.chain[0]),
            mutations(CREDENTIAL.chain[1]),
        ),
        max_size=6,
    ),
    st.lists(
        st.one_of(
            st.just(BELOW.root.public_bytes(Encoding.DER)),
            mutations(BELOW.root.public_bytes(Encoding.DER)),
        ),
        max_size=3,
    ),
)
def test_chain(chain: list[bytes], anchors: list[bytes]) -> None:
    bundle = TrustBundle(TRUST_DOMAIN, x509_authorities=tuple(anchors))
    with suppress(ChainRejected):
        verified = verify_x509_svid(chain, bundle=bundle, now=NOW)
        # Nothing but the one leaf that was really issued can come out of this.
        assert chain[0] == CREDENTIAL.chain[0]
        assert verified.spiffe_id == WORKLOAD_ID


@given(st.binary(max_size=64), st.integers(0, 255))
def test_der_reader(data: bytes, tag: int) -> None:
    reader = Reader(data)
    with suppress(DerError):
        content = reader.content(tag, "it")
        assert element(tag, content) == data[: reader.position]
        reader.finish("it")
        assert reader.at_end
