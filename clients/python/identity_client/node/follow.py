"""The stream of changes, for ever: opened, read, broken, opened again where the node stands.

- An update is handed out whole and in order, or the stream counts as broken: a gap, a message that
  cannot be read, another trust domain's bundle and silence all end it.
- After what cannot be followed the next stream begins with the full state.
- Many nodes lose their stream together: each waits a random part of what the broker asked for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from datetime import timedelta
from typing import Final, Protocol

from identity_api.broker.v1 import types_pb2
from identity_client._wire.sync import UpdateReader
from identity_client.credential import BundleSnapshot
from identity_client.errors import (
    IdentityError,
    NotAuthenticated,
    NotPermitted,
    ProtocolViolation,
    RequestRejected,
    SourceClosed,
)
from identity_client.link import REPLACED, STREAM_CUT, BrokerLink, SyncCall
from identity_client.node.reports import Reports
from identity_client.node.settings import NodeSettings
from identity_client.node.values import SyncEvent, SyncLost, SyncPosition, SyncUpdate
from identity_client.renewal import MAX_DELAY, retry_delay

__all__ = ["Follower"]

_logger = logging.getLogger(__name__)

_CAP: Final = timedelta(seconds=5)
_MAX_SPREAD_MS: Final = 60_000
_MAX_VERSION_BYTES: Final = 64
_REFUSALS = (NotPermitted, NotAuthenticated, RequestRejected)


class _Keeper(Protocol):
    """What following needs of the node's keeper."""

    @property
    def serial(self) -> str: ...
    async def attested_or_banned(self, told: IdentityError | None) -> IdentityError | None: ...
    @property
    def moved(self) -> asyncio.Event: ...
    async def pause(self, delay: timedelta, moved: asyncio.Event) -> None: ...
    def heard(self) -> None: ...
    def heard_refusal(self, error: IdentityError, serial: str) -> None: ...
    def heard_denied(self, authorities: Sequence[str]) -> None: ...
    def learn_bundle(self, message: types_pb2.TrustBundle) -> BundleSnapshot: ...


class Follower:
    """Follows for one `NodeKeeper.follow`.

    Attributes:
        error: why there is no stream at the moment; None while one stands.
    """

    def __init__(
        self,
        keeper: _Keeper,
        settings: NodeSettings,
        link: BrokerLink,
        position: Callable[[], SyncPosition],
        reports: Reports,
        dice: Callable[[], float],
    ) -> None:
        self._keeper = keeper
        self._settings = settings
        self._link = link
        self._position = position
        self._reports = reports
        self._dice = dice
        self._call: SyncCall | None = None
        self._want_all = False
        self._resyncs = 0
        self._spread = timedelta(0)
        self.error: IdentityError | None = None

    async def events(self) -> AsyncGenerator[SyncEvent, None]:
        """Updates, and a SyncLost whenever the stream breaks; ends when the keeper is closed."""
        failures = 0
        lost: IdentityError | None = None
        with suppress(SourceClosed):
            while True:
                lost = await self._keeper.attested_or_banned(lost)
                if lost is not None:
                    yield SyncLost(lost)
                    continue
                await self._rest_before_all()
                moved = self._keeper.moved
                serial = self._keeper.serial
                try:
                    async with aclosing(self._updates()) as updates:
                        async for update in updates:
                            yield update
                            del update  # It may be large, and the next may be long in coming.
                            if not self._want_all:
                                failures = self._resyncs = 0
                except IdentityError as error:
                    lost = error
                if lost is None or lost.reason == REPLACED:
                    continue  # Asked for: another connection, or the full state.
                failures += 1
                self.error = lost
                self._keeper.heard_refusal(lost, serial)
                if isinstance(lost, ProtocolViolation):
                    self._want_all = True
                yield SyncLost(lost)
                await self._keeper.pause(self._delay(lost, failures), moved)

    def resync(self) -> None:
        """Asks for the full state, on a new stream."""
        self._want_all = True
        self._resyncs += 1
        self.stop()

    def stop(self) -> None:
        """Ends the present stream."""
        if self._call is not None:
            self._call.cancel()
            self._call = None

    async def _updates(self) -> AsyncGenerator[SyncUpdate, None]:
        call = self._call = self._link.sync()
        reporting: asyncio.Task[None] | None = None
        try:
            at = await self._greet(call)
            reporting = asyncio.create_task(self._reports.run(call), name="verifiers")
            reporting.add_done_callback(_report_bug)
            async for update in self._read(call, at):
                yield update
                del update
        except IdentityError:
            if self._call is call:  # else it was we who ended it
                raise
        finally:
            if reporting is not None:
                reporting.cancel()
            call.cancel()

    async def _greet(self, call: SyncCall) -> SyncPosition:
        """Says where the node stands; returns it."""
        at = SyncPosition() if self._want_all else self._position()
        await call.hello(
            resume_from=at.revision,
            entries_digest=at.digest if at.revision else 0,
            version=self._settings.version.encode()[:_MAX_VERSION_BYTES].decode(errors="ignore"),
        )
        return at

    async def _read(self, call: SyncCall, at: SyncPosition) -> AsyncGenerator[SyncUpdate, None]:
        reader = UpdateReader(self._settings.domain, at.revision, call.acknowledge)
        bundle: types_pb2.TrustBundle | None = None
        while self._call is call:
            message = await call.read(self._settings.longest_silence)
            update = reader.read(message)
            self._keeper.heard()
            self._spread = timedelta(
                milliseconds=max(0, min(message.reconnect_spread_ms, _MAX_SPREAD_MS))
            )
            if message.HasField("bundle"):
                bundle = message.bundle
            if update is None:
                continue
            if bundle is not None:
                self._keeper.learn_bundle(bundle)
                bundle = None
            if update.denied_authorities:
                self._keeper.heard_denied(update.denied_authorities)
            self.error = None
            if update.full:
                self._want_all = False
            yield update
            del message, update

    async def _rest_before_all(self) -> None:
        """A full state that did not help is not asked for again at once."""
        if self._want_all and self._resyncs > 1:
            delay = retry_delay(self._resyncs - 1, dice=self._dice(), cap=MAX_DELAY)
            await self._keeper.pause(delay, self._keeper.moved)

    def _delay(self, error: IdentityError, failures: int) -> timedelta:
        if failures == 1 and error.reason == STREAM_CUT:
            return timedelta(0)  # The broker had something to say.
        dice = self._dice()
        refused = isinstance(error, _REFUSALS)
        delay = retry_delay(
            failures,
            dice=dice,
            retry_after=error.retry_after,
            cap=MAX_DELAY if refused else _CAP,
        )
        if failures == 1:
            delay = max(delay, self._spread * dice)
        return delay


def _report_bug(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (bug := task.exception()) is not None:
        _logger.error("the broker is not told of verifiers any more; a bug", exc_info=bug)
