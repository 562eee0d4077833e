"""OCSP responders through the door: any authority's key can certify one, active or not."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from cryptography import x509

from identity_broker.signing.door import Signing
from identity_ca.authority import Authority
from identity_ca.keys import PublicKey, SigningKey
from identity_ca.ocsp_responder import PreparedResponder, prepare_responder, sign_responder


@dataclass(frozen=True, slots=True)
class _Issuer:
    certificate: x509.Certificate
    key: SigningKey


async def prepare(
    signing: Signing, authority: Authority, public_key: PublicKey, now: datetime
) -> PreparedResponder:
    """Encode the certificate of a responder of that authority; nothing is signed yet.

    Raises:
        AuthorityUnavailable: the authority's key is lost.
        SigningBackendUnavailable: the key manager did not answer.
        PolicyViolation: the authority is not valid now.
    """

    def prepared(key: SigningKey) -> PreparedResponder:
        return prepare_responder(
            issuer=_Issuer(x509.load_der_x509_certificate(authority.chain[0]), key),
            trust_domain=signing.trust_domain,
            public_key=public_key,
            now=now,
        )

    return await signing.with_key(authority, prepared)


async def certify(
    signing: Signing, authority: Authority, prepared: PreparedResponder
) -> x509.Certificate:
    """Sign what was prepared, with the authority's key.

    Raises:
        AuthorityUnavailable: the authority's key is lost.
        SigningBackendUnavailable: the key manager did not answer.
    """
    return await signing.with_key(authority, lambda key: sign_responder(prepared, key))
