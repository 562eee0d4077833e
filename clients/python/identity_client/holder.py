"""The state every source shares: the current snapshot, what is denied, what went wrong last.

- One writer (the source's event loop), any number of reading threads. Readers take one reference
  to an immutable value and need no lock.
- What has expired, was revoked or was withdrawn is not handed out any more, whatever else fails.
- A failure of a subscriber never reaches the source.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from identity_client.clock import utc_now
from identity_client.credential import (
    NO_FEDERATION,
    BundleSnapshot,
    Federated,
    IdentitySnapshot,
    X509Material,
)
from identity_client.errors import (
    IdentityError,
    IdentityExpired,
    IdentityNotReady,
    IdentityRevoked,
    IdentityWithdrawn,
    SourceClosed,
)
from identity_client.revocation import DenySet, RevocationList, RevokedCredential
from identity_client.staleness import DEFAULT_STALENESS, StalenessPolicy

__all__ = ["IdentityHolder", "SourceState", "SourceStatus", "Subscriber", "Unsubscribe"]

_logger = logging.getLogger(__name__)

Subscriber = Callable[[IdentitySnapshot], None]
Unsubscribe = Callable[[], None]


class SourceState(StrEnum):
    """Where a source stands."""

    STARTING = "starting"  # nothing was issued yet
    READY = "ready"
    REVOKED = "revoked"  # our certificate was revoked and no other could be issued
    WITHDRAWN = "withdrawn"  # this process is not entitled to its identity any more
    EXPIRED = "expired"  # our certificate expired before it could be renewed
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class SourceStatus:
    """A source's health, for a readiness endpoint or a log line; holds no secret.

    Attributes:
        state: see SourceState.
        ready: whether `snapshot()` hands out an identity now.
        spiffe_id: who we are; empty until known.
        serial: our certificate's serial number.
        expires_at: when our certificate expires.
        revocations_synced: whether revocations arrive as they happen; if not, peers are checked
            against those known so far.
        revocations_heard_at: when something was last heard about revocations, "nothing new"
            included; None for never.
        revocations_stale: whether that is longer ago than the source's staleness policy allows.
        last_error: the last failure, None after a success.
        last_error_at: when that was.
        failures: how many attempts have failed in a row.
    """

    state: SourceState
    ready: bool
    spiffe_id: str
    serial: str
    expires_at: datetime | None
    revocations_synced: bool
    revocations_heard_at: datetime | None
    revocations_stale: bool
    last_error: IdentityError | None
    last_error_at: datetime | None
    failures: int


class IdentityHolder:
    """Holds what a source obtained. Writers are the source's loop alone; readers are any thread."""

    def __init__(self, staleness: StalenessPolicy = DEFAULT_STALENESS) -> None:
        self.denied = DenySet(staleness)
        self._snapshot: IdentitySnapshot | None = None
        self._revoked = False
        self._withdrawn: IdentityError | None = None
        self._closed = False
        self._crls: tuple[bytes, ...] = ()
        self._failure: tuple[IdentityError, datetime, int] | None = None
        self._subscribers: tuple[Subscriber, ...] = ()
        self._pid = os.getpid()

    # --- for readers ---------------------------------------------------------------------------

    def snapshot(self) -> IdentitySnapshot:
        """The current identity.

        Raises:
            SourceError: there is none to hand out; the leaf class says why.
        """
        current = self._snapshot
        if (
            current is None
            or self._revoked
            or self._withdrawn is not None
            or self._closed
            or time.time() >= current.expires_at
            or os.getpid() != self._pid
        ):
            raise self._refusal(current)
        return current

    def peek(self) -> IdentitySnapshot | None:
        """The last identity, whether or not it may still be used; None before the first."""
        return self._snapshot

    @property
    def crls(self) -> tuple[bytes, ...]:
        """The newest certificate revocation lists, DER; empty where none are sent."""
        return self._crls

    def status(self) -> SourceStatus:
        """The source's health at this moment."""
        current = self._snapshot
        state = self._state(current)
        error, error_at, failures = self._failure or (None, None, 0)
        return SourceStatus(
            state=state,
            ready=state is SourceState.READY,
            spiffe_id=str(current.spiffe_id) if current else "",
            serial=current.serial if current else "",
            expires_at=current.not_after if current else None,
            revocations_synced=self.denied.synced,
            revocations_heard_at=self.denied.heard_at,
            revocations_stale=self.denied.is_stale(),
            last_error=error,
            last_error_at=error_at,
            failures=failures,
        )

    def subscribe(self, subscriber: Subscriber) -> Unsubscribe:
        """Calls `subscriber` with every new snapshot, on the source's own thread.

        It must return quickly. The returned function ends the subscription.
        """
        self._subscribers = (*self._subscribers, subscriber)

        def unsubscribe() -> None:
            self._subscribers = tuple(s for s in self._subscribers if s is not subscriber)

        return unsubscribe

    # --- for the source ------------------------------------------------------------------------

    def publish(
        self, material: X509Material, bundle: BundleSnapshot, federated: Federated = NO_FEDERATION
    ) -> IdentitySnapshot:
        """A new certificate: the one assignment that readers see."""
        revision = self._snapshot.revision + 1 if self._snapshot else 1
        fresh = IdentitySnapshot(
            x509=material, bundle=bundle, federated=federated, revision=revision
        )
        self._revoked = self._is_denied(fresh)
        self._withdrawn = None
        self._announce(fresh)
        return fresh

    def publish_bundle(self, bundle: BundleSnapshot, federated: Federated = NO_FEDERATION) -> None:
        """New bundles beside the same certificate."""
        current = self._snapshot
        if current is not None and not current.same_bundles(bundle, federated):
            self._announce(current.with_bundle(bundle, federated))

    def revoke(self, revoked: Iterable[RevokedCredential], *, now: datetime) -> bool:
        """Denies credentials; returns whether our own certificate became one of them."""
        return self.denials_changed(somebody_denied=bool(self.denied.add(revoked, now=now)))

    def take_lists(self, lists: Iterable[RevocationList], crls: tuple[bytes, ...]) -> None:
        """The newest revocation lists, in place of those before; they may take our own, or not."""
        self.denied.replace_lists(lists, now=utc_now())
        self._crls = crls
        self.denials_changed(somebody_denied=True)

    def denials_changed(self, *, somebody_denied: bool) -> bool:
        """The deny set is another: our own certificate and open connections are looked at again.

        Returns:
            Whether our own certificate was not denied before.
        """
        current = self._snapshot
        fell = False
        if current is not None:
            was_revoked, self._revoked = self._revoked, self._is_denied(current)
            fell = self._revoked and not was_revoked
            if fell:
                self._note_revoked(current)
        if somebody_denied:
            self.denied.tell_watchers()
        return fell

    def withdraw(self, why: IdentityError) -> None:
        """Hands out nothing until the next `publish`: we are not entitled to it any more."""
        if self._withdrawn is None and self._snapshot is not None:
            _logger.warning("identity withdrawn: %s: %s", self._snapshot.spiffe_id, why)
        self._withdrawn = why

    def record_failure(self, error: IdentityError) -> None:
        """Remembers why the last attempt failed."""
        failures = self._failure[2] + 1 if self._failure else 1
        self._failure = (error, utc_now(), failures)

    def record_success(self) -> None:
        """Forgets the last failure."""
        self._failure = None

    def close(self) -> None:
        """Hands out nothing any more."""
        self._closed = True
        self._subscribers = ()

    @property
    def withdrawn(self) -> bool:
        """Whether we are not entitled to our identity any more."""
        return self._withdrawn is not None

    @property
    def revoked(self) -> bool:
        """Whether our own certificate is revoked."""
        return self._revoked

    def _is_denied(self, snapshot: IdentitySnapshot) -> bool:
        return self.denied.denies(snapshot.serial, snapshot.x509.issuer)

    def _note_revoked(self, current: IdentitySnapshot) -> None:
        self._revoked = True
        _logger.warning("identity revoked: %s, serial %s", current.spiffe_id, current.serial)

    def _announce(self, snapshot: IdentitySnapshot) -> None:
        self._snapshot = snapshot
        for subscriber in self._subscribers:
            try:
                subscriber(snapshot)
            except Exception:  # Foreign code: its bug must not end the rotation of identities.
                _logger.exception("a subscriber of the identity source failed")

    def _state(self, current: IdentitySnapshot | None) -> SourceState:
        if self._closed:
            return SourceState.CLOSED
        if current is None:
            return SourceState.STARTING
        if self._revoked:
            return SourceState.REVOKED
        if self._withdrawn is not None:
            return SourceState.WITHDRAWN
        if time.time() >= current.expires_at:
            return SourceState.EXPIRED
        return SourceState.READY

    def _refusal(self, current: IdentitySnapshot | None) -> IdentityError:
        if os.getpid() != self._pid:
            return SourceClosed(
                "the identity source was made before this process was forked",
                reason="SOURCE_FORKED",
                hint="make the source in the child process",
            )
        name = f'"{current.spiffe_id}"' if current else ""
        because = f" (last failure: {self._failure[0].message})" if self._failure else ""
        match self._state(current):
            case SourceState.CLOSED:
                return SourceClosed()
            case SourceState.REVOKED:
                return IdentityRevoked(
                    f"the identity {name} is revoked{because}",
                    hint=f"idb credential list --spiffe-id {name} says when and why",
                )
            case SourceState.WITHDRAWN:
                return IdentityWithdrawn(
                    f"this process may not use the identity {name} any more{because}"
                )
            case SourceState.EXPIRED:
                return IdentityExpired(
                    f"the identity {name} expired before it could be renewed{because}"
                )
            case _:
                return IdentityNotReady(f"{IdentityNotReady.sentence}{because}")
