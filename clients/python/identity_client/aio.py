"""An identity for an asyncio program: obtained, renewed, checked and swapped in the background.

    async with IdentitySource.from_env() as source:
        await source.wait_ready(timeout=10)
        print(source.x509_svid.spiffe_id)

- Everything that only reads (`snapshot`, `status`, `x509_svid`, …) may be called from any thread
  and never blocks; everything awaited belongs to the loop that started the source.
- An identity that was revoked, withdrawn or has expired is not handed out: the call raises instead.
- Where it comes from makes no difference to who uses it: a broker that this process joins by
  itself, or the Workload API of a node agent.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from spiffe import JwtSvid, SpiffeId, TrustDomain, X509Bundle, X509Svid

from identity_client.attestation import CertificateAttestor, JoinTokenAttestor
from identity_client.credential import IdentitySnapshot
from identity_client.engine import Engine
from identity_client.environment import any_settings_from_env
from identity_client.errors import (
    IdentityNotReady,
    NotAuthenticated,
    RequestRejected,
    SettingsInvalid,
    SourceClosed,
    SourceError,
)
from identity_client.holder import IdentityHolder, SourceStatus, Subscriber, Unsubscribe
from identity_client.jwt_check import verify_with
from identity_client.revocation import DenySet
from identity_client.settings import SourceSettings
from identity_client.staleness import DEFAULT_STALENESS, StalenessPolicy
from identity_client.workload_api.engine import WorkloadApiEngine
from identity_client.workload_api.settings import WorkloadApiSettings

__all__ = ["IdentitySource"]

# Waiting does not help against these; until the first identity they end `wait_ready` at once.
_HOPELESS = (NotAuthenticated, RequestRejected, SettingsInvalid)


class _Engine(Protocol):
    """What fills a holder: `identity_client.engine` or `identity_client.workload_api.engine`."""

    changed: asyncio.Condition

    async def start(self) -> None: ...
    async def close(self) -> None: ...
    async def fetch_jwt_svid(self, audiences: Sequence[str]) -> JwtSvid: ...


class IdentitySource:
    """Obtains one SPIFFE identity and keeps it fresh."""

    def __init__(self, settings: SourceSettings | WorkloadApiSettings) -> None:
        self._settings = settings
        self._holder = IdentityHolder(settings.staleness)
        self._engine: _Engine | None = None

    @classmethod
    def from_workload_api(
        cls,
        endpoint: str | None = None,
        *,
        spiffe_id: str | SpiffeId | None = None,
        hint: str | None = None,
        staleness: StalenessPolicy = DEFAULT_STALENESS,
    ) -> Self:
        """A source that asks a SPIFFE Workload API, and needs no secret at all.

        Args:
            endpoint: `unix:///absolute/path` or `tcp://IP:PORT`; None takes it from
                SPIFFE_ENDPOINT_SOCKET.
            spiffe_id: who to be; the first identity that is offered when None.
            hint: take the identity with this hint.
            staleness: what it means for peers when nothing is heard about revocations.

        Raises:
            SettingsInvalid: a value cannot be used, or no endpoint is named.
        """
        return cls(
            WorkloadApiSettings.make(endpoint, spiffe_id=spiffe_id, hint=hint, staleness=staleness)
        )

    @classmethod
    def from_join_token(
        cls,
        *,
        address: str,
        bootstrap_address: str,
        trust_domain: str | TrustDomain,
        bundle_file: str | Path,
        token: str | None = None,
        token_file: str | Path | None = None,
        spiffe_id: str | SpiffeId | None = None,
        state_dir: str | Path | None = None,
        staleness: StalenessPolicy = DEFAULT_STALENESS,
    ) -> Self:
        """A source that joins with a single-use token.

        Args:
            address: host:port of the broker's mTLS listener.
            bootstrap_address: host:port of its bootstrap listener.
            trust_domain: which broker this must be.
            bundle_file: PEM file with the trust domain's CA certificates.
            token: the join token; or
            token_file: a file that holds it.
            spiffe_id: who to be; the first identity this machine is authorised for when None.
            state_dir: keep the node's key and SVID here, so that a restart needs no new token, and
                what is revoked, so that it is refused before the broker was reached.
            staleness: what it means for peers when nothing is heard about revocations.

        Raises:
            SettingsInvalid: a value cannot be used.
        """
        return cls(
            SourceSettings.make(
                JoinTokenAttestor(token, token_file=token_file),
                address=address,
                bootstrap_address=bootstrap_address,
                trust_domain=trust_domain,
                bundle_file=bundle_file,
                spiffe_id=spiffe_id,
                state_dir=state_dir,
                staleness=staleness,
            )
        )

    @classmethod
    def from_certificate(
        cls,
        *,
        address: str,
        bootstrap_address: str,
        trust_domain: str | TrustDomain,
        bundle_file: str | Path,
        cert_file: str | Path,
        key_file: str | Path,
        spiffe_id: str | SpiffeId | None = None,
        state_dir: str | Path | None = None,
        staleness: StalenessPolicy = DEFAULT_STALENESS,
    ) -> Self:
        """A source that joins with a certificate this machine already has (x509_pop).

        Args:
            address: host:port of the broker's mTLS listener.
            bootstrap_address: host:port of its bootstrap listener.
            trust_domain: which broker this must be.
            bundle_file: PEM file with the trust domain's CA certificates.
            cert_file: PEM file, leaf first; read again for every attestation.
            key_file: PEM file with the leaf's unencrypted private key.
            spiffe_id: who to be; the first identity this machine is authorised for when None.
            state_dir: keep the node's key and SVID here, and what is revoked.
            staleness: what it means for peers when nothing is heard about revocations.

        Raises:
            SettingsInvalid: a value cannot be used.
        """
        return cls(
            SourceSettings.make(
                CertificateAttestor(cert_file, key_file),
                address=address,
                bootstrap_address=bootstrap_address,
                trust_domain=trust_domain,
                bundle_file=bundle_file,
                spiffe_id=spiffe_id,
                state_dir=state_dir,
                staleness=staleness,
            )
        )

    @classmethod
    def from_env(cls) -> Self:
        """A source described by environment variables.

        `identity_client.settings.ENVIRONMENT` where any of them is set, else the Workload API of
        SPIFFE_ENDPOINT_SOCKET.

        Raises:
            SettingsInvalid: lists every variable that is missing or contradicts another.
        """
        return cls(any_settings_from_env(os.environ))

    @property
    def settings(self) -> SourceSettings | WorkloadApiSettings:
        """What the source was made with."""
        return self._settings

    def __repr__(self) -> str:
        status = self._holder.status()
        return f"IdentitySource({status.spiffe_id or 'no identity yet'}, {status.state})"

    # --- life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Starts obtaining the identity in the background; returns at once.

        Raises:
            SettingsInvalid: the bundle file or the state directory cannot be used.
        """
        if self._engine is None:
            engine = self._make_engine()
            await engine.start()
            self._engine = engine

    def _make_engine(self) -> _Engine:
        if isinstance(self._settings, WorkloadApiSettings):
            return WorkloadApiEngine(self._settings, self._holder)
        return Engine(self._settings, self._holder)

    async def close(self) -> None:
        """Ends renewal and connections; nothing is handed out any more."""
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.close()
        self._holder.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def wait_ready(self, timeout: float | None = None) -> IdentitySnapshot:
        """Waits until there is an identity to hand out, and returns it.

        Args:
            timeout: seconds; None waits for ever.

        Raises:
            IdentityNotReady: not within `timeout`; the message names the last failure.
            NotAuthenticated, RequestRejected: we were refused and waiting would not help.
        """
        await self.start()
        engine = self._running()
        try:
            async with asyncio.timeout(timeout), engine.changed:
                while True:
                    try:
                        return self._holder.snapshot()
                    except SourceClosed:
                        raise
                    except SourceError:
                        self._raise_if_hopeless()
                    await engine.changed.wait()
        except TimeoutError:
            error = self._holder.status().last_error
            why = f": {error.message}" if error else ""
            raise IdentityNotReady(
                f"no identity was issued within {timeout:g} s{why}",
                reason=error.reason if error else "",
                hint=error.hint if error else "",
            ) from error

    def _raise_if_hopeless(self) -> None:
        error = self._holder.status().last_error
        if isinstance(error, _HOPELESS) and self._holder.peek() is None:
            raise error

    def _running(self) -> _Engine:
        if self._engine is None:
            self._holder.snapshot()  # raises: closed, or never started
            raise SourceClosed
        return self._engine

    # --- what it hands out ---------------------------------------------------------------------

    def snapshot(self) -> IdentitySnapshot:
        """Key, chain and bundles of one moment.

        Raises:
            SourceError: IdentityNotReady, IdentityRevoked, IdentityWithdrawn, IdentityExpired or
                SourceClosed.
        """
        return self._holder.snapshot()

    @property
    def x509_svid(self) -> X509Svid:
        """Our X.509-SVID; raises as `snapshot` does."""
        return self._holder.snapshot().svid

    def x509_bundle(self, trust_domain: str | TrustDomain | None = None) -> X509Bundle:
        """A trust domain's X.509 bundle, our own by default.

        Raises:
            SourceError: as `snapshot`.
            ObjectNotFound: reason BUNDLE_NOT_FOUND.
        """
        snapshot = self._holder.snapshot()
        own = snapshot.bundle.trust_domain
        return snapshot.x509_bundle(own if trust_domain is None else TrustDomain(str(trust_domain)))

    @property
    def denied(self) -> DenySet:
        """What was revoked and has not expired yet."""
        return self._holder.denied

    @property
    def crls(self) -> tuple[bytes, ...]:
        """The certificate revocation lists of the Workload API, DER; empty from a broker."""
        return self._holder.crls

    def status(self) -> SourceStatus:
        """The source's health; never raises."""
        return self._holder.status()

    async def fetch_jwt_svid(self, audience: str | Sequence[str]) -> JwtSvid:
        """A JWT-SVID for one or more audiences, cached until half of its life.

        Raises:
            SourceError: there is no identity to issue it for.
            IdentityError: it could not be issued and no cached one is valid.
        """
        audiences = (audience,) if isinstance(audience, str) else tuple(audience)
        return await self._running().fetch_jwt_svid(audiences)

    def validate_jwt_svid(self, token: str, audience: str) -> JwtSvid:
        """Verifies a JWT-SVID somebody sent us: signature, expiry, audience, revocation.

        A broker and our own node agent say which tokens are revoked. A Workload API of others
        does not: a source of one cannot know here, and `confirm_jwt_svid` asks.

        Raises:
            PeerRejected: reason TOKEN_REJECTED; PEER_REVOKED for a token that is revoked by name,
                with its identity or with the key that signed it; REVOCATIONS_STALE.
            SourceError: there is no bundle to verify it with.
        """
        return verify_with(self._holder.snapshot(), token, audience, denied=self._holder.denied)

    async def confirm_jwt_svid(self, token: str, audience: str) -> JwtSvid:
        """As `validate_jwt_svid`, and asks the Workload API where the identity comes from one.

        Raises:
            PeerRejected, SourceError: as `validate_jwt_svid`.
            IdentityError: the Workload API does not answer.
        """
        svid = self.validate_jwt_svid(token, audience)
        engine = self._running()
        if isinstance(engine, WorkloadApiEngine):
            await engine.confirm_jwt_svid(svid, audience)
        return svid

    def subscribe(self, subscriber: Subscriber) -> Unsubscribe:
        """Calls `subscriber` with every new snapshot, on the loop's thread, until unsubscribed."""
        return self._holder.subscribe(subscriber)

    async def updates(self, *, crls: bool = False) -> AsyncIterator[IdentitySnapshot]:
        """The current snapshot and every later one; a slow reader skips to the newest.

        Args:
            crls: yield the snapshot again when nothing but `self.crls` has changed.
        """
        engine = self._running()
        seen: tuple[int, tuple[bytes, ...]] = (0, ())
        while self._engine is engine:
            current = self._holder.peek()
            if current is not None:
                lists = self._holder.crls if crls else ()
                if (current.revision, lists) != seen:
                    seen = current.revision, lists
                    yield current
                    continue
            async with engine.changed:
                await engine.changed.wait()
