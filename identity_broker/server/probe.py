"""Looks at our own revocation lists and OCSP answers from outside, as a verifier would.

- Over HTTP, with `cryptography`'s readers and none of our encoders: what this sees is what others
  see.
- Looked for: freshness, signature, a number that never goes back, and agreement: lists, OCSP and
  ledger say the same of what was revoked, what is good and what was never issued.
- A large list is compared by samples and by count; a short one entry by entry.
"""

from __future__ import annotations

import base64
import http.client
import json
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp

from identity_ca.der import BIT_STRING, SEQUENCE, Reader
from identity_ca.distribution import Shard, shard_of
from identity_ca.errors import CAError
from identity_ca.keys import spki_der
from identity_ca.ocsp_check import check_signature
from identity_ca.serial import new_serial

_TIMEOUT_SECONDS: Final = 5.0
_MOST_OCTETS: Final = 128 * 1024 * 1024
_SAMPLES: Final = 32
_STATUS_SAMPLES: Final = 3
_WHOLE: Final = 10_000
# A verifier whose clock is a little slow must still find a list in force.
_LEAST_LEFT: Final = timedelta(seconds=30)
_OCSP_TYPE: Final = "application/ocsp-response"


_UNREADABLE: Final = (OSError, http.client.HTTPException, ValueError, x509.ExtensionNotFound)


@dataclass(frozen=True, slots=True)
class Expected:
    """What the ledger says of one authority.

    Attributes:
        authority_id: its subject key identifier, hexadecimal.
        certificate: its own, DER.
        revoked: serial numbers that lists and OCSP have to deny: revoked and unexpired.
        good: a few that are neither.
        is_denied: the authority itself is revoked: OCSP has to deny all that it signed.
    """

    authority_id: str
    certificate: bytes
    revoked: frozenset[int]
    good: tuple[int, ...]
    is_denied: bool = False


@dataclass(frozen=True, slots=True)
class Sighting:
    """One thing looked at; `problem` is empty when it is as it should be."""

    check: str
    detail: str
    problem: str = ""


