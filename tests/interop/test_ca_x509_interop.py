"""Our certificates and lists in other people's hands: py-spiffe, OpenSSL, pkilint, TLS stacks."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from spiffe import TrustDomain as TheirTrustDomain
from spiffe import X509Bundle, X509Svid

from identity_ca.authority_certificate import build_root
from identity_ca.bundle import TrustBundle
from identity_ca.crl import RevokedEntry, build_crl, encode_entry, encode_removal, sign_crl
from identity_ca.distribution import DistributionPoints
from identity_ca.issuer import X509Credential, X509Issuer
from identity_ca.keys import KeyAlgorithm
from identity_ca.profile import WORKLOAD
from identity_ca.spiffe_id import SpiffeId, TrustDomain
from support.ca import (
    HOUR,
    csr_der,
    forge,
    hierarchy,
    intermediate_of,
    leaf_extensions,
    workload_key,
)
from support.ca_material import TRUST_DOMAIN, WORKLOAD_ID, signing_key

# OpenSSL and TLS stacks look at the real clock.
NOW = datetime.now(UTC)
OPENSSL = shutil.which("openssl") or "openssl"

POINTS = DistributionPoints("http://idb.example.org:8082", 64)

ALGORITHMS = [KeyAlgorithm.EC_P256, KeyAlgorithm.EC_P384, KeyAlgorithm.RSA_2048]


class Issued:
    """A root, an intermediate, a leaf and a CRL that revokes another leaf, as files."""

    def __init__(self, folder: Path, algorithm: KeyAlgorithm) -> None:
        root_key, ca_key = signing_key(algorithm, 91), signing_key(algorithm, 92)
        self.root = build_root(
            root_key,
            trust_domain=TRUST_DOMAIN,
            ttl=timedelta(days=60),
            now=NOW,
            path_length=1,
        )
        self.intermediate = intermediate_of(ca_key, issuer_key=root_key, issuer=self.root, now=NOW)
        self.issuer = X509Issuer(
            authority_id="a", trust_domain=TRUST_DOMAIN, key=ca_key, chain=[self.intermediate]
        )
        self.pointing = X509Issuer(
            authority_id="a",
            trust_domain=TRUST_DOMAIN,
            key=ca_key,
            chain=[self.intermediate],
            points=POINTS,
        )
        self.good, self.revoked = self._issue(algorithm), self._issue(algorithm)
        pointing = self._issue(algorithm, self.pointing)
        plain = self._issue(algorithm, dns_names=())
        self.crl = build_crl(
            issuer=self.issuer,
            entries=[RevokedEntry(int(self.revoked.serial, 16), NOW, 1), RevokedEntry(7, NOW)],
            number=3,
            this_update=NOW,
            next_update=NOW + HOUR,
        )
        root_issuer = X509Issuer(
            authority_id="root", trust_domain=TRUST_DOMAIN, key=root_key, chain=[self.root]
        )
        root_crl = build_crl(
            issuer=root_issuer,
            entries=[],
            number=1,
            this_update=NOW,
            next_update=NOW + HOUR,
        )
        self.files = {
            "pointing": _pem(pointing.chain[:1]),
            "plain": _pem(plain.chain[:1]),
            "full_crl": self._crl(delta_url=POINTS.delta_url("a")),
            "part_crl": self._crl(scope_url=POINTS.shard_urls("a")[5]),
            "delta_crl": self._crl(base_number=3),
            "root": self.root.public_bytes(Encoding.PEM),
            "intermediate": self.intermediate.public_bytes(Encoding.PEM),
            "leaf": _pem(self.good.chain[:1]),
            "revoked": _pem(self.revoked.chain[:1]),
            "chain": _pem(plain.chain),
            "crl": x509.load_der_x509_crl(self.crl).public_bytes(Encoding.PEM),
            "root_crl": x509.load_der_x509_crl(root_crl).public_bytes(Encoding.PEM),
            "key": workload_key(algorithm)
            .as_private_key()
            .private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        }
        self.files["crls"] = self.files["crl"] + self.files["root_crl"]
        self.folder = folder
        for name, content in self.files.items():
            (folder / f"{name}.pem").write_bytes(content)

    def path(self, name: str) -> str:
        return str(self.folder / f"{name}.pem")

    def _crl(
        self, *, scope_url: str = "", delta_url: str = "", base_number: int | None = None
    ) -> bytes:
        entries = [encode_entry(RevokedEntry(int(self.revoked.serial, 16), NOW, 6))]
        if base_number is not None:
            entries.append(encode_removal(7, NOW))
        der = sign_crl(
            issuer=self.issuer,
            encoded_entries=entries,
            number=4,
            this_update=NOW,
            next_update=NOW + HOUR,
            scope_url=scope_url,
            delta_url=delta_url,
            base_number=base_number,
        )
        return x509.load_der_x509_crl(der).public_bytes(Encoding.PEM)

    def _issue(
        self,
        algorithm: KeyAlgorithm,
        issuer: X509Issuer | None = None,
        dns_names: tuple[str, ...] = ("api.example.org",),
    ) -> X509Credential:
        issuer = issuer or self.issuer
        return issuer.sign(
            issuer.prepare(
                csr=csr_der(algorithm),
                spiffe_id=WORKLOAD_ID,
                profile=WORKLOAD,
                ttl=HOUR,
                now=NOW,
                dns_names=dns_names,
            )
        )


def _pem(chain: tuple[bytes, ...]) -> bytes:
    return b"".join(x509.load_der_x509_certificate(d).public_bytes(Encoding.PEM) for d in chain)


@pytest.fixture(scope="module", params=ALGORITHMS)
def issued(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Issued:
    return Issued(tmp_path_factory.mktemp("pki"), request.param)


def openssl(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [OPENSSL, *arguments], capture_output=True, text=True, check=False, timeout=30
    )


def verify(issued: Issued, leaf: str, *options: str) -> subprocess.CompletedProcess[str]:
    return openssl(
        "verify",
        "-x509_strict",
        *options,
        "-CAfile",
        issued.path("root"),
        "-untrusted",
        issued.path("intermediate"),
        issued.path(leaf),
    )


def test_openssl_verifies_the_chain(issued: Issued) -> None:
    for purpose in ("sslserver", "sslclient"):
        result = verify(issued, "leaf", "-purpose", purpose)
        assert result.returncode == 0, result.stderr
    derived = WORKLOAD_ID.dns_san() or ""
    assert verify(issued, "leaf", "-verify_hostname", derived).returncode == 0
    assert verify(issued, "leaf", "-verify_hostname", "other.example.org").returncode != 0
    assert verify(issued, "leaf", "-purpose", "smimesign").returncode != 0


def test_openssl_sees_the_revocation(issued: Issued) -> None:
    options = ("-crl_check", "-CRLfile", issued.path("crl"))
    good = verify(issued, "leaf", *options)
    assert good.returncode == 0, good.stderr
    revoked = verify(issued, "revoked", *options)
    assert revoked.returncode != 0
    assert "certificate revoked" in revoked.stderr
    everything = ("-crl_check_all", "-CRLfile", issued.path("crls"))
    whole = verify(issued, "leaf", *everything)
    assert whole.returncode == 0, whole.stderr


def test_openssl_reads_the_crl(issued: Issued) -> None:
    result = openssl(
        "crl", "-in", issued.path("crl"), "-noout", "-text", "-CAfile", issued.path("intermediate")
    )
    assert "verify OK" in result.stderr
    for expected in ("Key Compromise", "X509v3 CRL Number", issued.revoked.serial.upper()):
        assert expected in result.stdout


def test_openssl_holds_the_name_constraints(issued: Issued) -> None:
    """A leaf of another trust domain below our CA is refused by others, too."""
    outside = forge(
        subject="",
        key=workload_key(),
        issuer=issued.intermediate,
        issuer_key=signing_key(issued.issuer.key.algorithm, 92),
        extensions=leaf_extensions("spiffe://example.com/a"),
        now=NOW,
    )
    (issued.folder / "outside.pem").write_bytes(outside.public_bytes(Encoding.PEM))
    result = verify(issued, "outside")
    assert result.returncode != 0
    assert "permitted subtree violation" in result.stderr


@pytest.mark.clause("ID-4")
@pytest.mark.parametrize("name", ["my_domain", "10.0.0.1", "a..b", "localhost", "-", "a" * 255])
def test_id_4_openssl_takes_any_trust_domain(name: str, tmp_path: Path) -> None:
    """Name constraints are compared as text, so names that are no host names work as well."""
    domain = TrustDomain(name)
    below = hierarchy(domain, now=NOW)
    leaf = below.issue(SpiffeId(domain, "/a"), now=NOW).chain[:1]
    files = {
        "root": below.root.public_bytes(Encoding.PEM),
        "intermediate": below.intermediate.public_bytes(Encoding.PEM),
        "leaf": _pem(leaf),
    }
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    root, between, end = (str(tmp_path / file) for file in files)
    result = openssl("verify", "-x509_strict", "-CAfile", root, "-untrusted", between, end)
    assert result.returncode == 0, result.stderr


def test_py_spiffe_parses_svid_and_bundle(issued: Issued) -> None:
    key = workload_key(issued.issuer.key.algorithm).as_private_key()
    svid = X509Svid.parse_raw(
        b"".join(issued.good.chain),
        key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
    )
    assert str(svid.spiffe_id) == str(WORKLOAD_ID)
    assert len(svid.cert_chain) == 2
    bundle = TrustBundle(TRUST_DOMAIN, x509_authorities=(issued.root.public_bytes(Encoding.DER),))
    theirs = X509Bundle.parse(TheirTrustDomain("example.org"), bundle.to_pem())
    assert theirs.x509_authorities == {issued.root}


def findings(tool: str, *arguments: str) -> set[tuple[str, str]]:
    """What pkilint reports at WARNING or above, as (code, message)."""
    result = subprocess.run(
        [
            str(Path(sys.executable).with_name(tool)),
            *("lint", "-s", "WARNING", "-f", "JSON"),
            *arguments,
        ],
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


def only_scheme(spiffe_id: str) -> set[tuple[str, str]]:
    """pkilint's one false alarm: its URL check knows nine schemes, and `spiffe` is none of them.

    RFC 5280 section 4.2.1.6 asks for a URI of RFC 3986, which a SPIFFE ID is.
    """
    return {("pkix.invalid_uri_syntax", f'Invalid URI syntax: "{spiffe_id}"')}


@pytest.mark.parametrize("name", ["leaf", "plain", "pointing", "intermediate", "root"])
def test_pkilint_finds_nothing_in_certificates(issued: Issued, name: str) -> None:
    expected = only_scheme(
        str(WORKLOAD_ID if name in ("leaf", "plain", "pointing") else TRUST_DOMAIN.id)
    )
    assert findings("lint_pkix_cert", issued.path(name)) == expected


def test_pkilint_finds_nothing_in_crls(issued: Issued) -> None:
    assert findings("lint_crl", "-t", "CRL", "-p", "PKIX", issued.path("crl")) == set()
    assert findings("lint_crl", "-t", "ARL", "-p", "PKIX", issued.path("root_crl")) == set()


@pytest.mark.parametrize("kind", ["full", "part", "delta"])
def test_pkilint_finds_nothing_in_any_kind_of_crl(issued: Issued, kind: str) -> None:
    assert findings("lint_crl", "-t", "CRL", "-p", "PKIX", issued.path(f"{kind}_crl")) == set()


@pytest.fixture
def grpc_server(issued: Issued) -> Iterator[tuple[int, list[bytes]]]:
    seen: list[bytes] = []

    def echo(request: bytes, context: grpc.ServicerContext) -> bytes:
        seen.extend(bytes(each) for each in context.auth_context().get("peer_spiffe_id", []))
        return request

    server = grpc.server(futures.ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers(
        [
            grpc.method_handlers_generic_handler(
                "test", {"Echo": grpc.unary_unary_rpc_method_handler(echo)}
            )
        ]
    )
    credentials = grpc.ssl_server_credentials(
        [(issued.files["key"], issued.files["chain"])],
        issued.files["root"],
        require_client_auth=True,
    )
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    yield port, seen
    server.stop(None).wait()


def test_grpc_accepts_an_empty_subject_and_pins_the_derived_name(
    issued: Issued, grpc_server: tuple[int, list[bytes]]
) -> None:
    port, seen = grpc_server
    credentials = grpc.ssl_channel_credentials(
        issued.files["root"], issued.files["key"], issued.files["chain"]
    )

    def call(name: str) -> bytes:
        options = [("grpc.ssl_target_name_override", name)]
        with grpc.secure_channel(f"127.0.0.1:{port}", credentials, options=options) as channel:
            echo: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/test/Echo")
            answer = echo(b"hello", timeout=10)
            return answer

    assert call(WORKLOAD_ID.dns_san() or "") == b"hello"
    assert seen == [str(WORKLOAD_ID).encode()]
    with pytest.raises(grpc.RpcError):
        call(f"{'a' * 52}.svid.example.org")


def test_python_ssl_accepts_an_empty_subject(issued: Issued) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.verify_mode = ssl.CERT_REQUIRED
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for context in (server, client):
        context.load_cert_chain(issued.path("chain"), issued.path("key"))
        context.load_verify_locations(issued.path("root"))
    ours, theirs = socket.socketpair()
    peers: list[object] = []

    def serve() -> None:
        with server.wrap_socket(theirs, server_side=True) as tls:
            peers.append(tls.getpeercert())
            tls.recv(1)

    thread = threading.Thread(target=serve)
    thread.start()
    with client.wrap_socket(ours, server_hostname=WORKLOAD_ID.dns_san()) as tls:
        tls.send(b".")
        thread.join(10)
    (peer,) = peers
    assert isinstance(peer, dict)
    assert ("URI", str(WORKLOAD_ID)) in peer["subjectAltName"]
