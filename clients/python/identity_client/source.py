"""An identity for a threaded program: the asyncio source on one background thread.

    with IdentitySource.from_env() as source:
        source.wait_ready(timeout=10)
        print(source.x509_svid.spiffe_id)

- There is no second implementation: every call goes to `identity_client.aio.IdentitySource`.
- All sources of a process share one event-loop thread, which ends with the last of them.
- Reading (`snapshot`, `status`, `x509_svid`) is lock-free and does not touch that thread.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from spiffe import JwtSvid, SpiffeId, TrustDomain, X509Bundle, X509Svid

from identity_client import aio
from identity_client.credential import IdentitySnapshot
from identity_client.errors import SourceClosed
from identity_client.holder import SourceStatus, Subscriber, Unsubscribe
from identity_client.revocation import DenySet
from identity_client.settings import SourceSettings
from identity_client.staleness import DEFAULT_STALENESS, StalenessPolicy
from identity_client.workload_api.settings import WorkloadApiSettings

__all__ = ["IdentitySource"]

_T = TypeVar("_T")


class IdentitySource:
    """Obtains one SPIFFE identity and keeps it fresh."""

    def __init__(self, settings: SourceSettings | WorkloadApiSettings) -> None:
        self._source = aio.IdentitySource(settings)
        self._thread: _LoopThread | None = None
        self._lock = threading.Lock()

    @classmethod
    def from_workload_api(
        cls,
        endpoint: str | None = None,
        *,
        spiffe_id: str | SpiffeId | None = None,
        hint: str | None = None,
        staleness: StalenessPolicy = DEFAULT_STALENESS,
    ) -> Self:
        """A source that asks a Workload API; see `aio.IdentitySource.from_workload_api`."""
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
        """A source that joins with a single-use token; see `aio.IdentitySource.from_join_token`."""
        return cls(
            aio.IdentitySource.from_join_token(
                address=address,
                bootstrap_address=bootstrap_address,
                trust_domain=trust_domain,
                bundle_file=bundle_file,
                token=token,
                token_file=token_file,
                spiffe_id=spiffe_id,
                state_dir=state_dir,
                staleness=staleness,
            ).settings
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
        """A source that joins with a certificate; see `aio.IdentitySource.from_certificate`."""
        return cls(
            aio.IdentitySource.from_certificate(
                address=address,
                bootstrap_address=bootstrap_address,
                trust_domain=trust_domain,
                bundle_file=bundle_file,
                cert_file=cert_file,
                key_file=key_file,
                spiffe_id=spiffe_id,
                state_dir=state_dir,
                staleness=staleness,
            ).settings
        )

    @classmethod
    def from_env(cls) -> Self:
        """A source described by environment variables; see `aio.IdentitySource.from_env`."""
        return cls(aio.IdentitySource.from_env().settings)

    def __repr__(self) -> str:
        return repr(self._source)

    # --- life ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts obtaining the identity in the background; returns at once.

        Raises:
            SettingsInvalid: the bundle file or the state directory cannot be used.
        """
        with self._lock:
            if self._thread is not None:
                return
            thread = _LoopThread.join_shared()
            try:
                thread.run(self._source.start())
            except BaseException:
                thread.leave()
                raise
            self._thread = thread
            _open_sources.add(self)

    def close(self) -> None:
        """Ends renewal and connections; nothing is handed out any more."""
        with self._lock:
            thread, self._thread = self._thread, None
            _open_sources.discard(self)
            if thread is not None and not thread.forked:
                thread.run(self._source.close())
                thread.leave()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def wait_ready(self, timeout: float | None = None) -> IdentitySnapshot:
        """Waits until there is an identity, and returns it; see `aio.IdentitySource.wait_ready`."""
        self.start()
        return self._run(self._source.wait_ready(timeout))

    # --- what it hands out ---------------------------------------------------------------------

    def snapshot(self) -> IdentitySnapshot:
        """Key, chain and bundles of one moment.

        Raises:
            SourceError: IdentityNotReady, IdentityRevoked, IdentityWithdrawn, IdentityExpired or
                SourceClosed.
        """
        return self._source.snapshot()

    @property
    def x509_svid(self) -> X509Svid:
        """Our X.509-SVID; raises as `snapshot` does."""
        return self._source.x509_svid

    def x509_bundle(self, trust_domain: str | TrustDomain | None = None) -> X509Bundle:
        """A trust domain's X.509 bundle, our own by default.

        Raises:
            SourceError: as `snapshot`.
            ObjectNotFound: reason BUNDLE_NOT_FOUND.
        """
        return self._source.x509_bundle(trust_domain)

    @property
    def denied(self) -> DenySet:
        """What was revoked and has not expired yet."""
        return self._source.denied

    @property
    def crls(self) -> tuple[bytes, ...]:
        """The certificate revocation lists of the Workload API, DER; empty from a broker."""
        return self._source.crls

    def status(self) -> SourceStatus:
        """The source's health; never raises."""
        return self._source.status()

    def fetch_jwt_svid(self, audience: str | Sequence[str]) -> JwtSvid:
        """A JWT-SVID for one or more audiences, cached until half of its life.

        Raises:
            SourceError: there is no identity to issue it for.
            IdentityError: it could not be issued and no cached one is valid.
        """
        return self._run(self._source.fetch_jwt_svid(audience))

    def validate_jwt_svid(self, token: str, audience: str) -> JwtSvid:
        """Verifies a JWT-SVID somebody sent us: signature, expiry, audience, revocation.

        A broker and our own node agent say which tokens are revoked. A Workload API of others
        does not: a source of one cannot know here, and `confirm_jwt_svid` asks.

        Raises:
            PeerRejected: reason TOKEN_REJECTED; PEER_REVOKED for a token that is revoked by name,
                with its identity or with the key that signed it; REVOCATIONS_STALE.
            SourceError: there is no bundle to verify it with.
        """
        return self._source.validate_jwt_svid(token, audience)

    def confirm_jwt_svid(self, token: str, audience: str) -> JwtSvid:
        """As `validate_jwt_svid`, and asks the Workload API where the identity comes from one.

        Raises:
            PeerRejected, SourceError: as `validate_jwt_svid`.
            IdentityError: the Workload API does not answer.
        """
        return self._run(self._source.confirm_jwt_svid(token, audience))

    def subscribe(self, subscriber: Subscriber) -> Unsubscribe:
        """Calls `subscriber` with every new snapshot, on the background thread.

        It must return quickly and may not call blocking methods of the source. Call the result
        to end the subscription.
        """
        return self._source.subscribe(subscriber)

    def updates(self, *, crls: bool = False) -> Iterator[IdentitySnapshot]:
        """The current snapshot and every later one; a slow reader skips to the newest.

        Blocks between them; ends when the source is closed.

        Args:
            crls: yield the snapshot again when nothing but `self.crls` has changed.
        """
        stream = self._source.updates(crls=crls)

        async def following() -> IdentitySnapshot | None:
            return await anext(stream, None)

        with suppress(SourceClosed):
            while (snapshot := self._run(following())) is not None:
                yield snapshot

    def _run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        thread = self._thread
        if thread is None or thread.forked:
            coroutine.close()
            self._source.snapshot()  # raises: closed, forked, or never started
            raise SourceClosed
        return thread.run(coroutine)


class _LoopThread:
    """The event-loop thread all sources of this process share."""

    _shared: _LoopThread | None = None
    _guard = threading.Lock()

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self.users = 0
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._serve, name="identity-source", daemon=True)
        self._thread.start()

    @classmethod
    def join_shared(cls) -> _LoopThread:
        """The running thread, with one more user."""
        with cls._guard:
            if cls._shared is None or cls._shared.forked:
                cls._shared = _LoopThread()
            cls._shared.users += 1
            return cls._shared

    @property
    def forked(self) -> bool:
        """Whether this is the copy in a forked child, where no thread runs."""
        return os.getpid() != self._pid

    def leave(self) -> None:
        """One user less; the last one ends the thread."""
        with _LoopThread._guard:
            self.users -= 1
            if self.users > 0:
                return
            if _LoopThread._shared is self:
                _LoopThread._shared = None
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Runs `coroutine` on the thread and returns its result."""
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("a subscriber may not call blocking methods of its source")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()


_open_sources: set[IdentitySource] = set()


@atexit.register
def _close_all() -> None:
    # A daemon thread inside gRPC while the interpreter ends is a crash waiting to happen.
    for source in list(_open_sources):
        source.close()
