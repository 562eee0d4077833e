"""Revocation lists through the door: any authority's key can sign one, the active one's or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509

from identity_broker.signing.door import Signing
from identity_ca.authority import Authority
from identity_ca.crl import sign_crl
from identity_ca.keys import SigningKey


@dataclass(frozen=True, slots=True)
class _Issuer:
    certificate: x509.Certificate
    key: SigningKey


async def sign_list(
    signing: Signing,
    authority: Authority,
    *,
    encoded_entries: Sequence[bytes],
    number: int,
    this_update: datetime,
    next_update: datetime,
    scope_url: str = "",
    base_number: int | None = None,
    delta_url: str = "",
) -> bytes:
    """Return the authority's revocation list, DER; the arguments are `identity_ca.crl.sign_crl`'s.

    Raises:
        AuthorityUnavailable: its key is lost.
        SigningBackendUnavailable: the key manager did not answer.
        PolicyViolation, InvariantViolated: the authority may not sign lists.
    """

    def sign(key: SigningKey) -> bytes:
        certificate = x509.load_der_x509_certificate(authority.chain[0])
        return sign_crl(
            issuer=_Issuer(certificate, key),
            encoded_entries=encoded_entries,
            number=number,
            this_update=this_update,
            next_update=next_update,
            scope_url=scope_url,
            base_number=base_number,
            delta_url=delta_url,
        )

    return await signing.with_key(authority, sign)