class StatusProbe:
    """Looks at the endpoints below one address. Blocking; one thread at a time.

    Args:
        address: host:port of the broker's HTTP listener.
    """

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._host, self._port = host.strip("[]"), int(port)
        self._numbers: dict[str, int] = {}

    def look(self, expected: Expected, now: datetime) -> list[Sighting]:
        """Everything that is published about one authority."""
        issuer = x509.load_der_x509_certificate(expected.certificate)
        return [*self._lists(expected, issuer, now), *self._status(expected, issuer, now)]

    # --- revocation lists -------------------------------------------------------------------------

    def _lists(
        self, expected: Expected, issuer: x509.Certificate, now: datetime
    ) -> Iterator[Sighting]:
        name = f"revocation list of {expected.authority_id[:8]}"
        path = f"/crl/{expected.authority_id}.crl"
        try:
            der = self._ask("GET", path)
            crl = x509.load_der_x509_crl(der)
            problem = self._fault(path, crl, issuer, now) or _disagreement(crl, expected)
            until = crl.next_update_utc
        except _UNREADABLE as exc:
            yield Sighting(name, path, f"it cannot be fetched or read: {_why(exc)}")
            return
        detail = f"number {self._numbers.get(path, 0)}, {len(crl)} entries, until {until}"
        yield Sighting(name, detail, problem)
        yield from self._delta(expected, issuer, now)
        yield from self._part(expected, issuer, now)

    def _part(
        self, expected: Expected, issuer: x509.Certificate, now: datetime
    ) -> Iterator[Sighting]:
        """The part that the certificate revoked last names, where certificates name any."""
        name = f"part of the list of {expected.authority_id[:8]}"
        newest = max(expected.revoked, default=0)
        try:
            listed = json.loads(self._ask("GET", "/crl"))["lists"]
            (found,) = [one for one in listed if one["authority_id"] == expected.authority_id]
            shards = int(found.get("shards", 0))
            if not shards:
                return
            path = f"/crl/{expected.authority_id}/{Shard(shard_of(newest, shards), shards)}.crl"
            crl = x509.load_der_x509_crl(self._ask("GET", path))
            crl.extensions.get_extension_for_class(x509.IssuingDistributionPoint)
            problem = self._fault(path, crl, issuer, now)
            if newest and crl.get_revoked_certificate_by_serial_number(newest) is None:
                problem = problem or f"{newest:040x} was revoked and is not on it"
        except (*_UNREADABLE, KeyError, TypeError) as exc:
            yield Sighting(name, "/crl", f"it cannot be fetched or read: {_why(exc)}")
            return
        yield Sighting(name, f"number {self._numbers.get(path, 0)}, {len(crl)} entries", problem)

    def _delta(
        self, expected: Expected, issuer: x509.Certificate, now: datetime
    ) -> Iterator[Sighting]:
        name = f"delta list of {expected.authority_id[:8]}"
        path = f"/crl/{expected.authority_id}/delta.crl"
        try:
            crl = x509.load_der_x509_crl(self._ask("GET", path))
            crl.extensions.get_extension_for_class(x509.DeltaCRLIndicator)
            problem = self._fault(path, crl, issuer, now)
        except _UNREADABLE as exc:
            yield Sighting(name, path, f"it cannot be fetched or read: {_why(exc)}")
            return
        yield Sighting(name, f"number {self._numbers.get(path, 0)}, {len(crl)} entries", problem)

    def _fault(
        self,
        path: str,
        crl: x509.CertificateRevocationList,
        issuer: x509.Certificate,
        now: datetime,
    ) -> str:
        """What is wrong with a list, whatever it lists."""
        if not crl.is_signature_valid(issuer.public_key()):  # type: ignore[arg-type]
            return "its signature is not the authority's"
        number = crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        before, self._numbers[path] = self._numbers.get(path, 0), number
        if number < before:
            return f"its number went back from {before} to {number}"
        until = crl.next_update_utc
        if until is None or until - now < _LEAST_LEFT:
            return f"it is not fresh: the next one was due {until}"
        if crl.last_update_utc > now + _LEAST_LEFT:
            return f"it is from the future: {crl.last_update_utc}"
        return ""

    # --- OCSP -------------------------------------------------------------------------------------

    def _status(
        self, expected: Expected, issuer: x509.Certificate, now: datetime
    ) -> Iterator[Sighting]:
        denied = ocsp.OCSPCertStatus.REVOKED
        good = denied if expected.is_denied else ocsp.OCSPCertStatus.GOOD
        never_issued = denied if expected.is_denied else ocsp.OCSPCertStatus.UNKNOWN
        wanted = [
            *((serial, denied) for serial in _some(expected.revoked)),
            *((serial, good) for serial in expected.good[:_STATUS_SAMPLES]),
            (new_serial(now), never_issued),
        ]
        name = f"OCSP of {expected.authority_id[:8]}"
        problems = []
        for serial, status in wanted:
            try:
                answer = self._ocsp(issuer, serial, now)
                if answer is not status:
                    problems.append(f"{serial:040x} is {answer.name}, should be {status.name}")
            except (
                OSError,
                http.client.HTTPException,
                ValueError,
                InvalidSignature,
                CAError,
            ) as exc:
                problems.append(f"no answer that can be used: {_why(exc)}")
                break
        yield Sighting(name, f"{len(wanted)} serial numbers asked for", "; ".join(problems))

    def _ocsp(self, issuer: x509.Certificate, serial: int, now: datetime) -> ocsp.OCSPCertStatus:
        algorithm = hashes.SHA256()
        request = (
            ocsp.OCSPRequestBuilder()
            .add_certificate_by_hash(
                _digest(issuer.subject.public_bytes()),
                _digest(_key_bits(issuer)),
                serial,
                algorithm,
            )
            .build()
        )
        encoded = base64.b64encode(request.public_bytes(Encoding.DER)).decode()
        raw = self._ask("GET", f"/ocsp/{urllib.parse.quote(encoded, safe='')}", _OCSP_TYPE)
        response = ocsp.load_der_ocsp_response(raw)
        if response.response_status is not ocsp.OCSPResponseStatus.SUCCESSFUL:
            raise ValueError(f"the responder says {response.response_status.name}")
        check_signature(response, issuer, now)
        if response.serial_number != serial:
            raise ValueError("the answer is about another serial number")
        return response.certificate_status

    # --- HTTP -------------------------------------------------------------------------------------

    def _ask(self, method: str, path: str, kind: str = "") -> bytes:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=_TIMEOUT_SECONDS)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            body = response.read(_MOST_OCTETS)
            if response.status != http.HTTPStatus.OK:
                raise ValueError(f"HTTP status {response.status}")
            if kind and response.getheader("content-type", "") != kind:
                raise ValueError(f"content type {response.getheader('content-type', '')!r}")
            return body
        finally:
            connection.close()


def _disagreement(crl: x509.CertificateRevocationList, expected: Expected) -> str:
    """What the full list says that the ledger does not, or the other way round."""
    if len(crl) <= _WHOLE:
        missing = expected.revoked - {each.serial_number for each in crl}
    else:
        samples = _some(expected.revoked, _SAMPLES)
        missing = frozenset(
            serial
            for serial in samples
            if crl.get_revoked_certificate_by_serial_number(serial) is None
        )
    if missing:
        return f"{len(missing)} revoked serial numbers are not on it, {min(missing):040x} is one"
    listed = [
        serial
        for serial in expected.good
        if crl.get_revoked_certificate_by_serial_number(serial) is not None
    ]
    if listed:
        return f"{listed[0]:040x} is on it and was not revoked"
    return ""


def _some(serials: frozenset[int], count: int = _STATUS_SAMPLES) -> list[int]:
    """The newest of them, and the oldest: serial numbers begin with their time."""
    ordered = sorted(serials)
    return ordered[:1] + ordered[1:][1 - count :]


def _digest(octets: bytes) -> bytes:
    digest = hashes.Hash(hashes.SHA256())
    digest.update(octets)
    return digest.finalize()


def _key_bits(certificate: x509.Certificate) -> bytes:
    """The subject's public key, without its algorithm: what a CertID hashes (RFC 6960, 4.1.1)."""
    key_info = Reader(spki_der(certificate.public_key())).enter(SEQUENCE, "key info")
    key_info.enter(SEQUENCE, "key algorithm")
    return key_info.content(BIT_STRING, "public key")[1:]


def _why(error: Exception) -> str:
    return str(error) or type(error).__name__
