"""Our OCSP answers in other people's hands, and other people's beside ours."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import hvac
import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp

from identity_broker.dev.openbao import EmbeddedOpenBao
from identity_ca.ocsp import (
    CertStatus,
    OcspRequest,
    OcspSigner,
    ResponseStatus,
    SingleAnswer,
    parse_request,
    refusal,
)
from identity_ca.ocsp_check import build_request, check_answer
from identity_ca.ocsp_responder import prepare_responder, sign_responder
from support.ca import forge, hierarchy
from support.ca_material import TRUST_DOMAIN, signing_key
from support.line import RunningBroker

NOW = datetime.now(UTC).replace(microsecond=0)
BELOW = hierarchy(now=NOW)
LEAF = x509.load_der_x509_certificate(BELOW.issue(now=NOW).chain[0])
KEY = signing_key(nth=46)
CERTIFICATE = sign_responder(
    prepare_responder(
        issuer=BELOW.issuer, trust_domain=TRUST_DOMAIN, public_key=KEY.public_key, now=NOW
    ),
    BELOW.issuer.key,
)
SIGNER = OcspSigner(certificate=CERTIFICATE, key=KEY)
_numbers = count(1)


def single(status: CertStatus, reason: int | None = None) -> SingleAnswer:
    read = parse_request(build_request(LEAF, BELOW.intermediate))
    assert isinstance(read, OcspRequest)
    return SingleAnswer(
        read.cert_ids[0].der,
        status,
        NOW,
        NOW + timedelta(minutes=10),
        revoked_at=NOW if status is CertStatus.REVOKED else None,
        reason=reason,
    )


def findings(tool: str, file: Path) -> set[tuple[str, str]]:
    """What pkilint reports at WARNING or above, as (code, message)."""
    result = subprocess.run(
        [str(Path(sys.executable).with_name(tool)), "lint", "-s", "WARNING", "-f", "JSON", file],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.stdout, result.stderr
    return {
        (description["code"], description.get("message") or "")
        for entry in json.loads(result.stdout)["results"]
        for description in entry["finding_descriptions"]
    }


def test_pkilint_finds_nothing_in_answers(tmp_path: Path) -> None:
    each_status = [single(status) for status in CertStatus]
    answers = {
        "each": SIGNER.sign(each_status, produced_at=NOW),
        "reason": SIGNER.sign([single(CertStatus.REVOKED, 1)], produced_at=NOW, nonce=b"n" * 32),
        "refusal": refusal(ResponseStatus.TRY_LATER),
    }
    file = tmp_path / "answer.der"
    for name, der in answers.items():
        file.write_bytes(der)
        assert findings("lint_ocsp_response", file) == set(), name
    # It does find something where there is something.
    file.write_bytes(bytes.fromhex("30030a0104"))
    assert findings("lint_ocsp_response", file) == {("pkix.ocsp_response_status_code_4", "")}


def test_pkilint_finds_nothing_in_a_responder_s_certificate(tmp_path: Path) -> None:
    file = tmp_path / "responder.pem"
    file.write_bytes(CERTIFICATE.public_bytes(Encoding.PEM))
    assert findings("lint_pkix_cert", file) == set()


@pytest.mark.openbao
async def test_openbao_calls_good_what_nobody_issued_and_we_do_not(
    openbao: EmbeddedOpenBao, openbao_admin: hvac.Client, broker: RunningBroker
) -> None:
    """The difference that issuance-awareness makes, asked of both in the same words."""
    mount = f"pki-ocsp-{next(_numbers)}"
    openbao_admin.sys.enable_secrets_engine("pki", path=mount)
    root: Any = openbao_admin.write_data(
        f"{mount}/root/generate/internal", data={"common_name": "peer", "key_type": "ec"}
    )
    theirs = x509.load_pem_x509_certificate(root["data"]["certificate"].encode())
    node = await broker.join("web-1")
    chain = [x509.load_der_x509_certificate(each) for each in node.svid.cert_chain]
    roots = x509.load_pem_x509_certificates(broker.bundle_pem)
    ours = next(each for each in [*chain[1:], *roots] if each.subject == chain[0].issuer)

    def status_of(url: str, issuer: x509.Certificate) -> CertStatus:
        """Of a serial number that this issuer never used, whatever a certificate says."""
        invented = forge(subject="x", key=KEY, issuer=issuer, issuer_key=KEY, extensions=())
        answer = requests.post(
            url,
            data=build_request(invented, issuer),
            headers={"content-type": "application/ocsp-request"},
            timeout=20,
        )
        return check_answer(
            answer.content, leaf=invented, issuer=issuer, now=datetime.now(UTC)
        ).status

    address = f"http://{broker.addresses.http_address}/ocsp"
    assert status_of(f"{openbao.address}/v1/{mount}/ocsp", theirs) is CertStatus.GOOD
    assert await asyncio.to_thread(status_of, address, ours) is CertStatus.UNKNOWN


def test_the_statuses_have_the_numbers_of_the_standard() -> None:
    for status in ResponseStatus:
        assert ocsp.OCSPResponseStatus(status.value).name.lower() == status.name.lower()
