"""The life of a signing authority: a pure state machine, the same for X.509 and JWT.

    PREPARED ──activate──▶ ACTIVE ──activate(another)──▶ OLD
        │                     └──────────taint───────────┤
        ├──drop──▶ (gone)                                ▼
        └──revoke─────────────────▶ REVOKED ◀──revoke── TAINTED

- An `AuthoritySet` holds one kind, at most one PREPARED and at most one ACTIVE; it cannot be built
  otherwise.
- Sets and authorities are values: every transition returns a new set, an illegal one raises and
  changes nothing.
- REVOKED is terminal. A revoked authority is never trusted again; its record stays until it
  expires.
- An active authority is never pruned: losing it is a fault to see, not an entry to tidy away.
- Nothing here reads a clock: `now` is always an argument, in aware UTC.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

from identity_ca.bundle import JwtKey, TrustBundle
from identity_ca.errors import AuthorityTransitionError
from identity_ca.keys import KeyAlgorithm
from identity_ca.spiffe_id import TrustDomain


class AuthorityKind(StrEnum):
    """What an authority signs."""

    X509 = "x509"
    JWT = "jwt"


class AuthorityState(StrEnum):
    """Where an authority stands in its life."""

    PREPARED = "prepared"
    """Published, so that verifiers learn it; signs nothing yet."""
    ACTIVE = "active"
    """Signs."""
    OLD = "old"
    """Signs no more; what it signed is still trusted."""
    TAINTED = "tainted"
    """What it signed must be replaced now; still trusted while that happens."""
    REVOKED = "revoked"
    """No longer trusted; terminal."""


TRUSTED_STATES: Final = frozenset(
    {
        AuthorityState.PREPARED,
        AuthorityState.ACTIVE,
        AuthorityState.OLD,
        AuthorityState.TAINTED,
    }
)

_TAINTABLE: Final = frozenset({AuthorityState.ACTIVE, AuthorityState.OLD})
_REVOCABLE: Final = frozenset({AuthorityState.PREPARED, AuthorityState.TAINTED})


@dataclass(frozen=True, slots=True)
class Authority:
    """One signing key with everything needed to publish it and to sign with it again.

    Attributes:
        id: stable name: the subject key identifier in hex (X.509), or the `kid` (JWT).
        kind: what it signs.
        state: where it stands.
        key_id: the key's name in its key manager, version included.
        algorithm: the key's algorithm.
        public_key_der: SubjectPublicKeyInfo, DER.
        chain: X.509 only; DER, its own certificate first, without the root unless it is the root.
        roots: X.509 only; DER certificates verifiers have to trust.
        upstream: who certified it: "selfsigned", "disk", "vault_pki"; "none" for JWT.
        created_at: when it was prepared, hence first published; aware UTC.
        not_before: start of its validity; aware UTC.
        not_after: end of its validity, which nothing it signs may outlive; aware UTC.
    """

    id: str
    kind: AuthorityKind
    state: AuthorityState
    key_id: str
    algorithm: KeyAlgorithm
    public_key_der: bytes
    chain: tuple[bytes, ...]
    roots: tuple[bytes, ...]
    upstream: str
    created_at: datetime
    not_before: datetime
    not_after: datetime

    @property
    def trusted(self) -> bool:
        """Whether verifiers should still accept what it signed."""
        return self.state in TRUSTED_STATES

    @property
    def lifetime(self) -> timedelta:
        """From `not_before` to `not_after`."""
        return self.not_after - self.not_before


@dataclass(frozen=True, slots=True)
class AuthoritySet:
    """All authorities of one kind that are still remembered, in the order they were prepared.

    Raises:
        AuthorityTransitionError: the authorities contradict each other (two active, two prepared,
            an id used twice, another kind), as a damaged store could hold them.
    """

    kind: AuthorityKind
    authorities: tuple[Authority, ...] = ()

    def __post_init__(self) -> None:
        strangers = [a.id for a in self.authorities if a.kind is not self.kind]
        if strangers:
            raise AuthorityTransitionError(
                f"authority {strangers[0]} does not sign {self.kind.value}"
            )
        if len({a.id for a in self.authorities}) != len(self.authorities):
            raise AuthorityTransitionError(f"two {self.kind.value} authorities share one id")
        for state in (AuthorityState.PREPARED, AuthorityState.ACTIVE):
            holders = [a.id for a in self.authorities if a.state is state]
            if len(holders) > 1:
                raise AuthorityTransitionError(
                    f"more than one {self.kind.value} authority is {state.value}",
                    detail=", ".join(holders),
                )

    def __iter__(self) -> Iterator[Authority]:
        return iter(self.authorities)

    def __len__(self) -> int:
        return len(self.authorities)

    @property
    def active(self) -> Authority | None:
        """The one that signs."""
        return self._only(AuthorityState.ACTIVE)

    @property
    def prepared(self) -> Authority | None:
        """The one that signs next."""
        return self._only(AuthorityState.PREPARED)

    @property
    def trusted(self) -> tuple[Authority, ...]:
        """Those whose signatures are to be accepted: PREPARED, ACTIVE, OLD and TAINTED."""
        return tuple(a for a in self.authorities if a.trusted)

    def get(self, authority_id: str) -> Authority:
        """The authority of that id.

        Raises:
            AuthorityTransitionError: there is none.
        """
        for authority in self.authorities:
            if authority.id == authority_id:
                return authority
        raise AuthorityTransitionError(
            f"there is no {self.kind.value} authority {authority_id!r}",
            hint="idb authority list",
        )

    def prepare(self, authority: Authority) -> AuthoritySet:
        """Add a PREPARED authority.

        Raises:
            AuthorityTransitionError: it is not PREPARED, of another kind, its id is taken, or
                another one is prepared already.
        """
        if authority.state is not AuthorityState.PREPARED:
            raise AuthorityTransitionError(
                f"a new authority starts as prepared, not as {authority.state.value}"
            )
        if self.prepared is not None:
            raise AuthorityTransitionError(
                f"{self.kind.value} authority {self.prepared.id} is prepared already",
                hint="activate or drop it first",
            )
        return AuthoritySet(self.kind, (*self.authorities, authority))

    def activate(self, authority_id: str) -> AuthoritySet:
        """Let the PREPARED authority sign; the one that signed until now becomes OLD.

        Raises:
            AuthorityTransitionError: unknown, or not PREPARED.
        """
        self._require(authority_id, frozenset({AuthorityState.PREPARED}), "activated")

        def moved(authority: Authority) -> Authority:
            if authority.id == authority_id:
                return replace(authority, state=AuthorityState.ACTIVE)
            if authority.state is AuthorityState.ACTIVE:
                return replace(authority, state=AuthorityState.OLD)
            return authority

        return AuthoritySet(self.kind, tuple(moved(a) for a in self.authorities))

    def taint(self, authority_id: str) -> AuthoritySet:
        """Mark an ACTIVE or OLD authority as not to be relied on; an ACTIVE one stops signing.

        Raises:
            AuthorityTransitionError: unknown, or in another state.
        """
        self._require(authority_id, _TAINTABLE, "tainted")
        return self._with_state(authority_id, AuthorityState.TAINTED)

    def revoke(self, authority_id: str) -> AuthoritySet:
        """End the trust in a TAINTED or PREPARED authority, for good.

        Raises:
            AuthorityTransitionError: unknown, or in another state (taint it first, so that what it
                signed is replaced before it is refused).
        """
        self._require(authority_id, _REVOCABLE, "revoked")
        return self._with_state(authority_id, AuthorityState.REVOKED)

    def drop(self, authority_id: str) -> AuthoritySet:
        """Forget a PREPARED authority, which has signed nothing.

        Raises:
            AuthorityTransitionError: unknown, or not PREPARED.
        """
        self._require(authority_id, frozenset({AuthorityState.PREPARED}), "dropped")
        return AuthoritySet(self.kind, tuple(a for a in self.authorities if a.id != authority_id))

    def prune(self, now: datetime) -> AuthoritySet:
        """Forget every authority that has expired at `now`, except the active one."""
        return AuthoritySet(
            self.kind,
            tuple(
                a for a in self.authorities if a.state is AuthorityState.ACTIVE or a.not_after > now
            ),
        )

    def _only(self, state: AuthorityState) -> Authority | None:
        return next((a for a in self.authorities if a.state is state), None)

    def _require(self, authority_id: str, allowed: frozenset[AuthorityState], verb: str) -> None:
        authority = self.get(authority_id)
        if authority.state not in allowed:
            wanted = " or ".join(sorted(state.value for state in allowed))
            raise AuthorityTransitionError(
                f"{self.kind.value} authority {authority_id} is {authority.state.value}; "
                f"only a {wanted} one can be {verb}",
                hint="idb authority list",
            )

    def _with_state(self, authority_id: str, state: AuthorityState) -> AuthoritySet:
        return AuthoritySet(
            self.kind,
            tuple(replace(a, state=state) if a.id == authority_id else a for a in self.authorities),
        )


# --- when the next step is due --------------------------------------------------------------


def preparation_time(active: Authority) -> datetime:
    """When its successor should be prepared: at half of its life."""
    return active.not_before + active.lifetime / 2


def activation_time(prepared: Authority, active: Authority, *, refresh_hint: timedelta) -> datetime:
    """When `prepared` should take over from `active`.

    At five sixths of the active one's life, but not before verifiers had one whole refresh hint
    to learn the new key (SPIFFE Federation section 4.1); and never later than the active one's
    end, when waiting longer would only add an outage.
    """
    published_long_enough = prepared.created_at + refresh_hint
    wanted = active.not_before + active.lifetime * 5 / 6
    return min(max(wanted, published_long_enough), active.not_after)


def preparation_due(active: Authority | None, now: datetime) -> bool:
    """Whether an authority should be prepared now, given that none is.

    Without an active one it always is.
    """
    return active is None or now >= preparation_time(active)


def activation_due(
    prepared: Authority, active: Authority | None, now: datetime, *, refresh_hint: timedelta
) -> bool:
    """Whether `prepared` should be activated now.

    Without an active one it always is: nothing can be issued until then.
    """
    if active is None:
        return True
    return now >= activation_time(prepared, active, refresh_hint=refresh_hint)


# --- what verifiers are told ----------------------------------------------------------------


def authority_bundle(
    x509: AuthoritySet,
    jwt: AuthoritySet,
    trust_domain: TrustDomain,
    sequence: int,
    refresh_hint: timedelta,
) -> TrustBundle:
    """The bundle that the trusted authorities of both kinds add up to.

    Roots are listed once, in the order their authorities were created. Two X.509 authorities below
    one root share it, so revoking one of them takes its root out only together with the other.

    Raises:
        AuthorityTransitionError: the sets are swapped.
    """
    if x509.kind is not AuthorityKind.X509 or jwt.kind is not AuthorityKind.JWT:
        raise AuthorityTransitionError("the X.509 and the JWT authorities are swapped")
    roots = dict.fromkeys(root for authority in _by_age(x509) for root in authority.roots)
    return TrustBundle(
        trust_domain=trust_domain,
        x509_authorities=tuple(roots),
        jwt_keys=tuple(
            JwtKey(key_id=a.id, public_key_der=a.public_key_der, expires_at=a.not_after)
            for a in _by_age(jwt)
        ),
        sequence=sequence,
        refresh_hint=refresh_hint,
    )


def _by_age(authorities: AuthoritySet) -> Iterable[Authority]:
    return sorted(authorities.trusted, key=lambda a: (a.created_at, a.id))
