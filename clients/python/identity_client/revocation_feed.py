"""Follows the broker's feed of revocations, from the broker itself or from a node agent.

- What a message denies is denied at once, whatever else is wrong with it. What it takes back is
  taken back only by a message that follows on what was applied before: by name, or as a full
  state once it is complete.
- A message that does not follow (a gap, a replay, a step back, something that cannot be read) ends
  the stream; what is denied stays, and the next stream begins with everything.
- A message is acknowledged when it is enforced: after connections of the denied were closed.
- Silence for three heartbeats ends the stream.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Final

from identity_client._wire.revocation_feed import FeedCall, FeedMessage
from identity_client.clock import utc_now
from identity_client.errors import ProtocolViolation
from identity_client.holder import IdentityHolder
from identity_client.revocation import DenySet, id_key
from identity_client.staleness import uptime

__all__ = ["FEED_BROKEN", "FEED_GAP", "FeedReader", "RevocationFollower", "verifier_name"]

_logger = logging.getLogger(__name__)

FEED_GAP: Final = "FEED_GAP"
FEED_BROKEN: Final = "FEED_BROKEN"

# Far beyond any trust domain: a stream that does not end must not fill the memory.
_MOST_DENIED: Final = 4_000_000
_FIRST_MESSAGE_SECONDS: Final = 15.0
_HEARTBEAT_MS: Final = (1_000, 60_000)
_HEARTBEATS_MISSED: Final = 3
_MOST_SPREAD_MS: Final = 60_000
# Who breaks the rules again and again is asked more and more seldom.
_FORGIVEN_AFTER_SECONDS: Final = 60.0
_LONGEST_PENANCE_SECONDS: Final = 30.0
_MOST_NAME_BYTES: Final = 64
_UNFIT = re.compile(r"[^A-Za-z0-9._:-]", re.ASCII)


@dataclass(frozen=True, slots=True)
class Applied:
    """What one message did.

    Attributes:
        denied: somebody is denied that was not.
        released: somebody may be denied no more.
        complete: the state as of the message's sequence is known.
    """

    denied: bool
    released: bool
    complete: bool


class FeedReader:
    """The messages of one stream, applied to a deny set in the order they come.

    Args:
        denied: what they change.
        at: the sequence the stream was opened at; 0 where it is to begin with everything.
    """

    def __init__(self, denied: DenySet, at: int) -> None:
        self._denied = denied
        self._at = at or None
        self._last = at
        self._joining = False
        self._full = False
        self._released: dict[bytes | str, str] = {}
        self._authorities: tuple[str, ...] | None = None

    def take(self, message: FeedMessage, *, now: datetime) -> Applied:
        """Applies the next message.

        Raises:
            ProtocolViolation: reason FEED_GAP or FEED_BROKEN; what it denies is denied all the
                same, and nothing is taken back.
        """
        wrong = self._wrong_with(message)
        if wrong is None and not self._joining:
            self._begin(full=message.full)
        elif wrong is None and message.full and not self._full:
            self._begin(full=True)
        if wrong is None and self._full:
            self._denied.release(message.released)
        news = self._deny(message, now)
        if len(self._denied) > _MOST_DENIED:
            wrong = (FEED_BROKEN, "the feed does not come to an end")
        if wrong is not None:
            self._denied.abandon_full()
            raise ProtocolViolation(wrong[1], reason=wrong[0])
        self._last = message.sequence
        if not self._full:
            self._note_released(message)
        if not message.complete:
            return Applied(news, released=False, complete=False)
        released = self._finish()
        self._at = message.sequence
        return Applied(news, released=released, complete=True)

    def _wrong_with(self, message: FeedMessage) -> tuple[str, str] | None:
        if message.flaw:
            return FEED_BROKEN, f"the feed sent {message.flaw}"
        if message.sequence < self._last:
            return FEED_GAP, f"the feed went back from {self._last} to {message.sequence}"
        if self._joining or message.full:
            return None
        if message.previous != self._at:
            stands = "nothing" if self._at is None else self._at
            return (
                FEED_GAP,
                f"the feed goes on at {message.previous}, and this verifier stands at {stands}",
            )
        return None

    def _begin(self, *, full: bool) -> None:
        self._joining, self._full = True, full
        self._released, self._authorities = {}, None
        if full:
            self._denied.begin_full()

    def _deny(self, message: FeedMessage, now: datetime) -> bool:
        news = bool(self._denied.add(message.revoked, now=now))
        for epoch in message.epochs:
            news |= self._denied.raise_epoch(epoch)
        if message.authorities is not None:
            news |= self._denied.deny_authorities(message.authorities, only=False)
        return news

    def _note_released(self, message: FeedMessage) -> None:
        for one in message.released:
            self._released[id_key(one)] = one
        for denied in message.revoked:
            self._released.pop(id_key(denied.id), None)
        if message.authorities is not None:
            self._authorities = message.authorities

    def _finish(self) -> bool:
        self._joining = False
        if self._full:
            self._denied.finish_full()
            return True
        released = self._denied.release(self._released.values())
        if self._authorities is not None:
            self._denied.deny_authorities(self._authorities)
        return released


class RevocationFollower:
    """Keeps one holder's deny set what the feed says. Belongs to one event loop.

    Args:
        holder: whose deny set, and whose own identity may be among the denied.
        on_change: called after every message that denied or released somebody.
        on_own: called when our own identity was denied.

    Attributes:
        sequence: where this verifier stands; 0 for nowhere. Kept over streams and restarts.
        spread: how long, at most, to wait before the next stream, so that not all come at once.
    """

    def __init__(
        self,
        holder: IdentityHolder,
        *,
        on_own: Callable[[], None],
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._holder = holder
        self._denied = holder.denied
        self._on_own = on_own
        self._on_change = on_change
        self.sequence = 0
        self.spread = timedelta(0)
        self._settled = asyncio.Event()
        self._violations = 0
        self._violated_at = 0.0

    async def stream(self, call: FeedCall) -> AsyncIterator[None]:
        """One stream, until it ends; yields after every message.

        Raises:
            IdentityError: why it ended.
        """
        reader = FeedReader(self._denied, self.sequence)
        within = _FIRST_MESSAGE_SECONDS
        try:
            await call.hello(resume_from=self.sequence, name=verifier_name(), version=_version())
            while True:
                message = await call.read(within)
                self._denied.find_feed()
                self._apply(reader, message)
                await call.acknowledge(message.sequence)
                within = _HEARTBEATS_MISSED * _clamped(message.heartbeat_ms, *_HEARTBEAT_MS) / 1000
                self.spread = timedelta(
                    milliseconds=_clamped(message.spread_ms, 0, _MOST_SPREAD_MS)
                )
                yield
        finally:
            self._denied.feed_synced = False
            self._denied.abandon_full()
            self._settled.clear()
            call.cancel()

    async def settled(self, seconds: float) -> None:
        """Returns once the feed's whole state is known, or will not be; or after `seconds`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._settled.wait()

    def give_up(self, *, absent: bool = False) -> None:
        """There is no feed, or none for now: nobody waits for it.

        Args:
            absent: whether whoever was asked knows of no feed.
        """
        if absent:
            self._denied.lack_feed(now=utc_now())
        self._settled.set()

    def expect(self) -> None:
        """There may be a feed (again)."""
        if not self._denied.feed_synced:
            self._settled.clear()

    def _apply(self, reader: FeedReader, message: FeedMessage) -> None:
        now = utc_now()
        known = len(self._denied)
        try:
            applied = reader.take(message, now=now)
        except ProtocolViolation as violation:
            self._denied.feed_synced = False
            self.sequence = 0
            if len(self._denied) != known:
                self._enforce()
            violation.retry_after = self._penance()
            _logger.warning("what is denied stays denied, and is asked for again: %s", violation)
            raise
        if applied.denied or applied.released:
            self._enforce(denied=applied.denied)
        if applied.complete:
            # A part of a state is no news of what is not in it: an agent that has lost its broker
            # sends nothing that is complete.
            self._denied.hear(now=now)
            self.sequence = message.sequence
            self._denied.feed_synced = True
            self._settled.set()

    def _enforce(self, *, denied: bool = True) -> None:
        if self._holder.denials_changed(somebody_denied=denied):
            self._on_own()
        self._on_change()

    def _penance(self) -> float | None:
        now = uptime()
        if now - self._violated_at > _FORGIVEN_AFTER_SECONDS:
            self._violations = 0
        self._violations, self._violated_at = self._violations + 1, now
        if self._violations == 1:
            return None
        return min(0.5 * 2.0 ** min(self._violations - 2, 10), _LONGEST_PENANCE_SECONDS)


def verifier_name() -> str:
    """What an operator should call this process: host, program and process id."""
    program = Path(sys.argv[0]).name or "python"
    end = f":{program[:24]}:{os.getpid()}"
    name = socket.gethostname()[: _MOST_NAME_BYTES - len(end)] + end
    return _UNFIT.sub("-", name)[:_MOST_NAME_BYTES]


def _version() -> str:
    try:
        return metadata.version("identity-broker-client")
    except metadata.PackageNotFoundError:
        return ""


def _clamped(value: int, least: int, most: int) -> int:
    return min(max(value, least), most)
