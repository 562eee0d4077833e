"""rotate: everything is replaced before it expires.

- Nodes renew their own SVID by calling; the one they called with is superseded.
- The broker's server SVID is replaced at half of its life.
- An authority is prepared at half of the active one's life, published, activated at five sixths,
  and forgotten when it has expired; one whose key is lost is replaced at once.
- One that is revoked is trusted no more from that moment on: if it was the active one, its
  successor signs at once, and the broker's own SVID is replaced before anybody is told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from identity_broker.domain.caller import Caller
from identity_broker.domain.clock import Clock
from identity_broker.domain.events import AuditEvent, AuditKind
from identity_broker.errors import AuthorityNotFound, ConfigError, NodeBanned, StaleWrite
from identity_broker.lifecycle.authorize import Authorize
from identity_broker.lifecycle.directory import Directory
from identity_broker.lifecycle.issue import Issue, X509Order, one
from identity_broker.signing import Signing
from identity_broker.store import Repositories, Store
from identity_broker.telemetry.logs import get_logger
from identity_ca.authority import (
    Authority,
    AuthorityKind,
    AuthoritySet,
    AuthorityState,
    activation_due,
    preparation_due,
)
from identity_ca.issuer import X509Credential
from identity_ca.keys import KeyAlgorithm, generate_private_key, signature_hash

_log = get_logger("rotate")

_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class AuthorityPolicy:
    """What new authorities look like."""

    x509_algorithm: KeyAlgorithm
    x509_ttl: timedelta
    jwt_algorithm: KeyAlgorithm
    jwt_ttl: timedelta
    refresh_hint: timedelta

    def algorithm(self, kind: AuthorityKind) -> KeyAlgorithm:
        """The key algorithm of new authorities of that kind."""
        return self.x509_algorithm if kind is AuthorityKind.X509 else self.jwt_algorithm

    def ttl(self, kind: AuthorityKind) -> timedelta:
        """How long new authorities of that kind are asked for."""
        return self.x509_ttl if kind is AuthorityKind.X509 else self.jwt_ttl


class RotateAuthorities:
    """Keeps one active authority of each kind, and the next one ready in time."""

    def __init__(
        self, *, signing: Signing, store: Store, policy: AuthorityPolicy, clock: Clock
    ) -> None:
        self._signing = signing
        self._store = store
        self._policy = policy
        self._clock = clock
        self._installing = asyncio.Lock()
        self._installed = 0

    async def start(self) -> None:
        """Put the stored authorities into force, and make what is missing.

        Raises:
            StoreUnavailable, SigningBackendUnavailable: the broker cannot start yet.
            ConfigError: the database holds another trust domain's authorities.
        """
        await self._refuse_another_trust_domain()
        for kind in AuthorityKind:
            # Another broker may start on the same store in this moment; whoever is second follows.
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    await self._step(kind, lost=await self._lost(kind))
                    break
                except StaleWrite:
                    if attempt == _ATTEMPTS:
                        raise
        await self.install()

    async def run(self) -> bool:
        """Do what is due now; return whether a new generation is in force.

        What an earlier run stored but could not put into force is put into force now.

        Raises:
            StoreUnavailable, SigningBackendUnavailable, StaleWrite: nothing was lost; run again.
        """
        for kind in AuthorityKind:
            await self._step(kind, lost=())
        return await self.install()

    async def revoke(self, authority_id: str, actor: str) -> None:
        """End the trust in an authority at once; one that is revoked already stays so.

        Raises:
            AuthorityNotFound: there is none with that id.
            StoreUnavailable, SigningBackendUnavailable, StaleWrite: repeat the call.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            now = self._clock.now()
            stored, _ = await self._stored()
            found = next((item for item in stored if item.id == authority_id), None)
            if found is None:
                raise AuthorityNotFound(f'there is no authority "{authority_id[:64]}"')
            if found.state is AuthorityState.REVOKED:
                break
            before = _set_of(found.kind, stored)
            after = before
            if found.state is AuthorityState.ACTIVE:
                after = await self._succeeded(after, now)
            if found.state in (AuthorityState.ACTIVE, AuthorityState.OLD):
                after = after.taint(found.id)
            try:
                await self._write(before, after.revoke(found.id), now, actor)
                break
            except StaleWrite:
                if attempt == _ATTEMPTS:
                    raise
        await self.install()

    async def _succeeded(self, authorities: AuthoritySet, now: datetime) -> AuthoritySet:
        """Let the prepared authority take over; a new one where there is none that can sign."""
        prepared = authorities.prepared
        if prepared is not None and await self._signing.missing_keys([prepared]):
            authorities, prepared = authorities.drop(prepared.id), None
        if prepared is None:
            kind = authorities.kind
            prepared = await self._signing.new_authority(
                kind, self._policy.algorithm(kind), self._policy.ttl(kind), now
            )
            authorities = authorities.prepare(prepared)
        return authorities.activate(prepared.id)

    async def install(self) -> bool:
        """Put what the store holds into force; return whether that is news. Never goes back.

        Raises:
            StoreUnavailable, SigningBackendUnavailable: the former generation stays in force.
        """
        async with self._installing:
            stored, sequence = await self._stored()
            if sequence <= self._installed:
                return False
            await self._signing.install(
                _set_of(AuthorityKind.X509, stored), _set_of(AuthorityKind.JWT, stored), sequence
            )
            self._installed = sequence
            return True

    async def _refuse_another_trust_domain(self) -> None:
        stored, _ = await self._stored()
        wanted = self._signing.trust_domain.id
        for authority in stored:
            for der in authority.chain[:1]:
                names = _uri_names(x509.load_der_x509_certificate(der))
                if names and str(wanted) not in names:
                    raise ConfigError(
                        f'the database belongs to the trust domain of "{names[0]}", '
                        f'not to "{self._signing.trust_domain}"',
                        hint="use another store.url, or the trust domain it was made for",
                    )

    async def _lost(self, kind: AuthorityKind) -> Sequence[Authority]:
        stored, _ = await self._stored()
        authorities = _set_of(kind, stored)
        needed = [item for item in (authorities.active, authorities.prepared) if item is not None]
        return await self._signing.missing_keys(needed)

    async def _step(self, kind: AuthorityKind, *, lost: Sequence[Authority]) -> bool:
        now = self._clock.now()
        stored, _ = await self._stored()
        before = _set_of(kind, stored)
        after = before.prune(now)
        lost_ids = {authority.id for authority in lost}
        if after.prepared is not None and after.prepared.id in lost_ids:
            after = after.drop(after.prepared.id)
        active = after.active
        usable = (
            active
            if active is not None and active.id not in lost_ids and now < active.not_after
            else None
        )
        if after.prepared is None and preparation_due(usable, now):
            after = after.prepare(
                await self._signing.new_authority(
                    kind, self._policy.algorithm(kind), self._policy.ttl(kind), now
                )
            )
        prepared = after.prepared
        if prepared is not None and activation_due(
            prepared, usable, now, refresh_hint=self._policy.refresh_hint
        ):
            after = after.activate(prepared.id)
        if after == before:
            return False
        await self._write(before, after, now)
        return True

    async def _write(
        self, before: AuthoritySet, after: AuthoritySet, now: datetime, actor: str = "broker"
    ) -> None:
        known = {authority.id: authority.state for authority in before}
        events = [
            AuditEvent(
                at=now,
                kind=kind,
                actor=actor,
                subject=authority.id,
                facts={"kind": authority.kind.value, "key": authority.key_id},
            )
            for authority in after
            for kind in _news(known.get(authority.id), authority)
        ]

        def write(repos: Repositories) -> None:
            if _set_of(after.kind, repos.authorities.all()) != before:
                raise StaleWrite("another broker changed the authorities in this moment")
            repos.authorities.replace_all(after.kind, list(after))
            for event in events:
                repos.audit.append(event)

        await self._store.write(write)
        for event in events:
            _log.info("authority changed", change=event.kind.value, authority_id=event.subject)

    async def _stored(self) -> tuple[list[Authority], int]:
        def read(repos: Repositories) -> tuple[list[Authority], int]:
            return list(repos.authorities.all()), repos.authorities.sequence()

        return await self._store.read(read)


