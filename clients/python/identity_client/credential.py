"""What a source hands out: an immutable snapshot of one identity and what to check others with.

- Key, chain, bundles and revision belong together and are swapped in one assignment: nobody sees
  one generation's key with another's chain.
- Nothing enters a snapshot unchecked: the chain must belong to our key, name the identity asked
  for, be valid and lead to the trust bundle.
- PEM forms are made once per snapshot; keys never appear in a representation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import pairwise
from types import MappingProxyType

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from spiffe import JwtBundle, SpiffeId, TrustDomain, X509Bundle, X509Svid

from identity_client.errors import ObjectNotFound, PeerRejected, ProtocolViolation
from identity_client.keys import spki_der
from identity_client.peer import peer_from_der
from identity_client.revocation import Issuer

__all__ = [
    "NO_FEDERATION",
    "BundleSnapshot",
    "Federated",
    "IdentitySnapshot",
    "WorkloadKey",
    "X509Material",
]

WorkloadKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
"""The kinds of key an SVID may have."""


@dataclass(frozen=True, slots=True)
class BundleSnapshot:
    """A trust domain's keys at one moment.

    Attributes:
        trust_domain: whose.
        x509_authorities: CA certificates.
        jwt_bundle: the keys its JWT-SVIDs verify with.
        sequence: grows with every change; 0 for a trust anchor file.
        roots_pem: `x509_authorities` for a TLS library.
    """

    trust_domain: TrustDomain
    x509_authorities: tuple[x509.Certificate, ...]
    jwt_bundle: JwtBundle
    sequence: int
    roots_pem: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "roots_pem", _pem(self.x509_authorities))

    @property
    def x509_bundle(self) -> X509Bundle:
        """A copy as py-spiffe's type; changing it changes nothing here."""
        return X509Bundle(self.trust_domain, set(self.x509_authorities))

    def same_keys(self, other: BundleSnapshot) -> bool:
        """Whether nothing but the sequence differs."""
        return (
            self.trust_domain == other.trust_domain
            and self.x509_authorities == other.x509_authorities
            and self.jwt_bundle == other.jwt_bundle
        )


Federated = Mapping[TrustDomain, BundleSnapshot]
NO_FEDERATION: Federated = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class X509Material:
    """An X.509-SVID with its key, checked and ready for a TLS library.

    Attributes:
        svid: py-spiffe's value: SPIFFE ID, chain (leaf first) and private key.
        serial: the leaf's serial number as the broker's ledger writes it.
        received: when it was issued to us; renewal counts from here.
        hint: what its operator wrote about how to use it; empty for most.
        issuer: who signed it, as revocation lists name it.
        chain_pem: the chain; public.
        key_pem: the private key, PKCS #8; secret.
    """

    svid: X509Svid
    serial: str
    received: datetime
    hint: str = ""
    issuer: Issuer | None = field(default=None, repr=False)
    chain_pem: bytes = field(init=False, repr=False)
    key_pem: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "chain_pem", _pem(self.svid.cert_chain))
        key = self.svid.private_key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        object.__setattr__(self, "key_pem", key)

    @classmethod
    def from_chain(
        cls,
        chain: Sequence[bytes],
        *,
        private_key: WorkloadKey,
        bundle: BundleSnapshot,
        received: datetime,
        hint: str = "",
    ) -> X509Material:
        """The chain (DER, leaf first) with our key, after every check.

        Raises:
            ProtocolViolation: reason CHAIN_UNTRUSTED when it does not lead to `bundle` (a newer
                bundle may help), PROTOCOL_VIOLATION for anything else wrong with it.
        """
        try:
            certificates = [x509.load_der_x509_certificate(der) for der in chain]
        except (ValueError, x509.InvalidVersion) as exc:
            raise ProtocolViolation("the certificate chain cannot be read") from exc
        if not certificates:
            raise ProtocolViolation("the certificate chain is empty")
        leaf = certificates[0]
        if not _certifies(leaf, private_key):
            raise ProtocolViolation("the certificate is for another key than ours")
        try:
            peer = peer_from_der(chain[0])
        except PeerRejected as exc:
            raise ProtocolViolation("the certificate is not an X.509-SVID") from exc
        if peer.spiffe_id.trust_domain != bundle.trust_domain:
            raise ProtocolViolation("the certificate is of another trust domain")
        _check_path(certificates, bundle.x509_authorities)
        svid = X509Svid(peer.spiffe_id, certificates, private_key)
        return cls(svid=svid, serial=peer.serial, received=received, hint=hint, issuer=peer.issuer)

    @property
    def spiffe_id(self) -> SpiffeId:
        """Whom it names."""
        return self.svid.spiffe_id

    @property
    def not_after(self) -> datetime:
        """When it expires."""
        return self.svid.leaf.not_valid_after_utc


