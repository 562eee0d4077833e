"""The first trust: a file, a pinned address, or whatever answers first, said loudly."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from identity_broker.agent.trust import anchors, fetch_bundle, fingerprint
from identity_broker.config.agent_settings import TrustSection
from identity_ca.bundle import MAX_BUNDLE_BYTES
from identity_ca.spiffe_id import TrustDomain
from identity_client.errors import BrokerUnavailable, SettingsInvalid
from support.workload_identities import FakeIdentities

DOMAIN = TrustDomain("example.org")


class Site:
    """An HTTP server that answers what the test says."""

    def __init__(self) -> None:
        self.document: bytes = b""
        self.status = 200
        self.location = ""
        self.asked = 0
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.asked += 1
                self.send_response(site.status)
                if site.location:
                    self.send_header("Location", site.location)
                self.end_headers()
                self.wfile.write(site.document)

            def log_message(self, *arguments: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/bundle"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def site() -> Iterator[Site]:
    one = Site()
    yield one
    one.close()


@pytest.fixture(scope="module")
def identities() -> FakeIdentities:
    return FakeIdentities()


def pinned(site: Site, *fingerprints: str) -> TrustSection:
    return TrustSection(bundle_url=site.url, bundle_fingerprints=fingerprints)


def test_a_file_is_read_whenever_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "root.pem"
    path.write_bytes(b"one")
    read = anchors(TrustSection(bundle_file=path), DOMAIN)
    assert read() == b"one"
    path.write_bytes(b"two")
    assert read() == b"two"
    path.unlink()
    with pytest.raises(SettingsInvalid):
        read()


@pytest.mark.parametrize("form", ["spiffe", "pem"])
def test_what_is_pinned_is_believed_and_nothing_else(
    site: Site, identities: FakeIdentities, form: str
) -> None:
    bundle, stranger = identities.bundle, FakeIdentities().bundle
    both = stranger.x509_authorities + bundle.x509_authorities
    served = type(bundle)(DOMAIN, x509_authorities=both)
    site.document = served.to_spiffe_json() if form == "spiffe" else served.to_pem()
    (root,) = bundle.x509_authorities
    assert anchors(pinned(site, fingerprint(root)), DOMAIN)() == bundle.to_pem()
    with pytest.raises(SettingsInvalid) as caught:
        anchors(pinned(site, "00" * 32), DOMAIN)()
    assert caught.value.reason == "FINGERPRINT_MISMATCH"


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"{}",
        b'{"keys": []}',
        b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        b"<html>log in</html>",
        b"x" * (MAX_BUNDLE_BYTES + 1),
    ],
    ids=["nothing", "empty", "no keys", "no certificate", "a page", "too long"],
)
def test_what_is_no_bundle_is_refused(site: Site, document: bytes) -> None:
    site.document = document
    with pytest.raises(SettingsInvalid) as caught:
        fetch_bundle(site.url, DOMAIN)
    assert caught.value.reason == "BUNDLE_UNUSABLE"


def test_another_trust_domain_s_bundle_is_refused(site: Site) -> None:
    site.document = FakeIdentities("example.com").bundle.to_spiffe_json()
    with pytest.raises(SettingsInvalid):
        fetch_bundle(site.url, DOMAIN)


@pytest.mark.parametrize("status", [301, 404, 500])
def test_whoever_does_not_answer_may_answer_later(site: Site, status: int) -> None:
    """A redirect is no answer: it would be another place than the one that was named."""
    site.status, site.location = status, "http://127.0.0.1:1/"
    with pytest.raises(BrokerUnavailable) as caught:
        fetch_bundle(site.url, DOMAIN)
    assert caught.value.reason == "BUNDLE_UNREACHABLE"
    assert site.asked == 1


def test_nobody_there_is_not_an_error_of_the_settings() -> None:
    with pytest.raises(BrokerUnavailable):
        fetch_bundle("http://127.0.0.1:1/bundle", DOMAIN)


def test_what_answered_first_is_believed_for_good_and_said_loudly(
    site: Site, identities: FakeIdentities
) -> None:
    settings = TrustSection(bundle_url=site.url, insecure_bootstrap=True)
    believe = anchors(settings, DOMAIN)
    site.document = identities.bundle.to_spiffe_json()
    with capture_logs() as lines:
        first = believe()
    (root,) = identities.bundle.x509_authorities
    (told,) = (line for line in lines if "insecure bootstrap" in line["event"])
    assert told["log_level"] == "warning"
    assert told["detail"] == fingerprint(root)
    site.document = FakeIdentities().bundle.to_spiffe_json()
    assert believe() == first
    assert site.asked == 1
