"""The upstream that is none: every X.509 authority is its own root.

- For development and for trust domains that distribute their bundle themselves. Each rotation adds
  a root to the bundle, so verifiers have to follow the bundle.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

from identity_ca.authority_certificate import build_root
from identity_ca.keys import SigningKey
from identity_ca.spiffe_id import TrustDomain
from identity_ca.upstream import SignedAuthority, verify_upstream

__all__ = ["SelfSignedUpstream"]


class SelfSignedUpstream:
    """An `UpstreamAuthority` that has the key certify itself."""

    name: Final = "selfsigned"

    def certify(
        self, key: SigningKey, *, trust_domain: TrustDomain, ttl: timedelta, now: datetime
    ) -> SignedAuthority:
        """A root certificate for `key`, which may sign leaves and no CA.

        Raises:
            ProfileViolation: the lifetime is outside the profile `ROOT`.
            BackendUnavailable, BackendMisconfigured, KeyNotFound: from a remote key.
        """
        root = build_root(key, trust_domain=trust_domain, ttl=ttl, now=now, path_length=0)
        signed = SignedAuthority(chain=(root,), roots=(root,))
        verify_upstream(signed, key=key, trust_domain=trust_domain, ttl=ttl, now=now)
        return signed

    def revocation_lists(
        self, *, number: int, this_update: datetime, next_update: datetime
    ) -> tuple[bytes, ...]:
        """None: there is no authority above ours."""
        return ()

    def check(self) -> None:
        """There is nothing it depends on."""

    def close(self) -> None:
        """Nothing is held open."""