def _uri_names(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return names.value.get_values_for_type(x509.UniformResourceIdentifier)


def _set_of(kind: AuthorityKind, stored: Sequence[Authority]) -> AuthoritySet:
    return AuthoritySet(kind, tuple(item for item in stored if item.kind is kind))


_KINDS: Final = {
    AuthorityState.PREPARED: AuditKind.AUTHORITY_PREPARED,
    AuthorityState.ACTIVE: AuditKind.AUTHORITY_ACTIVATED,
    AuthorityState.OLD: AuditKind.AUTHORITY_RETIRED,
    AuthorityState.TAINTED: AuditKind.AUTHORITY_TAINTED,
    AuthorityState.REVOKED: AuditKind.AUTHORITY_REVOKED,
}


def _news(before: AuthorityState | None, authority: Authority) -> list[AuditKind]:
    if before is authority.state:
        return []
    found = _KINDS[authority.state]
    if before is None and authority.state is AuthorityState.ACTIVE:
        return [AuditKind.AUTHORITY_PREPARED, found]
    return [found]


class RotateNode:
    """Issues a calling node its next SVID."""

    def __init__(
        self,
        *,
        authorize: Authorize,
        issue: Issue,
        store: Store,
        directory: Directory,
        clock: Clock,
    ) -> None:
        self._authorize = authorize
        self._issue = issue
        self._store = store
        self._directory = directory
        self._clock = clock

    async def renew(self, caller: Caller, csr: bytes, correlation_id: str = "") -> X509Credential:
        """Return the node's next SVID.

        Raises:
            NodeUnknown, NodeBanned: the node is not (or no longer) welcome.
            CsrRejected, KeyTooWeak, StoreUnavailable, SigningBackendUnavailable: nothing changed.
        """
        grant = self._authorize.renewal(caller)
        credential = one(await self._issue.x509([X509Order(grant, csr)], correlation_id))
        event = AuditEvent(
            at=self._clock.now(),
            kind=AuditKind.NODE_RENEWED,
            actor=caller.name,
            subject=str(grant.spiffe_id),
            correlation_id=correlation_id,
            facts={"serial": credential.serial, "supersedes": grant.supersedes},
        )

        def write(repos: Repositories) -> None:
            # Read again inside the transaction: a ban that came meanwhile must not be undone.
            node = repos.nodes.get(grant.spiffe_id)
            if node.banned:
                raise NodeBanned(detail=f"{grant.spiffe_id} was banned during its renewal")
            repos.nodes.upsert(
                replace(node, serial=credential.serial, expires_at=credential.not_after)
            )
            repos.audit.append(event)

        await self._store.write(write)
        await self._directory.sync()
        return credential


@dataclass(frozen=True, slots=True)
class ServerCertificate:
    """The broker's own SVID and its key, for the listeners."""

    credential: X509Credential
    key_pem: bytes

    @property
    def chain_pem(self) -> bytes:
        """The SVID and its intermediates, PEM, leaf first."""
        return b"".join(
            x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM)
            for der in self.credential.chain
        )

    @property
    def authority_id(self) -> str:
        """The authority that signed it."""
        leaf = x509.load_der_x509_certificate(self.credential.chain[0])
        authority = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
        return (authority.key_identifier or b"").hex()

    def due(self, now: datetime) -> bool:
        """Whether half of its life is over."""
        lifetime = self.credential.not_after - self.credential.not_before
        return now >= self.credential.not_before + lifetime / 2