@dataclass(frozen=True, slots=True)
class IdentitySnapshot:
    """One identity and the bundles to check peers with, all of one moment.

    Attributes:
        x509: our X.509-SVID with its key.
        bundle: our own trust domain's keys.
        revision: grows by one with every snapshot of a source.
        federated: the keys of the trust domains ours federates with, by trust domain.
        expires_at: seconds since the epoch; when `x509` expires.
    """

    x509: X509Material
    bundle: BundleSnapshot
    revision: int
    federated: Federated = field(default_factory=lambda: NO_FEDERATION)
    expires_at: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "expires_at", self.x509.not_after.timestamp())

    @property
    def svid(self) -> X509Svid:
        """Our X.509-SVID as py-spiffe's type."""
        return self.x509.svid

    @property
    def spiffe_id(self) -> SpiffeId:
        """Who we are."""
        return self.x509.svid.spiffe_id

    @property
    def serial(self) -> str:
        """Our certificate's serial number, as the broker's ledger writes it."""
        return self.x509.serial

    @property
    def not_after(self) -> datetime:
        """When our certificate expires."""
        return self.x509.not_after

    @property
    def bundles(self) -> Mapping[TrustDomain, X509Bundle]:
        """Copies of the X.509 bundles, by trust domain."""
        known = (self.bundle, *self.federated.values())
        return MappingProxyType(
            {one.trust_domain: one.x509_bundle for one in known if one.x509_authorities}
        )

    def bundle_of(self, trust_domain: TrustDomain) -> BundleSnapshot:
        """All keys of `trust_domain`, which is ours or federated with it.

        Raises:
            ObjectNotFound: reason BUNDLE_NOT_FOUND.
        """
        if trust_domain == self.bundle.trust_domain:
            return self.bundle
        found = self.federated.get(trust_domain)
        if found is None:
            raise ObjectNotFound(
                f'no bundle of trust domain "{trust_domain}" is known', reason="BUNDLE_NOT_FOUND"
            )
        return found

    def x509_bundle(self, trust_domain: TrustDomain) -> X509Bundle:
        """The X.509 bundle of `trust_domain`.

        Raises:
            ObjectNotFound: reason BUNDLE_NOT_FOUND.
        """
        return self.bundle_of(trust_domain).x509_bundle

    def with_bundle(
        self, bundle: BundleSnapshot, federated: Federated | None = None
    ) -> IdentitySnapshot:
        """The next snapshot, with other bundles; None leaves those of others as they are."""
        federated = self.federated if federated is None else federated
        return replace(self, bundle=bundle, federated=federated, revision=self.revision + 1)

    def same_bundles(self, bundle: BundleSnapshot, federated: Federated) -> bool:
        """Whether nothing but their sequences differs from ours."""
        return (
            self.bundle.same_keys(bundle)
            and self.federated.keys() == federated.keys()
            and all(one.same_keys(federated[name]) for name, one in self.federated.items())
        )


def _certifies(leaf: x509.Certificate, private_key: WorkloadKey) -> bool:
    try:
        return spki_der(leaf.public_key()) == spki_der(private_key.public_key())
    except (ValueError, UnsupportedAlgorithm):
        return False  # A key this library cannot even read is not ours.


def _check_path(chain: Sequence[x509.Certificate], authorities: Iterable[x509.Certificate]) -> None:
    for issued, issuer in pairwise(chain):
        if not _issued_by(issued, issuer):
            raise ProtocolViolation("the certificate chain is broken")
    last = chain[-1]
    if not any(last == root or _issued_by(last, root) for root in authorities):
        raise ProtocolViolation(
            "the certificate chain does not lead to the trust bundle", reason="CHAIN_UNTRUSTED"
        )


def _issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _pem(certificates: Iterable[x509.Certificate]) -> bytes:
    return b"".join(one.public_bytes(serialization.Encoding.PEM) for one in certificates)
