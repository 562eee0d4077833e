"""Follows the broker: what it pushes goes into the mirror, and from there to whom it concerns.

- An update is acknowledged once everything that a caller could ask reflects it. Those who follow
  revocations are told first.
- What does not fit is not applied: the full state is asked for instead.
- A broken stream changes nothing but the health; a ban withdraws every identity at once.
- Entries end by the clock without being told.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from math import inf
from time import monotonic
from typing import Final, Protocol

from identity_broker.agent.denied import DeniedChange
from identity_broker.agent.identities import Identities
from identity_broker.agent.instances import is_over
from identity_broker.agent.mirror import Changed, EntryChange, Mirror, Mismatch, OutOfStep
from identity_broker.agent.relay import Relay
from identity_broker.agent.renewals import Renewals, all_entries
from identity_broker.agent.svids import SvidKey, Svids
from identity_broker.agent.tokens import Tokens
from identity_broker.domain.clock import Clock
from identity_broker.telemetry.logs import get_logger
from identity_broker.telemetry.metrics import AgentMetrics
from identity_client.errors import IdentityError
from identity_client.node.values import SyncEvent, SyncLost, SyncPosition, SyncUpdate

_log = get_logger("follow")

FRESH_SECONDS: Final = 20.0
"""How long after the broker's last word it still counts as heard: its heartbeat, every 15 s, and a
little more. A broken connection is noticed at once; a silent one, only by this."""

_BANNED: Final = "NODE_BANNED"
_TICK_SECONDS: Final = 1.0
_SWEEP_TICKS: Final = 30


class Followed(Protocol):
    """What pushes: `identity_client.node.NodeKeeper`."""

    def follow(self, position: Callable[[], SyncPosition]) -> AsyncIterator[SyncEvent]:
        """Yield updates for ever, and `SyncLost` when the stream breaks."""
        ...

    def resync(self) -> None:
        """Ask for the full state."""
        ...


@dataclass(slots=True)
class Hearing:
    """When the broker was heard.

    Attributes:
        connected: whether the stream stands.
        heard_at: the last time anything came; None before the first.
        heard_tick: the same by a clock that only goes forward.
        lost_tick: since when the stream is broken (or was never there).
        skew: how far the broker's clock was ahead of ours, in seconds.
        mismatch: why its last update was not applied; None when it was.
    """

    connected: bool = False
    heard_at: datetime | None = None
    heard_tick: float = -inf
    lost_tick: float = 0.0
    skew: float = 0.0
    last_error: IdentityError | None = None
    mismatch: Mismatch | None = None

    def is_fresh(self, tick: float) -> bool:
        """Whether the mirror is what the broker knows, as far as can be known."""
        in_step = self.connected and self.mismatch is None
        return in_step and tick - self.heard_tick <= FRESH_SECONDS


@dataclass(frozen=True, slots=True)
class Listeners:
    """Who is told what the mirror learned, in this order."""

    relay: Relay
    svids: Svids
    tokens: Tokens
    identities: Identities
    renewals: Renewals


class Follower:
    """The loop between the broker's stream and the agent's parts."""

    def __init__(
        self,
        *,
        source: Followed,
        mirror: Mirror,
        listeners: Listeners,
        clock: Clock,
        metrics: AgentMetrics,
    ) -> None:
        self._source = source
        self._mirror = mirror
        self._to = listeners
        self._clock = clock
        self._metrics = metrics
        self.hearing = Hearing(lost_tick=monotonic())

    async def run(self) -> None:
        """Follow until cancelled."""
        async for event in self._source.follow(lambda: self._mirror.position):
            if isinstance(event, SyncLost):
                self._lost(event.error)
            else:
                await self._hear(event)
            del event  # It may be large, and the next may be long in coming.

    async def keep_time(self) -> None:
        """End what has expired, until cancelled."""
        ticks = 0
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            ticks += 1
            self._spread(self._mirror.expire(self._clock.now()))
            if ticks % _SWEEP_TICKS == 0:
                self._to.tokens.sweep()
                self._to.svids.forgive(is_over)
            self._measure()

    def withdraw(self) -> None:
        """Hand out nothing any more: the node was banned."""
        _log.error("identities withdrawn", count=len(self._to.svids))
        gone = self._mirror.withdraw(self._clock.now())
        self._to.svids.clear()
        self._to.tokens.clear()
        self._to.identities.withdraw(withdrawn=True)
        self._to.identities.changed(gone)

    # --- inside -------------------------------------------------------------------------------

    def _lost(self, error: IdentityError) -> None:
        if self.hearing.connected:
            self.hearing.lost_tick = monotonic()
            _log.warning("broker lost", reason=error.reason, detail=error.message)
        self.hearing.connected = False
        self.hearing.last_error = error
        self._metrics.agent_connected.set(0)
        if error.reason == _BANNED:
            self.withdraw()

    async def _hear(self, update: SyncUpdate) -> None:
        try:
            changed = self._mirror.apply(update, now=self._clock.now(), tick=monotonic())
        except OutOfStep as exc:
            self._metrics.agent_syncs_total.labels(exc.mismatch.name.lower()).inc()
            _log.warning("update not applied", detail=str(exc), sequence=update.revision)
            self.hearing.mismatch = exc.mismatch
            self._source.resync()
            return
        back = not self.hearing.connected
        self._note(update)
        self._to.relay.told(
            changed.denied,
            concerned=bool(update.revocations or update.released_ids or update.epochs),
        )
        self._to.identities.withdraw(withdrawn=False)  # It would not talk to a banned node.
        self._spread(changed)
        if back:
            _log.info(
                "in step with the broker",
                sequence=update.revision,
                state="full" if update.full else "resumed",
            )
            self._to.renewals.kick()
        await update.ack()

    def _note(self, update: SyncUpdate) -> None:
        now = self._clock.now()
        self.hearing.connected = True
        self.hearing.heard_at = now
        self.hearing.heard_tick = monotonic()
        self.hearing.last_error = None
        self.hearing.mismatch = None
        self.hearing.skew = (update.sent_at - now).total_seconds()
        self._metrics.agent_connected.set(1)
        self._metrics.agent_revision.set(update.revision)
        self._metrics.agent_syncs_total.labels("applied").inc()

    def _spread(self, changed: Changed) -> None:
        """Tell everybody; the identities last, for they look at all the others."""
        if not changed:
            return
        svids, tokens, identities = self._to.svids, self._to.tokens, self._to.identities
        bundle = self._mirror.bundle
        if changed.bundle and bundle is not None:
            identities.svids_changed(svids.trust(bundle.x509_authorities))
            tokens.trust(key.key_id for key in bundle.jwt_keys)
        if changed.denied:
            self._deny(changed.denied)
        if changed.entries:
            tokens.follow(changed.entries)
            gone = svids.follow(changed.entries, all_entries(self._mirror, self._clock))
            identities.svids_changed(gone)
        identities.changed(changed)
        self._to.renewals.wake()

    def _deny(self, change: DeniedChange) -> None:
        """Drop the keys and tokens that are refused from now on, and allow what is again."""
        svids = self._to.svids
        if change.pardoned:
            svids.pardon(SvidKey(*each) for each in change.pardoned)
            self._to.identities.changed(Changed(entries=tuple(self._pardoned(change))))
        lost = svids.deny(SvidKey(*each) for each in change.denied)
        lost |= svids.revoke(each.id for each in change.revoked)
        if change.authorities:
            lost |= svids.refuse(change.authorities)
        if change.revoked or change.epochs or change.authorities:
            self._to.tokens.revoke()
        if lost:
            _log.warning("svids revoked", kind="x509", count=len(lost))
            self._to.identities.svids_changed(lost)

    def _pardoned(self, change: DeniedChange) -> Iterator[EntryChange]:
        """The entries that instances may have SVIDs of again: for them it is as if they changed."""
        now = self._clock.now()
        for each in change.pardoned:
            entry = self._mirror.entry(each.entry_id, now)
            if entry is not None:
                yield EntryChange(entry, entry)

    def _measure(self) -> None:
        now = self._clock.now()
        self._metrics.agent_entries.set(len(self._mirror))
        self._metrics.agent_svids.labels("x509").set(len(self._to.svids))
        self._metrics.agent_svids.labels("jwt").set(len(self._to.tokens))
        self._metrics.agent_overdue.set(self._to.svids.overdue(now))
        self._metrics.agent_revocations.set(len(self._mirror.denied))
        self._metrics.agent_followers.set(len(self._to.relay))
