"""What must not be trusted though it looks valid, in memory.

- Revoked credentials, the epochs of identities, blocked keys, and authorities that were revoked.
- Credentials, epochs and authorities leave when they have expired, a little late: verifiers' clocks
  differ. A blocked key never leaves.
- Touched by the event loop's thread alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from identity_broker.domain.credential import Revocation
from identity_broker.domain.revocation import IdentityEpoch
from identity_ca.authority import Authority, AuthorityState

MARGIN = timedelta(minutes=5)


class Denials:
    """What is to be refused.

    Attributes:
        revocations: by serial or jti.
        epochs: by identity.
        keys: fingerprints of blocked keys.
        authorities: the id of each revoked authority and the end of its validity.
    """

    __slots__ = ("authorities", "epochs", "keys", "revocations")

    def __init__(
        self,
        *,
        revocations: Iterable[Revocation] = (),
        epochs: Iterable[IdentityEpoch] = (),
        keys: Iterable[str] = (),
        authorities: Iterable[Authority] = (),
    ) -> None:
        self.revocations = {revocation.id: revocation for revocation in revocations}
        self.epochs = {epoch.spiffe_id: epoch for epoch in epochs}
        self.keys = set(keys)
        self.authorities = revoked_of(authorities)

    def forget(self, now: datetime) -> None:
        """Let go of what has expired by `now`."""
        limit = now - MARGIN
        for serial in [key for key, item in self.revocations.items() if item.expires_at < limit]:
            del self.revocations[serial]
        for identity in [key for key, item in self.epochs.items() if item.expires_at < limit]:
            del self.epochs[identity]
        for authority in [key for key, until in self.authorities.items() if until < limit]:
            del self.authorities[authority]


def revoked_of(authorities: Iterable[Authority]) -> dict[str, datetime]:
    """The id of each revoked authority and the end of its validity."""
    return {
        authority.id: authority.not_after
        for authority in authorities
        if authority.state is AuthorityState.REVOKED
    }
