"""The OCSP answer that a server shows with its SVID (stapling): fetched, verified, kept current.

- The SVID itself says where to ask (authority information access); what comes back counts only
  when its issuer, or a responder the issuer certified, signed it for this very certificate.
- Asking takes a few seconds at most and never fails anything: without an answer there is none, and
  that is told once.
- It is asked again at half of the answer's validity. "revoked" is an answer like any other;
  "unknown" is none.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from datetime import datetime, timedelta
from http.client import HTTPException
from typing import TYPE_CHECKING, Final
from urllib.error import HTTPError
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPSHandler,
    OpenerDirector,
    Request,
)

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import AuthorityInformationAccessOID

from identity_broker.cli.output import say
from identity_broker.domain.clock import Clock, SystemClock
from identity_ca.errors import AnswerRejected
from identity_ca.ocsp import CertStatus
from identity_ca.ocsp_check import MAX_ANSWER_OCTETS, CheckedAnswer, build_request, check_answer

if TYPE_CHECKING:
    from identity_client.credential import IdentitySnapshot

_PATIENCE_SECONDS: Final = 3.0
_RETRY: Final = timedelta(seconds=15)
_AT_LEAST: Final = timedelta(seconds=1)


class Stapler:
    """Knows the current answer for one SVID after another."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._serial = ""
        self._answer: CheckedAnswer | None = None
        self._due: datetime | None = None
        self._told = ""

    def is_due(self) -> bool:
        """Whether the answer for the SVID asked about last should be asked for again."""
        return self._due is not None and self._clock.now() >= self._due

    async def answer(self, snapshot: IdentitySnapshot) -> bytes | None:
        """The current OCSPResponse for the SVID, DER; None when there is none to be had."""
        if snapshot.serial != self._serial:
            self._serial, self._answer, self._due = snapshot.serial, None, self._clock.now()
        if self.is_due():
            await self._ask_again(snapshot)
        if self._answer is None or self._clock.now() >= self._answer.next_update:
            return None
        return self._answer.der

    async def _ask_again(self, snapshot: IdentitySnapshot) -> None:
        leaf = snapshot.svid.cert_chain[0]
        url = responder_url(leaf)
        issuer = _issuer(leaf, [*snapshot.svid.cert_chain[1:], *snapshot.bundle.x509_authorities])
        if url is None or issuer is None:
            self._due = None
            why = "names no OCSP responder" if url is None else "does not bring its issuer"
            self._tell(f"the SVID {why}: no ocsp.der is written")
            return
        try:
            answer = await self._asked(url, leaf, issuer)
        except (AnswerRejected, HTTPException, OSError, ValueError) as exc:
            self._due = self._clock.now() + _RETRY
            self._tell(f"no current OCSP answer from {url}: {str(exc) or type(exc).__name__}")
            return
        self._answer = answer
        half = answer.this_update + (answer.next_update - answer.this_update) / 2
        self._due = max(half, self._clock.now() + _AT_LEAST)
        self._tell("the OCSP answer says: revoked" if answer.status is CertStatus.REVOKED else "")

    async def _asked(
        self, url: str, leaf: x509.Certificate, issuer: x509.Certificate
    ) -> CheckedAnswer:
        request = build_request(leaf, issuer)
        async with asyncio.timeout(_PATIENCE_SECONDS):
            der = await asyncio.to_thread(_post, url, request)
        answer = check_answer(der, leaf=leaf, issuer=issuer, now=self._clock.now())
        if answer.status is CertStatus.UNKNOWN:
            raise AnswerRejected("the responder does not know this SVID")
        return answer

    def _tell(self, news: str) -> None:
        if news and news != self._told:
            say(news)
        self._told = news


def responder_url(certificate: x509.Certificate) -> str | None:
    """Where a certificate says to ask for its status: the first http(s) address, or None."""
    return next(iter(responder_urls(certificate)), None)


def responder_urls(certificate: x509.Certificate) -> list[str]:
    """All http(s) addresses of OCSP responders that a certificate names."""
    try:
        access = certificate.extensions.get_extension_for_class(x509.AuthorityInformationAccess)
    except (x509.ExtensionNotFound, ValueError):
        return []
    return [
        each.access_location.value
        for each in access.value
        if each.access_method == AuthorityInformationAccessOID.OCSP
        and isinstance(each.access_location, x509.UniformResourceIdentifier)
        and each.access_location.value.startswith(("http://", "https://"))
    ]


def _issuer(leaf: x509.Certificate, candidates: list[x509.Certificate]) -> x509.Certificate | None:
    for candidate in candidates:
        if candidate.subject == leaf.issuer:
            try:
                leaf.verify_directly_issued_by(candidate)
            except (InvalidSignature, ValueError, TypeError):
                continue
            return candidate
    return None


def _post(url: str, request: bytes) -> bytes:
    """What a responder answers; blocks for as long as there is patience.

    Raises:
        OSError, HTTPException, ValueError: it does not answer, or not in time, or too much.
    """
    until = time.monotonic() + _PATIENCE_SECONDS
    # Built by hand: no redirects, no proxies, no other schemes.
    opener = OpenerDirector()
    for handler in (
        HTTPHandler(),
        HTTPSHandler(context=_unverified()),
        HTTPErrorProcessor(),
        HTTPDefaultErrorHandler(),
    ):
        opener.add_handler(handler)
    headers = {"Content-Type": "application/ocsp-request", "Accept": "application/ocsp-response"}
    asked = Request(url, data=request, headers=headers)  # noqa: S310  # its scheme was checked
    document = b""
    try:
        with opener.open(asked, timeout=_PATIENCE_SECONDS) as answer:
            while piece := answer.read1(MAX_ANSWER_OCTETS):
                document += piece
                if len(document) > MAX_ANSWER_OCTETS:
                    raise ValueError("the answer is too long")
                if time.monotonic() > until:
                    raise TimeoutError("the answer did not come in time")
    except HTTPError as exc:
        exc.close()
        raise
    return document


def _unverified() -> ssl.SSLContext:
    """TLS that believes anybody: the answer's signature decides."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
