"""Makes a workload's key and its CSR, and checks what the broker made of them.

- A key is made here and leaves only with the SVID it belongs to.
- The CSR carries the key alone: the broker takes the names from the entry.
- What comes back is trusted with nothing: our key, the entry's SPIFFE ID, a path to the bundle.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from identity_broker.agent.identity import X509Identity
from identity_broker.agent.svids import Issued
from identity_ca.bundle import TrustBundle
from identity_ca.chain import verify_x509_svid
from identity_ca.errors import CAError
from identity_ca.keys import KeyAlgorithm, generate_private_key, signature_hash, spki_der
from identity_client.errors import ProtocolViolation
from identity_client.node.values import IssuedX509, SyncedEntry

_DEFAULT: Final = KeyAlgorithm.EC_P256
_MADE: Final = frozenset({KeyAlgorithm.EC_P256, KeyAlgorithm.EC_P384, KeyAlgorithm.RSA_2048})
_NO_NAME: Final = x509.Name([])


@dataclass(frozen=True, slots=True)
class KeyOrder:
    """A fresh key on its way to an SVID. The key is secret."""

    key: bytes = field(repr=False)
    public_key: bytes = field(repr=False)
    csr: bytes = field(repr=False)


def algorithm_for(entry: SyncedEntry) -> KeyAlgorithm:
    """The kind of key the entry asks for.

    Raises:
        ProtocolViolation: one that this agent does not make.
    """
    if not entry.key_algorithm:
        return _DEFAULT
    for algorithm in _MADE:
        if algorithm.value == entry.key_algorithm:
            return algorithm
    raise ProtocolViolation(
        "the entry asks for a kind of key that this agent does not make",
        reason="KEY_ALGORITHM_UNKNOWN",
        hint="update the agent, or the entry's key type",
    )


async def make_order(algorithm: KeyAlgorithm) -> KeyOrder:
    """A fresh key and its CSR; an RSA key is made beside the loop, for it takes its time."""
    if algorithm is KeyAlgorithm.RSA_2048:
        return await asyncio.to_thread(_order, algorithm)
    return _order(algorithm)


def _order(algorithm: KeyAlgorithm) -> KeyOrder:
    key = generate_private_key(algorithm)
    assert isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey)  # noqa: S101  # see _MADE
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(_NO_NAME)
        .sign(key, signature_hash(algorithm))
    )
    return KeyOrder(
        key=key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
        public_key=spki_der(key.public_key()),
        csr=csr.public_bytes(Encoding.DER),
    )


def check_issued(
    issued: IssuedX509,
    *,
    order: KeyOrder,
    entry: SyncedEntry,
    bundle: TrustBundle,
    now: datetime,
) -> Issued:
    """The SVID, once it is known to be what was ordered.

    Raises:
        ProtocolViolation: another key or SPIFFE ID, or no path to the bundle
            (reason CHAIN_UNTRUSTED).
    """
    try:
        verified = verify_x509_svid(issued.chain, bundle=bundle, now=now)
    except CAError as exc:
        raise ProtocolViolation(
            exc.message,
            reason="CHAIN_UNTRUSTED",
            hint="compare this machine's clock with the broker's",
        ) from exc
    if str(verified.spiffe_id) != entry.spiffe_id:
        raise ProtocolViolation(
            "the broker issued another identity than was asked for", reason="IDENTITY_CHANGED"
        )
    if spki_der(verified.public_key) != order.public_key:
        raise ProtocolViolation("the broker issued an SVID for another key than ours")
    chain = [verified.leaf, *map(_loaded, issued.chain[1:])]
    return Issued(
        identity=X509Identity(
            entry_id=entry.id,
            spiffe_id=entry.spiffe_id,
            hint=entry.hint,
            chain=issued.chain,
            key=order.key,
            serial=verified.serial,
            not_after=verified.not_after,
        ),
        entry_revision=entry.revision,
        anchor=_anchor_of(chain, bundle),
        signers=frozenset(filter(None, map(_signer_of, chain))),
    )


def _signer_of(certificate: x509.Certificate) -> str:
    """The id of the authority that signed it; empty where it names none."""
    try:
        named = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier)
    except x509.ExtensionNotFound:
        return ""
    return (named.value.key_identifier or b"").hex()


def _anchor_of(chain: Sequence[x509.Certificate], bundle: TrustBundle) -> bytes:
    """The authority of the bundle that a verified chain leads to."""
    subjects = {one.subject for one in chain}
    for top in chain:
        if top.issuer in subjects:
            continue
        for der in bundle.x509_authorities:
            if _names_issuer(top, _loaded(der)):
                return der
    raise ProtocolViolation("the chain has no authority above it", reason="CHAIN_UNTRUSTED")


def _names_issuer(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether `certificate` says that `authority` signed it; the key ID tells namesakes apart."""
    if certificate.issuer != authority.subject:
        return False
    try:
        wanted = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier)
        found = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    except x509.ExtensionNotFound:
        return True
    return wanted.value.key_identifier in (None, found.value.digest)


@lru_cache(maxsize=64)
def _loaded(der: bytes) -> x509.Certificate:
    return x509.load_der_x509_certificate(der)
