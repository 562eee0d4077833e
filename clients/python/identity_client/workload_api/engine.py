"""Follows a Workload API and keeps a holder filled with what it says; until closed.

- Every message is the full state and replaces the one before, whole (Workload API, sections 4.3
  and 4.4); one that cannot be used is discarded, and what was there stays.
- The first identity chosen is kept for the life of the process, by SPIFFE ID: it never becomes
  somebody else. When it is offered no more, or nothing is, it is not handed out any more
  (section 5.2.1). An agent that is merely away takes nothing from us before it expires.
- InvalidArgument and Unimplemented are never tried again; everything else is, with a backoff
  (SPIFFE Workload Endpoint, section 6).
- Revocations come in two ways: as lists with the X.509-SVIDs, from any Workload API, and by our own
  agent's feed, where there is one.
- Renewal is the agent's work: there is no timer here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from types import MappingProxyType
from typing import Any, TypeVar

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from spiffe import JwtBundle, JwtSvid, SpiffeId, TrustDomain

from identity_client._wire.workload import JWTBundlesResponse, X509SVIDResponse
from identity_client._wire.workload_values import (
    Authorities,
    OfferedState,
    OfferedSvid,
    authorities_from_der,
    jwt_bundles_from_wire,
    x509_state_from_wire,
)
from identity_client.clock import roll, utc_now
from identity_client.credential import (
    NO_FEDERATION,
    BundleSnapshot,
    Federated,
    WorkloadKey,
    X509Material,
)
from identity_client.errors import (
    IdentityError,
    NotPermitted,
    PeerRejected,
    ProtocolViolation,
    RequestRejected,
    SourceClosed,
)
from identity_client.holder import IdentityHolder
from identity_client.jwt_cache import CachedToken, JwtKey
from identity_client.jwt_fetch import JwtFetcher
from identity_client.renewal import retry_delay
from identity_client.revocation_feed import RevocationFollower
from identity_client.workload_api.link import WorkloadApiLink
from identity_client.workload_api.revocation_lists import ListReader
from identity_client.workload_api.settings import WorkloadApiSettings

__all__ = ["WorkloadApiEngine"]

_logger = logging.getLogger(__name__)

_INSIST_SECONDS = 1.0
# A local socket is asked again soon: an entry that was just made should be found.
_RETRY_CAP = timedelta(seconds=2)
# A first identity waits so long for the JWT bundles that come beside it.
_JWT_PATIENCE_SECONDS = 1.0
# And so long for the revocations.
_FEED_PATIENCE_SECONDS = 1.0
# More than this is read in a thread.
_LARGE_LISTS = 64 * 1024
_T = TypeVar("_T")


class WorkloadApiEngine:
    """The moving part of a source. Belongs to one event loop; the holder is read by anybody."""

    def __init__(
        self,
        settings: WorkloadApiSettings,
        holder: IdentityHolder,
        *,
        dice: Callable[[], float] = roll,
    ) -> None:
        self._settings = settings
        self._holder = holder
        self._dice = dice
        self._link: WorkloadApiLink | None = None
        self._identity: SpiffeId | None = settings.spiffe_id
        self._offer: OfferedSvid | None = None
        self._material: X509Material | None = None
        self._lists = ListReader()
        self._x509: Mapping[TrustDomain, Authorities] = MappingProxyType({})
        self._jwt: Mapping[TrustDomain, JwtBundle] = MappingProxyType({})
        # Set once the JWT bundles were heard of since this process was last refused.
        self._jwt_known = asyncio.Event()
        self._jwt_hurry = asyncio.Event()
        self._bundle: BundleSnapshot | None = None
        self._follower = RevocationFollower(holder, on_own=self._tell_soon)
        self._feed_hurry = asyncio.Event()
        self._feed_refused = False
        self._x509_lost = False
        self._telling: set[asyncio.Task[None]] = set()
        self._tokens = JwtFetcher(holder, self._fetch_token)
        self._tasks: list[asyncio.Task[None]] = []
        self.changed = asyncio.Condition()

    # --- life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Starts following; returns at once."""
        self._link = WorkloadApiLink(self._settings)
        for loop in (self._keep_x509, self._keep_jwt, self._keep_revocations):
            task = asyncio.create_task(loop(self._link), name=f"identity-{loop.__name__}")
            task.add_done_callback(_report_bug)
            self._tasks.append(task)

    async def close(self) -> None:
        """Ends the streams and the connection."""
        pending: set[asyncio.Task[Any]] = {*self._tasks, *self._tokens.flights}
        while pending:
            # More than once: a library that ends a call may swallow the first.
            for task in pending:
                task.cancel()
            _, pending = await asyncio.wait(pending, timeout=_INSIST_SECONDS)
        if self._link is not None:
            await self._link.close()
        self._holder.close()
        await self._tell()

    async def fetch_jwt_svid(self, audiences: Sequence[str]) -> JwtSvid:
        """A JWT-SVID for `audiences`; see `JwtFetcher.fetch`."""
        return await self._tokens.fetch(audiences)

    async def _fetch_token(self, key: JwtKey) -> CachedToken:
        return await self._linked().jwt_svid(key[0], sorted(key[1]))

    async def confirm_jwt_svid(self, svid: JwtSvid, audience: str) -> None:
        """Asks the Workload API about a token that was verified here.

        Raises:
            PeerRejected: it says that it does not hold: its issuer may have revoked it.
            IdentityError: it does not answer.
        """
        try:
            named = await self._linked().validate_jwt_svid(svid.token, audience)
        except RequestRejected as refusal:
            raise PeerRejected(
                f'the JWT-SVID of "{svid.spiffe_id}" is refused by the Workload API: '
                f"{refusal.message}",
                reason="TOKEN_REJECTED",
            ) from refusal
        if named != str(svid.spiffe_id):
            raise ProtocolViolation("the Workload API speaks of another token than it was asked")

    def _linked(self) -> WorkloadApiLink:
        if self._link is None:
            raise SourceClosed
        return self._link

    # --- the streams ---------------------------------------------------------------------------

    async def _keep_x509(self, link: WorkloadApiLink) -> None:
        async def take(message: X509SVIDResponse) -> None:
            try:
                await self._take_x509(message)
            except ProtocolViolation as violation:
                self._note_failure(violation)
            except NotPermitted as refusal:
                self._holder.withdraw(refusal)
                self._note_failure(refusal)
            else:
                self._holder.record_success()
            await self._tell()

        async def lost(error: IdentityError) -> None:
            self._holder.denied.lose_lists()
            self._x509_lost = True
            if isinstance(error, NotPermitted):
                self._holder.withdraw(error)
            self._note_failure(error)
            await self._tell()

        await self._follow(link.x509_svids, take, lost)

    async def _keep_jwt(self, link: WorkloadApiLink) -> None:
        async def take(message: JWTBundlesResponse) -> None:
            try:
                self._jwt = jwt_bundles_from_wire(message)
            except ProtocolViolation as violation:
                _logger.warning("a message was discarded: %s", violation)
            self._jwt_hurry.clear()
            self._jwt_known.set()
            await self._jwt_changed()

        async def lost(error: IdentityError) -> None:
            if isinstance(error, NotPermitted):
                self._jwt = MappingProxyType({})
                self._jwt_known.clear()
            else:
                self._jwt_known.set()
            _logger.info("following the JWT bundles stopped: %s", error)
            await self._jwt_changed()

        await self._follow(link.jwt_bundles, take, lost, self._jwt_hurry)

    async def _keep_revocations(self, link: WorkloadApiLink) -> None:
        async def take(_: None) -> None:
            return

        async def lost(error: IdentityError) -> None:
            self._holder.denied.note_silence()
            self._feed_refused = isinstance(error, NotPermitted)
            if not self._feed_refused:
                self._follower.give_up(absent=error.reason == "METHOD_UNKNOWN")
            _logger.info("following the revocations stopped: %s", error)

        while True:
            await self._follow(
                lambda: self._follower.stream(link.revocation_feed()),
                take,
                lost,
                self._feed_hurry,
                spread=lambda: self._follower.spread,
            )
            # This endpoint has no feed, and lists are all there is. Another endpoint may answer
            # there after a reconnection.
            await self._feed_hurry.wait()
            self._feed_hurry.clear()

    def _tell_soon(self) -> None:
        task = asyncio.get_running_loop().create_task(self._tell())
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _follow(
        self,
        messages: Callable[[], AsyncIterator[_T]],
        take: Callable[[_T], Awaitable[None]],
        lost: Callable[[IdentityError], Awaitable[None]],
        hurry: asyncio.Event | None = None,
        spread: Callable[[], timedelta] | None = None,
    ) -> None:
        hurry = hurry or asyncio.Event()
        failures = 0
        while True:
            try:
                async for message in messages():
                    await take(message)
                    failures = 0
            except IdentityError as error:
                failures += 1
                await lost(error)
                if isinstance(error, RequestRejected):
                    if spread is None:  # the feed of revocations is ours alone
                        _logger.error("the Workload API will not be asked again: %s", error)  # noqa: TRY400 - the answer, not a fault of ours
                    return
                delay = retry_delay(
                    failures,
                    dice=self._dice(),
                    retry_after=error.retry_after,
                    cap=_RETRY_CAP,
                )
                if spread is not None:
                    delay = max(delay, spread() * self._dice())
                with suppress(TimeoutError):
                    async with asyncio.timeout(delay.total_seconds()):
                        await hurry.wait()
                        hurry.clear()

    # --- what they say -------------------------------------------------------------------------

    async def _take_x509(self, message: X509SVIDResponse) -> None:
        state = x509_state_from_wire(message)
        chosen = self._choose(state)
        own = chosen.spiffe_id.trust_domain
        x509 = {**state.federated, own: authorities_from_der(chosen.bundle)}
        # Nothing is kept before everything is known to be usable.
        material = self._checked(chosen, x509[own])
        if self._x509_lost or self._feed_refused:
            self._x509_lost = self._feed_refused = False
            self._follower.expect()
            self._feed_hurry.set()
        if not self._jwt_known.is_set():
            # Both were refused until now; whoever has an identity is told the JWT bundles too.
            self._jwt_hurry.set()
            with suppress(TimeoutError):
                async with asyncio.timeout(_JWT_PATIENCE_SECONDS):
                    await self._jwt_known.wait()
        await self._take_lists(state, material, x509[own])
        self._identity, self._offer, self._x509 = chosen.spiffe_id, chosen, x509
        renewed = material is not self._material or self._holder.withdrawn
        self._material = material
        bundle, federated = self._bundles(own)
        if not renewed:
            self._holder.publish_bundle(bundle, federated)
            return
        if not self._holder.status().ready:
            # Who may be accepted is known before there is an identity to accept anybody with.
            await self._follower.settled(_FEED_PATIENCE_SECONDS)
        snapshot = self._holder.publish(material, bundle, federated)
        _logger.info(
            "identity received: %s, serial %s, expires %s",
            snapshot.spiffe_id,
            snapshot.serial,
            snapshot.not_after.isoformat(),
        )

    def _choose(self, state: OfferedState) -> OfferedSvid:
        wanted, hint = self._identity, self._settings.hint
        offered = [one for one in state.svids if wanted is None or one.spiffe_id == wanted]
        hinted = [one for one in offered if hint is None or one.hint == hint]
        if hinted:
            return hinted[0]
        if offered and self._holder.peek() is not None:
            return offered[0]  # The same identity; what its operator calls it has changed.
        asked = f'"{wanted}"' if wanted is not None else "an identity"
        asked += f' with the hint "{hint}"' if hint is not None else ""
        raise NotPermitted(
            f"the Workload API does not offer {asked} to this process",
            reason="NO_IDENTITY",
            hint=f"it offers {', '.join(str(one.spiffe_id) for one in state.svids[:5])}",
        )

    def _checked(self, chosen: OfferedSvid, authorities: Authorities) -> X509Material:
        if self._material is not None and chosen == self._offer:
            return self._material
        own = chosen.spiffe_id.trust_domain
        material = X509Material.from_chain(
            chosen.chain,
            private_key=_private_key(chosen.key),
            bundle=BundleSnapshot(own, authorities, JwtBundle(own, {}), sequence=0),
            received=utc_now(),
            hint=chosen.hint,
        )
        if material.spiffe_id != chosen.spiffe_id:
            raise ProtocolViolation("an X.509-SVID names somebody else than its message")
        return material

    async def _take_lists(
        self, state: OfferedState, material: X509Material, authorities: Authorities
    ) -> None:
        self._lists.learn((*authorities, *material.svid.cert_chain[1:]))
        if sum(map(len, state.crls)) > _LARGE_LISTS:
            lists = await asyncio.to_thread(self._lists.read, state.crls)
        else:
            lists = self._lists.read(state.crls)
        self._holder.take_lists(lists, state.crls)

    async def _jwt_changed(self) -> None:
        current = self._holder.peek()
        if current is not None:
            self._holder.publish_bundle(*self._bundles(current.bundle.trust_domain))
            await self._tell()

    def _bundles(self, own: TrustDomain) -> tuple[BundleSnapshot, Federated]:
        sequence = self._bundle.sequence + 1 if self._bundle is not None else 1
        known = {
            name: BundleSnapshot(
                trust_domain=name,
                x509_authorities=self._x509.get(name, ()),
                jwt_bundle=self._jwt.get(name) or JwtBundle(name, {}),
                sequence=sequence,
            )
            for name in {*self._x509, *self._jwt}
        }
        bundle = known.pop(own)
        if self._bundle is None or not self._bundle.same_keys(bundle):
            self._bundle = bundle
        return self._bundle, MappingProxyType(known) if known else NO_FEDERATION

    def _note_failure(self, error: IdentityError) -> None:
        self._holder.record_failure(error)
        _logger.warning("the Workload API gives no identity: %s", error)

    async def _tell(self) -> None:
        async with self.changed:
            self.changed.notify_all()


def _private_key(der: bytes) -> WorkloadKey:
    try:
        key = serialization.load_der_private_key(der, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # "from None": the parser's message could quote the key.
        raise ProtocolViolation("the Workload API sent a key that cannot be read") from None
    if not isinstance(key, WorkloadKey):
        raise ProtocolViolation("the Workload API sent a key that no SVID may have")
    return key


def _report_bug(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (bug := task.exception()) is not None:
        _logger.error("the identity source stopped following; this is a bug", exc_info=bug)
