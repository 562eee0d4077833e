"""The first trust in the broker: a file, or an address whose answer is pinned.

- What comes from an address is believed by the SHA-256 of each root certificate, not by how it
  came: https is welcome and not needed.
- With `insecure_bootstrap` whatever answers first is believed, loudly, and then nothing else for
  as long as the agent runs.
- Read anew when the broker's TLS fails: an operator replaces the file after a change of roots.
"""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Final
from urllib.error import HTTPError, URLError
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPSHandler,
    OpenerDirector,
    Request,
)

from cryptography import x509

from identity_broker.config.agent_settings import TrustSection
from identity_broker.telemetry.logs import get_logger
from identity_ca.bundle import MAX_BUNDLE_BYTES, TrustBundle
from identity_ca.errors import BundleRejected
from identity_ca.spiffe_id import TrustDomain
from identity_client.errors import BrokerUnavailable, IdentityError, SettingsInvalid

_log = get_logger("trust")
_TIMEOUT_SECONDS: Final = 10.0


def anchors(settings: TrustSection, trust_domain: TrustDomain) -> Callable[[], bytes]:
    """How to get the root certificates (PEM); what it returns blocks.

    It raises SettingsInvalid for what has to be corrected, BrokerUnavailable for what may pass.
    """
    if settings.bundle_file is not None:
        return _FromFile(settings.bundle_file)
    url = settings.bundle_url or ""
    if settings.insecure_bootstrap:
        return _FirstAnswer(url, trust_domain)
    return _Pinned(url, trust_domain, frozenset(settings.bundle_fingerprints))


class _FromFile:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self) -> bytes:
        try:
            return self._path.read_bytes()
        except OSError as exc:
            raise SettingsInvalid(
                f'the bundle file "{self._path}" cannot be read: '
                f"{exc.strerror or type(exc).__name__}",
                hint="idb bundle show --format pem writes the trust domain's bundle",
            ) from exc


class _Pinned:
    def __init__(self, url: str, trust_domain: TrustDomain, fingerprints: frozenset[str]) -> None:
        self._url = url
        self._trust_domain = trust_domain
        self._fingerprints = fingerprints

    def __call__(self) -> bytes:
        bundle = fetch_bundle(self._url, self._trust_domain)
        pinned = tuple(
            der for der in bundle.x509_authorities if fingerprint(der) in self._fingerprints
        )
        if not pinned:
            raise SettingsInvalid(
                f'no root certificate at "{self._url}" has the fingerprint that is pinned',
                reason="FINGERPRINT_MISMATCH",
                hint="compare trust.bundle_fingerprints with `idb bundle show` on the broker's "
                "machine; if they agree, somebody is between you and it",
            )
        return TrustBundle(self._trust_domain, x509_authorities=pinned).to_pem()


class _FirstAnswer:
    def __init__(self, url: str, trust_domain: TrustDomain) -> None:
        self._url = url
        self._trust_domain = trust_domain
        self._believed = b""

    def __call__(self) -> bytes:
        if not self._believed:
            bundle = fetch_bundle(self._url, self._trust_domain)
            self._believed = bundle.to_pem()
            for der in bundle.x509_authorities:
                _log.warning(
                    "insecure bootstrap: this root is believed because it answered first",
                    address=self._url,
                    detail=fingerprint(der),
                    hint="pin it: trust.bundle_fingerprints",
                )
        return self._believed


def fingerprint(certificate: bytes) -> str:
    """SHA-256 of a certificate's DER, lower-case hex."""
    return hashlib.sha256(certificate).hexdigest()


def fetch_bundle(url: str, trust_domain: TrustDomain) -> TrustBundle:
    """The bundle at an address, believed by nobody yet. Blocks.

    Raises:
        BrokerUnavailable: nobody answers.
        SettingsInvalid: what answers has no bundle of that trust domain.
    """
    document = _get(url)
    try:
        if document.lstrip().startswith(b"{"):
            bundle = TrustBundle.from_spiffe_json(trust_domain, document)
        else:
            bundle = TrustBundle.from_pem(trust_domain, document)
    except BundleRejected as exc:
        raise _no_bundle(url, exc.message) from exc
    if not bundle.x509_authorities:
        raise _no_bundle(url, "it holds no root certificate")
    for der in bundle.x509_authorities:
        if not _is_of(der, trust_domain):
            raise _no_bundle(url, "a root certificate is another trust domain's")
    return bundle


def _is_of(der: bytes, trust_domain: TrustDomain) -> bool:
    """Whether a root names our trust domain, or none (an upstream's has no URI)."""
    certificate = x509.load_der_x509_certificate(der)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return True
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    spiffe = [uri for uri in uris if uri.startswith("spiffe://")]
    return not spiffe or str(trust_domain.id) in spiffe


def _get(url: str) -> bytes:
    # Built by hand: no redirects, no proxies, no other schemes.
    opener = OpenerDirector()
    handlers = (
        HTTPHandler(),
        HTTPSHandler(context=_unverified()),
        HTTPErrorProcessor(),
        HTTPDefaultErrorHandler(),
    )
    for handler in handlers:
        opener.add_handler(handler)
    request = Request(url, headers={"Accept": "application/json, application/x-pem-file"})  # noqa: S310  # its scheme was checked
    try:
        with opener.open(request, timeout=_TIMEOUT_SECONDS) as answer:
            document: bytes = answer.read(MAX_BUNDLE_BYTES + 1)
    except HTTPError as exc:
        exc.close()
        raise _unanswered(url, exc) from exc
    except (URLError, HTTPException, OSError, ValueError) as exc:
        raise _unanswered(url, exc) from exc
    if len(document) > MAX_BUNDLE_BYTES:
        raise _no_bundle(url, "it is too long")
    return document


def _unverified() -> ssl.SSLContext:
    """TLS that believes anybody: the fingerprints decide, and a pin needs no other root."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _unanswered(url: str, exc: Exception) -> IdentityError:
    return BrokerUnavailable(
        f'the bundle at "{url}" cannot be had: {exc}',
        reason="BUNDLE_UNREACHABLE",
        hint="is that the broker's HTTP listener, with the path /bundle?",
    )


def _no_bundle(url: str, why: str) -> SettingsInvalid:
    return SettingsInvalid(
        f'what "{url}" answers cannot be used as the bundle: {why}', reason="BUNDLE_UNUSABLE"
    )
