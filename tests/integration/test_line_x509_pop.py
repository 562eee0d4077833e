"""x509_pop: both halves of the challenge, and what does not pass it."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from identity_api.broker.v1 import node_attestation_pb2 as pb
from identity_api.broker.v1 import node_attestation_pb2_grpc
from identity_broker.attestors.node import Evidence
from identity_broker.attestors.node.x509_pop import X509PopAttestor, signed_message
from identity_broker.domain.selector_syntax import SelectorSyntax
from identity_broker.errors import AttestationFailed, ChallengeFailed, ConfigError
from identity_ca.keys import spki_der
from identity_ca.spiffe_id import TrustDomain
from identity_client.attestation import CertificateAttestor, pop_message
from support.line import TRUST_DOMAIN, csr_for, new_key, reason_of, running, settings_in
from support.machines import MachineCa, client_half
from support.store import SettableClock

DOMAIN = TrustDomain.parse(TRUST_DOMAIN)


@pytest.fixture(scope="module")
def machines() -> MachineCa:
    return MachineCa()


@pytest.fixture
def bundle_file(tmp_path: Path, machines: MachineCa) -> Path:
    path = tmp_path / "machines.pem"
    path.write_bytes(machines.certificate.public_bytes(Encoding.PEM))
    return path


def the_broker(machines: MachineCa) -> X509PopAttestor:
    return X509PopAttestor(DOMAIN, [machines.certificate], SettableClock(datetime.now(UTC)))


async def attest(
    broker: X509PopAttestor,
    node: CertificateAttestor,
    spki: bytes,
    change: Callable[[bytes], bytes] = lambda answer: answer,
) -> Any:
    async def challenge(question: bytes) -> bytes:
        return change(node.respond(question, public_key_der=spki, trust_domain=TRUST_DOMAIN))

    return await broker.attest(Evidence(node.payload(), spki), challenge)


def test_both_halves_sign_the_same_bytes() -> None:
    spki = spki_der(new_key().public_key())
    nonce, client_nonce = b"n" * 32, b"c" * 32
    assert signed_message(spki, DOMAIN, nonce, client_nonce) == pop_message(
        public_key_der=spki, trust_domain=TRUST_DOMAIN, nonce=nonce, client_nonce=client_nonce
    )


@pytest.mark.parametrize(
    "new",
    [
        lambda: ec.generate_private_key(ec.SECP256R1()),
        lambda: ec.generate_private_key(ec.SECP384R1()),
        lambda: rsa.generate_private_key(public_exponent=65537, key_size=2048),
    ],
    ids=["p256", "p384", "rsa"],
)
async def test_a_machine_proves_its_certificate(
    tmp_path: Path, machines: MachineCa, new: Callable[[], Any]
) -> None:
    key, certificate = machines.machine(new())
    spki = spki_der(new_key().public_key())
    node = await attest(the_broker(machines), client_half(tmp_path, key, certificate), spki)
    fingerprint = certificate.fingerprint(hashes.SHA256()).hex()
    assert str(node.spiffe_id) == f"spiffe://{TRUST_DOMAIN}/idb/node/x509_pop/{fingerprint}"
    facts = {str(selector) for selector in node.selectors}
    assert "x509_pop:subject:cn:web-1.internal" in facts
    assert "x509_pop:san:dns:web-1.internal" in facts
    SelectorSyntax().check_all(node.selectors)  # entries may ask for each of them
    assert node.reattestable


async def test_an_answer_fits_one_challenge_and_one_csr(
    tmp_path: Path, machines: MachineCa
) -> None:
    half = client_half(tmp_path, *machines.machine())
    broker = the_broker(machines)
    spki, other = (spki_der(new_key().public_key()) for _ in range(2))
    kept: list[bytes] = []

    def keep(answer: bytes) -> bytes:
        kept.append(answer)
        return answer

    await attest(broker, half, spki, keep)
    with pytest.raises(ChallengeFailed):
        await attest(broker, half, spki, lambda _: kept[0])  # replayed

    async def for_another_csr(question: bytes) -> bytes:
        return half.respond(question, public_key_der=other, trust_domain=TRUST_DOMAIN)

    with pytest.raises(ChallengeFailed):
        await broker.attest(Evidence(half.payload(), spki), for_another_csr)

    async def for_another_broker(question: bytes) -> bytes:
        return half.respond(
            question.replace(TRUST_DOMAIN.encode(), b"other.org"),
            public_key_der=spki,
            trust_domain="other.org",
        )

    with pytest.raises(ChallengeFailed):
        await broker.attest(Evidence(half.payload(), spki), for_another_broker)


async def test_a_stolen_certificate_without_its_key_proves_nothing(
    tmp_path: Path, machines: MachineCa
) -> None:
    _, certificate = machines.machine()
    thief = ec.generate_private_key(ec.SECP256R1())
    payload = json.dumps(
        {"certificates": [base64.b64encode(certificate.public_bytes(Encoding.DER)).decode()]}
    ).encode()

    async def answer(question: bytes) -> bytes:
        nonce = base64.b64decode(json.loads(question)["nonce"])
        message = signed_message(b"spki", DOMAIN, nonce, b"c" * 32)
        signature = thief.sign(message, ec.ECDSA(hashes.SHA256()))
        return json.dumps(
            {
                "client_nonce": base64.b64encode(b"c" * 32).decode(),
                "signature": base64.b64encode(signature).decode(),
            }
        ).encode()

    with pytest.raises(ChallengeFailed):
        await the_broker(machines).attest(Evidence(payload, b"spki"), answer)


async def test_an_expired_certificate_and_a_foreign_ca_are_refused(
    tmp_path: Path, machines: MachineCa
) -> None:
    spki = spki_der(new_key().public_key())
    expired = client_half(tmp_path / "expired", *machines.machine(days=-1))
    with pytest.raises(AttestationFailed):
        await attest(the_broker(machines), expired, spki)
    foreign = client_half(tmp_path / "foreign", *MachineCa().machine())
    with pytest.raises(AttestationFailed):
        await attest(the_broker(machines), foreign, spki)


async def test_a_ca_is_no_machine(tmp_path: Path, machines: MachineCa) -> None:
    spki = spki_der(new_key().public_key())
    for name, key, certificate in (
        ("root", machines.key, machines.certificate),
        ("intermediate", *machines.machine(ca=True)),
    ):
        half = client_half(tmp_path / name, key, certificate)
        with pytest.raises(AttestationFailed, match="not a machine"):
            await attest(the_broker(machines), half, spki)


@pytest.mark.parametrize(
    ("extension", "fits"),
    [
        ("", True),  # what `openssl req -x509` makes by itself
        ("keyUsage=critical,keyCertSign,cRLSign", True),
        ("keyUsage=critical,digitalSignature", False),
        ("1.2.3.4=critical,ASN1:NULL", False),
    ],
)
async def test_a_plain_private_ca_of_openssl_certifies_machines(
    tmp_path: Path, extension: str, fits: bool
) -> None:
    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "leaf.cnf").write_text("subjectAltName=DNS:web-1.internal\n")  # or it is no v3
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    more = ("-addext", extension) if extension else ()
    openssl(
        *("req", "-x509", *curve, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca"),
        *("-days", "30", *more),
    )
    openssl("req", *curve, "-keyout", "m.key", "-out", "m.csr", "-subj", "/CN=web-1")
    openssl(
        *("x509", "-req", "-in", "m.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-out", "m.pem"),
        *("-days", "10", "-set_serial", "7", "-extfile", "leaf.cnf"),
    )
    root = x509.load_pem_x509_certificate((tmp_path / "ca.pem").read_bytes())
    broker = X509PopAttestor(DOMAIN, [root], SettableClock(datetime.now(UTC)))
    half = CertificateAttestor(tmp_path / "m.pem", tmp_path / "m.key")
    spki = spki_der(new_key().public_key())
    if fits:
        node = await attest(broker, half, spki)
        assert "x509_pop:subject:cn:web-1" in {str(selector) for selector in node.selectors}
    else:
        with pytest.raises(AttestationFailed):
            await attest(broker, half, spki)


@pytest.mark.parametrize(
    ("purposes", "fits"),
    [
        ([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH], True),
        ([ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE], True),
        ([ExtendedKeyUsageOID.SERVER_AUTH], False),
        ([ExtendedKeyUsageOID.CODE_SIGNING], False),
    ],
)
async def test_an_extended_key_usage_includes_client_auth(
    tmp_path: Path,
    machines: MachineCa,
    purposes: list[x509.ObjectIdentifier],
    fits: bool,  # parametrized
) -> None:
    half = client_half(tmp_path, *machines.machine(purposes=purposes))
    spki = spki_der(new_key().public_key())
    if fits:
        assert (await attest(the_broker(machines), half, spki)).selectors
    else:
        with pytest.raises(AttestationFailed, match="clientAuth"):
            await attest(the_broker(machines), half, spki)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    payload=st.one_of(
        st.binary(max_size=300),
        st.text(max_size=100).map(lambda text: json.dumps({"certificates": [text]}).encode()),
    )
)
async def test_any_payload_is_refused_with_a_reason(machines: MachineCa, payload: bytes) -> None:
    async def challenge(_: bytes) -> bytes:
        raise AssertionError("an unproven certificate was challenged")

    with pytest.raises(AttestationFailed):
        await the_broker(machines).attest(Evidence(payload, b""), challenge)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(
    answer=st.one_of(
        st.binary(max_size=200),
        st.fixed_dictionaries(
            {"client_nonce": st.text(max_size=60), "signature": st.text(max_size=60)}
        ).map(lambda value: json.dumps(value).encode()),
    )
)
async def test_any_answer_is_refused_with_a_reason(machines: MachineCa, answer: bytes) -> None:
    _, certificate = machines.machine()
    payload = json.dumps(
        {"certificates": [base64.b64encode(certificate.public_bytes(Encoding.DER)).decode()]}
    ).encode()

    async def challenge(_: bytes) -> bytes:
        return answer

    with pytest.raises(ChallengeFailed):
        await the_broker(machines).attest(Evidence(payload, b""), challenge)


def test_a_bundle_that_cannot_be_used_is_a_configuration_error(tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.write_bytes(b"")
    for path in (tmp_path / "missing.pem", empty):
        with pytest.raises(ConfigError):
            X509PopAttestor.from_file(DOMAIN, path, SettableClock())


async def test_a_node_joins_over_the_wire_with_its_certificate(
    tmp_path: Path, machines: MachineCa, bundle_file: Path
) -> None:
    wanted = settings_in(
        tmp_path / "idb",
        ca={"key_manager": "memory"},
        attestors={"x509_pop": {"ca_bundle_file": str(bundle_file)}},
    )
    half = client_half(tmp_path / "node", *machines.machine())
    async with running(wanted) as broker:
        stub = node_attestation_pb2_grpc.NodeAttestationStub(await broker.bootstrap())
        for _ in range(2):  # a certificate may attest again
            key = new_key()
            call = stub.Attest()
            await call.write(
                pb.AttestRequest(
                    begin=pb.AttestRequest.Begin(
                        attestor="x509_pop", payload=half.payload(), csr=csr_for(key)
                    )
                )
            )
            asked: Any = await call.read()
            await call.write(
                pb.AttestRequest(
                    challenge_response=half.respond(
                        asked.challenge,
                        public_key_der=spki_der(key.public_key()),
                        trust_domain=TRUST_DOMAIN,
                    )
                )
            )
            last: Any = await call.read()
            result = last.result
            assert result.reattestable
            assert "/idb/node/x509_pop/" in result.svid.spiffe_id

        async def silent() -> AsyncIterator[pb.AttestRequest]:
            yield pb.AttestRequest(
                begin=pb.AttestRequest.Begin(
                    attestor="x509_pop", payload=half.payload(), csr=csr_for(new_key())
                )
            )

        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async for _ in stub.Attest(silent()):
                pass
        assert reason_of(refused.value) == "CHALLENGE_FAILED"


async def test_an_attestor_that_is_not_enabled_is_named(tmp_path: Path) -> None:
    async with running(settings_in(tmp_path / "idb", ca={"key_manager": "memory"})) as broker:
        stub = node_attestation_pb2_grpc.NodeAttestationStub(await broker.bootstrap())

        async def begin() -> AsyncIterator[pb.AttestRequest]:
            yield pb.AttestRequest(
                begin=pb.AttestRequest.Begin(
                    attestor="x509_pop", payload=b"{}", csr=csr_for(new_key())
                )
            )

        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async for _ in stub.Attest(begin()):
                pass
        assert reason_of(refused.value) == "ATTESTOR_UNKNOWN"

        async def nothing() -> AsyncIterator[pb.AttestRequest]:
            yield pb.AttestRequest(challenge_response=b"x")

        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async for _ in stub.Attest(nothing()):
                pass
        assert reason_of(refused.value) == "MALFORMED_REQUEST"
