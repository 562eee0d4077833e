"""Who certifies our signing key, and the check of what came back.

- The upstream is not trusted to do what it was asked: `verify_upstream` compares every property
  of the returned certificate, because real ones cut lifetimes and drop extensions silently.
- What does not pass is never published and never signs.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol

from cryptography import x509

from identity_ca.keys import SigningKey
from identity_ca.spiffe_id import TrustDomain

__all__ = ["SignedAuthority", "UpstreamAuthority", "verify_upstream"]


@dataclass(frozen=True, slots=True)
class SignedAuthority:
    """Our signing key, certified.

    Attributes:
        chain: our CA certificate first, then the intermediates above it, without the root; a
            self-signed authority has just its own root here.
        roots: what verifiers must trust, self-signed certificates.
    """

    chain: tuple[x509.Certificate, ...]
    roots: tuple[x509.Certificate, ...]


class UpstreamAuthority(Protocol):
    """Certifies a signing key as a CA of a trust domain; one plugin kind, see `backends/`."""

    @property
    def name(self) -> str: ...

    def certify(
        self, key: SigningKey, *, trust_domain: TrustDomain, ttl: timedelta, now: datetime
    ) -> SignedAuthority:
        """A CA certificate for `key`, checked with `verify_upstream`.

        Raises:
            UpstreamRejected, BackendUnavailable, BackendMisconfigured
        """
        ...

    def check(self) -> None:
        """Returns when the upstream can be used; signs nothing.

        Raises:
            BackendUnavailable, BackendMisconfigured
        """
        ...

    def close(self) -> None:
        """Gives back connections; twice is harmless."""
        ...


def verify_upstream(
    signed: SignedAuthority,
    *,
    key: SigningKey,
    trust_domain: TrustDomain,
    ttl: timedelta,
    now: datetime,
) -> None:
    """Returns when the upstream did exactly what was asked.

    Raises:
        UpstreamRejected: with a sentence naming the first property that differs.
    """
    raise NotImplementedError
