"""Revocation lists through the door: any authority's key can sign one, the active one's or not."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509

from identity_broker.signing.door import Signing
from identity_ca.authority import Authority
from identity_ca.crl import sign_crl
from identity_ca.keys import SigningKey
from identity_ca.upstream import UpstreamAuthority, UpstreamList, verify_upstream_list


@dataclass(frozen=True, slots=True)
class _Issuer:
    certificate: x509.Certificate
    key: SigningKey


@dataclass(frozen=True, slots=True)
class SignedList:
    """A list, DER, and the CPU time it took to put together and sign, in seconds."""

    der: bytes
    busy_seconds: float


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
) -> SignedList:
    """Return a revocation list of the authority; the arguments are `identity_ca.crl.sign_crl`'s.

    Raises:
        AuthorityUnavailable: its key is lost.
        SigningBackendUnavailable: the key manager did not answer.
        PolicyViolation, InvariantViolated: the authority may not sign lists.
    """

    def sign(key: SigningKey) -> SignedList:
        started = time.thread_time()
        certificate = x509.load_der_x509_certificate(authority.chain[0])
        der = sign_crl(
            issuer=_Issuer(certificate, key),
            encoded_entries=encoded_entries,
            number=number,
            this_update=this_update,
            next_update=next_update,
            scope_url=scope_url,
            base_number=base_number,
            delta_url=delta_url,
        )
        return SignedList(der, time.thread_time() - started)

    return await signing.with_key(authority, sign)


async def lists_above(
    signing: Signing,
    *,
    number: int,
    this_update: datetime,
    next_update: datetime,
) -> list[UpstreamList]:
    """Return the lists of the authorities above ours that the upstream has, checked.

    Raises:
        SigningBackendUnavailable: the upstream did not answer, or not with lists of its own.
    """
    certificates = {
        der: x509.load_der_x509_certificate(der)
        for authority in signing.authorities.x509_set
        for der in (*authority.chain[1:], *authority.roots)
        if len(authority.chain) > 1 or authority.chain[0] not in authority.roots
    }

    def ask(upstream: UpstreamAuthority) -> list[UpstreamList]:
        lists = upstream.revocation_lists(
            number=number, this_update=this_update, next_update=next_update
        )
        return [verify_upstream_list(der, certificates.values()) for der in lists]

    return await signing.with_upstream(ask)