class RotateServer:
    """Keeps the broker's own SVID fresh; its key is made here and never leaves.

    Args:
        is_revoked: whether the credential with that serial is revoked.
        is_trusted: whether what the authority with that id signed is still to be accepted.
    """

    def __init__(
        self,
        *,
        authorize: Authorize,
        issue: Issue,
        clock: Clock,
        is_revoked: Callable[[str], bool] = lambda _serial: False,
        is_trusted: Callable[[str], bool] = lambda _authority_id: True,
    ) -> None:
        self._authorize = authorize
        self._issue = issue
        self._clock = clock
        self._is_revoked = is_revoked
        self._is_trusted = is_trusted
        self.current: ServerCertificate | None = None

    async def run(self) -> bool:
        """Replace the SVID if it is due, or revoked, or its authority is.

        Raises:
            StoreUnavailable, SigningBackendUnavailable: the former one stays in use.
        """
        current = self.current
        if (
            current is not None
            and not current.due(self._clock.now())
            and not self._is_revoked(current.credential.serial)
            and self._is_trusted(current.authority_id)
        ):
            return False
        key = generate_private_key(KeyAlgorithm.EC_P256)
        csr = (
            x509.CertificateSigningRequestBuilder()
            .subject_name(x509.Name([]))
            .sign(key, signature_hash(KeyAlgorithm.EC_P256))
            .public_bytes(Encoding.DER)
        )
        grant = self._authorize.broker(current.credential.serial if current else "")
        credential = one(await self._issue.x509([X509Order(grant, csr)]))
        self.current = ServerCertificate(
            credential, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        )
        return True
