"""Obtains an identity and keeps it: issue, renew, watch; retried until closed.

- Three loops side by side: one obtains and renews, two watch the bundle and the revocations. Each
  backs off on its own; none ends but by `close` (or by a bug, which is logged). The node below
  them keeps itself: `identity_client.node`.
- What is valid stays in use whatever fails: only expiry and revocation take it away.
- No identity is handed out before the revocations were asked for, within a bounded time.
- The first identity chosen is kept for the life of the process, by SPIFFE ID: entries may be
  replaced under it, it never becomes somebody else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any, TypeVar

from spiffe import JwtSvid, SpiffeId
from spiffe.errors import PySpiffeError

from identity_client._wire.convert import AuthorizedEntry
from identity_client.clock import roll, utc_now
from identity_client.errors import (
    IdentityError,
    NotPermitted,
    ProtocolViolation,
    SourceClosed,
)
from identity_client.holder import IdentityHolder
from identity_client.jwt_cache import CachedToken, JwtKey
from identity_client.jwt_fetch import JwtFetcher
from identity_client.keys import KeyPair
from identity_client.link import REPLACED
from identity_client.node.keeper import NodeKeeper
from identity_client.node.values import IssuedJwt, JwtRequest, X509Request
from identity_client.renewal import renewal_due, retry_delay
from identity_client.revocation_feed import RevocationFollower
from identity_client.revocation_file import RevocationMemory
from identity_client.settings import SourceSettings

__all__ = ["Engine"]

_logger = logging.getLogger(__name__)

_T = TypeVar("_T")

# The wall clock may jump and machines sleep: due times are looked at again at least this often.
_INSIST_SECONDS = 1.0
_LONGEST_SLEEP = timedelta(seconds=60)
_SHORTEST_SLEEP = timedelta(milliseconds=100)
_WATCH_CAP = timedelta(seconds=5)
# A first identity waits so long for the revocations that come beside it.
_FEED_PATIENCE_SECONDS = 1.0


class Engine:
    """The moving part of a source. Belongs to one event loop; the holder is read by anybody."""

    def __init__(
        self,
        settings: SourceSettings,
        holder: IdentityHolder,
        *,
        dice: Callable[[], float] = roll,
    ) -> None:
        self._holder = holder
        self._dice = dice
        self._keeper = NodeKeeper(settings.node(), on_change=self._after_node_change, dice=dice)
        self._node_serial = ""
        self._node_error: IdentityError | None = None
        self._failing = False
        self._entry: AuthorizedEntry | None = None
        self._identity: SpiffeId | None = settings.spiffe_id
        self._svid_due: datetime | None = None
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._telling: set[asyncio.Task[None]] = set()
        self._jwts = JwtFetcher(holder, self._issue_jwt)
        self._follower = RevocationFollower(
            holder, on_own=self._after_own_denial, on_change=self._after_denials
        )
        self._memory = RevocationMemory(
            settings.state_dir, settings.trust_domain, holder.denied, self._follower
        )
        self.changed = asyncio.Condition()

    # --- life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Reads the trust anchors and the kept state, and starts the loops.

        Raises:
            SettingsInvalid: a file cannot be read or used.
        """
        await self._keeper.start()
        await self._memory.load()  # Before anybody can be accepted.
        loops = (self._keep_identity, self._keep_bundle, self._keep_revocations, self._memory.run)
        for loop in loops:
            task = asyncio.create_task(loop(), name=f"identity-{loop.__name__}")
            task.add_done_callback(_report_bug)
            self._tasks.append(task)

    async def close(self) -> None:
        """Ends the loops and the connections."""
        pending: set[asyncio.Task[Any]] = {*self._tasks, *self._jwts.flights}
        while pending:
            # More than once: a library that ends a call may swallow the first.
            for task in pending:
                task.cancel()
            _, pending = await asyncio.wait(pending, timeout=_INSIST_SECONDS)
        await self._memory.save()
        await self._keeper.close()
        self._holder.close()
        await self._tell()

    # --- the identity --------------------------------------------------------------------------

    async def _keep_identity(self) -> None:
        failures = 0
        while True:
            self._wake.clear()
            try:
                await self._advance()
            except IdentityError as error:
                failures += 1
                self._failing = True
                self._holder.record_failure(error)
                _logger.warning("obtaining the identity failed (%d): %s", failures, error)
                pause = self._retry_in(error, failures)
            else:
                failures = 0
                self._failing = False
                if self._keeper.status.last_error is None:
                    self._holder.record_success()
                pause = self._until_due()
            await self._tell()
            with suppress(TimeoutError):
                async with asyncio.timeout(pause.total_seconds()):
                    await self._wake.wait()

    async def _advance(self) -> None:
        self._holder.denied.prune(now=utc_now())
        if self._svid_due is None or utc_now() >= self._svid_due or self._holder.revoked:
            await self._keeper.attested()
            await self._issue()

    async def _issue(self) -> None:
        entry = await self._choose_entry()
        pair = KeyPair()
        (issued,) = await self._keeper.issue_x509([X509Request(entry.id, pair.csr())])
        svid = _issued(issued)
        material, bundle = await self._keeper.checked(svid.chain, pair, hint=svid.hint)
        if material.spiffe_id != entry.spiffe_id:
            raise ProtocolViolation("the broker issued another identity than was asked for")
        self._svid_due = renewal_due(
            received=material.received, not_after=material.not_after, dice=self._dice()
        )
        if not self._holder.status().ready:
            # Who may be accepted is known before there is an identity to accept anybody with.
            await self._follower.settled(_FEED_PATIENCE_SECONDS)
        snapshot = self._holder.publish(material, bundle)
        _logger.info(
            "identity issued: %s, serial %s, expires %s",
            snapshot.spiffe_id,
            snapshot.serial,
            snapshot.not_after.isoformat(),
        )

    async def _choose_entry(self) -> AuthorizedEntry:
        entries = await self._keeper.ask(lambda link: link.list_authorized(now=utc_now()))
        wanted = self._identity
        for entry in entries:
            if wanted is None or entry.spiffe_id == wanted:
                self._entry, self._identity = entry, entry.spiffe_id
                return entry
        node = self._keeper.status.node_id
        if wanted is None:
            raise NotPermitted(
                "this machine is not authorized for any identity",
                reason="ENTRY_NOT_AUTHORIZED",
                hint=f'register one below "{node}": idb entry create',
            )
        raise NotPermitted(
            f'this machine is not authorized for "{wanted}"',
            reason="ENTRY_NOT_AUTHORIZED",
            hint=f'idb explain "{wanted}" --node "{node}" says which rule did not hold',
        )

    def _retry_in(self, error: IdentityError, failures: int) -> timedelta:
        current = self._holder.peek()
        remaining = current.not_after - utc_now() if current and not self._holder.revoked else None
        return retry_delay(
            failures, dice=self._dice(), remaining=remaining, retry_after=error.retry_after
        )

    def _until_due(self) -> timedelta:
        longest = _LONGEST_SLEEP
        if self._svid_due is not None:
            longest = min(longest, self._svid_due - utc_now())
        return max(longest, _SHORTEST_SLEEP)

    # --- the node ------------------------------------------------------------------------------

    def _after_node_change(self) -> None:
        """What becomes of the node becomes of the source: its failures, its bundle."""
        status = self._keeper.status
        if status.last_error is not None and status.last_error is not self._node_error:
            self._holder.record_failure(status.last_error)
        elif status.last_error is None and self._node_error is not None and not self._failing:
            self._holder.record_success()
        self._node_error = status.last_error
        if status.serial and status.serial != self._node_serial:
            self._node_serial = status.serial
            self._wake.set()  # What was refused to the node as it was may be granted now.
        if self._keeper.bundle is not None:
            self._holder.publish_bundle(self._keeper.bundle)
        self._tell_soon()

    def _tell_soon(self) -> None:
        task = asyncio.get_running_loop().create_task(self._tell())
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    # --- what the broker tells -----------------------------------------------------------------

    async def _keep_bundle(self) -> None:
        async def follow() -> AsyncIterator[None]:
            async for message in self._keeper.watch(lambda link: link.watch_bundle()):
                self._keeper.learn_bundle(message)
                yield

        await self._follow("bundle", follow)

    async def _keep_revocations(self) -> None:
        async def follow() -> AsyncIterator[None]:
            stream = self._keeper.watch(lambda link: self._follower.stream(link.revocation_feed()))
            async for _ in stream:
                yield

        def spread() -> timedelta:
            self._holder.denied.note_silence()
            return self._follower.spread

        await self._follow("revocations", follow, spread)

    def _after_denials(self) -> None:
        self._memory.changed()

    def _after_own_denial(self) -> None:
        self._wake.set()
        self._tell_soon()

    async def _follow(
        self,
        what: str,
        follow: Callable[[], AsyncIterator[None]],
        spread: Callable[[], timedelta] = timedelta,
    ) -> None:
        failures = 0
        with suppress(SourceClosed):
            while True:
                await self._keeper.attested()
                moved = self._keeper.moved
                retry_after: float | None = None
                try:
                    async for _ in follow():
                        failures = 0
                    reason = "the stream ended"
                except IdentityError as error:
                    if error.reason == REPLACED:
                        continue
                    reason, retry_after = str(error), error.retry_after
                failures += 1
                _logger.info("watching %s stopped, will resume: %s", what, reason)
                delay = retry_delay(
                    failures, dice=self._dice(), retry_after=retry_after, cap=_WATCH_CAP
                )
                await self._keeper.pause(max(delay, spread() * self._dice()), moved)

    async def _tell(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    # --- JWT-SVIDs -----------------------------------------------------------------------------

    async def fetch_jwt_svid(self, audiences: Sequence[str]) -> JwtSvid:
        """A JWT-SVID for `audiences`: from the cache, or issued once however many ask.

        Raises:
            SourceError: there is no identity to issue it for.
            IdentityError: it could not be issued and no cached one is valid.
        """
        return await self._jwts.fetch(audiences)

    async def _issue_jwt(self, key: JwtKey) -> CachedToken:
        audiences = tuple(sorted(key[1]))
        entry = self._entry or await self._choose_entry()
        try:
            issued = await self._order_jwt(entry, audiences)
        except NotPermitted as error:
            # The entry may have been replaced by another with the same SPIFFE ID.
            renewed = await self._choose_entry()
            if error.reason != "ENTRY_NOT_AUTHORIZED" or renewed.id == entry.id:
                raise
            issued = await self._order_jwt(renewed, audiences)
        try:
            svid = JwtSvid.parse_insecure(issued.token, set(audiences))
        except PySpiffeError:
            # "from None": the parser's message could quote the token.
            raise ProtocolViolation("the broker sent a JWT-SVID that cannot be read") from None
        return CachedToken(
            svid=svid, jti=issued.jti, received=utc_now(), expires_at=issued.expires_at
        )

    async def _order_jwt(self, entry: AuthorizedEntry, audiences: tuple[str, ...]) -> IssuedJwt:
        (issued,) = await self._keeper.issue_jwt([JwtRequest(entry.id, audiences)])
        svid = _issued(issued)
        if svid.spiffe_id != str(entry.spiffe_id):
            raise ProtocolViolation("the broker issued another identity than was asked for")
        return svid


def _issued(outcome: _T | IdentityError) -> _T:
    if isinstance(outcome, IdentityError):
        raise outcome
    return outcome


def _report_bug(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (bug := task.exception()) is not None:
        _logger.error("the identity source stopped renewing; this is a bug", exc_info=bug)
